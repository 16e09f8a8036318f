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

The defaults are the paper's. `position`, `local`, `past` and `carry` of the configs change one
thing each.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn import functional as F

# On a CPU torch's fused attention is used where queries times keys are at least FUSED_FROM ** 2, on
# a GPU always. attend() has both ways: change them together.
FUSED_FROM = 129

def one_of(config, **choices):
    for key, known in choices.items():
        if getattr(config, key) not in known:
            raise ValueError(f'{key} must be one of {known}, not {getattr(config, key)!r}')

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
    position: str = 'learned'  # 'learned', an embedding of each place; 'rotary', queries and keys
                               # turned by it; or 'none'
    rotary_base: float = 10000.0  # of rotary positions: the larger, the slower the slowest turn
    window: int = 0         # tokens that a layer sees, sliding; 0: the whole block
    gelu: str = 'none'      # how GELU is approximated: 'none', or 'tanh', as in OpenAI's GPT-2
    border: int = -1        # token that begins a document: lib/ forgets what was before; -1: none

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        one_of(self, position=('learned', 'rotary', 'none'), gelu=('none', 'tanh'))
        if self.position == 'rotary' and self.n_embd // self.n_head % 2:
            raise ValueError(f"position='rotary' takes heads of an even size, n_embd / n_head, not "
                             f'{self.n_embd // self.n_head}')
        if self.position == 'rotary' and self.rotary_base <= 1:
            raise ValueError(f'rotary_base must be above 1, not {self.rotary_base}')
        for key in ('window', 'segment_size'):  # the latter where a class below has it
            size = getattr(self, key, 0)
            if size and self.block_size % size:
                raise ValueError(f'block_size={self.block_size} must be a multiple of {key}={size}')

@dataclass
class FoldConfig(GPTConfig):
    """Sizes of a FoldGPT: a GPT's, with n_layer = n_local + n_global. Raises ValueError."""
    block_size: int = 768   # L, tokens of a training sequence, whole segments
    segment_size: int = 12  # l, tokens of a segment; the global window is twice as wide
    n_local: int = 6        # local layers
    n_global: int = 6       # global layers
    local: str = 'segment'  # what local layers see: their 'segment', or l tokens, 'sliding'
    past: str = 'evolving'  # the past half: 'evolving', or 'frozen', as it came; or no recurrence:
                            # 'local', X^{s-1}_{N,0}, or 'none'
    carry: str = 'plain'    # 'plain', the paper's, or 'gated', mixed with the carry before

    def __post_init__(self):
        super().__post_init__()
        self.n_layer = self.n_local + self.n_global
        one_of(self, local=('segment', 'sliding'), carry=('plain', 'gated'),
               past=('evolving', 'frozen', 'local', 'none'))
        if self.window:
            raise ValueError("window is a GPT's: a fold takes window=0, and a segment_size")
        if self.carry == 'gated' and not self.recurrent:
            raise ValueError(f"carry='gated' has no carry to mix with past={self.past!r}: take "
                             "carry='plain'")

    @property
    def recurrent(self):
        return self.past in ('evolving', 'frozen')

