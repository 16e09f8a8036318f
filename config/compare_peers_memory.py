# What else keeps a state of constant size, asked to remember:
#   python compare.py config/compare_peers_memory.py
# The models of config/compare_peers.py, three layers of 64 channels, as many updates on each task.
# The sliding window of 24 is left out, as segments are of 12. Cups: config/compare_track.py.
from config import compare_peers as _peers

_less = 'learning_rate', 'min_lr'  # which are those of text
_models = {name: {key: model[key] for key in model if key not in _less}
           for name, model in _peers.runs.items() if name != 'sliding window of 24'}
seeds = [1337, 1338, 1339]
updates = 4000

common = dict(n_layer=3, n_head=4, n_embd=64, position='rotary', segment_size=12, block_size=72,
              batch_size=64, learning_rate=2e-3, min_lr=0.0, decay_from=0.6, weight_decay=0.01,
              beta2=0.98)
_split = dict(n_local=1, n_global=2)  # of every fold
_walk = dict(longest=4, grow_at=0.9)
_tasks = {
    'needle': dict(task='needle', **_walk),
    'parity': dict(task='track', cups=2, every=2, regular=False, **_walk),
    'facts': dict(task='facts', dataset='shakespeare', block_size=96, **_walk),
    'recall': dict(task='mqar', block_size=264),
}
runs = {f'{name}, {task}': {**model, **_split, **settings}
        for task, settings in _tasks.items() for name, model in _models.items()}
probe = dict(distances='48,192,768,49152,100000,1000000', far_sequences=100)
