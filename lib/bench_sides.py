"""A side of bench.py's measurements of training: a model and its way of back-propagation, at work
in processes of its own: `python -m lib.bench_sides JOB`, the arguments of work() in JSON."""
import json
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout, suppress
from types import SimpleNamespace

import torch

from lib.contract import adamw, make_model, unit
from lib.device import choose_products, compile_blocks, keep_freed_memory, peak_mb, set_threads
from lib.gradients import backpropagate
from lib.processes import RANK, average_gradients, from_writer, join, leave, my_share
from lib.records import ROOT


def make_side(side, size, T, s):
    """A model for sequences of T tokens, and the side's way. Raises SystemExit for bad names."""
    model_type, _, way = side.partition(' ')
    numbers = size.replace('+', 'x').split('x')
    if [n.isdecimal() for n in numbers] != [True] * 4 or way not in ('', 'truncated', 'recomputed'):
        raise SystemExit(f"error: {side!r} of size {size!r}: a side is a model_type, or one and "
                         f"'truncated' or 'recomputed'; a size is such as 2+2x128x4")
    n_local, n_global, n_embd, n_head = map(int, numbers)
    return make_model(model_type, dict(
        n_layer=n_local + n_global, n_local=n_local, n_global=n_global, n_embd=n_embd,
        n_head=n_head, bias=False, dropout=0.0, block_size=T, vocab_size=s.vocab_size,
        segment_size=s.segment_size)), way


def seconds(work, device):
    """Wall-clock time of work(), in seconds, the device's own included."""
    before = time.perf_counter()
    work()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter() - before


def work(what, side, size, T, settings):
    """One process of a side. To every line that comes in it answers in a line of JSON: 'speed' in
    tokens per second, or the peaks of 'memory' in MB before and after updates, several of short
    sequences: the second one takes more, for gradients and gaps in the heap."""
    s = SimpleNamespace(**settings)
    set_threads(s.threads)
    device = join(s.device)
    if device == 'cpu':
        keep_freed_memory()
        choose_products(s.products)
    torch.manual_seed(s.seed)
    model, way = make_side(side, size, T, s)
    compile_blocks(model.to(device), s.compile, device)
    optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.99), device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its memory is there before the measurement
    tokens = torch.randint(s.vocab_size, (s.batch_size, T + 1), dtype=torch.uint16)
    x, y = my_share(tokens[:, :-1]), my_share(tokens[:, 1:])
    n = s.steps if what == 'speed' else max(1, 1536 // T)
    chunk = s.bptt_segments * unit(model) if way == 'truncated' else 0
    autocast = torch.autocast('cuda', torch.bfloat16, enabled=device.startswith('cuda'))

    def updates():
        for _ in range(n):
            backpropagate(model, x, y, chunk=chunk, recompute=way == 'recomputed', device=device,
                          autocast=autocast)
            average_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    while from_writer(sys.stdin.readline):
        before = peak_mb(device)
        speed = n * s.batch_size * T / seconds(updates, device)
        if RANK == 0:
            found = speed if what == 'speed' else [float(before), float(peak_mb(device))]
            print(json.dumps(found), file=sys.__stdout__, flush=True)
    leave()


@contextmanager
def at_work(job, n=1):
    """Yield a function that has a side in n processes measure once, and returns the answer. It
    raises SystemExit, in one line, if the side ends instead. Several processes are torchrun's."""
    several = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}'] * (n > 1)
    command = [sys.executable, *several, '-m', 'lib.bench_sides', json.dumps(job)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, start_new_session=True)  # without Ctrl-C

    def ask():
        with suppress(OSError):  # it has ended
            process.stdin.write('\n')
        found = json.loads(process.stdout.readline() or f'"code {process.wait()}"')
        if isinstance(found, str):
            raise SystemExit(f'error: {job[1]} at {job[2]}, {job[3]:,} tokens, ended: {found}')
        return found
    try:
        yield ask
    finally:
        if n == 1:
            process.kill()  # torchrun would leave its processes, which end by themselves
        process.communicate()


if __name__ == '__main__':
    with redirect_stdout(sys.stderr):  # what else is printed is no answer
        try:
            work(*json.loads(sys.argv[1]))
        except (Exception, SystemExit) as error:  # memory can end anywhere
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
            print(json.dumps(reason), file=sys.__stdout__, flush=True)
            raise SystemExit(1) from None
