# How far back a fold with all layers global uses Python source, and what moves that: python compare.py config/compare_python_reach.py
# The recipe that wins on tiny Shakespeare (config/compare_shakespeare.py) on sequences of 384 characters, its control, and one
# change at a time at a fifth of the tokens; an hour and a half on one CPU core (--jobs=1).
seeds = [1337]
tokens = 7_372_800
ablation_tokens = 1_474_560

common = dict(dataset='python', model_type='fold', n_local=0, n_global=4, n_layer=4, n_head=4, n_embd=128,
              segment_size=12, block_size=384, batch_size=8, learning_rate=2e-3, min_lr=1e-4, weight_decay=0.5)
runs = {
    'fold': dict(),
    # windows are cut from stretches of 384 tokens, so that both see the same text in the same order
    'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=256, stretch=384),
}
same_window = 'GPT, window 12'
ablations = {
    'fold, short': dict(),
    'learning rate 4e-3': dict(learning_rate=4e-3),
    'streams': dict(stream=True),
    'sequences of 96': dict(block_size=96, batch_size=32, stretch=384),
    '1 local, 3 global layers': dict(n_local=1, n_global=3),
    'weight decay 0.1': dict(weight_decay=0.1),
    'carry dropped': dict(model_type='fold_dropped'),
    'gated carry': dict(carry='gated'),
    'gradient cut every 8 segments': dict(bptt_segments=8),
    'position embedding of the window': dict(model_type='fold_placed'),
    '192 channels': dict(n_embd=192),
}
# histories that leave the segment room in a window of 384, as in config/compare_python_long.py
probe = dict(histories='0,12,24,48,96,144,156,168,192,240,300,360', swaps='', targets=10000, words=1500,
             bins='24,48,96,150,336')
prompts = []
