# Who is where, told in plain words among Shakespeare's lines, and kept by a fold with a window of
# 12 characters: python train.py config/fold_facts.py, then
# python probe.py --out_dir=out/fold_facts --file=book.txt. Two facts an answer: --hops=2.
task = 'facts'
out_dir = 'out/fold_facts'
dataset = 'shakespeare'
model_type = 'fold'
segment_size = 12
block_size = 96
n_local = 1
n_global = 2
position = 'rotary'
local = 'sliding'
carry = 'gated'
n_head = 4
n_embd = 64

batch_size = 64
max_iters = 4000
learning_rate = 2e-3
decay_from = 0.6
min_lr = 0.0
weight_decay = 0.01
beta2 = 0.98
longest = 4
eval_interval = 500
log_interval = 100
