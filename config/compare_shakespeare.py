# The fold and its baselines on tiny Shakespeare: python compare.py config/compare_shakespeare.py
# A run is what `common` says, and over that what the run says: settings of train.py. `tokens` and
# the seed are the same for all `runs`, of which the first is compared with each of the others.
seeds = [1337, 1338, 1339]
tokens = 4_300_800           # that each of the runs is trained on

common = dict(dataset='shakespeare', offline_dataset='python', model_type='fold', n_local=0,
              n_global=4, n_layer=4, n_head=4, n_embd=128, segment_size=12, block_size=96,
              batch_size=16, learning_rate=4e-3, min_lr=1e-4, weight_decay=0.5)
runs = {
    'fold': dict(),
    # windows are cut from stretches of 96 tokens: every run sees the same text in the same order
    'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=128, stretch=96),
    'GPT, window 24': dict(model_type='gpt', block_size=24, batch_size=64, stretch=96),
    'GPT, window 96': dict(model_type='gpt'),
    'fold, carry dropped': dict(past='none'),
}
# settings of probe.py
probe = dict(histories='0,12,24,36,48,72,96,144,192', targets=500, words=50)
prompts = ['ROMEO:\n', 'First Citizen:\nWe are ']
new_tokens = 200             # that each model writes after each prompt
