"""
The fold's blocks with their backward pass written out: model.py's results and gradients, in fewer and cheaper calls.

Automatic differentiation makes a node of every operation. With segments of a dozen tokens the keeping of these nodes takes
a sizable part of the time on a CPU, and every segment's gradient of a matrix is a new tensor, added to the one before.
Here the whole segment-carry loop is one node, a matrix has one gradient, to which all segments add in place, and what all
segments share is made once. Most of what is left beside matrix products is the number of calls: each counts.
model.py stays what defines the model: the tests hold this against it, in float64.
"""
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model import FoldGPT

SHORT_ROWS = 16  # numbers of a vector register: along rows shorter than that a softmax is slower than across them
GELU_BACKWARD = torch.ops.aten.gelu_backward.default
NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward.default


def install(model):
    """Let a fold compute its blocks so wherever a gradient is wanted, in place.

    Returns whether it does: not for a GPT (tried: no gain), a gated carry, dropout, or a fold that differs from FoldGPT.
    """
    if type(model) is not FoldGPT or model.config.carry != 'plain' or model.config.dropout:
        return False
    blocks, n_local, l = list(model.transformer.h), model.config.n_local, model.config.segment_size
    eager_local, eager_fold = model.local, model.fold

    def local(idx):  # all segments at once, none of which has one before it
        if not n_local or not torch.is_grad_enabled():
            return eager_local(idx)
        (B, T), segments = idx.shape, F.pad(idx, (0, -idx.size(1) % l)).view(-1, l)  # (B*N_s, l)
        return loop(blocks[:n_local], model.embed(segments), None, l).reshape(B, -1, model.config.n_embd)[:, :T]

    def fold(x, carry):
        if not torch.is_grad_enabled():
            return eager_fold(x, carry)
        outputs = loop(blocks[n_local:], x, carry, l)
        return outputs, outputs[:, (x.size(1) - 1) // l * l:]  # the last segment, which may be short
    model.local, model.fold = local, fold
    return True


def loop(blocks, x, carry, l):
    """FoldGPT.fold with the plain carry: x (B, T, C), carry (B, l, C) or None -> the outputs of all segments, (B, T, C)."""
    parameters = [p for block in blocks for pair in block.weights for p in pair]
    return Loop.apply(x, carry, l, blocks[0].attn.n_head, *parameters)


@contextmanager
def small_products():
    """Products of few numbers, an attention's, as torch does them: with training.onednn_products they would be slower."""
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = 'ieee'
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision


class Loop(torch.autograd.Function):
    """Segment after segment through all blocks, each in a window with the output of the one before it (eq. 13 to 17).

    Inside, time comes before the batch, (T, B, C) as rows (T*B, C): a segment and the second half of a window are then
    contiguous, and heads are views.
    """

    @staticmethod
    def forward(ctx, x, carry, l, n_head, *parameters):
        """Twelve parameters a block, in the order of Block.weights; biases may be None."""
        B, T, C = x.shape
        carry, outputs, ctx.saved, futures = None if carry is None else rows(carry), [], [], {}
        parameters = list(zip(*[iter(parameters)] * 12))
        past = carry is not None or T > l  # whether any window has one
        blocks = [Weights(p, n_head, apart=past and p is parameters[-1]) for p in parameters]
        for x_s in rows(x).split(l * B):
            window = x_s if carry is None else torch.cat((carry, x_s))  # (2l*B, C); l*B for the first segment
            for w in blocks:
                R, n = window.size(0), (x_s if w is blocks[-1] else window).size(0)
                if (n, R) not in futures:
                    futures[n, R] = x.new_full((n // B, R // B), float('-inf')).triu((R - n) // B + 1)
                window, saved = block_forward(w, window, futures[n, R], B * n_head)
                ctx.saved.append(saved)
            carry = window
            outputs.append(carry)
        ctx.blocks, ctx.l = blocks, l
        return torch.cat(outputs).view(T, B, C).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        B, T, C = grad.shape
        onward, parts = None, []  # onward: what a segment's output gets from the window of the next one
        for g in reversed(rows(grad).split(ctx.l * B)):
            n = g.size(0)
            g = g if onward is None else g + onward[:n]
            for w in reversed(ctx.blocks):
                g = block_backward(w, ctx.saved.pop(), g)  # (n, C) -> (R of its window, C)
            onward = g[:-n] if g.size(0) > n else None
            parts.append(g[-n:])
        g_carry = None if onward is None else onward.view(-1, B, C).transpose(0, 1)
        g_x = torch.cat(parts[::-1]).view(T, B, C).transpose(0, 1)
        return g_x, g_carry, None, None, *(g for w in ctx.blocks for g in w.gradients())


class Affine:
    """x W^T + b, for all segments."""

    def __init__(self, w, b):
        """W (M, K), b (M,) or None."""
        self.w, self.w_t, self.b, self.grad, self.b_grads = w, w.t(), b, None, []
        M, K = w.shape  # the gradient is made as it is or transposed, whichever was faster of such a shape
        self.upright = M > 3 * K if torch.backends.mkldnn.matmul.fp32_precision == 'bf16' else M < K

    def __call__(self, x, start=None):
        """x (R, K) -> (R, M), added to start (R, M)."""
        y = torch.mm(x, self.w_t)
        for more in (self.b, start):
            if more is not None:
                y.add_(more)  # faster than addmm, which begins with a copy
        return y

    def back(self, g, x, start=None):
        """The gradient of x (R, K) from that of the result, g (R, M); added in place to start (R, K)."""
        a, b = (g, x) if self.upright else (x, g)
        self.grad = torch.mm(a.t(), b) if self.grad is None else self.grad.addmm_(a.t(), b)
        if self.b is not None:
            self.b_grads.append(g.sum(dim=0))
        return torch.mm(g, self.w) if start is None else start.addmm_(g, self.w)

    def gradients(self):
        return self.grad if self.upright else self.grad.t(), total(self.b_grads)


class Projections(Affine):
    """m of queries, keys and values by one product, those of a head side by side, so that heads are views."""

    def __init__(self, w, b):
        """W (m, H, C/H, C), b (m, H, C/H) or None."""
        self.shape = w.transpose(0, 1).shape
        super().__init__(w.transpose(0, 1).reshape(-1, w.size(-1)), b if b is None else b.transpose(0, 1).flatten())

    def __call__(self, x, BH):
        """Rows x (T*B, C) -> m views (B*H, T, C/H)."""
        return super().__call__(x).view(-1, BH, *self.shape[1:3]).permute(2, 1, 0, 3).unbind(0)

    def back(self, grads, x, start=None):
        """As Affine.back, from the m gradients (B*H, T, C/H)."""
        return super().back(torch.stack([g.transpose(0, 1) for g in grads], dim=2).view(len(x), -1), x, start)

    def gradients(self):
        """Those of W and b as they came."""
        w, b = super().gradients()
        return w.view(self.shape).transpose(0, 1), b if b is None else b.view(self.shape[:3]).transpose(0, 1)


class Norm:
    """The layer norm of rows, for all segments."""

    def __init__(self, w, b):
        self.w, self.b, self.shape, self.grads = w, b, w.shape, []

    def __call__(self, x):
        """x (R, C) -> (R, C), and the mean and the inverse deviation of each row."""
        y, *stats = torch.native_layer_norm(x, self.shape, self.w, self.b, 1e-5)
        return y, stats

    def back(self, g, x, stats):
        """The gradient of x (R, C) from that of the result, g (R, C)."""
        g_x, *grads = NORM_BACKWARD(g, x, self.shape, *stats, self.w, self.b, [True, True, self.b is not None])
        self.grads.append(grads)
        return g_x

    def gradients(self):
        return [total(grads) for grads in zip(*self.grads)]


def total(grads):
    """The sum of a sequence of tensors; None if there are none."""
    return torch.stack(grads).sum(dim=0) if grads and grads[0] is not None else None


class Weights:
    """The parameters of a block, and, as segments come by, their gradients."""

    def __init__(self, parameters, n_head, apart):
        """apart: whether queries come from fewer rows than keys and values: from the current half alone."""
        w_1, b_1, w_qkv, b_qkv, w_o, b_o, w_2, b_2, w_fc, b_fc, w_down, b_down = parameters
        self.shape = 3, n_head, len(w_o) // n_head
        self.scale = w_o.new_tensor([self.shape[-1] ** -0.5, 1, 1]).view(3, 1, 1)  # of queries: here it is done once for all
        w = w_qkv.view(*self.shape, -1) * self.scale[..., None]
        b = b_qkv if b_qkv is None else b_qkv.view(self.shape) * self.scale
        self.qkv = [Projections(w[some], b if b is None else b[some])
                    for some in ([slice(1), slice(1, 3)] if apart else [slice(3)])]
        self.norm_1, self.norm_2 = Norm(w_1, b_1), Norm(w_2, b_2)
        self.o, self.fc, self.down = Affine(w_o, b_o), Affine(w_fc, b_fc), Affine(w_down, b_down)

    def gradients(self):
        """In the order of the parameters."""
        w, b = zip(*(part.gradients() for part in self.qkv))
        w, b = torch.cat(w) * self.scale[..., None], None if b[0] is None else torch.cat(b) * self.scale
        others = [part.gradients() for part in (self.norm_1, self.o, self.norm_2, self.fc, self.down)]
        others.insert(1, (w.flatten(0, 2), b if b is None else b.flatten()))
        return [g for pair in others for g in pair]


def block_forward(w, x, future, BH):
    """Block.forward: rows x (R, C), R = T*B -> its last n rows (n, C), and what block_backward needs.

    future (n/B, T): -inf where a query must not look, else 0. BH: rows of the batch times heads of each."""
    (a, stats_1), (t, T), R = w.norm_1(x), future.shape, x.size(0)
    n = R // T * t
    x_n, a_n = (x, a) if n == R else (x[-n:], a[-n:])  # the last block: its past half gives keys and values alone
    q, k, v = [heads for part, of in zip(w.qkv, (a_n, a)) for heads in part(of, BH)]  # (B*H, t or T, C/H)
    with small_products():
        weights = softmax(q, k, future)  # (B*H, t, T)
        y = torch.bmm(weights, v).transpose(0, 1).reshape(n, -1)  # (n, C)
    x_2 = w.o(y, x_n)
    b, stats_2 = w.norm_2(x_2)
    h = w.fc(b)
    u = F.gelu(h)
    return w.down(u, x_2), (x, a, a_n, stats_1, q, k, v, weights, y, x_2, stats_2, b, h, u)


def block_backward(w, saved, g):
    """The gradient of block_forward's x (R, C) from that of its result, g (n, C); those of its weights go into w."""
    x, a, a_n, stats_1, q, k, v, weights, y, x_2, stats_2, b, h, u = saved
    R, n, (BH, t, _) = x.size(0), g.size(0), q.shape
    g_h = GELU_BACKWARD(w.down.back(g, u), h)
    g_2 = w.norm_2.back(w.fc.back(g_h, b), x_2, stats_2).add_(g)
    g_y = w.o.back(g_2, y).view(t, BH, -1).transpose(0, 1)  # (B*H, t, C/H)
    with small_products():
        g_s = softmax_backward(g_y, v, weights)  # (B*H, t, T)
        g_qkv = torch.bmm(g_s, k), torch.bmm(g_s.mT, q), torch.bmm(weights.mT, g_y)
    *apart, last = w.qkv
    g_a = last.back(g_qkv[len(apart):], a)
    for queries in apart:
        queries.back(g_qkv[:1], a_n, g_a[-n:])
    g_x = w.norm_1.back(g_a, x, stats_1)
    (g_x if n == R else g_x[-n:]).add_(g_2)
    return g_x


def softmax(q, k, future):
    """Where q (B*H, t, C/H) looks among k (B*H, T, C/H): (B*H, t, T). Short rows are computed as columns, see SHORT_ROWS."""
    if k.size(1) < SHORT_ROWS:
        return torch._softmax(torch.baddbmm(future.t(), k, q.mT), 1, False).mT
    return torch._softmax(torch.baddbmm(future, q, k.mT), -1, False)


def softmax_backward(g_y, v, weights):
    """The gradient of the scores, (B*H, t, T), from that of what was gathered by the weights, g_y (B*H, t, C/H)."""
    if v.size(1) < SHORT_ROWS:
        return torch._softmax_backward_data(torch.bmm(v, g_y.mT), weights.mT, 1, v.dtype).mT
    return torch._softmax_backward_data(torch.bmm(g_y, v.mT), weights, -1, v.dtype)


def rows(x):
    """x (B, T, C) -> (T*B, C)."""
    return x.transpose(0, 1).reshape(-1, x.size(-1))
