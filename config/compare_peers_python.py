# As config/compare_peers.py, Python source: python compare.py config/compare_peers_python.py
from config import compare_peers as _peers

seeds, tokens, runs = _peers.seeds, _peers.tokens, _peers.runs
common = {**_peers.common, 'dataset': 'python'}
probe = {**_peers.probe, 'words': 200, 'bins': '24,48,96,150,336,1000'}
