"""A fold that also keeps the last segments token by token, in a queue of narrow vectors.

A carry holds the whole past in the same l places, and no layer finds a word in them (docs/text.md).
Here the global layers also read, of each token of the last `queue` segments, what the local
transformer made of it, as `queue_channels` numbers:
    q_t = W_down x_t,   x_t in X_{N,0}
    window of segment s: [W_up q_t for all t in the queue ; X^{s-1}_{N,N} ; X^s_{N,0}]
A narrow vector in place of keys and values is that of DeepSeek-V2 (arXiv 2405.04434, eq. 9 to 11);
here one serves all global layers. What was before the text is zeros. State: a fold's, and
queue * segment_size * queue_channels numbers, of 4 * 16 * 12 * 32 24,576 bytes.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from model import Block, FoldConfig
from models.cached import FoldGPT, room, run_cached

@dataclass
class QueuedConfig(FoldConfig):
    """Sizes of a fold with a queue. Raises ValueError."""
    local: str = 'sliding'
    past: str = 'frozen'
    queue: int = 16           # segments whose tokens are kept
    queue_channels: int = 32  # numbers that are kept of a token

    def __post_init__(self):
        super().__post_init__()
        if self.local != 'sliding' or self.n_local < 1:
            raise ValueError("a fold with a queue takes local='sliding' and n_local of 1 or more")
        if self.past == 'evolving' and self.n_global > 1:
            raise ValueError("a fold with a queue of several global layers takes past='frozen'")

class QueuedFold(FoldGPT):
    """The carry is (X^s_{N,N}, queue, what local layers keep)."""

    def __init__(self, config):
        super().__init__(config)
        C, r = config.n_embd, config.queue_channels
        self.places = config.queue * config.segment_size
        self.down, self.up = nn.Linear(C, r, bias=False), nn.Linear(r, C, bias=False)

    def forward(self, idx, targets=None, carry=None):
        """As FoldGPT's."""
        c, l = self.config, self.config.segment_size
        if carry is None:
            past = self.up.weight.new_zeros(len(idx), l, c.n_embd)
            carry = past, past.new_zeros(len(idx), self.places, c.queue_channels), None
        past, queue, kept = carry
        if idx.size(1) < 1 or past.shape != (len(idx), l, c.n_embd):
            raise ValueError('a fold takes 1 token or more, and the carry of a whole segment')
        x, kept = self.local(idx, kept)
        queue, outputs = torch.cat((queue, self.down(x)), dim=1), []
        far = self.seen(self.up(queue))
        for s, x_s in enumerate(x.split(l, dim=1)):
            now = far[..., s * l:s * l + self.places, :]
            outputs.append(self.carried(past, self.globally(self.window(now, past), x_s)))
            past = outputs[-1] if c.recurrent else x_s
        carry = past.clone(), queue[:, -self.places:].clone(), kept
        return *self.head(torch.cat(outputs, dim=1), targets), carry

    def seen(self, x):
        """Keys and values of x (B, P, C) in all global layers: (B, n_global, 2, H, P, C/H)."""
        blocks = list(self.transformer.h)[self.config.n_local:]
        return torch.stack([b.attn.keys_and_values(b.ln_1(x)) for b in blocks], dim=1)

    def window(self, far, past):
        """What stands before the current half: the queue and, if it is read, the past half."""
        return far if self.config.past == 'none' else torch.cat((far, self.seen(past)), dim=4)

    def globally(self, before, current, caches=None):
        """The global transformer after keys and values `before`; None if the cache has them."""
        for i, block in enumerate(list(self.transformer.h)[self.config.n_local:]):
            own = (None if some is None else some[:, i] for some in (before, caches))
            current, _ = Block.forward(block, current, *own)
        return current

    def new_cache(self, B):
        """Of the global layers alone: the carry has what the others keep."""
        before = self.places + self.config.segment_size * (self.config.past != 'none')
        return room(self, B, self.config.n_global, before + self.config.segment_size)

    def extend(self, idx, place, carry, cache, first):
        """As FoldGPT's."""
        c, end = self.config, place + idx.size(1)
        past, queue, kept = carry
        blocks = list(self.transformer.h)[:c.n_local]
        x, kept = run_cached(self, blocks, self.embed(idx, place), place, kept, None, first)
        before = None if place else self.window(self.seen(self.up(queue)), past)
        output = self.globally(before, x, cache[..., :cache.size(4) - c.segment_size + end, :])
        output = self.carried(past[:, place:], output)
        past[:, place:end] = output if c.recurrent else x
        queue = torch.cat((queue[:, idx.size(1):], self.down(x)), dim=1)
        return self.head(output)[0][:, -1], (past, queue, kept)
