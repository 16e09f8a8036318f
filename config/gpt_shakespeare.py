# The GPT beside config/fold_shakespeare.py: its window is the fold's segment; parameters, tokens
# and seed are the same; text is drawn in stretches of 96 characters, cut into windows. Its weight
# decay and warm-up were searched as the fold's were (config/search_shakespeare.py).
out_dir = 'out/gpt_shakespeare'
dataset = 'shakespeare'
offline_dataset = 'python'  # as in config/fold_shakespeare.py

model_type = 'gpt'
n_layer = 4
position = 'rotary'
n_head = 4
n_embd = 128

block_size = 12
batch_size = 128
stretch = 96
learning_rate = 4e-3
min_lr = 8e-5
weight_decay = 0.3
warmup_iters = 300
max_iters = 2300
eval_interval = 1150
log_interval = 25
