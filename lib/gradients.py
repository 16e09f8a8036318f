"""Back-propagation at any length: whole, chunk by chunk, or with segments computed anew."""
from contextlib import nullcontext

import torch

from lib.contract import unit
from lib.rows import as_tuple, rowwise

def backpropagate(model, x, y, carry=None, share=1.0, chunk=0, recompute=False, device='cpu',
                  autocast=nullcontext(), step=None):
    """Add the gradient of share * (mean loss of x, y) to that of the parameters, chunk by chunk.

    The carry goes from chunk to chunk, its gradient does not: memory is that of one chunk, and the
    sum over the chunks is that of one call with the carry detached between them.

    Args:
        x, y (B, T) integers of any kind: tokens and targets, moved to the device as needed.
        carry: as the model takes it, or None; no gradient flows into it.
        chunk: tokens of a chunk, whole recurrence steps; 0 takes all T at once.
        recompute: keep nothing of a chunk for backward but the carries between its segments.
        step: what does the work of a chunk, as piece() does; None is piece itself.
    Returns:
        share * (mean loss), and the last carry; both detached, on the device.
    """
    T, total = x.size(1), 0.0
    step = recomputed if recompute else step or piece
    for part in zip(*(tokens.split(chunk or T, dim=1) for tokens in (x, y))):
        loss, carry, _ = step(model, *part, carry, share * part[0].size(1) / T, device, autocast)
        total += loss
    return total, carry

def piece(model, x, y, carry, share, device, autocast, grad=None, wanted=False):
    """Forward and backward through x, y (B, T) at once; grad: what its last carry is to get.

    Returns share * loss, the last carry, and, if wanted, the gradient of the first one.
    """
    carry = rowwise(lambda c: c.detach().requires_grad_(wanted), carry)
    with autocast:
        _, loss, last = model(to_device(x, device), to_device(y, device), carry)
    loss = loss * share
    handed = zip(as_tuple(last), as_tuple(grad))
    ends = [(loss, None), *((value, part) for value, part in handed if part is not None)]
    torch.autograd.backward(*zip(*ends))
    return loss.detach(), rowwise(torch.detach, last), rowwise(lambda c: c.grad, carry)

def recomputed(model, x, y, carry, share, device, autocast):
    """As piece, in the memory of one recurrence step and of the carry before each: the carries come
    first, without a graph; then the segments once more, from the last to the first, each with the
    random numbers of the first time, handing on the gradient of the carry before it.
    (torch.utils.checkpoint would keep the nodes of the whole graph: more than the carries.)"""
    inputs, targets = (to_device(tokens, device).split(unit(model), dim=1) for tokens in (x, y))
    random, carries = [random_state(device)], [carry]
    with torch.no_grad(), autocast:
        for x_s in inputs[:-1]:
            carries.append(model(x_s, carry=carries[-1])[2])
            random.append(random_state(device))
    total, grad, after = 0.0, None, None
    for s in reversed(range(len(inputs))):
        set_random_state(random[s], device)
        part = share * inputs[s].size(1) / x.size(1)
        loss, last, grad = piece(model, inputs[s], targets[s], carries[s], part, device, autocast,
                                 grad, wanted=s > 0)
        total += loss
        after = after or (last, random_state(device))
    set_random_state(after[1], device)
    return total, after[0], None

def random_state(device):
    """What dropout draws from: the random numbers of the CPU, and of the device or None."""
    own = None if device in ('cpu', 'meta') else torch.get_device_module(device).get_rng_state()
    return torch.get_rng_state(), own

def set_random_state(state, device):
    torch.set_rng_state(state[0])
    if state[1] is not None and device != 'cpu':
        torch.get_device_module(device).set_rng_state(state[1])

def to_device(tokens, device):
    """tokens (B, T) of any integers -> int64 on the device."""
    tokens = tokens.long()
    if device.startswith('cuda') and not tokens.is_cuda:
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device)
