"""
Model FLOPs: what a model's matrix products cost, two for each multiplication and addition, as torch's counter counts.
"""
from fractions import Fraction

from model import FoldGPT


def flops_per_token(model, T, backward=True, carried=False):
    """FLOPs of training on a sequence of T tokens, per token; exact, and the same for every batch size.

    Counted are the matrix products of all blocks and of the output matrix at every position. Attention counts as a
    whole square or rectangle, masked or not. Norms, softmax, GELU and embeddings do not count, as is usual. Backward
    costs twice the forward pass: each product has two gradients. Computing anything again does not count, so that
    a recomputed model has the same FLOPs and fewer tokens per second.

    Args:
        model: GPT or FoldGPT.
        T: tokens of a sequence; a GPT's window at most.
        backward: False gives the forward pass alone.
        carried: whether a fold's first segment has a carry before it.
    Returns:
        a Fraction, a whole number of FLOPs over T.
    """
    c = model.config
    if isinstance(model, FoldGPT):
        l, n_segments = c.segment_size, -(-T // c.segment_size)
        total = n_segments * c.n_local * block_flops(c, l, l)  # a short last segment is padded here
        for s in range(n_segments):
            now = min(l, T - s * l)
            window = now + (l if s or carried else 0)
            total += (c.n_global - 1) * block_flops(c, window, window) + block_flops(c, window, now)
            if c.carry == 'gated' and window > now:
                total += 4 * now * c.n_embd ** 2  # the gate, out of [old ; new]
    else:
        total = c.n_layer * block_flops(c, T, T)
    total += 2 * T * c.n_embd * c.vocab_size
    return Fraction(total * (3 if backward else 1), T)


def block_flops(config, T, n_out):
    """FLOPs of one block forward on T positions, of which the last n_out are computed and the others only read."""
    C = config.n_embd
    queries, keys_values = 2 * n_out * C * C, 4 * T * C * C
    attention = 2 * (2 * n_out * T * C)  # queries by keys, weights by values
    rest = 2 * n_out * C * C + 16 * n_out * C * C  # the projection, and the two matrices of the feed-forward network
    return queries + keys_values + attention + rest