class CausalSelfAttention(nn.Module):
    """Multi-head causal attention: the softmax of eq. 6, and so of eq. 16 and 17."""

    def __init__(self, config, window=0):
        super().__init__()
        self.n_head, self.dropout, self.window = config.n_head, config.dropout, window
        self.head_size = config.n_embd // config.n_head
        self.rotary_base = config.rotary_base if config.position == 'rotary' else 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # W_Q, W_K, W_V
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, before=None, cache=None):
        """x (B, T, C) -> (B, T, C): what each position gathers from those up to it, or of them from
        the last `window`, itself included; and all keys and values, (B, 2, H, S, C/H).

        before (B, 2, H, P, C/H): keys and values that stand before those of x.
        cache (B, 2, H, S, C/H): room for all keys and values; the last P + T are filled in.
        """
        qkv, T = self.heads(self.c_attn(x)), x.size(1)  # (B, 3, H, T, C/H)
        q, seen = qkv[:, 0], qkv[:, 1:]
        if before is not None:
            seen = torch.cat((before, seen), dim=3)
        if cache is not None:
            cache[:, :, :, -seen.size(3):] = seen
            seen = cache
        k, v = seen.unbind(1)
        if 0 < self.window < T:
            y = self.slide(q, k, v)
        else:
            y = self.attend(self.turn(q), self.turn(k), v)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape)), seen

    def keys_and_values(self, x):
        """Of states x (B, P, C) that ask nothing themselves: (B, 2, H, P, C/H)."""
        C, weight, bias = x.size(-1), self.c_attn.weight, self.c_attn.bias
        return self.heads(F.linear(x, weight[C:], None if bias is None else bias[C:]))

    def heads(self, x):
        """Queries, keys, values x (B, T, n*C) -> (B, n, H, T, C/H)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.n_head, self.head_size).permute(0, 2, 3, 1, 4)

    def turn(self, x):
        """Queries or keys (..., n, C/H), turned by their distances from the last, which stays: a
        score depends on the difference of two places alone."""
        n, D = x.shape[-2:]
        if not self.rotary_base or n == 1:
            return x
        places = 1 << (n - 1).bit_length()  # few different tables, as each is kept
        cos, sin = rotary(places, D, self.rotary_base, x.dtype, x.device)
        return torch.addcmul(x * cos[-n:], x.roll(D // 2, dims=-1), sin[-n:])

    def slide(self, q, k, v):
        """attend() of more than l = `window` queries (B, H, T, C/H), block by block of l, each in a
        window of two blocks. k, v (B, H, P + T, C/H), with P places before, mostly 0 or l."""
        T, l, P = q.size(2), self.window, k.size(2) - q.size(2)
        if P != l:  # the first block does not stand as the others do
            first = self.attend(self.turn(q[:, :, :l]), self.turn(k[:, :, :P + l]), v[:, :, :P + l])
            rest = self.slide(q[:, :, l:], k[:, :, P:], v[:, :, P:])
            return torch.cat((first, rest), dim=2)
        q, k, v = (F.pad(x, (0, 0, 0, -T % l)) for x in (q, k, v))
        q = q.unflatten(2, (-1, l)).flatten(0, 1)  # (B*H, N_s, l, C/H)
        k, v = (x[:, :, 1:].unfold(2, 2 * l - 1, l).mT.flatten(0, 1) for x in (k, v))
        y = self.attend(self.turn(q), self.turn(k), v)  # to k, v (B*H, N_s, 2l - 1, C/H)
        return y.flatten(1, 2)[:, :T].unflatten(0, (-1, self.n_head))

    def attend(self, q, k, v):
        """Softmax attention of q (A, B, n, D) to k, v (A, B, S, D): the last query sees the last
        `window` of them, or all, the one before it those one earlier, and so on."""
        (A, B, n, D), p = q.shape, self.dropout if self.training else 0.0
        window = self.window or k.size(2)
        k, v = (x[:, :, -(n + window - 1):] for x in (k, v))  # what any of them sees
        S = k.size(2)
        fused = n == 1 or n * S >= FUSED_FROM ** 2 or q.is_cuda
        causal = 1 < n == S
        mask = None if fused and (n == 1 or causal) else band(n, S, window, q.dtype, q.device)
        if fused:
            return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=causal)
        q, k, v = (x.reshape(A * B, -1, D) for x in (q, k, v))
        weights = torch.baddbmm(mask, q, k.mT, alpha=D ** -0.5).softmax(dim=-1)  # (A*B, n, S)
        return (torch.dropout(weights, p, self.training) @ v).view(A, B, n, D)

def cached(make):
    """make, memoized. torch.compile takes its results for constants, as lib/device.py tells it."""
    kept = lru_cache(torch.inference_mode(False)(make))  # so that training can use it
    return lambda *args: kept(*args)

@cached
def band(n, S, window, dtype, device):
    """0 where a query sees a key, else -inf: n queries, the last at the last of S keys, (n, S)."""
    seen = torch.ones(n, S, dtype=torch.bool).tril(S - n).triu(S - n - window + 1)
    return torch.zeros(n, S, dtype=dtype).masked_fill(~seen, -math.inf).to(device)

@cached
def rotary(places, D, base, dtype, device):
    """Cosines and signed sines, (places, D) each, of the rotary positions 1 - places, ..., 0 (Su et
    al. 2021, arXiv 2104.09864, eq. 34). Channels i and i + D/2 are turned together."""
    speeds = base ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)  # radians a place
    angles = torch.arange(1 - places, 1)[:, None] * speeds.repeat(2)
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(D // 2)
    return angles.cos().to(device, dtype), (angles.sin() * signs).to(device, dtype)

class MLP(nn.Module):
    """Feed-forward network; W_FF of eq. 10."""

    def __init__(self, config):
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))

class Block(nn.Module):
    """GPT-2's block, one step in time (eq. 5, 6): attention and feed-forward on residuals."""

    def __init__(self, config, window=0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, window)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, *others):
        """x (B, T, C) -> (B, T, C), one layer on, with what else the attention takes and gives."""
        y, seen = self.attn(self.ln_1(x), *others)
        x = x + torch.dropout(y, self.dropout, self.training)
        return x + torch.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training), seen

