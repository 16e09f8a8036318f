"""
The fold's blocks with their backward pass written out: model.py's results and gradients, in fewer and cheaper calls.

Automatic differentiation makes a node of every operation. With segments of a dozen tokens the keeping of these nodes takes
a sizable part of the time on a CPU, and every segment's gradient of a matrix is a new tensor, added to the one before.
Here the whole segment-carry loop is one node, and a matrix has one gradient, to which all segments add in place.
model.py stays what defines the model: the tests hold this against it, in float64.
"""
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model import FoldGPT

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


class Loop(torch.autograd.Function):
    """Segment after segment through all blocks, each in a window with the output of the one before it (eq. 13 to 17).

    Inside, time comes before the batch, (T, B, C) as rows (T*B, C): a segment and the second half of a window are then
    contiguous, and heads are views.
    """

    @staticmethod
    def forward(ctx, x, carry, l, n_head, *parameters):
        """Twelve parameters a block, in the order of Block.weights; biases may be None."""
        B, T, C = x.shape
        blocks, outputs, ctx.saved = list(zip(*[iter(parameters)] * 12)), [], []
        carry = None if carry is None else rows(carry)
        for x_s in rows(x).split(l * B):
            window = x_s if carry is None else torch.cat((carry, x_s))  # (2l*B, C); l*B for the first segment
            for p in blocks:
                n = len(x_s) if p is blocks[-1] else len(window)
                window, saved = block_forward(p, window, n, B, n_head)
                ctx.saved.append(saved)
            carry = window
            outputs.append(carry)
        ctx.blocks, ctx.l, ctx.n_head = blocks, l, n_head
        return torch.cat(outputs).view(T, B, C).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        B, T, C = grad.shape
        sums = [[None if p is None else torch.empty_like(p) if p.dim() == 2 else torch.zeros_like(p) for p in block]
                for block in ctx.blocks]
        onward, parts, beta = None, [], 0  # onward: what a segment's output gets from the window of the next one
        for g in reversed(rows(grad).split(ctx.l * B)):
            n = len(g)
            g = g if onward is None else g + onward[:n]
            for p, total in zip(reversed(ctx.blocks), reversed(sums)):
                g = block_backward(p, ctx.saved.pop(), g, total, beta, B, ctx.n_head)  # (n, C) -> (R of its window, C)
            onward = g[:-n] if len(g) > n else None
            parts.append(g[-n:])
            beta = 1
        g_carry = None if onward is None else onward.view(-1, B, C).transpose(0, 1)
        g_x = torch.cat(parts[::-1]).view(T, B, C).transpose(0, 1)
        return g_x, g_carry, None, None, *(g for total in sums for g in total)


