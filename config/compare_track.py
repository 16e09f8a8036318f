# Who tracks a changing state, three cups and three objects:
#   python compare.py config/compare_track.py
# All make as many updates as config/fold_track.py says, and are asked after up to a million tokens.
from config import compare_shakespeare as _file
from config import fold_track

seeds = [1337, 1338, 1339]
updates = 6000
common = {**_file._settings(fold_track), 'n_layer': 3}
runs = {
    'fold': dict(),
    'fold without recurrence': dict(past='local', carry='plain'),
    'sliding window of 12': dict(model_type='gpt', window=12),
    'linear attention': dict(model_type='linear', position='none'),
    'Gated DeltaNet': dict(model_type='deltanet', position='none'),
    'LSTM': dict(model_type='lstm', position='none'),
    'GPT, window 72': dict(model_type='gpt'),
}
probe = dict(distances='12,48,192,768,12288,100000,1000000', far_sequences=100)
