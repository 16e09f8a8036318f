"""
The baseline GPT (GPT-2's blocks, nanoGPT's parameter names), and FoldGPT, which runs its blocks by
*folded context condensation* (Paeng and Kwon, arXiv 2405.04620): a sequence is cut into segments; a
local transformer runs inside each, a global one over the window [previous segment's output ; this
segment]; its output gives the logits and is carried on. All other code calls what is defined here.

    paper             here                               meaning
    L = l * N_s, d_E  block_size, n_embd                 tokens of a training sequence, channels
    l, N              segment_size, n_local = n_global   (free here): tokens of a segment, layers
    X^s_{i,0}         local()                            segment s after i local layers       eq. 16
    X^s_{N,i}         `current` in GlobalBlock           segment s after i global layers      eq. 17
    X^{s-1}_{N,N+i}   `past` in GlobalBlock              segment s-1, i global layers later   eq. 13
    X^s_{N,N}         carry                              output of s: logits and carry        eq. 15
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

FUSED_FROM = 65  # keys from which torch's fused attention is used on a CPU; on a GPU it always is

@dataclass
class GPTConfig:
    """Sizes of a GPT. Raises ValueError for sizes that no model can have."""
    block_size: int = 1024  # tokens of a training sequence; the GPT's window
    vocab_size: int = 50304  # different tokens
    n_layer: int = 12       # layers
    n_head: int = 12        # attention heads
    n_embd: int = 768       # channels
    dropout: float = 0.0    # share of activations dropped in training
    bias: bool = True       # biases in linear layers and layer norms, as in GPT-2

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')

@dataclass
class FoldConfig(GPTConfig):
    """Sizes of a FoldGPT: a GPT's, with n_layer = n_local + n_global. Raises ValueError."""
    block_size: int = 768   # L, tokens of a training sequence, whole segments
    segment_size: int = 12  # l, tokens of a segment; the global window is twice as wide
    n_local: int = 6        # local layers
    n_global: int = 6       # global layers
    carry: str = 'plain'    # 'plain', the paper's, or 'gated', mixed with the carry before

    def __post_init__(self):
        super().__post_init__()
        self.n_layer = self.n_local + self.n_global
        if self.carry not in ('plain', 'gated'):
            raise ValueError(f"carry must be 'plain' or 'gated', not {self.carry!r}")
        if self.block_size % self.segment_size:
            raise ValueError(f'block_size must be a multiple of segment_size={self.segment_size}')

class CausalSelfAttention(nn.Module):
    """Multi-head causal attention: the softmax of eq. 6, and so of eq. 16 and 17."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.head_size = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # W_Q, W_K, W_V
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, before=None, cache=None):
        """x (B, T, C) -> (B, T, C): what each position gathers from those up to it.

        before (B, S, C): states that stand before x, are attended to, and ask nothing themselves.
        cache (B, 2, H, P + S + T, C/H): keys and values of P more; these S + T are filled in.
        """
        qkv = self.heads(self.c_attn(x))  # (B, 3, H, T, C/H)
        q, kv = qkv[:, 0], qkv[:, 1:]
        if before is not None:
            C, weight, bias = x.size(-1), self.c_attn.weight, self.c_attn.bias
            before = F.linear(before, weight[C:], None if bias is None else bias[C:])
            kv = torch.cat((self.heads(before), kv), dim=3)
        if cache is not None:
            cache[..., -kv.size(3):, :] = kv
            kv = cache
        y = attend(q, *kv.unbind(1), self.dropout if self.training else 0.0)  # (B, H, T, C/H)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))

    def heads(self, x):
        """Queries, keys, values x (B, T, n*C) -> (B, n, H, T, C/H)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.n_head, self.head_size).permute(0, 2, 3, 1, 4)

def attend(q, k, v, dropout=0.0):
    """Softmax attention of q (B, H, n, C/H) to k, v (B, H, S, C/H), of which the last query sees
    all, the one before it one less, and so on."""
    (B, H, n, D), S = q.shape, k.size(2)
    if n == 1 or S >= FUSED_FROM or q.is_cuda:
        mask = q.new_ones(n, S, dtype=torch.bool).tril(S - n) if 1 < n < S else None
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=1 < n == S)
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    future = q.new_full((n, S), -math.inf).triu(S - n + 1)
    weights = torch.baddbmm(future, q, k.mT, alpha=D ** -0.5).softmax(dim=-1)  # (B*H, n, S)
    return (F.dropout(weights, dropout) @ v).view(B, H, n, D)

