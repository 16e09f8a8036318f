# What each part of the fold is worth, tiny Shakespeare:
#   python compare.py config/compare_shakespeare_parts.py
# The fold of compare_shakespeare.py with one thing changed, and the GPTs with learned positions, at
# the same tokens, over three seeds. 33 runs of six minutes of a core.
from config import compare_shakespeare as _file

seeds, tokens, common = _file.seeds, _file.tokens, _file.runs['fold']
runs = {
    'fold': dict(),
    'gated carry': dict(carry='gated'),
    'carry dropped': dict(past='none'),
    'local layers see their segment': dict(local='segment'),
    'learned positions': dict(position='learned'),
    '2 local, 2 global layers': dict(n_local=2, n_global=2),
    '2 + 2 layers, past frozen': dict(n_local=2, n_global=2, past='frozen'),
    '2 + 2 layers, without recurrence': dict(n_local=2, n_global=2, past='local'),
    **{f'{name}, learned positions': {**_file.runs[name], 'position': 'learned'}
       for name in ('GPT, window 12', 'GPT, window 24', 'GPT, window 96')},
}
