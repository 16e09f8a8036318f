# GPT-2, folded: its weights in a window of 1,024 tokens, of which 512 are the carry, fine-tuned on
# a long text, so that it reads on without end in a state of constant size.
#   python prepare.py long --file=my.txt --tokenizer=gpt2
#   python train.py config/fold_gpt2.py
# On a CPU, cut short: --block_size=1024 --batch_size=1 --max_iters=2 --eval_tokens=2048
init_from = 'gpt2'
out_dir = 'out/fold_gpt2'
dataset = 'long'

model_type = 'fold'
segment_size = 512
n_local = 9
n_global = 3
past_gate = True

block_size = 8192
batch_size = 4
recompute = True
bptt_segments = 8
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 50
max_iters = 500
eval_interval = 250
eval_tokens = 262144
