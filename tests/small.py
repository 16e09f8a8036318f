"""Small models in float64, every case of them, and two that have nothing but a forward pass and a
config."""
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lib.contract import make_model
from lib.rows import rowwise

V, C, HEADS, SEGMENT = 11, 8, 2, 3
SIZES = dict(block_size=4 * SEGMENT, segment_size=SEGMENT, vocab_size=V, n_head=HEADS, n_embd=C,
             n_layer=4, n_local=2, n_global=2)
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

def shake(model):
    """Every parameter, norms and biases too, well away from its initial value; float64, eval."""
    for p in model.double().eval().parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model

def make(kind='fold', **sizes):
    if kind in TOYS:
        config, model = TOYS[kind]
        return shake(model(config()))
    return shake(make_model(kind, {**SIZES, **sizes}))

def make_case(name):
    """A model of CASES or MORE; of four tokens at once where their number is free."""
    model = make(**{**CASES, **MORE}[name])
    if type(model).__name__ in ('Linear', 'DeltaNet', 'Feedback', 'LSTM'):
        model.at_once = 4
    return model

def tokens(B, T):
    return torch.randint(V, (B, T))

def all_logits(model, idx, carry=None):
    """The teacher-forced logits after every token, (B, T, V)."""
    return model(idx, idx, carry)[0]

def gradients(model):
    """The gradients of a model, by name, taken off it."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads

def reach(model, idx, chunk, detach=True):
    """|d loss of the last token / d embedding| of each token of one row, read in chunks between
    which the carry is passed on, or detached."""
    seen, embed, carry = [], model.embed, None
    model.embed = lambda *args: seen.append(embed(*args)) or seen[-1]
    for part in idx.split(chunk, dim=1):
        logits, _, carry = model(part, carry=rowwise(torch.detach, carry) if detach else carry)
    grads = torch.autograd.grad(logits.logsumexp(-1).sum(), seen, allow_unused=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten(0, 1).norm(dim=1)
                      for x, g in zip(seen, grads)])

@dataclass
class ToyConfig:
    block_size: int = 8
    vocab_size: int = V
    width: int = 6  # a key of its own

class Recurrent(torch.nn.Module):
    """Its carry is two tensors (B, width), its recurrence step one token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Embedding(config.vocab_size, config.width)
        self.cell = torch.nn.LSTMCell(config.width, config.width)
        self.output = torch.nn.Linear(config.width, config.vocab_size)

    def forward(self, idx, targets=None, carry=None):
        states = [carry]
        for x in self.embedding(idx).unbind(1):
            states.append(self.cell(x, states[-1]))
        logits = self.output(torch.stack([h for h, _ in states[1:]], dim=1))
        if targets is None:
            return logits[:, -1:], None, states[-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss, states[-1]

class Windowed(Recurrent):
    """It carries nothing: a model that reads a window of block_size tokens."""

    def forward(self, idx, targets=None, carry=None):
        assert carry is None and idx.size(1) <= self.config.block_size
        return *super().forward(idx, targets)[:2], None

TOYS = {'recurrent': (ToyConfig, Recurrent), 'windowed': (ToyConfig, Windowed)}

# all combinations of a fold's keys, and some that have every pair of values
KEYS = [dict(position=position, local=local, past=past, carry=carry)
        for position in ('learned', 'rotary') for local in ('segment', 'sliding')
        for past, carry in (('evolving', 'plain'), ('evolving', 'gated'), ('frozen', 'plain'),
                            ('frozen', 'gated'), ('local', 'plain'), ('none', 'plain'))]
KEYS += [{**KEYS[i], 'kind': 'gated_fold'} for i in (0, 4, 19, 20)]
SOME_KEYS = [KEYS[i] for i in (1, 2, 10, 11, 16, 17, 18, 21)]

TURNED = dict(position='rotary', rotary_base=50.0)
PEERS = {
    'gpt, window': dict(window=SEGMENT, **TURNED), 'gpt, window, learned': dict(window=SEGMENT),
    'transformer_xl': TURNED, 'transformer_xl, not stopped': dict(stop=False, **TURNED),
    'transformer_xl, learned': {}, 'rmt': dict(memory=1, **TURNED), 'rmt, learned': {},
    'rmt, 4': dict(memory=4, bias=False, **TURNED), 'infini': TURNED,
    'infini, delta': dict(update='delta', **TURNED), 'infini, learned': dict(update='delta'),
    'linear': {}, 'deltanet': {}, 'deltanet, no bias': dict(bias=False),
    'feedback': dict(memory=SEGMENT, **TURNED), 'feedback, none': dict(memory=1, position='none'),
    'lstm': {}, 'queued_fold': dict(queue=2, queue_channels=5, **TURNED),
    'queued_fold, local': dict(queue=3, queue_channels=4, past='local', bias=False),
    'queued_fold, gated': dict(n_local=3, n_global=1, past='evolving', carry='gated', queue=2),
    'queued_fold, learned': dict(queue=1),
    'queued_fold, rotary, local': dict(queue=2, past='local', **TURNED),
    'queued_fold, rotary, gated': dict(queue=2, carry='gated', **TURNED)}
WHOLE = {'gpt': dict(block_size=21), 'gpt, rotary': dict(block_size=21, **TURNED)}
CASES = {  # {name: kind and sizes} of every model
    **{' '.join(map(str, keys.values())): {'rotary_base': 50.0, **keys} for keys in KEYS},
    'one layer': dict(n_local=0, n_global=1), 'segments of 1': dict(segment_size=1),
    **{name: dict(kind=name.split(',')[0], **sizes) for name, sizes in (PEERS | WHOLE).items()}}
MORE = {  # that are not in tests/literal.py, or longer than that takes
    **{name: dict(kind=name) for name in TOYS},
    'long segment': dict(segment_size=36, block_size=36),
    'long gpt': dict(kind='gpt', block_size=80)}
EVERY_CASE = pytest.mark.parametrize('name', CASES)
EVERY_CARRY = pytest.mark.parametrize('name', [name for name in CASES if name not in WHOLE])
