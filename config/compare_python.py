# As config/compare_shakespeare.py, on the corpus that needs no network: python compare.py config/compare_python.py
import os
import runpy

_shakespeare = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'compare_shakespeare.py'))
seeds, tokens, ablation_tokens = (_shakespeare[key] for key in ('seeds', 'tokens', 'ablation_tokens'))
runs, ablations, probe, new_tokens = (_shakespeare[key] for key in ('runs', 'ablations', 'probe', 'new_tokens'))
same_window, full_window = _shakespeare['same_window'], _shakespeare['full_window']
common = {**_shakespeare['common'], 'dataset': 'python'}
prompts = ['def read(self, ', 'import os\n']
