# The GPT beside config/fold_needle.py: as many layers and channels, a window of two segments, the
# same task and updates: python train.py config/gpt_needle.py
task = 'needle'
out_dir = 'out/gpt_needle'
model_type = 'gpt'
block_size = 24
segment_size = 12  # of the fold beside it: the question stands in the last two
n_layer = 2
n_head = 4
n_embd = 64

batch_size = 64
max_iters = 4000
learning_rate = 4e-3
decay_from = 0.6
min_lr = 0.0
weight_decay = 0.01
beta2 = 0.98
eval_interval = 500
log_interval = 100
