"""How loss is measured: nats per token, deterministic, every model on the same tokens."""
from itertools import pairwise

import torch
from torch.nn import functional as F

from lib.contract import border, carries, unit

STREAMS = 16       # parallel streams in which a model with a carry reads a text
MIN_SEGMENTS = 32  # a stream is not made shorter than this, as each of them starts without history
BLOCKS = 100       # contiguous stretches of tokens behind a standard error

@torch.no_grad()
def token_losses(model, tokens, at=lambda done: None):
    """The loss of every token of a text (N,) but the first, given the text before it: (N - 1,)
    float32 nats on the CPU, in eval mode. at(done) is told how many tokens have been read."""
    was_training = model.training
    model.eval()
    score, losses, done = stream_losses if carries(model) else window_losses, [], 0
    for document in documents(tokens, border(model)):
        losses.append(score(model, document, lambda n: at(done + n)))
        done += len(document) - 1
    model.train(was_training)
    return torch.cat(losses)

def documents(tokens, border):
    """tokens (N,) cut where a document begins; each but the last ends with the border, a target."""
    borders = (tokens[1:-1] == border).nonzero()[:, 0] + 1
    return [tokens[a:b + 1] for a, b in pairwise([0, *borders.tolist(), len(tokens) - 1])]

def stream_losses(model, tokens, at):
    """token_losses of a model with a carry: R streams side by side, whole units a call."""
    n, step = len(tokens) - 1, unit(model)
    R = max(1, min(STREAMS, n // (MIN_SEGMENTS * max(step, 12))))
    x, y = (F.pad(t, (0, -n % (R * step))).view(R, -1) for t in (tokens[:-1], tokens[1:]))
    width = max(1, tokens_per_call(model) // (R * step)) * step
    losses, carry = [], None
    for some, answers in zip(x.split(width, dim=1), y.split(width, dim=1)):
        logits, _, carry = model(some, answers, carry)
        losses.append(per_token(logits, answers))
        at(R * width * len(losses))
    return torch.cat(losses, dim=1).flatten()[:n]  # the padding is at the end of the last stream

def window_losses(model, tokens, at):
    """token_losses of a model without a carry: windows with a stride of half their width W, which
    score their second half (the first window all of itself): no token starts cold."""
    n, W = len(tokens) - 1, model.config.block_size
    stride, rows = max(1, W // 2), max(1, tokens_per_call(model) // W)
    windows = F.pad(tokens, (0, max(W - n, (W - n) % stride))).unfold(0, W + 1, stride)
    losses = [losses_alone(model, windows[:1], W)]
    for start in range(1, len(windows), rows):
        losses.append(losses_alone(model, windows[start:start + rows], stride))
        at((start + rows) * stride)
    return torch.cat([some.flatten() for some in losses])[:n].float()

@torch.no_grad()
def last_losses(model, rows, n):
    """The loss of the last n tokens of rows (M, T + 1), given what is before them in the row alone:
    (M, n) float64 nats on the CPU. A model with a carry counts its units from the row's start."""
    mixed = (rows[:, 1:-1] == border(model)).any(dim=1)  # rows in which a document begins
    losses = torch.zeros(len(rows), n, dtype=torch.float64)
    if not mixed.all():
        losses[~mixed.cpu()] = losses_alone(model, rows[~mixed], n)
    for i in mixed.nonzero()[:, 0].tolist():
        parts = [losses_alone(model, document[None], len(document) - 1)[0]
                 for document in documents(rows[i], border(model))]
        losses[i] = torch.cat(parts)[-n:]
    return losses

def losses_alone(model, rows, n):
    """last_losses of rows without a border."""
    T, W, keeps = rows.size(1) - 1, model.config.block_size, carries(model)
    size = max(1, tokens_per_call(model) // T)
    if len(rows) > size:
        return torch.cat([losses_alone(model, some, n) for some in rows.split(size)])
    if T > W and not keeps:
        early = n - (T - W)  # targets that the row's first window holds
        if early > 0:
            parts = (rows[:, :W + 1], early), (rows, n - early)
            return torch.cat([losses_alone(model, *part) for part in parts], dim=1)
        windows = rows[:, T - n - W + 1:].unfold(1, W + 1, 1)  # (M, n, W + 1): one for each target
        return losses_alone(model, windows.reshape(-1, W + 1), 1).view(len(rows), n)
    start = (T - n) // unit(model) * unit(model) if keeps else 0  # before it, no costly logits
    carry = model(rows[:, :start])[2] if start else None
    logits = model(rows[:, start:-1], None if n == 1 else rows[:, start + 1:], carry)[0]
    return per_token(logits[:, -n:], rows[:, -n:]).double()

def per_token(logits, targets):
    """logits (B, T, V), targets (B, T) -> nats (B, T) on the CPU."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='none')
    return losses.view(targets.shape).cpu()

def tokens_per_call(model):
    """As many tokens as keep the logits of a call near 256 MB, 8192 at most."""
    return min(8192, 2 ** 26 // model.config.vocab_size)

def mean_and_error(losses):
    """Mean of losses (N,), and its standard error from contiguous blocks, as neighboring tokens
    are not independent: None for fewer than BLOCKS tokens."""
    size = max(1, len(losses) // BLOCKS)
    blocks = losses[:len(losses) // size * size].view(-1, size).double().mean(dim=1)
    error = blocks.std().item() / len(blocks) ** 0.5 if len(losses) >= BLOCKS else None
    return losses.double().mean().item(), error