def block_forward(p, x, n, B, n_head):
    """Block.forward: rows x (R, C), R = T*B -> its last n rows (n, C), and what block_backward needs."""
    (R, C), (w_1, b_1, w_qkv, b_qkv, w_o, b_o, w_2, b_2, w_fc, b_fc, w_down, b_down) = x.shape, p
    a, *norm_1 = torch.native_layer_norm(x, (C,), w_1, b_1, 1e-5)
    if n == R:
        q, k, v = heads(F.linear(a, w_qkv, b_qkv), 3, B, n_head)  # (B*H, T, C/H) each
    else:  # the last block: its past half gives keys and values alone
        q, = heads(F.linear(a[-n:], w_qkv[:C], b_qkv if b_qkv is None else b_qkv[:C]), 1, B, n_head)
        k, v = heads(F.linear(a, w_qkv[C:], b_qkv if b_qkv is None else b_qkv[C:]), 2, B, n_head)
    future = x.new_full((n // B, R // B), float('-inf')).triu((R - n) // B + 1)
    weights = torch.baddbmm(future, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5).softmax(dim=-1)  # (B*H, n/B, T)
    y = merged(torch.bmm(weights, v)[None], n)  # (n, C)
    x_2 = affine(x[-n:], y, w_o, b_o)
    b, *norm_2 = torch.native_layer_norm(x_2, (C,), w_2, b_2, 1e-5)
    h = F.linear(b, w_fc, b_fc)
    u = F.gelu(h)
    return affine(x_2, u, w_down, b_down), (x, a, norm_1, q, k, v, weights, y, x_2, b, norm_2, h, u)


def block_backward(p, saved, g, sums, beta, B, n_head):
    """The gradient of block_forward's x (R, C) from that of its result, g (n, C).

    Those of p are added to sums; with beta 0 those of matrices replace what is there, whatever it is."""
    w_1, b_1, w_qkv, _, w_o, _, w_2, b_2, w_fc, _, w_down, _ = p
    x, a, norm_1, q, k, v, weights, y, x_2, b, norm_2, h, u = saved
    (R, C), n = x.shape, len(g)
    add_products(sums[10:12], g, u, beta)
    g_h = GELU_BACKWARD(torch.mm(g, w_down), h)
    add_products(sums[8:10], g_h, b, beta)
    g_2 = add_norm(sums[6:8], torch.mm(g_h, w_fc), x_2, norm_2, w_2, b_2).add_(g)
    add_products(sums[4:6], g_2, y, beta)
    g_y, = heads(torch.mm(g_2, w_o), 1, B, n_head)
    g_s = torch._softmax_backward_data(torch.bmm(g_y, v.transpose(1, 2)), weights, -1, x.dtype).mul_(q.size(-1) ** -0.5)
    g_qkv = x.new_empty(3, *k.shape)
    torch.bmm(g_s.transpose(1, 2), q, out=g_qkv[1])
    torch.bmm(weights.transpose(1, 2), g_y, out=g_qkv[2])
    if n == R:
        torch.bmm(g_s, k, out=g_qkv[0])
        g_qkv = merged(g_qkv, R)  # (R, 3C)
        add_products(sums[2:4], g_qkv, a, beta)
        g_a = torch.mm(g_qkv, w_qkv)
    else:
        g_q, g_kv = merged(torch.bmm(g_s, k)[None], n), merged(g_qkv[1:], R)  # (n, C), (R, 2C)
        q_sums, kv_sums = zip(*((None, None) if s is None else s.split([C, 2 * C]) for s in sums[2:4]))
        add_products(q_sums, g_q, a[-n:], beta)
        add_products(kv_sums, g_kv, a, beta)
        g_a = torch.mm(g_kv, w_qkv[C:])
        g_a[-n:].addmm_(g_q, w_qkv[:C])
    g_x = add_norm(sums[0:2], g_a, x, norm_1, w_1, b_1)
    g_x[-n:].add_(g_2)
    return g_x


def rows(x):
    """x (B, T, C) -> (T*B, C)."""
    return x.transpose(0, 1).reshape(-1, x.size(-1))


def heads(x, n, B, n_head):
    """Rows x (T*B, n*C) -> (n, B*H, T, C/H)."""
    x = x.view(-1, B, n, x.size(1) // n).permute(2, 0, 1, 3).reshape(n, -1, B * n_head, x.size(1) // (n * n_head))
    return x.transpose(1, 2)


def merged(x, R):
    """The way back, n tensors (B*H, T, C/H) -> rows (T*B, n*C)."""
    n, BH, T, D = x.shape
    return x.view(n, R // T, -1, T, D).permute(3, 1, 0, 2, 4).reshape(R, -1)


def affine(start, x, w, b):
    """start + x W^T + b."""
    return torch.addmm(start if b is None else start + b, x, w.t())


def add_products(sums, g, x, beta):
    """Add to sums, in place, the gradients of a matrix and of its bias, if any: its output's g (R, M), its input x (R, K)."""
    sums[0].addmm_(g.t(), x, beta=beta)
    if sums[1] is not None:
        sums[1].add_(g.sum(dim=0))


def add_norm(sums, g, x, norm, w, b):
    """Back through a layer norm of x: returns the gradient of x, adds those of weight and bias to sums, in place."""
    g_x, g_w, g_b = NORM_BACKWARD(g, x, (x.size(-1),), *norm, w, b, [True, True, b is not None])
    sums[0].add_(g_w)
    if b is not None:
        sums[1].add_(g_b)
    return g_x
