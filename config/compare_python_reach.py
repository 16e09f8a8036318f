# What moves how far back a fold uses Python source:
#   python compare.py config/compare_python_reach.py
# One change at a time to the fold of compare_python_long.py at a sixth of its tokens.
seeds = [1337]
tokens = 1_474_560

common = dict(dataset='python', model_type='fold', n_local=1, n_global=3, n_layer=4, n_head=4,
              n_embd=128, segment_size=12, block_size=384, batch_size=8, learning_rate=2e-3,
              min_lr=1e-4)
runs = {
    'fold': dict(),
    'learning rate 4e-3': dict(learning_rate=4e-3),
    'weight decay 0.5': dict(weight_decay=0.5),
    '0 local, 4 global layers': dict(n_local=0, n_global=4),
    'streams': dict(stream=True),
    'half the tokens an update': dict(batch_size=4),
    # windows are cut from stretches of 384 tokens: the same text in the same order
    'sequences of 96': dict(block_size=96, batch_size=32, stretch=384),
    'gradient cut every 8 segments': dict(bptt_segments=8),
    'gated carry': dict(carry='gated'),
    'carry dropped': dict(past='none'),
    '192 channels': dict(n_embd=192),
}
# histories that leave the segment room in a window of 384, as in compare_python_long.py
probe = dict(histories='0,12,24,48,72,96,144,168,192,300', targets=4000, words=1500,
             bins='24,48,96,150,336')
prompts = []
