# A key of five digits among random symbols, held by a fold with a window of 12 tokens: python needle.py config/fold_needle.py
# config/gpt_needle.py is the GPT beside it: the window of two segments that the fold's global layers see.
out_dir = 'out/fold_needle'
model_type = 'fold'
segment_size = 12
n_local = 1
n_global = 1
carry = 'gated'  # the paper's plain carry learns this far more slowly (README)
n_head = 4
n_embd = 64

max_iters = 4000
learning_rate = 4e-3
grow_at = 0.9
longest = 4  # segments that gradient flows through before those of the question: walking sequences give the depth