class LocalBlock(Block):
    """Layer i of the local transformer, X^s_{i-1,0} -> X^s_{i,0} (eq. 16), shown one segment, or
    the whole sequence if its window slides."""

class GlobalBlock(Block):
    """Layer i of the global transformer: both halves of the window one step on in time."""

    def forward(self, past, current, cache=None, frozen=False):
        """X^{s-1}_{N,N+i-1} (B, l, C) and X^s_{N,i-1} (B, n, C) -> both, one layer on. past None:
        there is none, or it is in the cache. frozen: it gives keys and values alone, as it came."""
        if past is None or frozen:
            before = None if past is None else self.attn.keys_and_values(self.ln_1(past))
            return past, super().forward(current, before, cache)[0]
        l = past.size(1)
        window, _ = super().forward(torch.cat((past, current), dim=1), None, cache)  # (B, l + n, C)
        past = window[:, :l]  # eq. 13: under the causal mask it has attended within itself
        current = window[:, l:]  # eq. 17: to the past half and, causally, to itself (eq. 14)
        return past, current

class GPT(nn.Module):
    """The baseline: `logits, loss, carry = model(idx, targets)`, with None for a carry, or, if its
    window slides, with the keys and values of the last `unit` tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        segment = getattr(config, 'segment_size', 0)  # of a fold, and of some of models/
        self.unit = segment or config.window or 1  # tokens of a recurrence step
        places = segment or config.window or config.block_size  # that a learned position tells
        blocks = self.layout(config)
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == 'learned':
            self.transformer['wpe'] = nn.Embedding(places, config.n_embd)
        self.transformer['h'] = nn.ModuleList(blocks)
        self.transformer['ln_f'] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # residual branches start smaller the more there are, as in GPT-2
                residual = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def layout(self, config):
        """The blocks, from the first to the last."""
        return [Block(config, config.window) for _ in range(config.n_layer)]

    def forward(self, idx, targets=None, carry=None):
        """idx, targets (B, T) -> logits (B, T, V) of the next tokens, mean loss in nats, carry.

        Targets of -1 are left out. Without targets the loss is None, and the logits are those of
        the last position alone, (B, 1, V). Raises ValueError if T is not in 1..block_size, which
        is no limit where a window slides, or if a carry is not of a whole segment.
        """
        T, most, window = idx.size(1), self.config.block_size, self.config.window
        if T < 1 or T > most and not window:
            raise ValueError(f'block_size={most}: the model cannot read {T} tokens at once')
        if carry is not None and carry.shape[4:5] != (window,):
            raise ValueError(f'the carry is not of a whole segment of {window} tokens')
        keep = (T - 1) % window + 1 if window else 0  # tokens of the last segment
        x, carry = self.run_blocks(self.transformer.h, self.embed(idx), carry, keep)
        return *self.head(x, targets), carry

    def embed(self, idx, place=0):
        """Token plus position embedding, from `place` on: idx (B, T) -> (B, T, C)."""
        x = self.transformer.wte(idx)
        if self.config.position == 'learned':
            wpe, places = self.transformer.wpe, torch.arange(idx.size(1), device=idx.device)
            x = x + wpe((place + places) % wpe.num_embeddings)  # in each segment anew
        return torch.dropout(x, self.config.dropout, self.training)

    def run_blocks(self, blocks, x, before=None, keep=0, caches=None):
        """x (B, T, C) -> (B, T, C) after the blocks, and the last `keep` keys and values of each,
        (B, n, 2, H, keep, C/H), or None; before, caches: the attention's, stacked alike."""
        kept = []
        for i, block in enumerate(blocks):
            own = (None if some is None else some[:, i] for some in (before, caches))
            x, seen = block(x, *own)
            if keep:
                kept.append(seen[:, :, :, -keep:])
        return x, torch.stack(kept, dim=1) if kept else None

    def head(self, x, targets=None):
        """Final layer norm, output matrix, cross entropy (eq. 15): x (B, T, C) -> logits, loss."""
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

