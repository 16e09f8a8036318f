"""Folds that differ from model.py in one thing each, to see what it is worth (compare.py)."""
import torch

from model import FoldGPT

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
