# Who tracks a changing state, three or five cups and as many objects:
#   python compare.py config/compare_track.py
# All make as many updates as config/fold_track.py says, at its learning rate, and are asked after
# up to a million tokens. 10 to 18 minutes of a core a run.
from config import compare_shakespeare as _file
from config import fold_track

seeds = [1337, 1338, 1339]
updates = 6000
common = {**_file._settings(fold_track), 'n_layer': 3}
_models = {
    'fold': dict(),
    'fold without recurrence': dict(past='local', carry='plain'),
    'sliding window of 12': dict(model_type='gpt', window=12),
    'linear attention': dict(model_type='linear', position='none'),
    'Gated DeltaNet': dict(model_type='deltanet', position='none'),
    'LSTM': dict(model_type='lstm', position='none'),
    'GPT, window 72': dict(model_type='gpt'),
}
runs = {f'{name}, {cups} cups': {**settings, 'cups': cups}
        for cups in (3, 5) for name, settings in _models.items()}
probe = dict(distances='12,48,192,768,12288,100000,1000000', far_sequences=100)
