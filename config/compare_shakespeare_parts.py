# What each part of the fold is worth, tiny Shakespeare:
#   python compare.py config/compare_shakespeare_parts.py
# The fold of config/fold_shakespeare.py with one thing changed, at a third of its length, scored on
# the last tenth of the training split, which these runs do not see. Two minutes of a core a run.
from config import compare_shakespeare as _file

seeds = [1337]
tokens = 1_152_000

common = {**_file.runs['fold'], 'set_aside': 0.1}
runs = {
    'fold': dict(),
    'without recurrence': dict(past='local'),
    'carry dropped': dict(past='none'),
    'gated carry': dict(carry='gated'),
    'local layers see their segment': dict(local='segment'),
    'learned positions': dict(position='learned'),
    '1 local, 3 global layers': dict(n_local=1, n_global=3),
    '2 local, 2 global layers': dict(n_local=2, n_global=2),
    '2 + 2 layers, past frozen': dict(n_local=2, n_global=2, past='frozen'),
    'segments of 6': dict(segment_size=6),
    'segments of 24': dict(segment_size=24),
    'rotary base 100': dict(rotary_base=100.0),
    'sequences of 48': dict(block_size=48, batch_size=32, stretch=96),
}
