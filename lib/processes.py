"""Several processes, as torchrun starts them, and the wish to stop: what all of them agree on."""
import atexit
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from lib.console import require

texts = [os.environ.get(key) or usual
         for key, usual in (('RANK', '0'), ('LOCAL_RANK', '0'), ('WORLD_SIZE', '1'))]
require(all(map(str.isdecimal, texts)) and int(texts[1]) <= int(texts[0]) < int(texts[2]),
        'the environment has RANK={}, LOCAL_RANK={}, WORLD_SIZE={}: unset them, or start with '
        'torchrun, which sets them'.format(*texts))
RANK, LOCAL_RANK, WORLD = map(int, texts)

def join(device):
    """Meet the other processes: one GPU each with nccl, else gloo. Returns this one's device."""
    if WORLD == 1:
        return device
    require('MASTER_ADDR' in os.environ and os.environ.get('MASTER_PORT', '').isdecimal(),
            f'WORLD_SIZE={WORLD} is set, but not by torchrun: unset it, or start with torchrun')
    if RANK:
        sys.stdout = open(os.devnull, 'w')  # one process prints
    cuda = device.startswith('cuda')
    require(device == 'cpu' or cuda and LOCAL_RANK < torch.cuda.device_count(),
            f'process {LOCAL_RANK} finds no device of its own on {device!r}: start as many as '
            f'there are GPUs, or take --device=cpu')
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    # others wait while one evaluates; small things go by gloo even where gradients go by nccl
    backend = 'cpu:gloo,cuda:nccl' if cuda else 'gloo'
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    return f'cuda:{LOCAL_RANK}' if cuda else device

def leave():
    """End this process, when the run is done, if it is one of several: not through the
    interpreter's own end, in which a thread of gloo's can abort it (4 of 60 short runs did)."""
    if WORLD > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

def average_gradients(model):
    """Replace each gradient by its mean over the processes, all in one piece."""
    if WORLD == 1:
        return
    for p in model.parameters():  # one process may have met a parameter that another has not
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in model.parameters()]
    means = mean(parameters_to_vector(grads)).split([grad.numel() for grad in grads])
    for grad, part in zip(grads, means):
        grad.copy_(part.view_as(grad))  # in place: a captured update adds to what is there

def mean(value):
    """The mean of a tensor over the processes."""
    if WORLD > 1:
        dist.all_reduce(value)
    return value / WORLD

def my_share(rows):
    """The part of the rows of a batch that this process computes."""
    return rows.chunk(WORLD)[RANK]

def from_writer(make, each_machine=False):
    """What make() returns in the one process that writes, or in the first of each machine; all get
    it, and wait for it. If it raises SystemExit or OSError there, the others end as well, without a
    word."""
    value, error = None, None
    if (LOCAL_RANK if each_machine else RANK) == 0:
        try:
            value = make()
        except (SystemExit, OSError) as refused:
            error = refused
    values, failed = zip(*from_all((value, error is not None)))
    if any(failed):
        raise error or SystemExit(1)
    return values[RANK - LOCAL_RANK if each_machine else 0]

def from_all(value):
    """The values of all processes, in their order."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

def end_on_signals():
    """SIGTERM and SIGHUP end this process as Ctrl-C does, and so with those that it started."""
    for name in ('SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # by nohup
            signal.signal(number, lambda n, _: sys.exit(128 + n))

class Stop:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a wish to stop; a second one ends the process.
    Not so under torchrun, which sends on what it gets, and kills after half a minute."""

    def __init__(self):
        self.signal, self.waiting = 0, False
        known = [getattr(signal, name, None) for name in ('SIGINT', 'SIGTERM', 'SIGHUP')]
        self.numbers = [n for n in known if n and signal.getsignal(n) != signal.SIG_IGN]  # by nohup
        for number in self.numbers:
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.signal = number
        if WORLD == 1:
            self.done()
        if self.waiting:  # reading input that may never come
            raise KeyboardInterrupt

    def done(self):
        """Answer signals as usual."""
        for number in self.numbers:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)

    def wanted(self):
        """The signal that any of the processes got, 0 if none did; to be called by all."""
        if WORLD == 1:
            return self.signal
        wanted = torch.tensor(self.signal)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return int(wanted)
