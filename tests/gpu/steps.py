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

def smoke_chains(work):
    """Every script once; in the first chains what this session is for."""
    here, data = f'--device={DEVICE}', f'--data_dir={work}/data'
    small = ['--n_embd=16', '--n_head=2', '--batch_size=4', '--block_size=24', '--threads=1']
    short = ['--max_iters=20', '--eval_interval=10', '--log_interval=5', '--overwrite=True', here,
             *(small if TINY else [])]

    def train(name, *more, task='text', wanted='done, '):
        own = [data, f'--dataset={DATASET}'] if task in ('text', 'needle') else []
        own += ['--eval_tokens=2000'] * (task == 'text')
        return f'train {name}', ['train.py', f'--task={task}', f'--out_dir={work}/{name}', *short,
                                 *own, *more], wanted

    def resume(name):
        return f'resume {name}', ['train.py', f'--out_dir={work}/{name}', '--init_from=resume',
                                  '--max_iters=25', here, data], 'iter 25: validation'

    def use(script, name, *more, wanted=''):
        label = f'{script.removesuffix(".py")} {name}'
        return label, [script, f'--out_dir={work}/{name}', here, *more], wanted
    texts = '--targets=20', '--words=20', '--resamples=50', '--histories=0,12,24', data
    recall = '--distances=12,48', '--sequences=8', '--most=2', data
    bench_ = ['bench.py', here, '--label=_gpu_session', '--threads=1', '--rounds=2', '--starts=1',
              '--sizes=1+1x16x2' if TINY else '--sizes=2+2x128x4', '--batch_size=4',
              '--compile=off', '--bptt_segments=1']
    state = f'{work}/state'
    ours = [[train('fold', '--compile=off'), resume('fold'),
             use('sample.py', 'fold', '--max_new_tokens=20', f'--save_state={state}'),
             ('sample on', ['sample.py', f'--out_dir={work}/fold', here, '--max_new_tokens=20',
                            f'--load_state={state}', '--top_k=5', '--top_p=0.9'], ''),
             use('probe.py', 'fold', *texts, wanted='written to'),
             ('bench generation', [*bench_, f'--out_dir={work}/fold', '--contexts=10,100',
                                   '--window_tokens=12'], 'written to')]]
    if TINY:
        ours += [[train('graph', '--compile=graph', wanted="error: compile='graph' takes CUDA")]]
    else:
        ours += [[train('graph', '--compile=graph', '--dropout=0.2'), resume('graph')],
                 [train('graph gpt', '--compile=graph', '--model_type=gpt',
                        '--gradient_accumulation_steps=2')],
                 [train('graph stream', '--compile=graph', '--stream=True', '--bptt_segments=2',
                        '--carry=gated', '--local=sliding'), resume('graph stream')],
                 [train('graph recompute', '--compile=graph', '--recompute=True',
                        wanted='nothing is captured')],
                 [train('float32', '--compile=off', '--dtype=float32')]]
        ours += [[train('fold kernels', '--compile=kernels', '--dropout=0.2')]]
    more = {'recompute': ['--recompute=True', '--dropout=0.2'], 'document': ['--document=\n'],
            'stream': ['--stream=True', '--bptt_segments=2', '--carry=gated', '--local=sliding'],
            'bfloat16': ['--dtype=bfloat16', '--position=rotary'],
            **{kind: [f'--model_type={kind}'] for kind in MODELS if kind not in ('fold', 'gpt')}}
    return [
        *ours,
        [train('gpt', '--model_type=gpt'), use('sample.py', 'gpt', '--max_new_tokens=20'),
         use('probe.py', 'gpt', *texts, wanted='written to'),
         train('folded gpt', f'--init_from={work}/gpt/ckpt.pt'),
         ('export', ['-m', 'lib.pretrained', f'{work}/gpt', f'{work}/export'], ''),
         train('from export', '--model_type=gpt', f'--init_from={work}/export')],
        *[[train(name, *keys, '--compile=off')] for name, keys in more.items()],
        *[[train(task, '--segment_size=12', *keys, task=task),
           use('probe.py', task, *recall, wanted='written to')]
          for task, keys in (('needle', []), ('track', []), ('pairs', ['--fresh=4']),
                             ('mqar', ['--vocabulary=64', '--lengths=32:4']))],
        [('bench speed', [*bench_, '--parts=speed', '--steps=2', '--window=24',
                          f'--sides={"gpt" if TINY else "fold truncated,gpt"}'], 'written to'),
         ('bench memory', [*bench_, '--parts=memory', '--sides=fold recomputed',
                           f'--block_sizes={"24" if TINY else "24,48"}'], 'written to')],
        [('compare', ['compare.py', f'{work}/comparison.py', here, data,
                      f'--out_dir={work}/compare', f'--only={"GPT" if TINY else ""}'],
          'written to')],
        [('torchrun', ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                       *train('two')[1]], 'error: process 1 finds no device of its own'
          if not TINY and torch.cuda.device_count() < 2 else 'done, ')],
        [train('kernels', '--compile=kernels', '--model_type=gpt', '--n_layer=1'),
         *([] if TINY else [resume('kernels')])]]
