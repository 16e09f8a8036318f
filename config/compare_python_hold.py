# A fold that is taught to hold what it has read, beside the one that is not, on Python source:
#   python compare.py config/compare_python_hold.py
# Sequences and rate are those of compare_python_longest.py, with a fifth of its text. Ten minutes
# of a core a run.
from config import compare_python_longest as _longest

seeds = [1337, 1338, 1339]
tokens = 3_532_800
common, probe = _longest.common, {**_longest.probe, 'histories': '0,12,24,36,48,72,96,144,192,240'}
_fold = _longest.runs['fold']
runs = {
    'fold': _fold,
    'holding, weight 0.1': {**_fold, 'model_type': 'holding_fold', 'hold_weight': 0.1},
    'holding, weight 0.3': {**_fold, 'model_type': 'holding_fold', 'hold_weight': 0.3},
    'holding, without recurrence': {**_fold, 'model_type': 'holding_fold', 'past': 'local'},
}
