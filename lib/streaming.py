"""Streaming: any number of tokens is read into a state of constant size, and written from it."""
import math
import sys
from itertools import pairwise

import torch

from lib.console import require, write
from lib.contract import blank_carry, border, carries, unit
from lib.rows import Rows, rowwise
from model import FUSED_FROM

TOKENS_PER_CALL = 6144  # of all rows: more in one call leave a CPU's caches, and take longer
MOST_TRIED = 2048  # tokens of one call, where a model is tried out
FEW_TOKENS = 64  # up to so many, calling oneDNN costs more than it saves

def new_state(model, B=1):
    """The state of B rows of which nothing has been read: Rows of

    read (B,) int64 on the CPU, tokens of the document that were read; logits (B, V) of the next;
    carry, as the contract has it; tokens (B, N), those of the open recurrence step or of the
    window, where they are computed anew; cache, where the model has one that agrees with forward.
    """
    extends = getattr(model, 'extend', None)
    if extends and reads_alike(model, cached=True):
        return empty_state(model, B, cached=True)
    check_reading(model)
    if extends:
        write(sys.stderr, f'{type(model).__name__} reads otherwise through extend() than in '
                          'forward(): what is open is computed anew for every token (slow)\n')
    return empty_state(model, B, cached=False)

def empty_state(model, B, cached):
    carry, zeros = blank_carry(model, B), next(model.parameters()).new_zeros
    N = model.config.block_size if carry is None else unit(model)
    kept = carry is None or not cached
    return Rows(read=torch.zeros(B, dtype=torch.int64), logits=zeros(B, model.config.vocab_size),
                carry=carry, tokens=zeros(B, N, dtype=torch.int64) if kept else None,
                cache=model.new_cache(B) if cached else None)

def check_reading(model, least=0):
    """Raises SystemExit for a model that breaks the contract, or cannot be read piece by piece;
    tried on `least` tokens or more, but no more than it reads at once."""
    require(reads_alike(model, False, least), f'{type(model).__name__} gives other logits for a '
            f'text as a whole than piece by piece with the carry passed on: its forward() sees '
            f'what is still to come, or depends on more than the carry (lib/contract.py)')

