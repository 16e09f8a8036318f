# How far back a fold uses Python source, trained for an hour and a half on one CPU core, and its
# controls: python compare.py config/compare_python_longest.py
# Sequences of 384 characters, four times those of compare_python.py. Three to four hours on one
# CPU core (--jobs=1).
seeds = [1337]
tokens = 18_432_000

common = dict(dataset='python', model_type='fold', n_local=1, n_global=3, n_layer=4, n_head=4,
              n_embd=128, segment_size=12, block_size=384, batch_size=4, learning_rate=2e-3,
              min_lr=1e-4)
runs = {
    'fold': dict(),
    # windows are cut from stretches of 384 tokens: every run sees the same text in the same order
    'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=128, stretch=384),
    'GPT, window 384': dict(model_type='gpt'),
    'GPT, window 24': dict(model_type='gpt', block_size=24, batch_size=64, stretch=384),
    'fold, carry dropped': dict(past='none'),
}
# histories that leave the segment room in a window of 384, so that no window need slide
probe = dict(histories='0,12,24,48,96,144,156,168,192,240,300,360', targets=10000,
             words=3000, bins='24,48,96,150,336')
prompts = ['def read(self, ', 'import os\n']
new_tokens = 200
