# How far back a fold uses Python source, 18.4 million characters of training, and its controls:
#   python compare.py config/compare_python_longest.py
# Sequences of 384 characters, four times those of compare_python.py, and one learning rate for all
# but the LSTM, which does better at higher ones (config/search_peers.py).
# 30 to 50 minutes of one CPU core a run, 50 to 70 with a queue.
seeds = [1337, 1338, 1339]
tokens = 18_432_000

common = dict(dataset='python', n_local=3, n_global=1, n_layer=4, n_head=4, n_embd=128,
              segment_size=12, block_size=384, batch_size=4, learning_rate=2e-3, min_lr=1e-4)
_fold = dict(model_type='fold', position='rotary', local='sliding')  # that of the front page
_queued = {**_fold, 'model_type': 'queued_fold'}
# windows are cut from stretches of 384 tokens: every run sees the same text in the same order
runs = {
    'fold': _fold,
    'fold without recurrence': {**_fold, 'past': 'local'},
    'fold with a queue': _queued,
    'fold with a queue, without recurrence': {**_queued, 'past': 'local'},
    'sliding window of 12': dict(model_type='gpt', position='rotary', window=12),
    'sliding window of 48': dict(model_type='gpt', position='rotary', window=48),
    'LSTM': dict(model_type='lstm', position='none', learning_rate=8e-3, min_lr=4e-4),
    'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=128, stretch=384),
    'GPT, window 24': dict(model_type='gpt', block_size=24, batch_size=64, stretch=384),
    'GPT, window 384': dict(model_type='gpt'),
    'GPT, window 192, rotary': dict(model_type='gpt', position='rotary', block_size=192,
                                    batch_size=8, stretch=384),
    'GPT, window 384, rotary': dict(model_type='gpt', position='rotary'),
}
# histories that leave the segment room in a window of 384, so that no window need slide
probe = dict(histories='0,12,24,48,96,144,156,168,192,240,300,360', targets=10000,
             words=3000, bins='24,48,96,150,336')
prompts = ['def read(self, ', 'import os\n']
new_tokens = 200
