# A fold for tiny Shakespeare, by characters, with the paper's segment of 12 tokens:
#   python train.py config/fold_shakespeare.py
# Beside it are config/gpt_shakespeare.py, the GPT of the same window, and
# config/fold_shakespeare_paper.py, the paper's form: the same parameters, tokens and seed.
# docs/side_by_side.md says how the settings were found.
out_dir = 'out/fold_shakespeare'
dataset = 'shakespeare'
# Where Shakespeare cannot be downloaded, training goes on with a corpus that every Python carries;
# a loud line says so, and the checkpoint and every log line name it. '' stops instead.
offline_dataset = 'python'

model_type = 'fold'
segment_size = 12
n_local = 3
n_global = 1
position = 'rotary'
local = 'sliding'
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
