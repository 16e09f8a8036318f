"""
The baseline GPT (GPT-2's blocks, nanoGPT's parameter names), and FoldGPT, which runs the same blocks by
*folded context condensation* (Paeng and Kwon, arXiv 2405.04620): a sequence is cut into segments; a local
transformer runs inside each of them; a global transformer runs over the window [previous segment's output ;
this segment]; its output gives the logits and is carried on into the next segment.

    paper                    here                        meaning
    L = l * N_s, d_E         block_size, n_embd          tokens of a training sequence, channels
    l, N                     segment_size, n_local = n_global (free here): tokens of a segment, layers
    X^s_{i,0}                local()                     segment s after i local layers            eq. 16
    X^s_{N,i}                current half of the window  segment s after i global layers           eq. 17
    X^{s-1}_{N,N+i}          past half of the window     segment s-1, i global layers further on   eq. 13
    X^s_{N,N}                carry                       output of segment s: logits and carry     eq. 15
"""
import math
from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.nn import functional as F


SHORT_WINDOW = 64  # the longest window on which fused attention is slower than its products one by one
SHORT_ROWS = 0     # a softmax of fewer numbers is taken across rows, not along them: set by training on a CPU


@dataclass
class GPTConfig:
    """Sizes of a GPT. Raises ValueError for sizes that no model can have."""
    block_size: int = 1024  # tokens of a training sequence; the GPT's window
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True       # biases in linear layers and layer norms, as in GPT-2

    def __post_init__(self):
        for f in fields(self):
            if f.type is int and getattr(self, f.name) < (f.name != 'n_local'):
                raise ValueError(f"{f.name} must be at least {int(f.name != 'n_local')}, not {getattr(self, f.name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


@dataclass
class FoldConfig(GPTConfig):
    """Sizes of a FoldGPT: a GPT's, with n_layer = n_local + n_global. Raises ValueError like GPTConfig."""
    segment_size: int = 12  # l, the local window; the global one is twice as wide
    n_local: int = 6
    n_global: int = 6
    carry: str = 'plain'    # the paper's: a segment's output; 'gated' mixes it with what was carried before

    def __post_init__(self):
        super().__post_init__()
        self.n_layer = self.n_local + self.n_global
        if self.carry not in ('plain', 'gated'):
            raise ValueError(f"carry must be 'plain' or 'gated', not {self.carry!r}")
        if self.block_size % self.segment_size:
            raise ValueError(f"block_size={self.block_size} must be a multiple of segment_size={self.segment_size}")


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention: the softmax of eq. 6, and so of eq. 16 and 17."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # W_Q, W_K, W_V in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, n_out=None, cache=None):
        """x (B, T, C) -> (B, n_out, C): what the last n_out positions gather; by default, all T of them.
        A cache (B, 2, H, S, C/H), S >= T, holds keys and values of S - T positions before x; those of x are filled in."""
        B, T, C = x.shape
        if n_out in (None, T):
            q, k, v = self.heads(self.c_attn(x), 3)
        else:  # queries are computed only where somebody reads the answer
            (w_q, w_kv), b = self.c_attn.weight.split([C, 2 * C]), self.c_attn.bias
            b_q, b_kv = (None, None) if b is None else b.split([C, 2 * C])
            (q,), (k, v) = self.heads(F.linear(x[:, -n_out:], w_q, b_q), 1), self.heads(F.linear(x, w_kv, b_kv), 2)
        if cache is not None:
            cache[:, 0, :, -T:], cache[:, 1, :, -T:] = k, v
            k, v = cache.unbind(1)  # (B, H, S, C/H) each
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, n_out, C/H)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, -1, C)), self.dropout, self.training)

    def heads(self, x, n):
        """x (B, T, n*C) -> n tensors (B, H, T, C/H)."""
        return x.view(*x.shape[:2], n, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind(0)


def attend(q, k, v, dropout=0.0):
    """Softmax attention of q (B, H, n, C/H) to k, v (B, H, S, C/H); the last query sees all, the one before one less."""
    (B, H, n, D), S = q.shape, k.size(2)
    if n == 1 or n == S > SHORT_WINDOW:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=n > 1)
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    future = q.new_full((n, S), float('-inf')).triu(S - n + 1)
    if S < SHORT_ROWS:
        weights = torch.baddbmm(future.t(), k, q.mT, alpha=D ** -0.5).softmax(dim=1).mT  # (B*H, n, S)
    else:
        weights = torch.baddbmm(future, q, k.mT, alpha=D ** -0.5).softmax(dim=-1)
    return (F.dropout(weights, dropout) @ v).view(B, H, n, D)


