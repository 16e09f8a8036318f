# One change at a time to the fold of compare_shakespeare.py, at a quarter of its tokens:
#   python compare.py config/compare_shakespeare_changes.py
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_shakespeare.py')
_file = runpy.run_path(_path)
seeds, tokens = _file['seeds'][:1], _file['tokens'] // 4
common, probe = _file['common'], _file['probe']
runs = {
    'fold': dict(),
    'gated carry': dict(carry='gated'),
    'past half frozen': dict(past='frozen'),
    '1 local, 3 global layers': dict(n_local=1, n_global=3),
    '2 local, 2 global layers': dict(n_local=2, n_global=2),
    '3 local, 1 global layer': dict(n_local=3, n_global=1),
    'segments of 6': dict(segment_size=6),
    'segments of 24': dict(segment_size=24),
    'segments of 48': dict(segment_size=48),
}
prompts = []
