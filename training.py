"""
What training at any length rests on: back-propagation chunk by chunk, several processes, compiling, signals.
"""
import atexit
import ctypes
import os
import platform
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import manual_backward
import model as definition
from model import FoldGPT

# set by torchrun; a single process has none of them
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(key, value)) for key, value in
                           (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))


def backpropagate(model, x, y, carry=None, share=1.0, sync=True, chunk=0, recompute=False, device='cpu',
                  autocast=nullcontext()):
    """Add the gradient of share * (mean loss of x, y) to that of the parameters, a chunk of tokens at a time.

    The carry goes from chunk to chunk, its gradient does not: memory is that of one chunk, and the sum over the
    chunks is that of one call with the carry detached between them.

    Args:
        model: GPT or FoldGPT, or one of them in a DistributedDataParallel.
        x, y (B, T) integers of any kind, on the CPU: tokens and targets, moved to the device as they are needed.
        carry (B, l, C) or None: as in FoldGPT.forward; no gradient flows into it.
        sync: whether this is the last call before an update: its last piece averages gradients over processes.
        chunk: tokens of a chunk, whole segments; the last one may be shorter. 0 takes all T at once.
        recompute: of a fold, keep nothing of a chunk for backward but the carries between its segments.
    Returns:
        share * (mean loss), and the last carry; both detached, on the device.
    """
    T, total = x.size(1), 0.0
    for t in range(0, T, chunk or T):
        part = [tokens[:, t:t + (chunk or T)] for tokens in (x, y)]
        step = recomputed if recompute else piece
        last = sync and t + (chunk or T) >= T
        loss, carry, _ = step(model, *part, carry, share * part[0].size(1) / T, last, device, autocast)
        total += loss
    return total, carry


def piece(model, x, y, carry, share, sync, device, autocast, grad=None, onward=False):
    """Forward and backward through x, y (B, T) at once; grad (B, l, C) or None is what its last carry is to get.

    Returns share * loss, the last carry, and, if it is to go onward, the gradient that reaches the first one.
    """
    carry = None if carry is None else carry.detach().requires_grad_(onward)
    alone = isinstance(model, DistributedDataParallel) and not sync
    with model.no_sync() if alone else nullcontext():
        with autocast:
            _, loss, last = model(to_device(x, device), to_device(y, device), carry)
        loss = loss * share
        torch.autograd.backward([loss] if grad is None else [loss, last], [None] if grad is None else [None, grad])
    return loss.detach(), None if last is None else last.detach(), carry.grad if onward else None


def recomputed(model, x, y, carry, share, sync, device, autocast):
    """As piece, in the memory of one segment and of the carry before each.

    First the carries, without a graph; then the segments once more from the last to the first, each with the random
    numbers of the first time, and each handing the gradient of the carry before it on. (torch.utils.checkpoint would
    keep the nodes of the whole graph, for small segments more memory than the carries.)
    """
    fold = model.module if isinstance(model, DistributedDataParallel) else model
    inputs, targets = (tokens.split(fold.config.segment_size, dim=1) for tokens in (x, y))  # (B, l) each
    random, carries = [random_state(device)], [carry]
    with torch.no_grad(), autocast:
        for s, x_s in enumerate(inputs[:-1]):
            carry = fold(to_device(x_s, device), carry=carry)[2]
            if s == 0:  # one block for all of them: pieces of their size would be scattered among what comes and goes
                carries += carry.new_empty(len(inputs) - 1, *carry.shape)
            carries[s + 1].copy_(carry)
            random.append(random_state(device) if fold.config.dropout else random[0])
    total, grad, after = 0.0, None, None
    for s in reversed(range(len(inputs))):
        set_random_state(random[s], device)
        part = share * inputs[s].size(1) / x.size(1)
        loss, last, grad = piece(model, inputs[s], targets[s], carries[s], part, sync and s == 0, device, autocast,
                                 grad, onward=s > 0)
        total += loss
        after = after or (last, random_state(device))
    set_random_state(after[1], device)
    return total, after[0], None


