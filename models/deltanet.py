"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a memory matrix that forgets and corrects.

For every token t and head, after a convolution of 4 tokens and SiLU, q and k of length 1:
    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t       eq. 10
    alpha_t = exp(-exp(A) softplus(W_a x_t + b)),  beta_t = sigmoid(W_b x_t)              Mamba2's
    y_t = W_o (RMSNorm(o_t) * SiLU(W_g x_t))                                              3.4
A call computes S_t = alpha_t S_{t-1} + u_t k_t^T, where u_t = beta_t (v_t - alpha_t S_{t-1} k_t):
all u of n tokens solve one triangular system (section 3.3). S is kept transposed, keys first.
Differs: GPT-2's block, its MLP 3.5 times as wide as the stream, not 4, which makes up for W_g.
State: n_layer * n_embd * (n_embd / n_head + 9) numbers, at four layers of 128 and four heads
65,536 bytes of S and 18,432 of the convolution. Parameters: 806,304 with 65 tokens.
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CausalSelfAttention
from models.peer import Peer

class GatedDeltaRule(CausalSelfAttention):
    def __init__(self, config):
        super().__init__(config)
        C, H = config.n_embd, config.n_head
        self.conv = nn.Parameter(torch.empty(1, 3 * C, 4).uniform_(-0.5, 0.5))  # as nn.Conv1d's
        self.rates, self.gate = nn.Linear(C, 2 * H, bias=False), nn.Linear(C, C, bias=False)
        self.norm = nn.RMSNorm(C // H, eps=1e-5)
        self.A = nn.Parameter(torch.empty(H).uniform_(1, 16).log())  # as Mamba2 begins
        self.b = nn.Parameter(torch.logspace(-3, -1, H).expm1().log())  # softplus(b): 0.001 to 0.1

    def forward(self, x, memory=None):
        """x (B, n, C) -> (B, n, C); memory, before and after: S (B, H, D, D), and the inputs of
        the convolution of the last tokens, (B, 3, 3C)."""
        (B, _, C), H, D = x.shape, self.n_head, self.head_size
        S, inputs = memory or (x.new_zeros(B, H, D, D), x.new_zeros(B, 3, 3 * C))
        inputs = torch.cat((inputs, self.c_attn(x)), dim=1)  # (B, 3 + n, 3C)
        mixed = F.silu((inputs.unfold(1, 4, 1) * self.conv).sum(dim=-1))  # (B, n, 3C)
        q, k, v = self.heads(mixed).unbind(1)  # (B, H, n, D)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        a, b = self.rates(x).mT[..., None].chunk(2, dim=1)  # (B, H, n, 1)
        decay = -self.A.exp()[:, None, None] * F.softplus(a + self.b[:, None, None])
        decay, beta = decay.cumsum(dim=2), b.sigmoid()  # log alpha_1 ... alpha_t
        between = (decay - decay.mT).tril().exp().tril()  # (B, H, n, n): alpha_{j+1} ... alpha_t
        known = beta * (v - decay.exp() * k @ S)
        u = torch.linalg.solve_triangular(beta * between * (k @ k.mT), known, upper=False,
                                          unitriangular=True)  # (B, H, n, D)
        y = decay.exp() * q @ S + (between * (q @ k.mT)) @ u
        S = decay[:, :, -1:].exp() * S + (between[:, :, -1:].mT * k).mT @ u
        y = self.norm(y.to(x.dtype)).transpose(1, 2).reshape(x.shape) * F.silu(self.gate(x))
        return self.c_proj(y), (S, inputs[:, -3:])

class DeltaNet(Peer):
    """The carry is S and the convolution's inputs of each layer, in turn."""
    attention, at_once = GatedDeltaRule, 32

    def layout(self, config):
        return super().layout(config, width=7 * config.n_embd // 2)

    def step(self, x, carry):
        x, pairs = super().step(x, carry and [*zip(carry[::2], carry[1::2])])
        return x, sum(pairs, ())
