"""A fold whose past half is shut out until training opens its gates: it starts as the GPT of its
window, so that a trained GPT can be folded without harm (docs/training.md)."""
import torch
import torch.nn as nn

from model import CausalSelfAttention
from models.cached import FoldGPT

class GatedAttention(CausalSelfAttention):
    """g of the attention in a window of two segments, and 1 - g of that in the current one alone,
    where g, a number a channel, is 0 to begin with. The past half is not gated."""

    def __init__(self, config):
        super().__init__(config)
        self.l, self.past_gate = config.segment_size, nn.Parameter(torch.zeros(config.n_embd))

    def attend(self, q, k, v):
        both, l = super().attend(q, k, v), self.l
        n = k.size(2) - l  # tokens of the current half, of which q may ask for the last alone
        if n <= 0:  # nothing is past
            return both
        alone = super().attend(q[:, :, -n:], k[:, :, l:], v[:, :, l:])
        g = 16 * self.past_gate.view(self.n_head, 1, -1)  # 16 times: it opens in few updates
        return torch.cat((both[:, :, :-n], alone + g * (both[:, :, -n:] - alone)), dim=2)

class GatedFold(FoldGPT):
    """A fold with GatedAttention in its global layers."""

    def layout(self, config):
        blocks = super().layout(config)
        for block in blocks[config.n_local:]:
            block.attn = GatedAttention(config)
        return blocks
