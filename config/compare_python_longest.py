# A fold trained for an hour and a half on one CPU core, and its controls:
#   python compare.py config/compare_python_longest.py
# As compare_python_long.py with twice the tokens, and half as many of them an update, which
# compare_python_reach.py found to lower the loss most; twice as much is probed. Three to four
# hours on one CPU core (--jobs=1).
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_python_long.py')
_long = runpy.run_path(_path)
seeds, tokens = _long['seeds'], 2 * _long['tokens']
common = {**_long['common'], 'batch_size': 4}
runs = {
    'fold': dict(),
    'GPT, window 12': {**_long['runs']['GPT, window 12'], 'batch_size': 128},
    'GPT, window 384': dict(model_type='gpt'),
    'GPT, window 24': {**_long['runs']['GPT, window 24'], 'batch_size': 64},
    'fold, carry dropped': dict(past='none'),
}
probe = {**_long['probe'], 'targets': 10000, 'words': 3000}
prompts, new_tokens = _long['prompts'], _long['new_tokens']
