# What else keeps a state of constant size, on text: python compare.py config/compare_peers.py
# 0.80 million parameters, the same tokens in the same order, and each model's own learning rate, as
# config/search_peers.py found it: 4e-3 for most.
# config/compare_peers_memory.py asks the same models to remember. Without the Feedback Transformer:
# it reads token after token, and takes ten times as long.
seeds = [1337, 1338, 1339]
tokens = 1_152_000

def _at(rate):
    return dict(learning_rate=rate, min_lr=rate / 50)

common = dict(dataset='shakespeare', n_layer=4, n_local=2, n_global=2, n_head=4, n_embd=128,
              position='rotary', block_size=96, batch_size=16, **_at(4e-3))
_fold = dict(model_type='fold', segment_size=12)  # 2 + 2 layers, which carry a segment alone
_front = {**_fold, 'n_local': 3, 'n_global': 1, 'local': 'sliding'}  # that of the front page
runs = {
    'fold': _front,
    'fold without recurrence': {**_front, 'past': 'local'},
    'fold, evolving past': _fold,
    'fold, frozen past': {**_fold, 'past': 'frozen'},
    'fold, gated carry': {**_fold, 'carry': 'gated'},
    'sliding window of 12': dict(model_type='gpt', window=12),
    'sliding window of 24': dict(model_type='gpt', window=24),
    'Transformer-XL': dict(model_type='transformer_xl', segment_size=12),
    'Transformer-XL, not stopped': dict(model_type='transformer_xl', segment_size=12, stop=False),
    'RMT, 4 tokens': dict(model_type='rmt', segment_size=12, memory=4),
    'RMT, 12 tokens': dict(model_type='rmt', segment_size=12, memory=12),
    'Infini-attention': dict(model_type='infini', segment_size=12, **_at(8e-3)),
    'Infini-attention, delta': dict(model_type='infini', segment_size=12, update='delta'),
    'linear attention': dict(model_type='linear', position='none', **_at(8e-3)),
    'Gated DeltaNet': dict(model_type='deltanet', position='none', **_at(2e-3)),
    'LSTM': dict(model_type='lstm', position='none', **_at(1.2e-2)),
}
probe = dict(histories='0,24,48,96,192', targets=500, words=100, bins='24,48,96,150')
