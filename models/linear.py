"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236; after Shen et al., 1812.01243).

With phi = ELU + 1 (eq. 7), causal, for every token i and head:
    S_i = S_{i-1} + phi(K_i) V_i^T                                             eq. 10, 18
    Z_i = Z_{i-1} + phi(K_i)                                                   eq. 11, 19
    V'_i = phi(Q_i)^T S_i / (phi(Q_i)^T Z_i)                                   eq. 12, 20
Here many tokens at once: those of before through S, those of the call through their products.
Differs: no positions, where the paper adds them to the embedding; what divides is 1e-6 or more;
GPT-2's blocks, whose norm comes first.
State: n_layer * n_embd * (n_embd / n_head + 1) numbers, S and Z side by side, at four layers of
128 and four heads 67,584 bytes. Parameters: a GPT's, 795,904 with 65 tokens.
"""
from torch.nn import functional as F

from model import CausalSelfAttention
from models.peer import Peer

class LinearAttention(CausalSelfAttention):
    """Attention whose weights are products of features."""

    def forward(self, x, memory=None):
        """x (B, n, C) -> (B, n, C); memory: [S, Z] (B, H, D, D + 1), before and after."""
        q, k, v = self.heads(self.c_attn(x)).unbind(1)  # (B, H, n, D)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        v = F.pad(v, (0, 1), value=1.0)  # (B, H, n, D + 1): the column of ones adds up to Z
        y, new = (q @ k.mT).tril() @ v, (k.mT @ v).to(x.dtype)  # a sum, not of bfloat16
        if memory is not None:
            y, new = y + q @ memory, new + memory
        y = y[..., :-1] / y[..., -1:].clamp(min=1e-6)  # (B, H, n, D)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape)), new

class Linear(Peer):
    """The carry is a memory a layer: n_layer times (B, H, D, D + 1)."""
    attention, at_once = LinearAttention, 48
