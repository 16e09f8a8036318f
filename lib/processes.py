"""Several processes, as torchrun starts them, and the wish to stop: what all of them agree on."""
import atexit
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def from_environment(key, value):
    text = os.environ.get(key) or value
    if not text.isdigit():
        raise SystemExit(f'error: the environment has {key}={text!r}, which torchrun sets to a '
                         f'number: unset it')
    return int(text)


RANK = from_environment('RANK', '0')
LOCAL_RANK = from_environment('LOCAL_RANK', '0')
WORLD = from_environment('WORLD_SIZE', '1')
if RANK >= WORLD:
    raise SystemExit(f'error: the environment has RANK={RANK} and WORLD_SIZE={WORLD}: unset RANK, '
                     f'or start with torchrun')


def join(device):
    """Meet the other processes: one GPU each with nccl, else gloo. Returns this one's device."""
    if WORLD == 1:
        return device
    if 'MASTER_ADDR' not in os.environ:
        raise SystemExit(f'error: WORLD_SIZE={WORLD} is set, but not by torchrun: unset it, or '
                         f'start with torchrun')
    if RANK:
        sys.stdout = open(os.devnull, 'w')  # one process prints
    cuda = device.startswith('cuda')
    if not cuda and device != 'cpu' or cuda and LOCAL_RANK >= torch.cuda.device_count():
        raise SystemExit(f'error: process {LOCAL_RANK} finds no device of its own on {device!r}: '
                         f'start as many as there are GPUs, or take --device=cpu')
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    # others wait while one evaluates; small things go by gloo even where gradients go by nccl
    backend = 'cpu:gloo,cuda:nccl' if cuda else 'gloo'
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    return f'cuda:{LOCAL_RANK}' if cuda else device


def leave():
    """End this process, when the run is done, if it is one of several.

    Not through the interpreter's own end: a thread of gloo's that lets go of its last tensor then,
    which needs the interpreter, aborts the process (seen in 4 of 60 short runs on a busy machine).
    """
    if WORLD > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def same_weights(model):
    """Give all processes the first one's parameters."""
    if WORLD > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


def average_gradients(model):
    """Replace each gradient by its mean over the processes, all in one piece."""
    if WORLD == 1:
        return
    for p in model.parameters():  # one process may have met a parameter that another has not
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([grad.flatten() for grad in grads]) / WORLD
    dist.all_reduce(flat)
    for grad, mean_grad in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean_grad.view_as(grad))


def sum_over(value):
    """The sum of a tensor over the processes."""
    if WORLD > 1:
        dist.all_reduce(value)
    return value


def mean(value):
    """The mean of a tensor over the processes."""
    return sum_over(value) / WORLD


def my_share(rows):
    """The part of the rows of a batch that this process computes."""
    return rows.chunk(WORLD)[RANK]


def from_writer(make):
    """What make() returns in the one process that writes; all get it, and wait for it. If it raises
    SystemExit there, the others end as well, without a word."""
    if WORLD == 1:
        return make()
    box, error = [None, True], None
    if RANK == 0:
        try:
            box = [make(), False]
        except SystemExit as refused:
            error = refused
    dist.broadcast_object_list(box)
    if box[1]:
        raise error or SystemExit(1)
    return box[0]


def from_all(value):
    """The values of all processes, in their order."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


class Stop:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a wish to stop; a second one ends the process.

    Under torchrun, which itself sends on what it gets and kills after half a minute, further ones
    are not counted.
    """
    SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
               if hasattr(signal, name)]

    def __init__(self):
        self.signal = 0
        for number in self.SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.signal = number
        if WORLD == 1:
            self.done()

    def done(self):
        """Answer signals as usual again."""
        for number in self.SIGNALS:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)

    def wanted(self):
        """The signal that any of the processes got, 0 if none did; to be called by all."""
        if WORLD == 1:
            return self.signal
        wanted = torch.tensor(self.signal)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return int(wanted)