def random_state(device):
    """What dropout draws from: the random numbers of the CPU and of the device."""
    return torch.get_rng_state(), device_random_state(device)


def device_random_state(device):
    if device.startswith('cuda'):
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device == 'mps' else None


def set_random_state(state, device):
    torch.set_rng_state(state[0])
    if state[1] is not None and device.startswith('cuda'):
        torch.cuda.set_rng_state(state[1], device)
    if state[1] is not None and device == 'mps':
        torch.mps.set_rng_state(state[1])


def to_device(tokens, device):
    """tokens (B, T) on the CPU -> int64 on the device."""
    tokens = tokens.long()
    return tokens.pin_memory().to(device, non_blocking=True) if device.startswith('cuda') else tokens.to(device)


class Walk:
    """Rows that read a corpus in order: where each of them is, and the carry it brought there.

    Row r of R starts at r / R of the corpus. A row that has less than a whole sequence before it begins anew at token
    0, its carry dropped there: what it skips is less than a sequence, and stands elsewhere in those of other rows.
    """

    def __init__(self, R, T, corpus_size):
        self.T, self.corpus_size = T, corpus_size
        self.at = torch.arange(R) * (corpus_size - T) // R  # (R,) first token of the next sequence
        self.fresh = torch.ones(R, dtype=torch.bool)        # rows that have read nothing
        self.carry = None                                   # (R, l, C); only those of this process's rows are kept up

    def advance(self, rows):
        """Step on with rows (B,): the first tokens of their sequences, and which of them have no carry."""
        ended = self.at[rows] + self.T >= self.corpus_size  # the last token is the target of the one before
        starts, fresh = self.at[rows].masked_fill(ended, 0), self.fresh[rows] | ended
        self.at[rows], self.fresh[rows] = starts + self.T, False
        return starts, fresh

    def groups(self, rows, fresh):
        """Rows (B,) parted by whether they have a carry: pairs of places among the B, and their carry or None."""
        if self.carry is None or fresh.all():
            return [(slice(None), None)]
        if not fresh.any():
            return [(slice(None), self.carry[rows])]
        old, new = (~fresh).nonzero()[:, 0], fresh.nonzero()[:, 0]
        return [(old, self.carry[rows[old]]), (new, None)]

    def keep(self, rows, carry):
        """Take the carry of rows (B,); a GPT has none."""
        if carry is not None:
            if self.carry is None:
                self.carry = carry.new_zeros(len(self.at), *carry.shape[1:])
            self.carry[rows] = carry

    def state(self, mine):
        """What a checkpoint holds: the carries of all processes; `mine` are the rows of this one."""
        carry = self.carry
        if carry is not None and WORLD > 1:
            carry = torch.zeros_like(carry)
            carry[mine] = self.carry[mine]
            dist.all_reduce(carry)
        return {'at': self.at, 'fresh': self.fresh, 'carry': carry}

    def load(self, state, device):
        """Go on where another walk was, in any number of processes. Raises SystemExit if it had other rows."""
        if len(state['at']) != len(self.at):
            raise SystemExit(f"error: the checkpoint's streams are {len(state['at'])} rows, batch_size * "
                             f"gradient_accumulation_steps is {len(self.at)}; stream=False goes on without them")
        self.at, self.fresh = state['at'], state['fresh']
        self.carry = None if state['carry'] is None else state['carry'].to(device)


# --- several processes ------------------------------------------------------------------------------------------

