# Digits with names, held by a fold with segments of 12: python train.py config/fold_pairs.py,
# then python probe.py --out_dir=out/fold_pairs.
task = 'pairs'
out_dir = 'out/fold_pairs'
model_type = 'fold'
segment_size = 12
block_size = 48
n_local = 1
n_global = 2
carry = 'gated'
n_head = 2
n_embd = 64

batch_size = 64
max_iters = 2500
learning_rate = 2e-3
decay_from = 0.6
min_lr = 0.0
weight_decay = 0.01
beta2 = 0.98
eval_interval = 500
log_interval = 100
