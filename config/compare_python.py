# Who wins, Python source: python compare.py config/compare_python.py
# As compare_shakespeare.py, on the corpus that needs no network.
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_shakespeare.py')
_file = runpy.run_path(_path)
seeds, tokens, budgets = (_file[key] for key in ('seeds', 'tokens', 'budgets'))
runs = {name: {**run, 'dataset': 'python'} for name, run in _file['runs'].items()}