class MLP(nn.Module):
    """Feed-forward network; W_FF of eq. 10."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """GPT-2's block: pre-layer-norm, attention, residual, feed-forward, residual. One step in time (eq. 5, 6)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        parts = self.ln_1, self.attn.c_attn, self.attn.c_proj, self.ln_2, self.mlp.c_fc, self.mlp.c_proj
        self.weights = [(part.weight, part.bias) for part in parts]  # at hand for step

    def forward(self, x, n_out=None, cache=None):
        """x (B, T, C) -> (B, n_out, C): its last n_out positions one layer on; by default, all T of them."""
        if cache is not None and x.size(1) == 1:
            return self.step(x[:, 0], cache)[:, None]
        x = (x if n_out is None else x[:, -n_out:]) + self.attn(self.ln_1(x), n_out, cache)
        return x + self.mlp(self.ln_2(x))

    def step(self, x, cache):
        """forward for one token a row, x (B, C), in eval mode and in few calls: they cost more than what they compute."""
        (B, C), (ln_1, c_attn, c_proj, ln_2, c_fc, c_down) = x.shape, self.weights
        qkv = affine(torch.layer_norm(x, (C,), *ln_1), *c_attn).view(B, 3, cache.size(2), 1, -1)  # (B, 3, H, 1, C/H)
        cache[..., -1:, :] = qkv[:, 1:]
        x = affine(F.scaled_dot_product_attention(qkv[:, 0], *cache.unbind(1)).view(B, C), *c_proj, x)
        return affine(F.gelu(affine(torch.layer_norm(x, (C,), *ln_2), *c_fc)), *c_down, x)


def affine(x, weight, bias, start=None):
    """start + x W^T + b, for x (B, C)."""
    if bias is not None:
        start = bias if start is None else start + bias
    return torch.mm(x, weight.t()) if start is None else torch.addmm(start, x, weight.t())


class LocalBlock(Block):
    """Layer i of the local transformer, X^s_{i-1,0} -> X^s_{i,0} (eq. 16): a block that is shown one segment."""


class GlobalBlock(Block):
    """Layer i of the global transformer (eq. 17): a block that is shown the window [past half ; current half].
    [X^{s-1}_{N,N+i-1} ; X^s_{N,i-1}] (B, 2l, C) -> [X^{s-1}_{N,N+i} ; X^s_{N,i}], its last n_out positions. Under the
    causal mask the past half attends within itself (eq. 13), the current half to it and, causally, to itself (eq. 14):
    Block.forward is eq. 17 in the rows of the current half, eq. 13 in the others."""


class State(SimpleNamespace):
    """What a model keeps of the tokens it has read: tensors whose rows are those of the batch.

    Both: read (B,) int64 on the CPU, the number of tokens. GPT: tokens (B, W), the last ones, and while all that was
    read fits into the window W, their keys and values, cache (B, n_layer, 2, H, W, C/H). FoldGPT, of constant size:
    carry (B, l, C), X^s_{N,N} of the open segment as far as it is read, the carry once it is full; keys and values
    local (B, n_local, 2, H, l, C/H) of the open segment, window (B, n_global, 2, H, 2l, C/H) of [past half ; it]."""

    def pick(self, rows):
        """A copy of some rows, in any order and number: rows is a slice, a list or a tensor of indices."""
        rows = rows.cpu() if torch.is_tensor(rows) else rows  # `read` is there, and what is elsewhere takes these, too
        return State(**{name: value[rows].clone() for name, value in vars(self).items()})

    def clone(self):
        return self.pick(slice(None))

    def put(self, rows, other):
        """Replace some rows, in place, by those of another state, of a new one to reset them."""
        rows = rows.cpu() if torch.is_tensor(rows) else rows
        for name, value in vars(self).items():
            value[rows] = getattr(other, name)


