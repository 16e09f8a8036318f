# As compare_shakespeare.py, on the corpus that needs no network:
#   python compare.py config/compare_python.py
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_shakespeare.py')
_file = runpy.run_path(_path)
seeds, tokens, ablation_tokens = _file['seeds'], _file['tokens'], _file['ablation_tokens']
runs, ablations, probe = _file['runs'], _file['ablations'], _file['probe']
same_window, full_window = _file['same_window'], _file['full_window']
common = {**_file['common'], 'dataset': 'python'}
prompts, new_tokens = ['def read(self, ', 'import os\n'], _file['new_tokens']
