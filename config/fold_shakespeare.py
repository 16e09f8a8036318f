# The folded model on tiny Shakespeare, by characters, with the paper's segment of 12 tokens:
# python train.py config/fold_shakespeare.py. config/gpt_shakespeare.py is the GPT beside it: the
# same window, parameters, tokens, seed and optimizer.
out_dir = 'out/fold_shakespeare'
dataset = 'shakespeare'
# Where Shakespeare cannot be downloaded, training goes on with a corpus that every Python carries;
# a loud line says so, and the checkpoint and every log line name it. '' stops instead.
offline_dataset = 'python'

model_type = 'fold'
segment_size = 12
n_local = 1   # the paper has as many local as global layers; at this size and length of training
n_global = 3  # 1 + 3 learns more from the same computation than 2 + 2 (docs/text.md)
n_head = 4
n_embd = 128

block_size = 48
batch_size = 32
learning_rate = 4e-3
min_lr = 8e-5
max_iters = 2300
eval_interval = 1150
log_interval = 25
