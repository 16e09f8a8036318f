# Learning rates of config/compare_peers.py: python compare.py config/search_peers.py
# Five for each model, by runs of half the length, on the last tenth of the training split, which
# they do not see.
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_peers.py')
_file = runpy.run_path(_path)
seeds = [1337]
tokens = _file['tokens'] // 2
common = {**_file['common'], 'dataset': 'shakespeare', 'set_aside': 0.1}
runs = {f'{name}, {rate:g}': {**model, 'learning_rate': rate, 'min_lr': rate / 50}
        for rate in (4e-3, 2e-3, 6e-3, 8e-3, 1.2e-2) for name, model in _file['_models'].items()}