class LayerNorm(nn.LayerNorm):
    """torch's, called with less ado: one token at a time, that is a few per cent of the time."""
    def forward(self, x):
        return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

class MLP(nn.Module):
    """Feed-forward network; W_FF of eq. 10."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))

class Block(nn.Module):
    """GPT-2's block, one step in time (eq. 5, 6): attention and feed-forward on residuals."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, before=None, cache=None):
        """x (B, T, C) -> (B, T, C), one layer on; before and cache as in the attention."""
        before = None if before is None else self.ln_1(before)
        x = x + self.dropped(self.attn(self.ln_1(x), before, cache))
        return x + self.dropped(self.mlp(self.ln_2(x)))

    def dropped(self, x):
        return F.dropout(x, self.dropout) if self.training else x

class LocalBlock(Block):
    """Layer i of the local transformer, X^s_{i-1,0} -> X^s_{i,0} (eq. 16), shown one segment."""

class GlobalBlock(Block):
    """Layer i of the global transformer: both halves of the window one step on in time."""

    def forward(self, past, current, cache=None, frozen=False):
        """X^{s-1}_{N,N+i-1} (B, l, C) and X^s_{N,i-1} (B, n, C) -> both, one layer on.

        past None: there is none, or it is in the cache. frozen: it is read alone, as it came.
        """
        if past is None:
            return None, super().forward(current, cache=cache)
        if frozen:
            return past, super().forward(current, past, cache)
        l = past.size(1)
        window = super().forward(torch.cat((past, current), dim=1), cache=cache)  # (B, l + n, C)
        past = window[:, :l]  # eq. 13: under the causal mask it has attended within itself
        current = window[:, l:]  # eq. 17: to the past half and, causally, to itself (eq. 14)
        return past, current

def through(blocks, x, caches=None):
    """x (B, T, C) -> (B, T, C) after all of the blocks, each with its cache if there are some."""
    for block, cache in zip(blocks, caches or [None] * len(blocks)):
        x = block(x, cache=cache)
    return x

class GPT(nn.Module):
    """The baseline: `logits, loss, carry = model(idx, targets)`, with None for a carry."""
    unit = 1  # tokens of a recurrence step

    def __init__(self, config):
        super().__init__()
        self.config = config
        blocks, places = self.layout()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(places, config.n_embd),
            h=nn.ModuleList(block(config) for block in blocks),
            ln_f=LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # residual branches start smaller the more there are, as in GPT-2
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def layout(self):
        """The kinds of the blocks, and the number of places that have a position embedding."""
        return [Block] * self.config.n_layer, self.config.block_size

    def forward(self, idx, targets=None, carry=None):
        """idx, targets (B, T) -> logits (B, T, V) of the next tokens, mean loss in nats, None.

        Targets of -1 are left out. Without targets the loss is None, and the logits are those of
        the last position alone, (B, 1, V). Raises ValueError if T is not in 1..block_size.
        """
        T, W = idx.size(1), self.config.block_size
        if not 1 <= T <= W:
            raise ValueError(f'block_size={W}: the model cannot read {T} tokens at once')
        return *self.head(through(self.transformer.h, self.embed(idx)), targets), None

    def embed(self, idx, place=0):
        """Token plus position embedding, from `place` on: idx (B, T) -> (B, T, C)."""
        positions = self.transformer.wpe.weight[place:place + idx.size(1)]
        x = self.transformer.wte(idx) + positions
        return F.dropout(x, self.config.dropout) if self.training else x

    def head(self, x, targets=None):
        """Final layer norm, output matrix, cross entropy (eq. 15): x (B, T, C) -> logits, loss."""
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def new_cache(self, B):
        """Room for keys and values of a whole window: (B, n_layer, 2, H, block_size, C/H)."""
        return self.new_caches(B, self.config.n_layer, self.config.block_size)

    def new_caches(self, B, n_layer, places):
        H, D = self.config.n_head, self.config.n_embd // self.config.n_head
        return self.lm_head.weight.new_zeros(B, n_layer, 2, H, places, D)

    def extend(self, idx, place, carry, cache, first):
        """The next tokens of a window, idx (B, n) from `place` on, through the cache, which is
        filled in: logits (B, V) of the token that follows, and None for a carry."""
        caches = cache[..., :place + idx.size(1), :].unbind(1)
        x = through(self.transformer.h, self.embed(idx, place), caches)
        return self.head(x)[0][:, -1], None

