"""A fold that also keeps the last segments token by token, in a queue of narrow vectors.

A carry has the past mixed in its l places, where words are hardly found again (docs/text.md). Here
the global layers also read, of each token of the last `queue` segments, what the local transformer
made of it, as `queue_channels` numbers:
    q_t = W_down x_t,   x_t in X_{N,0}
    window of segment s: [W_up q_t for all t in the queue ; X^{s-1}_{N,N} ; X^s_{N,0}]
A narrow vector in place of keys and values is that of DeepSeek-V2 (arXiv 2405.04434, eq. 9 to 11);
here one serves all global layers. Places in the window are counted as it stands, so that a token
of the queue is l places further off than it was. What was before the text is zeros. At a border the
state is a fold's and queue * segment_size * queue_channels numbers: 16 * 12 * 32, 24,576 bytes.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from model import Block, FoldConfig
from models.cached import FoldGPT, room, run_cached

@dataclass
class QueuedConfig(FoldConfig):
    """Sizes of a fold with a queue. local becomes 'sliding', past='evolving' becomes
    'frozen'. Raises ValueError."""
    queue: int = 16           # segments whose tokens are kept
    queue_channels: int = 32  # numbers that are kept of a token

    def __post_init__(self):
        super().__post_init__()
        self.local = 'sliding'
        self.past = 'frozen' if self.past == 'evolving' else self.past
        if self.n_local < 1 or self.past == 'none':
            raise ValueError("a fold with a queue takes n_local of 1 or more, and past='frozen' "
                             "or, without recurrence, 'local'")

class QueuedFold(FoldGPT):
    """The carry is (X^s_{N,N} (B, l, C), the queue (B, queue * l, queue_channels), and what local
    layers keep)."""

    global_block = Block  # with no past half to move on

    def __init__(self, config):
        super().__init__(config)
        C, r = config.n_embd, config.queue_channels
        self.places = config.queue * config.segment_size
        self.down, self.up = nn.Linear(C, r, bias=False), nn.Linear(r, C, bias=False)

    def forward(self, idx, targets=None, carry=None):
        """As FoldGPT's."""
        c, l, B = self.config, self.config.segment_size, len(idx)
        sizes = (B, l, c.n_embd), (B, self.places, c.queue_channels)
        past, queue, kept = carry or (*map(self.up.weight.new_zeros, sizes), None)
        if idx.size(1) < 1 or (past.shape, queue.shape) != sizes:
            raise ValueError('a fold takes 1 token or more, and the carry of a whole segment')
        x, kept = self.local(idx, kept)
        queue, outputs = torch.cat((queue, self.down(x)), dim=1), []
        far = self.seen(self.up(queue)).split(l, dim=4)  # a segment each
        for s, x_s in enumerate(x.split(l, dim=1)):
            before = self.window(far[s:s + c.queue], past)
            outputs.append(self.carried(past, self.globally(before, x_s)))
            past = outputs[-1] if c.recurrent else x_s
        carry = past.clone(), queue[:, -self.places:].clone(), kept  # views would keep all of x
        return *self.head(torch.cat(outputs, dim=1), targets), carry

    def seen(self, x):
        """Keys and values of x (B, P, C) in all global layers: (B, n_global, 2, H, P, C/H)."""
        return torch.stack([b.attn.keys_and_values(b.ln_1(x)) for b in self.global_blocks], dim=1)

    def window(self, far, past):
        """What stands before the current half: the queue, in pieces, and the past half."""
        return torch.cat((*far, self.seen(past)), dim=4)

    def globally(self, before, current, caches=None):
        """The global transformer after keys and values `before`; None if the cache has them."""
        return self.run_blocks(self.global_blocks, current, before, caches=caches)[0]

    def new_cache(self, B):
        """Of the global layers alone: the carry has what the others keep."""
        return room(self, B, self.config.n_global, self.places + 2 * self.config.segment_size)

    def extend(self, idx, place, carry, cache, first):
        """As FoldGPT's."""
        c, end = self.config, place + idx.size(1)
        past, queue, kept = carry
        x = self.embed(idx, place)
        x, kept = run_cached(self, self.local_blocks, x, place, kept, None, first)
        before = None if place else self.window([self.seen(self.up(queue))], past)
        output = self.globally(before, x, cache[..., :cache.size(4) - c.segment_size + end, :])
        output = self.carried(past[:, place:], output)
        past[:, place:end] = output if c.recurrent else x
        queue = torch.cat((queue[:, idx.size(1):], self.down(x)), dim=1)
        return self.head(output)[0][:, -1], (past, queue, kept)
