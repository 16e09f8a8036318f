"""The model contract: what training, scoring and streaming ask of a model, whatever its class.

    logits, loss, carry = model(idx, targets=None, carry=None)

idx, targets: (B, T) int64. With targets: logits (B, T, V) and the mean loss in nats, targets of -1
left out. Without: None for a loss, and the logits of the last position, (B, 1, V). carry: None if
the model keeps nothing (it then reads at most config.block_size tokens at once), else a tensor or a
flat tuple of tensors, rows first, valid after whole recurrence steps of `model.unit` tokens (1 if
not said). `model.config` is a dataclass with block_size and vocab_size. For speed a model may have
`new_cache(B)` and `extend(idx, place, carry, cache, first)`, as in models/cached.py; without them
the open recurrence step is computed anew for every token.
"""
import math
import os
import re
from contextlib import suppress
from dataclasses import fields

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.console import require
from lib.rows import as_tuple, rowwise
from models import MODELS

def unit(model):
    """Tokens of a recurrence step."""
    return getattr(model, 'unit', 1)

def border(model):
    """The token at which a document begins, where what was before is forgotten; -1 is none."""
    return getattr(model.config, 'border', -1)

@torch.no_grad()
def output_for_zeros(model, B, targets=False):
    """What a model returns for B rows of a recurrence step."""
    was_training, device = model.training, next(model.parameters()).device
    idx = torch.zeros(B, unit(model), dtype=torch.int64, device=device)
    found = model.eval()(idx, idx if targets else None)
    model.train(was_training)
    return found

def check_contract(model):
    """Raises SystemExit for a model whose forward() does not return what the contract says."""
    for B, targets in ((2, False), (3, False), (2, True)):
        found, fine, T = output_for_zeros(model, B, targets), False, unit(model) if targets else 1
        with suppress(AttributeError, TypeError, ValueError):  # of other kinds than are expected
            logits, loss, carry = found
            rows = rowwise(lambda part: part.shape[0], carry)
            fine = (logits.shape == (B, T, model.config.vocab_size) and (loss is None) != targets
                    and {*as_tuple(rows)} <= {B, None})
        require(fine, f'{type(model).__name__}.forward() must return logits (B, T, V), the mean '
                f'loss, and a carry of None or of tensors (B, ...); without targets, logits '
                f'(B, 1, V), None, and a carry: see lib/contract.py')

def blank_carry(model, B=1):
    """Zeros of the shape of the carry of B rows; None if the model has no carry."""
    return rowwise(lambda x: x.new_zeros(B, *x.shape[1:]), output_for_zeros(model, 1)[2])

def carries(model):
    """Whether a model has a carry, so that its context goes beyond what it reads at once."""
    return blank_carry(model) is not None

def memory():
    """Bytes of memory of this machine; infinity where the system does not say."""
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return math.inf

def make_model(model_type, sizes, copies=1):
    """A fresh model of MODELS, from a dictionary with the keys of its config. copies: how many
    times its size it is to take in memory, with gradients and the like. Raises SystemExit for an
    unknown type, for sizes that no model can have, or for too little memory."""
    config_class, model_class = find_model(model_type)
    given = {f.name: sizes[f.name] for f in fields(config_class) if f.name in sizes}
    for name in [field.name for field in fields(config_class) if field.type is int]:
        least = {'n_local': 0, 'window': 0, 'border': -1}.get(name, 1)
        most = 1000 if name in ('n_layer', 'n_local', 'n_global', 'queue') else 2 ** 48
        value = given.get(name, least)
        require(value >= least, f'{name} must be at least {least}, not {value}')
        require(value <= most, f'{name}={value} must be at most {most:,}')
    dropout = given.get('dropout', 0)
    require(0 <= dropout < 1, f'dropout must lie in [0, 1), not {dropout}')
    try:
        config = config_class(**given)
        n_layer, C = getattr(config, 'n_layer', 0), getattr(config, 'n_embd', 0)
        need = copies * 4 * (config.vocab_size + 12 * n_layer * C) * C  # a GPT's, about a peer's
        require(need < memory(), f'this model takes some {need / 1e9:,.0f} GB, this machine has '
                f'{memory() / 1e9:,.0f}: make n_embd or the number of layers smaller')
        return model_class(config)
    except (TypeError, ValueError) as error:
        raise SystemExit(f'error: {error}') from None
    except RuntimeError as error:
        if not re.search('memory|overflow', str(error)):  # it is not the allocator's
            raise
        raise SystemExit(f'error: no memory for this model ({str(error)[:60]}): make n_embd or the '
                         f'number of layers smaller') from None

def find_model(model_type):
    """The config's and the model's class. Raises SystemExit for an unknown type."""
    require(isinstance(model_type, str) and model_type in MODELS,
            f'model_type must be one of {", ".join(map(repr, MODELS))}, not {model_type!r}')
    return MODELS[model_type]

def count_parameters(model):
    """Parameters without the position embedding, as GPTs are usually counted."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith('wpe.weight'))

def flops_per_token(model, T):
    """FLOPs of training on a sequence of T tokens, per token: the matrix products of forward and
    backward, as torch counts them; norms, softmax and embeddings are not counted."""
    def counted(some):
        idx = torch.zeros(1, T, dtype=torch.int64)
        # a fused kernel would count nothing
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            some(idx, idx)[1].backward()
        some.zero_grad(set_to_none=True)
        return counter.get_total_flops() / T
    try:
        with torch.device('meta'):  # shapes alone
            return counted(type(model)(model.config))
    except (RuntimeError, TypeError):  # a model that looks at numbers
        with next(model.parameters()).device:
            return counted(model)

def adamw(model, weight_decay, learning_rate, betas, device):
    """AdamW in two groups: matrices and embeddings decay, biases and layer norms do not."""
    groups = [{'params': [p for p in model.parameters() if (p.dim() >= 2) is matrices],
               'weight_decay': weight_decay * matrices} for matrices in (True, False)]
    fused = device.split(':')[0] in ('cpu', 'cuda')
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
