"""
Folds that differ from model.py in one thing each, to see what it is worth: compare.py trains them beside the fold.

They are further values of model_type in every script, such as --model_type=fold_frozen.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CausalSelfAttention, FoldConfig, FoldGPT


class DroppedFold(FoldGPT):
    """Nothing is carried: every segment is a sequence of its own, and the model a GPT with a window of segment_size."""

    def fold(self, x, carry):
        """As FoldGPT's; the carry that comes in is ignored, the one that goes out is the last segment's."""
        outputs = [super(DroppedFold, self).fold(x_s, None) for x_s in x.split(self.config.segment_size, dim=1)]
        return torch.cat([output for output, _ in outputs], dim=1), outputs[-1][1]

    def extend(self, idx, state, p, first):
        """As FoldGPT's, every segment the first."""
        return super().extend(idx, state, p, first=True)


class FrozenFold(FoldGPT):
    """The past half stays as the carry brought it: every global layer reads X^{s-1}_{N,N}, not X^{s-1}_{N,N+i-1}."""

    def globally(self, window, n_out, caches=None):
        past = window[:, :-n_out]  # (B, l, C), or (B, 0, C)
        blocks = self.transformer.h[self.config.n_local:]
        for block, cache in zip(blocks, caches or [None] * self.config.n_global):
            window = torch.cat((past, block(window, n_out, cache)), dim=1)
        return window[:, -n_out:]


class PlacedFold(FoldGPT):
    """Global layers that are told the place in their window: a learned embedding of 2l positions, added before them."""

    def __init__(self, config):
        super().__init__(config)
        self.window_wpe = nn.Embedding(2 * config.segment_size, config.n_embd)
        nn.init.normal_(self.window_wpe.weight, std=0.02)

    def num_params(self):
        return super().num_params() - self.window_wpe.weight.numel()

    def globally(self, window, n_out, caches=None):
        l, known = self.config.segment_size, (caches[0] if caches else window).size(-2)  # positions with keys and values
        end = l + (known - 1) % l + 1  # the current half is l..2l-1, in the first segment too
        return super().globally(window + self.window_wpe.weight[end - window.size(1):end], n_out, caches)


class OpenFold(FoldGPT):
    """The past half sees itself without a causal mask: it is all known when its window opens."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h[config.n_local:]:
            block.attn.__class__, block.attn.segment_size = OpenAttention, config.segment_size


class OpenAttention(CausalSelfAttention):
    """Attention in a window: causal, but for the past half within itself."""

    def forward(self, x, n_out=None, cache=None):
        l, T = self.segment_size, x.size(1)
        if T <= l or n_out not in (None, T):  # no past half, or nothing of it is asked for
            return super().forward(x, n_out, cache)
        return torch.cat((self.among(x[:, :l]), super().forward(x, T - l, cache)), dim=1)

    def among(self, x):
        """All of x (B, l, C) to all of it -> (B, l, C)."""
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)  # (B, H, l, C/H)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


KINDS = {'fold_dropped': (FoldConfig, DroppedFold), 'fold_frozen': (FoldConfig, FrozenFold),
         'fold_placed': (FoldConfig, PlacedFold), 'fold_open': (FoldConfig, OpenFold)}
