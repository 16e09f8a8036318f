# As compare_shakespeare.py, on the corpus that needs no network:
#   python compare.py config/compare_python.py
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_shakespeare.py')
_file = runpy.run_path(_path)
seeds, tokens, runs, probe = (_file[key] for key in ('seeds', 'tokens', 'runs', 'probe'))
common = {**_file['common'], 'dataset': 'python'}
prompts, new_tokens = ['def read(self, ', 'import os\n'], _file['new_tokens']
