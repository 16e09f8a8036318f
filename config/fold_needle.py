# A key of five digits among random symbols, held by a fold with a window of 12 tokens:
# python train.py config/fold_needle.py, then python probe.py --out_dir=out/fold_needle.
# config/gpt_needle.py is the GPT beside it: the window of two segments that the global layers see.
task = 'needle'
out_dir = 'out/fold_needle'
model_type = 'fold'
segment_size = 12
block_size = 72
n_local = 1
n_global = 1
carry = 'gated'  # the paper's plain carry learns this far more slowly (docs/memory.md)
n_head = 4
n_embd = 64

batch_size = 64
max_iters = 4000
learning_rate = 4e-3
decay_from = 0.6
min_lr = 0.0
weight_decay = 0.01
beta2 = 0.98
grow_at = 0.9
longest = 4  # segments before those of the question: walking sequences give the depth
eval_interval = 500
log_interval = 100
