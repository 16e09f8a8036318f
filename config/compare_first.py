# The runs of the front page over three seeds: python compare.py config/compare_first.py
# Half an hour on two CPU cores. Their settings are those of the files named.
import os
import runpy

_here = os.path.dirname(os.path.abspath(__file__))
_less = 'out_dir', 'max_iters', 'eval_interval'  # which a comparison sets

def _read(name):
    found = runpy.run_path(os.path.join(_here, name))
    return {key: value for key, value in found.items() if key[0] != '_' and key not in _less}

seeds = [1337, 1338, 1339]
tokens = 3_532_800
runs = {
    'fold': _read('fold_shakespeare.py'),
    'GPT, window 12': _read('gpt_shakespeare.py'),
    "fold, the paper's letter": _read('fold_shakespeare_paper.py'),
}
