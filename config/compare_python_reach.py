# What moves the length of history that a fold uses: python compare.py config/compare_python_reach.py
# One change at a time to the fold of config/compare_python_long.py, at a third of its tokens; some 35 minutes on two
# CPU cores.
seeds = [1337]
tokens = 3_072_000
ablation_tokens = 3_072_000

common = dict(dataset='python', model_type='fold', n_local=1, n_global=3, n_layer=4, n_head=4, n_embd=128,
              segment_size=12, block_size=384, batch_size=8, learning_rate=2e-3, min_lr=1e-4)
runs = {'fold': dict()}
ablations = {
    'gated carry': dict(carry='gated'),
    'learning rate 1e-3': dict(learning_rate=1e-3),
    'learning rate 4e-3': dict(learning_rate=4e-3),
    'gradient cut every 8 segments': dict(bptt_segments=8),
    'streams': dict(stream=True),
    'sequences of 96': dict(block_size=96, batch_size=32, stretch=384),
    '2 local, 2 global layers': dict(n_local=2, n_global=2),
    '64 channels': dict(n_embd=64),
    '192 channels': dict(n_embd=192),
    'half the tokens an update': dict(batch_size=4),
}
# histories that leave the segment room in a window of 384, as in config/compare_python_long.py
probe = dict(histories='0,12,24,48,96,144,156,168,192,240,300,360', swaps='', targets=5000, words=1500,
             bins='24,48,96,150,336')
prompts = []