class FoldGPT(GPT):
    """The folded model: parameters of a GPT with a window of one segment, a gate if it is gated."""

    def __init__(self, config):
        super().__init__(config)
        self.unit = config.segment_size
        if config.carry == 'gated':
            self.carry_gate = nn.Linear(2 * config.n_embd, config.n_embd)
            nn.init.ones_(self.carry_gate.bias)  # to begin with it keeps more than it takes

    def layout(self):
        local, glob = [LocalBlock] * self.config.n_local, [GlobalBlock] * self.config.n_global
        return local + glob, self.config.segment_size

    def forward(self, idx, targets=None, carry=None):
        """As GPT's, for any T >= 1 from the start of a segment on; the last segment may be short.
        The carry (B, l, C) is what the call on the tokens before returned, X^s_{N,N} of its last
        segment; None starts a sequence. Raises ValueError if it is not of a whole segment."""
        shape = len(idx), self.config.segment_size, self.config.n_embd
        if idx.size(1) < 1 or carry is not None and carry.shape != shape:
            raise ValueError(f'a fold takes 1 token or more, and the carry of a segment, {shape}')
        x, carry = self.fold(self.local(idx), carry)
        return *self.head(x, targets), carry

    def local(self, idx):
        """The local transformer, all segments at once: idx (B, T) -> X^s_{N,0} (B, T, C)."""
        (B, T), l = idx.shape, self.config.segment_size
        segments = F.pad(idx, (0, -T % l)).view(-1, l)  # (B*N_s, l); the padding comes last
        x = through(self.transformer.h[:self.config.n_local], self.embed(segments))  # eq. 16
        return x.view(B, -1, x.size(-1))[:, :T]  # (B*N_s, l, C) -> (B, T, C)

    def fold(self, x, carry):
        """The segment-carry loop: X^s_{N,0} -> X^s_{N,N} for all s (B, T, C), and the carry."""
        outputs = []
        for x_s in x.split(self.config.segment_size, dim=1):  # s = 1, ..., N_s
            carry = self.carried(carry, self.globally(carry, x_s))
            outputs.append(carry)
        return torch.cat(outputs, dim=1), carry

    def globally(self, past, current, caches=None):
        """The global transformer: X^{s-1}_{N,N} (B, l, C), X^s_{N,0} (B, n, C) -> X^s_{N,N}."""
        *blocks, last_block = list(self.transformer.h)[self.config.n_local:]
        *caches, last_cache = caches or [None] * self.config.n_global
        for block, cache in zip(blocks, caches):
            past, current = block(past, current, cache)  # eq. 13 and 17
        return last_block(past, current, last_cache, frozen=True)[1]  # nobody reads its past half

    def carried(self, old, new):
        """The output of a segment, new (B, n, C), as it goes on: mixed with the carry before it if
        that is gated, place by place; old (B, n or more, C) or None."""
        if old is None or self.config.carry == 'plain':
            return new
        old = old[:, :new.size(1)]
        g = self.carry_gate(torch.cat((old, new), dim=-1)).sigmoid()
        return g * old + (1 - g) * new

    def new_cache(self, B):
        """Room for keys and values: (B, n_local, 2, H, l, C/H), (B, n_global, 2, H, 2l, C/H)."""
        c, l = self.config, self.config.segment_size
        return self.new_caches(B, c.n_local, l), self.new_caches(B, c.n_global, 2 * l)

    def extend(self, idx, place, carry, cache, first):
        """The next tokens of an open segment, idx (B, n) from `place` on, through its caches, the
        past half's at place 0: logits (B, V) of the token that follows, and the carry (B, l, C), in
        place: X^s_{N,N} up to there, X^{s-1}_{N,N} beyond. first: no segment is before."""
        (local, window), l, end = cache, self.config.segment_size, place + idx.size(1)
        blocks = list(self.transformer.h)[:self.config.n_local]
        x = through(blocks, self.embed(idx, place), local[..., :end, :].unbind(1))
        past = None if first or place else carry
        x = self.globally(past, x, window[..., l if first else 0:l + end, :].unbind(1))
        x = carry[:, place:end] = self.carried(None if first else carry[:, place:], x)
        return self.head(x)[0][:, -1], carry
