# Who tracks a changing state, three cups and three objects:
#   python compare.py config/compare_track.py
# All make as many updates as config/fold_track.py says, and are asked after up to a million tokens.
import os
import runpy

_path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'fold_track.py')
_less = 'out_dir', 'max_iters', 'eval_interval'  # which a comparison sets
seeds = [1337, 1338, 1339]
updates = 6000
common = {key: value for key, value in runpy.run_path(_path).items()
          if key[0] != '_' and key not in _less}
common.update(n_layer=3, learning_rate=2e-3)
runs = {
    'fold': dict(),
    'fold without recurrence': dict(past='local', carry='plain'),
    'sliding window of 12': dict(model_type='gpt', window=12),
    'GPT, window 72': dict(model_type='gpt'),
}
probe = dict(distances='12,48,192,768,12288,100000,1000000', far_sequences=100)
