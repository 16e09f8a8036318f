# GPT-2, folded: its weights in a window of 1,024 tokens, of which 512 are the carry, fine-tuned on
# a long text, so that it reads on without end in a state of constant size.
#   python prepare.py long --file=my.txt --tokenizer=gpt2
#   python train.py config/fold_gpt2.py
# Meant for a GPU of 24 GB, on which it has not run yet. By count: 16.4 million tokens of 0.93
# billion FLOPs, and a third more for recompute, are 2.0e16 FLOPs, an hour at 5.6 TFLOP/s. On a CPU
# it takes 3.8 GB with one row in a batch (docs/training.md). Cut short there:
#   --block_size=1024 --batch_size=1 --max_iters=2 --eval_tokens=2048
init_from = 'gpt2'  # or a folder of Hugging Face's format
out_dir = 'out/fold_gpt2'
dataset = 'long'

model_type = 'gated_fold'  # starts as GPT-2 in windows of 512: folded at once it would be harmed
segment_size = 512  # half of GPT-2's window
n_local = 9         # FLOPs a token with 11 local layers: 0.81 billion, with 6: 1.10, with 0: 1.45
n_global = 3

block_size = 8192   # 16 segments
batch_size = 4      # the logits of a segment of four rows are 412 MB in float32
recompute = True    # memory of one segment and of the carries, 6 MB each in float32
bptt_segments = 8   # gradient through 4,096 tokens
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 50
max_iters = 500     # 32,768 tokens each
eval_interval = 250
eval_tokens = 262144
