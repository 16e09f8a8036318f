"""The steps of the GPU session: every script once, in chains of (name, words, what it prints).

A step needs the ones before it in its chain; chains may run side by side. An error that is wanted
is to end the step.
"""
from pieces import CASES, DATASET, DEVICE, TINY, torch

from models import MODELS

PIECES = 'tests/gpu/pieces.py'
NEEDED = {'export': 'safetensors', 'train from export': 'safetensors'}  # packages, by the step
PROBE = {} if TINY else dict(histories='0,12,24', targets=10, words=5, resamples=20)
COMPARISON = f"""tokens, seeds = 1920, [1337]
common = dict(dataset={DATASET!r}, block_size=24, batch_size=4, n_head=2, n_embd=16)
runs = {{'fold': {{}}, 'GPT': dict(model_type='gpt', n_layer=2)}}
probe = {PROBE}
"""

def gradient_chains():
    """Gradients, and what is captured, against the CPU's; the seldom asked last."""
    named = [['captured']] * (not TINY) + [['gradients', piece] for piece in CASES]
    named = [words for words in named if not TINY or 'compiled' not in words]
    return [[(' '.join(words), [PIECES, *words], '@@')] for words in named]

class Steps:
    """The steps whose folders are in `work`."""

    def __init__(self, work):
        self.work, self.here, self.data = work, f'--device={DEVICE}', f'--data_dir={work}/data'
        small = ['--n_embd=16', '--n_head=2', '--batch_size=4', '--block_size=24', '--threads=1']
        self.short = ['--max_iters=20', '--eval_interval=10', '--log_interval=5', self.here,
                      '--overwrite=True', *(small if TINY else [])]
        self.texts = ['--targets=20', '--words=20', '--resamples=50', '--histories=0,12,24',
                      self.data]
        self.bench = ['bench.py', self.here, '--label=_gpu_session', '--threads=1', '--rounds=2',
                      '--starts=1', '--sizes=1+1x16x2' if TINY else '--sizes=2+2x128x4',
                      '--batch_size=4', '--compile=off', '--bptt_segments=1']

    def train(self, name, *more, task='text', wanted='done, '):
        own = [self.data, f'--dataset={DATASET}'] if task in ('text', 'needle', 'facts') else []
        own += ['--eval_tokens=2000'] * (task == 'text')
        return f'train {name}', ['train.py', f'--task={task}', f'--out_dir={self.work}/{name}',
                                 *self.short, *own, *more], wanted

    def resume(self, name):
        return f'resume {name}', ['train.py', f'--out_dir={self.work}/{name}', self.here,
                                  '--init_from=resume', '--max_iters=25',
                                  self.data], 'iter 25: validation'

    def use(self, script, name, *more, wanted=''):
        label = f'{script.removesuffix(".py")} {name}'
        return label, [script, f'--out_dir={self.work}/{name}', self.here, *more], wanted

    def ours(self):
        """What this session is for: the fold, and what is compiled and captured."""
        train, resume, use, state = self.train, self.resume, self.use, f'{self.work}/state'
        fold = [train('fold', '--compile=off'), resume('fold'),
                use('sample.py', 'fold', '--max_new_tokens=20', f'--save_state={state}'),
                ('sample on', ['sample.py', f'--out_dir={self.work}/fold', self.here, '--top_k=5',
                               '--top_p=0.9', f'--load_state={state}', '--max_new_tokens=20'], ''),
                use('probe.py', 'fold', *self.texts, wanted='written to'),
                ('bench generation', [*self.bench, f'--out_dir={self.work}/fold',
                                      '--contexts=10,100', '--window_tokens=12'], 'written to')]
        if TINY:
            refused = "error: compile='graph' takes CUDA"
            return [fold, [train('graph', '--compile=graph', wanted=refused)]]
        return [fold, [train('graph', '--compile=graph', '--dropout=0.2'), resume('graph')],
                [train('graph gpt', '--compile=graph', '--model_type=gpt',
                       '--gradient_accumulation_steps=2')],
                [train('graph stream', '--compile=graph', '--stream=True', '--bptt_segments=2',
                       '--carry=gated', '--local=sliding'), resume('graph stream')],
                [train('graph recompute', '--compile=graph', '--recompute=True',
                       wanted='nothing is captured')],
                [train('fold kernels', '--compile=kernels', '--dropout=0.2'),
                 resume('fold kernels')],
                [train('float32', '--compile=off', '--dtype=float32')]]

    def others(self):
        """All else: the GPT, settings, models, tasks, and the scripts that start others."""
        train, use, work = self.train, self.use, self.work
        more = {'recompute': ['--recompute=True', '--dropout=0.2'], 'document': ['--document=\n'],
                'stream': ['--stream=True', '--bptt_segments=2', '--carry=gated',
                           '--local=sliding'],
                'bfloat16': ['--dtype=bfloat16', '--position=rotary'],
                **{kind: [f'--model_type={kind}'] for kind in MODELS
                   if kind not in ('fold', 'gpt')}}
        tasks = {'needle': [], 'track': [], 'facts': ['--block_size=48'], 'pairs': ['--fresh=4'],
                 'mqar': ['--vocabulary=64', '--lengths=32:4']}
        recall = '--distances=12,48', '--sequences=8', '--most=2', self.data
        alone = not TINY and torch.cuda.device_count() < 2
        return [
            [train('gpt', '--model_type=gpt'), use('sample.py', 'gpt', '--max_new_tokens=20'),
             use('probe.py', 'gpt', *self.texts, wanted='written to'),
             train('folded gpt', f'--init_from={work}/gpt/ckpt.pt'),
             ('export', ['-m', 'lib.pretrained', f'{work}/gpt', f'{work}/export'], ''),
             train('from export', '--model_type=gpt', f'--init_from={work}/export')],
            *[[train(name, *keys, '--compile=off')] for name, keys in more.items()],
            *[[train(task, '--segment_size=12', *keys, task=task),
               use('probe.py', task, *recall, wanted='written to')]
              for task, keys in tasks.items()],
            [('bench speed', [*self.bench, '--parts=speed', '--steps=2', '--window=24',
                              f'--sides={"gpt" if TINY else "fold truncated,gpt"}'], 'written to'),
             ('bench memory', [*self.bench, '--parts=memory', '--sides=fold recomputed',
                               f'--block_sizes={"24" if TINY else "24,48"}'], 'written to')],
            [('compare', ['compare.py', f'{work}/comparison.py', self.here, self.data,
                          f'--out_dir={work}/compare', f'--only={"GPT" if TINY else ""}'],
              'written to')],
            [('torchrun', ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           *train('two')[1]],
              'error: process 1 finds no device of its own' if alone else 'done, ')],
            [train('kernels', '--compile=kernels', '--model_type=gpt', '--n_layer=1')]]

def smoke_chains(work):
    steps = Steps(work)
    return steps.ours() + steps.others()