class FoldGPT(GPT):
    """The folded model: parameters of a GPT with a window of one segment, and gates if asked."""

    global_block = GlobalBlock

    def __init__(self, config):
        super().__init__(config)
        blocks, n = list(self.transformer.h), config.n_local
        self.local_blocks, self.global_blocks = blocks[:n], blocks[n:]
        self.slides = config.local == 'sliding' and config.n_local > 0
        if config.carry == 'gated':
            self.carry_gate = nn.Linear(2 * config.n_embd, config.n_embd)
            nn.init.ones_(self.carry_gate.bias)  # to begin with it keeps more than it takes

    def layout(self, config):
        window = config.segment_size if config.local == 'sliding' else 0
        local = [LocalBlock(config, window) for _ in range(config.n_local)]
        return local + [self.global_block(config) for _ in range(config.n_global)]

    def forward(self, idx, targets=None, carry=None):
        """As GPT's, for any T >= 1 from the start of a segment on; the last segment may be short.
        The carry (B, l, C) is what the call on the tokens before returned, X^s_{N,N} of its last
        segment, with what run_blocks() keeps if local layers slide: (carry, kept); None starts a
        sequence. Raises ValueError if it is not of a whole segment."""
        carry, kept = carry if isinstance(carry, tuple) else (carry, None)
        shape = len(idx), self.config.segment_size, self.config.n_embd
        if idx.size(1) < 1 or carry is not None and carry.shape != shape:
            raise ValueError(f'a fold takes 1 token or more, and the carry of a segment, {shape}')
        if self.slides and (carry is None) != (kept is None):
            raise ValueError('where local layers slide, a carry is what they keep, too')
        x, kept = self.local(idx, kept)
        x, carry = self.fold(x, carry)
        return *self.head(x, targets), carry if kept is None else (carry, kept)

    def local(self, idx, kept=None):
        """The local transformer, all segments at once: idx (B, T) -> X^s_{N,0} (B, T, C), kept."""
        x = self.embed(idx)
        (B, T, C), l = x.shape, self.config.segment_size
        if self.slides:
            return self.run_blocks(self.local_blocks, x, kept, keep=l)
        segments = F.pad(x, (0, 0, 0, -T % l)).view(-1, l, C)  # (B*N_s, l, C); padding comes last
        x, _ = self.run_blocks(self.local_blocks, segments)  # eq. 16
        return x.view(B, -1, C)[:, :T], None

    def fold(self, x, carry):
        """The segment-carry loop: X^s_{N,0} -> X^s_{N,N} for all s (B, T, C), and the carry."""
        segments, outputs = x.split(self.config.segment_size, dim=1), []
        if not self.config.recurrent:
            return self.at_once(x, carry), segments[-1].clone()  # a view would keep all of x
        for x_s in segments:  # s = 1, ..., N_s
            carry = self.carried(carry, self.globally(carry, x_s))
            outputs.append(carry)
        return torch.cat(outputs, dim=1), carry

    def at_once(self, x, past):
        """fold() without recurrence, where no segment waits for another: the past half, if there is
        one, is X^{s-1}_{N,0}."""
        (B, T, C), l = x.shape, self.config.segment_size
        first = self.globally(past, x[:, :l])
        segments = F.pad(x, (0, 0, 0, -T % l)).view(B, -1, l, C)  # (B, N_s, l, C)
        pairs = (some.flatten(0, 1) for some in (segments[:, :-1], segments[:, 1:]))
        rest = self.globally(*pairs).view(B, -1, C) if T > l else x[:, :0]
        return torch.cat((first, rest), dim=1)[:, :T]

    def globally(self, past, current, caches=None):
        """The global transformer: X^{s-1}_{N,N} (B, l, C), X^s_{N,0} (B, n, C) -> X^s_{N,N}."""
        past = None if self.config.past == 'none' else past
        for i, block in enumerate(self.global_blocks):
            last = i == self.config.n_global - 1  # whose past half is read no further
            frozen = self.config.past != 'evolving' or last
            cache = None if caches is None else caches[:, i]
            past, current = block(past, current, cache, frozen)  # eq. 13 and 17
        return current

    def carried(self, old, new):
        """The output of a segment, new (B, n, C), as it goes on: mixed with the carry before it if
        that is gated, place by place; old (B, n or more, C) or None."""
        if old is None or self.config.carry == 'plain':
            return new
        old = old[:, :new.size(1)]
        g = self.carry_gate(torch.cat((old, new), dim=-1)).sigmoid()
        return g * old + (1 - g) * new
