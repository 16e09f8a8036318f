# Learning rates of config/compare_peers.py: python compare.py config/search_peers.py
# Of five for each model, by runs of half the length, on the last tenth of the training split, which
# they do not see.
from config import compare_peers as _peers

seeds = [1337]
tokens = _peers.tokens // 2
common = {**_peers.common, 'set_aside': 0.1}
runs = {f'{name}, {rate:g}': {**model, **_peers._at(rate)}
        for rate in (4e-3, 2e-3, 8e-3, 1.2e-2, 1e-3) for name, model in _peers.runs.items()}
