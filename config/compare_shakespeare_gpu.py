# Folds beside nanoGPT's own Shakespeare setting, for one GPU:
#   python compare.py config/compare_shakespeare_gpu.py --jobs=1
# That baseline has 6 layers, 384 channels, a window of 256, dropout 0.2 and 5000 updates of 64
# sequences (nanoGPT publishes 1.4697 as its best validation loss). Here it makes 5001, a number of
# tokens that segments of 12 fit into too.
seeds = [1337, 1338, 1339]
tokens = 5001 * 64 * 256  # that each of the runs is trained on
common = dict(dataset='shakespeare', model_type='fold', n_local=3, n_global=3, n_layer=6, n_head=6,
              n_embd=384, dropout=0.2, segment_size=12, block_size=256, batch_size=64,
              learning_rate=1e-3, min_lr=1e-4, beta2=0.99)
_front = dict(n_local=5, n_global=1, local='sliding', position='rotary', block_size=192)
runs = {
    # 6668 updates of 12,288 tokens where block_size is 192; the others make 5001 of 16,384
    'fold, segments of 12': dict(block_size=192),
    'fold, segments of 32': dict(segment_size=32),
    'fold, segments of 64': dict(segment_size=64),
    'GPT, window 256': dict(model_type='gpt'),
    'fold of the front page': _front,
    'fold without recurrence': {**_front, 'past': 'local'},
    'sliding window of 12': dict(model_type='gpt', window=12, position='rotary', block_size=192),
}
# settings of probe.py
probe = dict(histories='0,12,24,36,48,72,96,144,192,264,384', targets=2000, words=200)
prompts = ['ROMEO:\n', 'First Citizen:\nWe are ']
new_tokens = 200          # that each model writes after each prompt
