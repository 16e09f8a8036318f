"""A side of bench.py's measurements of training: a model and its way of back-propagation, at work
in a process of its own: `python -m lib.bench_sides JOB`, the arguments of measure() in JSON."""
import json
import re
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

from lib.console import require
from lib.contract import adamw, make_model, unit
from lib.device import choose_products, compile_blocks, keep_freed_memory, peak_mb, set_threads
from lib.gradients import backpropagate
from lib.records import ROOT


def make_side(side, size, T, s):
    """A model for sequences of T tokens, and the side's way. Raises SystemExit for bad names."""
    model_type, _, way = side.partition(' ')
    found = re.fullmatch(r'(\d+)\+(\d+)x(\d+)x(\d+)', size)
    require(found and way in ('', 'truncated', 'recomputed'),
            f"{side!r} of size {size!r}: a side is a model_type, or one and 'truncated' or "
            "'recomputed'; a size is such as 2+2x128x4")
    n_local, n_global, n_embd, n_head = map(int, found.groups())
    return make_model(model_type, dict(
        n_layer=n_local + n_global, n_local=n_local, n_global=n_global, n_embd=n_embd,
        n_head=n_head, bias=False, dropout=0.0, block_size=T, vocab_size=s.vocab_size,
        segment_size=s.segment_size)), way


def rate(n, device, work, *args):
    """Tokens per second of work(*args), which is about n tokens, by the wall clock."""
    before = time.perf_counter()
    work(*args)
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return n / (time.perf_counter() - before)


def measure(what, side, size, T, settings):
    """The 'speed' of a side, the median of the rounds in tokens per second, or the peaks of its
    'memory' in MB before and after updates, several of short sequences: the second one takes more,
    for gradients and gaps in the heap."""
    s = SimpleNamespace(**settings)
    set_threads(s.threads)
    if s.device == 'cpu':
        keep_freed_memory()
        choose_products(s.products)
    torch.manual_seed(s.seed)
    model, way = make_side(side, size, T, s)
    compile_blocks(model.to(s.device), s.compile, s.device)
    optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.99), s.device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its memory is there before the measurement
    tokens = torch.randint(s.vocab_size, (s.batch_size, T + 1), dtype=torch.uint16)
    chunk = s.bptt_segments * unit(model) if way == 'truncated' else 0
    autocast = torch.autocast('cuda', torch.bfloat16, s.device.startswith('cuda'))

    def updates(n):
        for _ in range(n):
            backpropagate(model, tokens[:, :-1], tokens[:, 1:], chunk=chunk, device=s.device,
                          recompute=way == 'recomputed', autocast=autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    if what == 'memory':
        before = peak_mb(s.device)
        updates(max(1, 1536 // T))
        return float(before), float(peak_mb(s.device))
    _, *rates = [rate(s.steps * s.batch_size * T, s.device, updates, s.steps)
                 for _ in range(s.rounds + 1)]
    return statistics.median(rates)


def in_process(*job):
    """measure() in a new process. Raises SystemExit, in one line, if that fails or is killed."""
    done = subprocess.run([sys.executable, '-m', 'lib.bench_sides', json.dumps(job)], cwd=ROOT,
                          capture_output=True, text=True, start_new_session=True)  # without Ctrl-C
    *_, reason = ['', *done.stderr.splitlines()] if done.returncode > 0 else ['killed']
    require(done.returncode == 0, f'{job[1]} at {job[2]}, {job[3]:,} tokens, ended: {reason}')
    sys.stderr.write(done.stderr)  # such as that nothing is compiled
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
