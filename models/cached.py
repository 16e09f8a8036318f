"""The GPT and the fold, token by token: what an open window or segment has seen is kept, so that a
token costs the products of one. The forward pass is that of model.py, by its own parts."""
from torch.nn import functional as F

import model

def room(net, B, n_layer, places):
    """Room for keys and values, (B, n_layer, 2, H, places, C/H)."""
    H, C = net.config.n_head, net.config.n_embd
    return net.lm_head.weight.new_zeros(B, n_layer, 2, H, places, C // H)

def run_cached(net, blocks, x, place, kept, cache, first):
    """run_blocks() of the next tokens x (B, n, C) of an open window or segment, `place` of which
    have been read, and what is kept then: of layers that slide, of the last l tokens."""
    if kept is None:
        return net.run_blocks(blocks, x, caches=cache[..., :place + x.size(1), :])
    l = kept.size(4)
    x, kept = net.run_blocks(blocks, x, kept[..., l - place if first else 0:, :], keep=l)
    return x, F.pad(kept, (0, 0, l - kept.size(4), 0))  # which are fewer in the first segment

class GPT(model.GPT):
    def new_cache(self, B):
        """Of a window that slides there is none: the carry has its keys and values."""
        c = self.config
        return room(self, B, c.n_layer, 0 if c.window else c.block_size)

    def extend(self, idx, place, carry, cache, first):
        """The next tokens of a window or open segment, idx (B, n) from `place` on, through the
        cache, which is filled in: logits (B, V) of the token that follows, and the carry.
        first: no segment is before."""
        x = self.embed(idx, place)
        x, carry = run_cached(self, self.transformer.h, x, place, carry, cache, first)
        return self.head(x)[0][:, -1], carry

class FoldGPT(model.FoldGPT):
    def new_cache(self, B):
        """Of the local layers, unless they slide, l places; of the global ones 2l."""
        c, l = self.config, self.config.segment_size
        return room(self, B, c.n_local, 0 if self.slides else l), room(self, B, c.n_global, 2 * l)

    def extend(self, idx, place, carry, cache, first):
        """As GPT's. In the carry, places up to the last token read hold this segment's output; the
        others still hold that of the segment before."""
        old, kept = carry if isinstance(carry, tuple) else (carry, None)
        c, l, end = self.config, self.config.segment_size, place + idx.size(1)
        x = self.embed(idx, place)
        x, kept = run_cached(self, self.local_blocks, x, place, kept, cache[0], first)
        begin = l if first or c.past == 'none' else 0  # of what is seen; the current half is at l
        past = None if first or place else old
        output = self.globally(past, x, cache[1][..., begin:l + end, :])
        output = self.carried(None if first else old[:, place:], output)
        old[:, place:end] = output if c.recurrent else x
        return self.head(output)[0][:, -1], old if kept is None else (old, kept)
