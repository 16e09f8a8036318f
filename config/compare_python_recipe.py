# The recipe of compare_shakespeare.py on Python source, five times as long as the runs of
# compare_python_reach.py:
#   python compare.py config/compare_python_recipe.py
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_python_reach.py')
_reach = runpy.run_path(_path)
seeds, tokens, prompts = _reach['seeds'], 5 * _reach['tokens'], _reach['prompts']
common, probe = _reach['common'], _reach['probe']
runs = {
    '0 + 4 layers, weight decay 0.5': dict(n_local=0, n_global=4, weight_decay=0.5),
}
