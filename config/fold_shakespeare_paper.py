# The paper's form beside config/fold_shakespeare.py: learned positions, local layers that see
# their segment, as many of them as global ones, a past half that evolves, a plain carry.
out_dir = 'out/fold_shakespeare_paper'
dataset = 'shakespeare'
offline_dataset = 'python'  # as in config/fold_shakespeare.py

model_type = 'fold'
segment_size = 12
n_local = 2
n_global = 2
position = 'learned'
local = 'segment'
past = 'evolving'
carry = 'plain'
n_head = 4
n_embd = 128

block_size = 96
batch_size = 16
learning_rate = 4e-3
min_lr = 8e-5
weight_decay = 0.3
max_iters = 2300
eval_interval = 1150
log_interval = 25
