"""Pieces of the GPU session that compute in processes of their own: python pieces.py NAME WORDS

They print results as lines of JSON: of gradients as the session notes them, of speed by the batch.
"""
import fcntl
import json
import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from itertools import count, product

import torch

import bench
from configurator import configure
from lib.contract import make_model
from lib.device import compile_blocks, pick_device
from lib.gradients import backpropagate
from lib.graphs import Graphs
from models import MODELS

TINY = bool(os.environ.get('TINY'))
DEVICE, DATASET = ('cpu', 'tiny') if TINY else ('cuda', 'shakespeare')
SIZE, BATCH = ('1+1x16x2', 4) if TINY else ('3+3x384x6', 64)
BATCHES = 2  # at most that a speed is measured at, each four times the one before
SIDES = {'GPT': ('gpt', 12, 256), 'fold l=12': ('fold', 12, 252),  # model, segment, sequence
         'fold l=32': ('fold', 32, 256), 'fold l=64': ('fold', 64, 256)}
CASES = {  # of gradients: {piece: [(model, sizes)]}
    'keys': [('fold', dict(position=position, local=local, past=past, carry=carry))
             for position, local, (past, carry) in product(
                 ('learned', 'rotary'), ('segment', 'sliding'),
                 (('evolving', 'plain'), ('evolving', 'gated'), ('frozen', 'plain'),
                  ('frozen', 'gated'), ('local', 'plain'), ('none', 'plain')))],
    'models': [(kind, {}) for kind in MODELS if kind != 'fold'],
    'compiled': [('fold', dict(local='sliding', position='rotary')), ('gpt', {})]}

def make(kind, **sizes):
    """A small model with weights away from their start, and two batches of tokens and targets."""
    torch.manual_seed(1)
    model = make_model(kind, dict(n_layer=3, n_local=1, n_global=2, n_head=2, n_embd=32, bias=True,
                                  vocab_size=65, block_size=60, segment_size=12, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, torch.randint(65, (2, 2, 4, 60))

def gradient(model, tokens, autocast=nullcontext(), **kwargs):
    """The loss, and all gradients in one, (N,) float64 on the CPU, taken off the model."""
    device = str(next(model.parameters()).device)
    loss, _ = backpropagate(model, *tokens, device=device, autocast=autocast, **kwargs)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    found = torch.cat([grad.flatten() for grad in grads]).double().cpu()
    model.zero_grad(set_to_none=True)
    return loss.item(), found

def report(name, figures, limits):
    """Print a result: FAILED if a figure is not below its limit."""
    fine = all(figures[key] < limits[key] for key in figures)
    text = ', '.join(f'{key} {value:.1e}' for key, value in figures.items())
    print('@@' + json.dumps([f'gradients {name}', 'ok' if fine else 'FAILED', text]), flush=True)

def gradients(piece):
    """How far gradients of the device, plain and captured, are from those in float64 on a CPU."""
    half = torch.autocast(DEVICE, torch.bfloat16)
    for kind, sizes in CASES[piece]:
        model, (other, tokens) = make(kind, **sizes)
        _, expected = gradient(model.double(), tokens)
        model = model.float().to(DEVICE)
        found = {}
        if piece == 'compiled' and not TINY:
            compile_blocks(model, 'graph', DEVICE)
        if piece != 'compiled':
            found = {'float32': gradient(model, tokens), 'bfloat16': gradient(model, tokens, half)}
        if not TINY:
            step = Graphs()
            gradient(model, other, step=step)
            found['captured'] = gradient(model, tokens, step=step)
            if not step.works:  # nothing that was captured is measured
                found['captured'] = found['captured'][0], expected * float('nan')
        apart = {way: float((grad - expected).norm() / expected.norm())
                 for way, (_, grad) in found.items()}
        report(' '.join([piece, kind, *sizes.values()]), apart,
               {'float32': 1e-3, 'bfloat16': 0.1, 'captured': 1e-3})

def captured():
    """What is dropped in a captured micro-step is new each time; where capturing fails, training
    goes on unharmed."""
    model, (tokens, _) = make('fold', dropout=0.3)
    model.to(DEVICE)
    step, losses = Graphs(), []
    for way in (step, step, None, None):
        torch.manual_seed(len(losses) % 2)
        losses.append(gradient(model, tokens, step=way)[0])
    report('dropout, as without', {'apart': max(abs(losses[i] / losses[i + 2] - 1) for i in (0, 1)),
                                   'the same again': float(losses[0] == losses[1])},
           {'apart': 1e-3, 'the same again': 1})
    hook = model.register_forward_hook(lambda model, inputs, found: found[1].item() and None)
    torch.manual_seed(0)
    with redirect_stderr(StringIO()) as told:
        loss, _ = gradient(model, tokens, step=Graphs())
    hook.remove()
    assert 'does not work here' in told.getvalue()
    torch.manual_seed(0)
    report('where capturing fails', {'apart': abs(loss / gradient(model, tokens)[0] - 1)},
           {'apart': 1e-3})

def speed(name, way, gate):
    """Print a side's speed, batch by batch. At each it gets ready beside the other sides, says so,
    is measured alone, and says that: every answer is followed by a file, gate1, gate2 and so on,
    that the session holds until all sides have answered; gate0 is of the one that is measured."""
    files = (open(f'{gate}{number}', 'w') for number in count(1))

    @contextmanager
    def turn():
        print('@@{}', flush=True)
        with next(files) as file, open(f'{gate}0', 'w') as alone:
            fcntl.flock(file, fcntl.LOCK_SH)
            fcntl.flock(alone, fcntl.LOCK_EX)
            yield
    (kind, l, T), n = SIDES[name], '2' if TINY else '20'
    s = configure(vars(bench), [f'--segment_size={l}', f'--batch_size={BATCH}', '--threads=1',
                                f'--compile={way}', f'--device={DEVICE}', '--rounds=3',
                                f'--steps={n}', f'--largest_batch={BATCH * 4 ** (BATCHES - 1)}'])
    for found in bench.speeds(kind, SIZE, T, s, turn):
        print('@@' + json.dumps(found), flush=True)
        with next(files) as file:
            fcntl.flock(file, fcntl.LOCK_SH)

if __name__ == '__main__':
    pick_device(DEVICE)  # as the scripts do, which sets TF32
    {'gradients': gradients, 'captured': captured, 'speed': speed}[sys.argv[1]](*sys.argv[2:])
