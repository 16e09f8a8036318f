# The fold and its controls on tiny Shakespeare in GPT-2's byte pairs.
#   python prepare.py shakespeare_bpe --file=PATH --tokenizer=gpt2   # PATH: the text
#   python compare.py config/compare_bpe.py
# Most of the time goes into the 50,257 columns of the output matrix: an hour on one CPU core.
seeds = [1337]
tokens = 614_400  # twice the training split

common = dict(dataset='shakespeare_bpe', model_type='fold', n_local=1, n_global=3, n_layer=4,
              n_head=4, n_embd=128, segment_size=12, block_size=96, batch_size=8,
              learning_rate=4e-3, min_lr=1e-4)
runs = {
    'fold': dict(),
    'GPT, window 96': dict(model_type='gpt'),
    # windows are cut from stretches of 96 tokens: every run sees the same text in the same order
    'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=64, stretch=96),
    'fold, gated carry': dict(carry='gated'),
    'GPT, window 24': dict(model_type='gpt', block_size=24, batch_size=32, stretch=96),
    'fold, carry dropped': dict(past='none'),
}
probe = dict(histories='0,12,24,36,48,72,84', targets=2500, words=1000,
             bins='24,48,72,150')
prompts = ['ROMEO:\n', 'First Citizen:\nWe are ']
new_tokens = 60
