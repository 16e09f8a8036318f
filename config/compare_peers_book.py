# As config/compare_peers_python.py, of a book, which has to be prepared under that name:
#   python prepare.py book --file=PATH && python compare.py config/compare_peers_book.py
from config import compare_peers_python as _peers

seeds, tokens, runs, probe = [1337], _peers.tokens, _peers.runs, _peers.probe
common = {**_peers.common, 'dataset': 'book'}
