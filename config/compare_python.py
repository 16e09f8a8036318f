# Who wins, Python source: python compare.py config/compare_python.py
# As compare_shakespeare.py, on the corpus that needs no network, with the learning rates that
# config/search_python.py found for the fold, the GPT of window 12 and the sliding window of 12.
from config import compare_shakespeare as _file

def _with_rate(name, run):
    rate = 8e-3 if name.startswith('fold') else 6e-3
    return {**run, 'dataset': 'python', 'learning_rate': rate, 'min_lr': rate / 50}

seeds, tokens, budgets = _file.seeds, _file.tokens, _file.budgets
runs = {name: _with_rate(name, run) for name, run in _file.runs.items()}
