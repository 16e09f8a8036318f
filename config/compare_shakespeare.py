# Who wins, tiny Shakespeare: python compare.py config/compare_shakespeare.py
# The fold of the front page beside what else one would take, at equal tokens, equal FLOPs and equal
# time, over three seeds; settings are those of the files named, and, of the sliding windows, what
# config/search_shakespeare.py found. A queue of 8 segments holds a whole sequence. 84 runs of some
# six minutes of a core.
from config import fold_shakespeare, fold_shakespeare_paper, gpt_shakespeare

def _settings(module):
    less = 'out_dir', 'offline_dataset', 'max_iters', 'eval_interval'  # a comparison sets these
    return {key: vars(module)[key] for key in vars(module) if key[0] != '_' and key not in less}

seeds = [1337, 1338, 1339]
tokens = 3_532_800
budgets = ['flops', 'seconds']
_fold, _gpt = _settings(fold_shakespeare), _settings(gpt_shakespeare)
_queued = {**_fold, 'model_type': 'queued_fold', 'queue': 8}
_slide = {**_gpt, 'block_size': 96, 'batch_size': 16, 'weight_decay': 0.5}
runs = {
    'fold': _fold,
    'fold without recurrence': {**_fold, 'past': 'local'},
    "fold, the paper's form": _settings(fold_shakespeare_paper),
    'GPT, window 12': _gpt,
    'GPT, window 24': {**_gpt, 'block_size': 24, 'batch_size': 64},
    'GPT, window 96': {**_gpt, 'block_size': 96, 'batch_size': 16},
    'sliding window of 12': {**_slide, 'window': 12},
    'sliding window of 24': {**_slide, 'window': 24},
    'fold with a queue': _queued,
    'fold with a queue, without recurrence': {**_queued, 'past': 'local'},
}
