# Three cups and three objects, of which two cups are swapped every twelve tokens, tracked by a fold
# with a window of 12 tokens: python train.py config/fold_track.py, then
# python probe.py --out_dir=out/fold_track. Parity: --cups=2 --every=2 --regular=False.
task = 'track'
out_dir = 'out/fold_track'
model_type = 'fold'
cups = 3
every = 12
segment_size = 12
block_size = 72
n_local = 1
n_global = 2
position = 'rotary'
carry = 'gated'
n_head = 4
n_embd = 64

batch_size = 64
max_iters = 6000
learning_rate = 2e-3
decay_from = 0.6
min_lr = 0.0
weight_decay = 0.01
beta2 = 0.98
grow_at = 0.9
longest = 4
eval_interval = 500
log_interval = 100