def join(device):
    """Meet the processes that torchrun started: one GPU each with nccl, else gloo. Returns this one's device."""
    if WORLD == 1:
        return device
    if 'MASTER_ADDR' not in os.environ:
        raise SystemExit(f"error: WORLD_SIZE={WORLD} is set, but not by torchrun: unset it, or start with torchrun")
    if RANK:
        sys.stdout = open(os.devnull, 'w')  # one process prints
    cuda = device.startswith('cuda')
    if not cuda and device != 'cpu' or cuda and LOCAL_RANK >= torch.cuda.device_count():
        raise SystemExit(f"error: process {LOCAL_RANK} of this machine finds no device of its own on {device!r}; "
                         f"start as many as there are GPUs, or take --device=cpu")
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    # others wait while one evaluates; small things on the CPU go by gloo even where gradients go by nccl
    dist.init_process_group('cpu:gloo,cuda:nccl' if cuda else 'gloo', timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    return f'cuda:{LOCAL_RANK}' if cuda else device


def leave(stop):
    """Answer signals as usual again; and end this process, when the run is done, if it is one of several.

    Not through the interpreter's own end: a thread of gloo's that lets go of its last tensor then, which needs the
    interpreter, aborts the process (seen in 4 of 60 short runs on a busy machine).
    """
    stop.done()
    if WORLD > 1:
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def parallel(model, device):
    """The model, as one that averages its gradients over the processes if there are several."""
    if WORLD == 1:
        return model
    gated = getattr(model.config, 'carry', 'plain') == 'gated'  # a first segment has no gate: a backward pass may not meet it
    if device.startswith('cuda'):
        return DistributedDataParallel(model, device_ids=[LOCAL_RANK], find_unused_parameters=gated)
    # gradients go in pieces of 25 MB, a small model's in one: to begin with one of 1 MB, as is usual, does not pay on CPUs
    return DistributedDataParallel(model, bucket_cap_mb=25, gradient_as_bucket_view=True, find_unused_parameters=gated)


def from_writer(make):
    """What make() returns in the one process that writes; all get it, and wait for it. If it raises SystemExit there,
    the others end as well, without a word: they would wait for a process that is gone."""
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


def mean(value):
    """The mean of a tensor over the processes."""
    if WORLD > 1:
        dist.all_reduce(value)
        value /= WORLD
    return value


# --- updates of the memory tasks --------------------------------------------------------------------------------

def linear_lr(it, max_iters, learning_rate, warmup_iters, decay_from):
    """The learning rate of update it: linear warm-up, constant, and from a share of the updates on linear decay to 0."""
    return learning_rate * min((it + 1) / warmup_iters, 1.0, (max_iters - it) / max(1, max_iters * (1 - decay_from)))


def update(model, optimizer, loss, lr, grad_clip):
    """One update by the gradient of a loss, its norm clipped unless grad_clip is 0. Raises SystemExit if the loss is no number."""
    if not loss.isfinite():
        raise SystemExit(f"error: the loss is {loss.item()}: stopped without saving. A lower learning_rate usually helps (now {lr:g})")
    for group in optimizer.param_groups:
        group['lr'] = lr
    loss.backward()
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- stopping ---------------------------------------------------------------------------------------------------

class Stop:
    """Turns the first SIGINT or SIGTERM into a wish to stop; the second ends the process at once.

    Under torchrun, which itself sends on what it gets and kills after half a minute, further ones are not counted.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.signal = number
        if WORLD == 1:
            self.done()

    def done(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def wanted(self):
        """The signal that any of the processes got, 0 if none did; to be called by all."""
        if WORLD == 1:
            return self.signal
        wanted = torch.tensor(self.signal)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return int(wanted)


# --- compiling --------------------------------------------------------------------------------------------------

PRODUCTS = 'auto', 'onednn', 'torch'
COMPILE = {'auto': None, 'off': None, 'manual': None, 'kernels': 'default', 'graphs': 'reduce-overhead'}  # modes of torch.compile


def keep_freed_memory():
    """Have the C library keep what is freed for the next update, where it is glibc: on a CPU the page faults of giving
    it back and taking it anew are 5 to 10 % of an update's time. Returns whether it does."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    trim_threshold, mmap_threshold = (-1, 2 ** 31 - 1), (-3, 2 ** 25)  # of malloc.h; each the largest it takes
    return all([mallopt(*trim_threshold), mallopt(*mmap_threshold)])


def onednn_products():
    """Have oneDNN do float32 matrix products on AMD's processors with AVX-512, which torch's MKL leaves unused on them:
    training becomes 1.4 to 2 times as fast, for some more memory. Returns whether it does them.

    torch gives oneDNN such products only where it may round what it multiplies to bfloat16. A processor without matrix
    units for bfloat16 gains nothing by that and does not: tried out here, with numbers that would not survive it.
    (torch.get_float32_matmul_precision, of the older interface, raises a RuntimeError from then on.)
    """
    mkldnn, exact = torch.backends.mkldnn, False
    if (not mkldnn.is_available() or not mkldnn.enabled or torch.backends.cpu.get_cpu_capability() != 'AVX512'
            or 'AuthenticAMD' not in processor()):
        return False
    before, mkldnn.matmul.fp32_precision = mkldnn.matmul.fp32_precision, 'bf16'
    try:
        tried = [torch.full(shape, 1 + 2 ** -10) for shape in ((64, 64), (1024, 1024), (8, 256, 256))]
        exact = all(torch.allclose(x @ x, x.double().square().sum(-1, keepdim=True).float(), rtol=1e-5) for x in tried)
    finally:
        if not exact:
            mkldnn.matmul.fp32_precision = before
    if exact:
        definition.SHORT_WINDOW = 384  # so far the products of an attention gain more than the fused kernel, at its memory
    return exact


def choose_products(products):
    """Who multiplies on this CPU from now on, by a setting of PRODUCTS: 'onednn' or 'torch'; and attention as is fastest."""
    definition.SHORT_ROWS = manual_backward.SHORT_ROWS  # not in scripts that do not call this: their runs stay bit for bit
    if products == 'torch' or not onednn_products():
        if products == 'onednn':
            print("oneDNN's products do not serve on this machine; going on with torch's")
        return 'torch'
    return 'onednn'


def processor():
    """What the system says of its processor."""
    try:
        with open('/proc/cpuinfo') as f:
            return f.read(4096)
    except OSError:
        return platform.processor()


def compile_model(model, B, how, device, autocast=nullcontext()):
    """Compile what an update on B rows runs most, in place: of a fold, the step of the segment loop, `globally` on
    whole windows (B, 2l, C); of a GPT, all of its blocks, `hidden` on (B, block_size) tokens. Other shapes stay eager.

    how: 'kernels' fuses operations, 'graphs' replays them as a CUDA graph as well, 'off' does nothing, 'manual' takes
    the backward pass of manual_backward.py where it serves (float32, and what its install says); 'auto' is 'kernels' on
    CUDA, 'manual' on the CPU and 'off' elsewhere. What is compiled is tried out, backward too; if that fails, a line says
    so and everything stays as it is. Returns whether the model is another now.
    """
    if how == 'auto':
        how = 'kernels' if device.startswith('cuda') else 'manual' if device == 'cpu' else 'off'
    if how == 'manual':
        return isinstance(autocast, nullcontext) and manual_backward.install(model)
    if how == 'off':
        return False
    c, fold = model.config, isinstance(model, FoldGPT)
    name, T, usual = ('globally', 2 * c.segment_size, c.segment_size) if fold else ('hidden', c.block_size, 0)
    eager = getattr(model, name)
    compiled = torch.compile(eager, mode=COMPILE[how], dynamic=False)

    def step(x, n=usual, cache=None):  # n: how many positions a fold computes at last; the first position of a GPT
        if cache is not None or n != usual or x.shape[:2] != (B, T):
            return eager(x, n, cache)
        x = compiled(x, n)
        return x.clone() if how == 'graphs' else x  # the next replay writes where this one did
    try:
        with torch.random.fork_rng(), autocast:
            if fold:
                x = window = torch.zeros(B, T, c.n_embd, device=device, requires_grad=True)
                for _ in range(3):  # as the loop does: several steps forward, then as many backward
                    x = step(window)
                    window = torch.cat((x, x), dim=1)
            else:
                x = step(torch.zeros(B, T, dtype=torch.int64, device=device))
        x.sum().backward()
    except Exception as error:  # a compiler can fail in any way
        print(f"torch.compile does not work here ({type(error).__name__}: {' '.join(str(error).split())[:80]}); "
              f"going on without it")
        return False
    finally:
        model.zero_grad(set_to_none=True)
    setattr(model, name, step)
    if how == 'graphs':  # gradients are added to these: those that a graph gives lie where its next replay writes
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    return True
