# A fold with a queue beside the fold, and a GPT that sees the whole sequence, on Python source:
#   python compare.py config/compare_python_queue.py
# Sequences and rate are those of compare_python_longest.py, with a fifth of its text. A quarter of
# an hour of a core a run.
from config import compare_python_longest as _longest

seeds = [1337, 1338, 1339]
tokens = 3_532_800
common, probe = _longest.common, {**_longest.probe, 'histories': '0,12,24,36,48,72,96,144,192,240'}
_queued = _longest.runs['fold with a queue']
runs = {
    'fold with a queue': _queued,
    'without recurrence': {**_queued, 'past': 'local'},
    'fold': _longest.runs['fold'],
    'GPT, window 384, rotary': _longest.runs['GPT, window 384, rotary'],
}