class GPT(nn.Module):
    """The baseline: `logits, loss, carry = model(idx, targets)`, and `logits, state = model.read(idx, state)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        blocks, window = self.layout()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd), wpe=nn.Embedding(window, config.n_embd),
            h=nn.ModuleList(block(config) for block in blocks),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # as in GPT-2, residual branches start smaller the more there are
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def layout(self):
        """The kinds of the blocks, and the number of positions that have an embedding."""
        return [Block] * self.config.n_layer, self.config.block_size

    def num_params(self):
        """Parameters without the position embedding, as GPTs are usually counted."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW in two groups: matrices and embeddings decay, biases and layer norms do not."""
        groups = [{'params': [p for p in self.parameters() if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in self.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cpu', 'cuda'))

    def forward(self, idx, targets=None, carry=None, all_logits=False):
        """idx (B, T), targets (B, T) -> logits (B, T, V) of the next tokens, their mean loss in nats, None for a carry.
        Targets of -1 are left out. Without targets the loss is None, and the logits are those of the last position
        alone, (B, 1, V), unless all_logits. The carry is ignored. Raises ValueError if T is not in 1..block_size."""
        if not 1 <= idx.size(1) <= self.config.block_size:
            raise ValueError(f"a GPT with block_size={self.config.block_size} cannot read {idx.size(1)} tokens at once")
        return *self.head(self.hidden(idx), targets, all_logits), None

    def hidden(self, idx, first=0, cache=None):
        """All blocks on tokens whose first has position `first`: idx (B, T) -> (B, T, C)."""
        x, caches = self.embed(idx, first), [None] * self.config.n_layer if cache is None else cache.unbind(1)
        for block, cache in zip(self.transformer.h, caches):
            x = block(x, cache=cache)
        return x

    def embed(self, idx, first=0):
        """Token plus position embedding: idx (B, T) -> (B, T, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[first:first + idx.size(1)]
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, x, targets=None, all_logits=False):
        """Final layer norm, tied output matrix, cross entropy (eq. 15): x (B, T, C) -> logits, loss."""
        logits = self.lm_head(self.transformer.ln_f(x if all_logits or targets is not None else x[:, -1:]))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def new_state(self, B=1):
        """The state of B rows of which nothing has been read."""
        c, zeros = self.config, self.lm_head.weight.new_zeros
        return State(read=torch.zeros(B, dtype=torch.int64), tokens=zeros(B, c.block_size, dtype=torch.int64),
                     cache=zeros(B, c.n_layer, 2, c.n_head, c.block_size, c.n_embd // c.n_head))

    def read(self, idx, state=None):
        """Read idx (B, T), any T: logits (B, V) of the token that follows, zeros if nothing has been read, and the new state."""
        state = state.clone() if state else self.new_state(len(idx))
        return self.read_(idx, state).clone(), state

    def step(self, token, state=None):
        """As read, of one token a row: token (B,)."""
        return self.read(token[:, None], state)

    @torch.inference_mode()
    def read_(self, idx, state):
        """As read, in place; the logits are a tensor of inference mode: clone() makes one that can be written to.
        Raises FloatingPointError, naming the token, if what the model makes of one is not finite."""
        if len(idx) != len(state.read) or self.training and self.config.dropout:
            raise ValueError("reading takes a row of tokens for every row of the state, and model.eval()")
        counts = set(state.read.tolist())
        if len(counts) == 1 and (idx.size(1) or counts != {0}):
            return self.read_rows(idx, state, *counts)
        logits = self.lm_head.weight.new_zeros(len(idx), self.config.vocab_size)
        for count in counts - {0} if len(counts) == 1 else counts:  # rows that have read equally much go together
            rows = (state.read == count).nonzero()[:, 0]
            some = state.pick(rows)
            logits[rows] = self.read_(idx[rows], some)
            state.put(rows, some)
        return logits

    def read_rows(self, idx, state, read):
        """Through the cache, or, where the window is too short for all that was read, recomputing all of it."""
        W, T, p = self.config.block_size, idx.size(1), min(self.config.block_size, read)
        known = torch.cat((state.tokens[:, :p], idx), dim=1)[:, -W:]
        x = self.hidden(idx, p, state.cache[..., :p + T, :]) if 0 < T <= W - p else self.hidden(known)
        if not math.isfinite(torch.linalg.vector_norm(x, math.inf).item()):
            if T <= 1:
                raise FloatingPointError(f"the state is not finite at token {read}")
            return [self.read_(token, state) for token in idx.split(1, dim=1)][-1]  # to find the token
        state.tokens[:, :known.size(1)] = known
        state.read += T
        return self.head(x)[0][:, -1]

    def stream(self, idx, state, max_new_tokens, *how):
        """Read idx (B, T) into the state, in place, then yield one new token a row (B, 1) at a time, read as well."""
        logits = self.read_(idx, state)
        for _ in range(max_new_tokens):
            token = sample_token(logits, *how)
            logits = self.read_(token, state)
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue idx (B, T), any T: (B, T + max_new_tokens). The draws are those of sample_token."""
        tokens = self.stream(idx, self.new_state(len(idx)), max_new_tokens, temperature, top_k, top_p, generator)
        return torch.cat((idx, *tokens), dim=1)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token a row, logits (B, V) -> (B, 1): at temperature 0 the likeliest, else one of the top_k likeliest, or
    of those the fewest that hold the share top_p of the probability."""
    if temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(dim=-1, keepdim=True)
    probs, order = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        probs[:, top_k:] = 0
    if top_p:
        beyond = probs.cumsum(dim=-1) - probs >= top_p * probs.sum(dim=-1, keepdim=True)
        probs[:, 1:] = probs[:, 1:].masked_fill(beyond[:, 1:], 0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))


class FoldGPT(GPT):
    """The folded model: the parameters of a GPT with n_local + n_global layers and a window of segment_size, and of a gate if the
    carry is gated."""

    def __init__(self, config):
        super().__init__(config)
        if config.carry == 'gated':  # it starts by keeping more of the old than it takes of the new
            self.carry_gate = nn.Linear(2 * config.n_embd, config.n_embd)
            nn.init.ones_(self.carry_gate.bias)

    def layout(self):
        return [LocalBlock] * self.config.n_local + [GlobalBlock] * self.config.n_global, self.config.segment_size

    def forward(self, idx, targets=None, carry=None, all_logits=False):
        """As GPT's, for idx (B, T) from the start of a segment on, of any T >= 1; the last segment may be short.
        The carry (B, l, C) is what the call on the tokens before returned, X^s_{N,N} of its last segment; None at the
        start of a sequence. Raises ValueError if T is 0 or the carry is not of a whole segment."""
        shape = (len(idx), self.config.segment_size, self.config.n_embd)
        if idx.size(1) < 1 or carry is not None and carry.shape != shape:
            raise ValueError(f"a fold reads at least 1 token, not {idx.size(1)}, and takes the carry of whole segments, "
                             f"(B, l, C) = {shape}, not {carry if carry is None else tuple(carry.shape)}")
        x, carry = self.fold(self.local(idx), carry)
        return *self.head(x, targets, all_logits), carry

    def local(self, idx):
        """The local transformer on all segments at once: idx (B, T) -> X^s_{N,0} for every s, (B, T, C)."""
        (B, T), l = idx.shape, self.config.segment_size
        segments = F.pad(idx, (0, -T % l)).view(-1, l)  # (B*N_s, l); padding comes last, so no token sees it
        x = self.embed(segments)
        for block in self.transformer.h[:self.config.n_local]:
            x = block(x)  # eq. 16
        return x.view(B, -1, x.size(-1))[:, :T]  # (B*N_s, l, C) -> (B, T, C)

    def fold(self, x, carry):
        """The segment-carry loop: x (B, T, C) out of the local transformer -> X^s_{N,N} for every s, last carry."""
        outputs = []
        for x_s in x.split(self.config.segment_size, dim=1):  # s = 1, ..., N_s
            window = x_s if carry is None else torch.cat((carry, x_s), dim=1)  # (B, 2l, C); l for the first segment
            carry = self.carried(carry, self.globally(window, x_s.size(1)))
            outputs.append(carry)
        return torch.cat(outputs, dim=1), carry

    def carried(self, old, new):
        """The output of a segment (B, n, C) as it goes on: new, X^s_{N,N}, or its mixture with the carry before it, old."""
        if old is None or self.config.carry == 'plain':
            return new
        g = self.carry_gate(torch.cat((old[:, :new.size(1)], new), dim=-1)).sigmoid()
        return g * old[:, :new.size(1)] + (1 - g) * new

    def globally(self, window, n_out, caches=None):
        """The global transformer: [X^{s-1}_{N,N} ; X^s_{N,0}] (B, 2l, C) -> X^s_{N,N}, its last n_out positions."""
        *blocks, last_block = list(self.transformer.h)[self.config.n_local:]
        caches = caches or [None] * self.config.n_global
        for block, cache in zip(blocks, caches):
            window = block(window, cache=cache)  # eq. 13 and 17: both halves one step on
        return last_block(window, n_out, caches[-1])  # eq. 17 with i = N: the current half alone is read

    def new_state(self, B=1):
        c, l, zeros = self.config, self.config.segment_size, self.lm_head.weight.new_zeros
        heads = c.n_head, c.n_embd // c.n_head
        local, window = (zeros(B, n, 2, heads[0], S, heads[1]) for n, S in ((c.n_local, l), (c.n_global, 2 * l)))
        return State(read=torch.zeros(B, dtype=torch.int64), carry=zeros(B, l, c.n_embd), local=local, window=window)

    def read_rows(self, idx, state, read):
        """Whole segments at once, what is less than a segment through the caches."""
        l, most = self.config.segment_size, 64 * self.config.segment_size
        x = state.carry[:, :(read - 1) % l + 1]
        while idx.size(1):
            p, n = read % l, min(most, idx.size(1)) // l * l
            if p == 0 and n:
                x, _ = self.fold(self.local(idx[:, :n]), state.carry if read else None)
            else:
                n = min(most, idx.size(1), l - p)
                x = self.extend(idx[:, :n], state, p, first=read < l)
            if not math.isfinite(torch.linalg.vector_norm(x, math.inf).item()):
                if n == 1:
                    raise FloatingPointError(f"the state is not finite at token {read}")
                return [self.read_(token, state) for token in idx.split(1, dim=1)][-1]  # to find the token
            state.carry[:, p:p + n] = x[:, -l:]
            state.read += n
            read, idx = read + n, idx[:, n:]
        return self.head(x)[0][:, -1]

    def extend(self, idx, state, p, first):
        """Tokens idx (B, n) of one segment, from place p on, through its caches -> their X^s_{N,N}, (B, n, C).
        At p = 0 the window takes the carry along, which fills in the keys and values of the past half, once."""
        l, n, x = self.config.segment_size, idx.size(1), self.embed(idx, p)
        for block, cache in zip(self.transformer.h, state.local[..., :p + n, :].unbind(dim=1)):
            x = block(x, cache=cache)
        window = x if p or first else torch.cat((state.carry, x), dim=1)
        x = self.globally(window, n, state.window[..., l if first else 0:l + p + n, :].unbind(dim=1))
        return self.carried(None if first else state.carry[:, p:p + n], x)
