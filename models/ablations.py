"""Folds that differ from model.py in one thing each, to see what it is worth (compare.py)."""
import torch
from torch.nn import functional as F

from model import FoldGPT, GlobalBlock, LocalBlock


class DroppedFold(FoldGPT):
    """Nothing is carried: every segment is a sequence of its own, as for a GPT of that window."""

    def fold(self, x, carry):
        segments = x.split(self.config.segment_size, dim=1)
        outputs = [super(DroppedFold, self).fold(x_s, None)[0] for x_s in segments]
        return torch.cat(outputs, dim=1), outputs[-1]

    def extend(self, idx, place, carry, cache, first):
        return super().extend(idx, place, carry, cache, first=True)


class FrozenFold(FoldGPT):
    """The past half does not evolve: every global layer reads X^{s-1}_{N,N}, the carry itself."""

    def globally(self, past, current, caches=None):
        blocks = self.transformer.h[self.config.n_local:]
        for block, cache in zip(blocks, caches or [None] * len(blocks)):
            _, current = block(past, current, cache, frozen=True)
        return current


class PlacedFold(FoldGPT):
    """The global layers are told the place in their window: a learned embedding of its 2l places
    is added before them. The current half has places l..2l-1, in the first segment as well."""

    def __init__(self, config):
        super().__init__(config)
        self.window_wpe = torch.nn.Embedding(2 * config.segment_size, config.n_embd)
        torch.nn.init.normal_(self.window_wpe.weight, std=0.02)

    def globally(self, past, current, caches=None):
        l, n, places = self.config.segment_size, current.size(1), self.window_wpe.weight
        known = caches[0].size(-2) if caches else n  # positions with keys and values
        end = l + (known - 1) % l + 1
        past = None if past is None else past + places[:l]
        return super().globally(past, current + places[end - n:end], caches)


class OpenBlock(GlobalBlock):
    """A global layer in which every place of the past half attends to all of that half."""

    def forward(self, past, current, cache=None, frozen=False):
        _, current = super().forward(past, current, cache, frozen=True)
        if past is None or frozen:  # nobody reads the past half of this layer
            return past, current
        attn, dropout = self.attn, self.attn.dropout if self.training else 0.0
        q, k, v = attn.heads(attn.c_attn(self.ln_1(past)), 3)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, l, C/H)
        past = past + F.dropout(attn.c_proj(y.transpose(1, 2).reshape(past.shape)), dropout)
        return past + self.mlp(self.ln_2(past)), current


class OpenFold(FoldGPT):
    """The past half sees itself without a causal mask: it is all known when its window opens."""

    def layout(self):
        c = self.config
        return [LocalBlock] * c.n_local + [OpenBlock] * c.n_global, c.segment_size
