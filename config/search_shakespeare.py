# The search behind config/fold_shakespeare.py and config/gpt_shakespeare.py:
#   python compare.py config/search_shakespeare.py
# One change at a time, and the two that helped together, the same for the fold, the GPT of its
# window and the sliding window. All are scored on the last tenth of the training split, which these
# runs do not see.
seeds = [1337]
tokens = 3_532_800

common = dict(dataset='shakespeare', set_aside=0.1, n_local=3, n_global=1, n_layer=4, n_head=4,
              n_embd=128, position='rotary', segment_size=12, block_size=96, batch_size=16,
              learning_rate=4e-3, min_lr=8e-5, log_interval=50)
_models = {
    'fold': dict(model_type='fold', local='sliding'),
    'sliding window': dict(model_type='gpt', window=12),
    'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=128, stretch=96),
}
_changes = {
    '': dict(),
    'learning rate 1e-3': dict(learning_rate=1e-3),
    'learning rate 2e-3': dict(learning_rate=2e-3),
    'learning rate 6e-3': dict(learning_rate=6e-3),
    'learning rate 8e-3': dict(learning_rate=8e-3),
    'weight decay 0.3': dict(weight_decay=0.3),
    'weight decay 0.5': dict(weight_decay=0.5),
    'warm-up of 300': dict(warmup_iters=300),
    'weight decay 0.3, warm-up of 300': dict(weight_decay=0.3, warmup_iters=300),
    'weight decay 0.5, warm-up of 300': dict(weight_decay=0.5, warmup_iters=300),
    'last rate 0': dict(min_lr=0.0),
    'last rate 4e-4': dict(min_lr=4e-4),
}
runs = {f'{name}, {change}'.removesuffix(', '): {**model, **settings}
        for change, settings in _changes.items() for name, model in _models.items()}