@torch.no_grad()
def reads_alike(model, cached, least=0):
    """Whether reading piece by piece, through caches or not, gives the logits of one call on the
    whole: tried on a few segments, as a reader may change one of the ways alone."""
    u, keeps, was_training = unit(model), carries(model), model.training
    longest = max(5 * u + 2 if keeps else FUSED_FROM + 5, min(least, MOST_TRIED))
    longest = longest if keeps else min(longest, model.config.block_size)
    device = next(model.parameters()).device
    idx = (7 * torch.arange(longest, device=device) % model.config.vocab_size)[None]
    idx[idx == border(model)] = (border(model) + 1) % model.config.vocab_size
    ends = {1, u // 2, u, u + 1, 2 * u, 2 * u + u // 2, 4 * u + 1, longest - 1, longest}
    ends &= {*range(1, longest + 1)}
    model.eval()
    try:
        expected, state = model(idx, idx)[0], empty_state(model, 1, cached)
        if not expected.isfinite().all():
            return True  # whoever reads is told
        tolerance = 1000 * torch.finfo(expected.dtype).eps * (1 + expected.abs().max())
        for at, end in pairwise([0, *sorted(ends)]):
            found = read_(model, idx[:, at:end], state)
            if not (found - expected[:, end - 1]).abs().max() <= tolerance:
                return False
        return True
    except (TypeError, AttributeError, RuntimeError):  # extend() of another carry
        if not cached:
            raise
        return False
    finally:
        model.train(was_training)

def read(model, idx, state=None):
    """Read idx (B, T), any T: logits (B, V) of the token that follows, zeros if nothing has been
    read, and the new state; the state handed in stays as it is."""
    state = new_state(model, len(idx)) if state is None else state.clone()
    return read_(model, idx, state).clone(), state

@torch.inference_mode()
def read_(model, idx, state):
    """As read, in place, for speed; the logits are the state's own. Raises ValueError for other
    rows than the state's or a model that drops activations, FloatingPointError if logits are not
    finite, naming the token."""
    if len(idx) != len(state) or model.training and getattr(model.config, 'dropout', 0):
        raise ValueError('reading takes a row of tokens for every row of the state, and '
                         'model.eval()')
    library = torch.backends.mkldnn
    was, library.enabled = library.enabled, library.enabled and idx.numel() > FEW_TOKENS
    try:
        read_texts(model, idx, state)
    finally:
        library.enabled = was
    return state.logits

def read_texts(model, idx, state):
    """read_ of tokens in which documents may begin."""
    if border(model) < 0:
        return read_document(model, idx, state)
    begins = (idx == border(model)).cpu()  # a document, with which its row starts anew
    places = begins.any(dim=0).nonzero()[:, 0].tolist()
    for part, anew in zip(*(x.tensor_split(places, dim=1) for x in (idx, begins))):
        rows = anew[:, :1].any(dim=1).nonzero()[:, 0]
        if len(rows):
            state.put(rows, empty_state(model, len(rows), state.cache is not None))
        read_document(model, part, state)

def read_document(model, idx, state):
    """read_ of tokens of which only the first can begin a document."""
    counts = set(state.read.tolist())
    if len(counts) == 1:
        read_rows(model, idx, state, *counts)
    else:
        before = state.read.clone()
        for count in counts:  # rows that have read equally much go together
            rows = (before == count).nonzero()[:, 0]
            some = state.pick(rows)
            read_rows(model, idx[rows.to(idx.device)], some, count)
            state.put(rows, some)

def read_rows(model, idx, state, count):
    """read_ of rows that have all read `count` tokens: piece by piece, each of one call."""
    advance = read_window if state.carry is None else read_carry
    while idx.size(1):
        logits, n, changes = advance(model, idx, state, count)
        if not math.isfinite(logits.sum().item()):
            for token in idx[:, :n].split(1, dim=1) if n > 1 else ():  # to find the one
                read_rows(model, token, state, count)
                count += 1
            raise FloatingPointError(f'the state is not finite at token {count}')
        for name, value in changes.items():
            setattr(state, name, value)
        state.logits, state.read = logits, state.read + n
        count, idx = count + n, idx[:, n:]

def read_carry(model, idx, state, count):
    """One call of a model with a carry: whole recurrence steps at once, or some tokens of an open
    one, through its cache or computed anew. Returns logits (B, V), tokens read, what changes."""
    u = unit(model)
    place, whole = count % u, min(max(1, TOKENS_PER_CALL // idx.size(0) // u), idx.size(1) // u)
    carry = state.carry if count >= u else None
    if place == 0 and whole:
        logits, _, carry = model(idx[:, :whole * u], carry=carry)
        return logits[:, -1], whole * u, {'carry': carry}
    n = min(idx.size(1), u - place)
    if state.cache is not None:
        # a failed call is to leave the carry as it was
        carry = state.carry if n == 1 else rowwise(torch.clone, state.carry)
        logits, carry = model.extend(idx[:, :n], place, carry, state.cache, count < u)
        return logits, n, {'carry': carry}
    state.tokens[:, place:place + n] = idx[:, :n]
    logits, _, carry = model(state.tokens[:, :place + n], carry=carry)
    return logits[:, -1], n, {'carry': carry} if place + n == u else {}

def read_window(model, idx, state, count):
    """One call of a model without a carry: through its cache while its window has room for all
    that was read, else on the last window."""
    W = state.tokens.size(1)
    place, T = min(count, W), idx.size(1)
    window = torch.cat((state.tokens[:, :place], idx), dim=1)[:, -W:]
    tokens = torch.cat((window, state.tokens[:, window.size(1):]), dim=1)
    if state.cache is not None and place + T <= W:
        logits, _ = model.extend(idx, place, None, state.cache, count == 0)
    else:
        logits = model(window)[0][:, -1]
    return logits, T, {'tokens': tokens}

def stream(model, idx, state, max_new_tokens, temperature=1.0, top_k=0, top_p=0.0, generator=None):
    """Read idx (B, T) into the state, in place, then yield one new token a row (B, 1) at a time,
    read as well."""
    logits = read_(model, idx, state)
    for _ in range(max_new_tokens):
        token = sample_token(logits, temperature, top_k, top_p, generator)
        logits = read_(model, token, state)
        yield token

def generate(model, idx, max_new_tokens, **kwargs):
    """Continue idx (B, T), any T: (B, T + max_new_tokens). kwargs: those of sample_token."""
    tokens = stream(model, idx, new_state(model, len(idx)), max_new_tokens, **kwargs)
    return torch.cat((idx, *tokens), dim=1)

def sample_token(logits, temperature=1.0, top_k=0, top_p=0.0, generator=None):
    """One token a row, logits (B, V) -> (B, 1): at temperature 0 the likeliest, else a random one
    of the top_k likeliest, or of those the fewest that hold the share top_p of the probability."""
    if temperature < 1e-38:  # less is 0, or nearly, in float32
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        probs[:, top_k:] = 0
    if top_p:
        beyond = probs.cumsum(dim=-1) - probs >= top_p * probs.sum(dim=-1, keepdim=True)
        probs[:, 1:] = probs[:, 1:].masked_fill(beyond[:, 1:], 0)
    noise = torch.empty_like(probs).exponential_(generator=generator)  # multinomial() would wait
    return order.gather(1, (probs / noise).argmax(dim=-1, keepdim=True))
