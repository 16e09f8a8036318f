# As config/compare_peers.py, Python source: python compare.py config/compare_peers_python.py
from config import compare_peers as _peers

seeds, tokens, runs, probe = _peers.seeds, _peers.tokens, _peers.runs, _peers.probe
common = {**_peers.common, 'dataset': 'python'}
