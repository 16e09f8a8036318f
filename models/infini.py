"""Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143): a memory matrix a head and layer.

In segment s, with sigma = ELU + 1:
    A_dot = softmax(Q K^T / sqrt(d)) V, causal, of the segment alone               eq. 2
    A_mem = sigma(Q) M_{s-1} / (sigma(Q) z_{s-1})                                  eq. 3
    M_s = M_{s-1} + sigma(K)^T V,  z_s = z_{s-1} + sum_t sigma(K_t)                eq. 4
    M_s = M_{s-1} + sigma(K)^T (V - sigma(K) M_{s-1} / (sigma(K) z_{s-1}))         eq. 5, or
    A = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot                            eq. 6
As in the paper, positions turn the queries and keys of eq. 2 alone, and gradient flows through all
segments of a call. Before the first segment M and z are zero, and what is read of them is zero, as
what divides is 1e-6 or more.
State: n_layer * n_embd * (n_embd / n_head + 1) numbers, M and z side by side, at four layers of
128 and four heads 67,584 bytes. Parameters: a GPT's and beta, 795,920 with 65 tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CausalSelfAttention, one_of
from models.peer import Peer, SegmentConfig

@dataclass
class InfiniConfig(SegmentConfig):
    """Sizes of a GPT with Infini-attention. Raises ValueError."""
    update: str = 'linear'  # of the memory: 'linear', eq. 4, or 'delta', eq. 5, what it lacks

    def __post_init__(self):
        super().__post_init__()
        one_of(self, update=('linear', 'delta'))

class InfiniAttention(CausalSelfAttention):
    """Attention to the segment and to the memory."""

    def __init__(self, config):
        super().__init__(config)
        self.update = config.update
        self.beta = nn.Parameter(torch.zeros(config.n_head))

    def forward(self, x, memory=None):
        """x (B, l, C) -> (B, l, C); memory: [M, z] (B, H, D, D + 1), before and after."""
        q, k, v = self.heads(self.c_attn(x)).unbind(1)  # (B, H, l, D)
        local = self.attend(self.turn(q), self.turn(k), v)  # eq. 2
        q, k, gate = F.elu(q) + 1, F.elu(k) + 1, self.beta.sigmoid()[:, None, None]
        if memory is None:
            memory = x.new_zeros(len(x), self.n_head, self.head_size, self.head_size + 1)
        y = gate * read(memory, q) + (1 - gate) * local  # eq. 6
        if self.update == 'delta':
            v = v - read(memory, k)  # eq. 5
        memory = memory + k.mT @ F.pad(v, (0, 1), value=1.0)  # eq. 4; z is the column of ones
        return self.c_proj(y.transpose(1, 2).reshape(x.shape)), memory

def read(memory, q):
    """What [M, z] holds at q (B, H, l, D), eq. 3: (B, H, l, D), 0 as long as nothing is held."""
    found = q @ memory  # (B, H, l, D + 1)
    return found[..., :-1] / found[..., -1:].clamp(min=1e-6)

class Infini(Peer):
    """The carry is a memory a layer: n_layer times (B, H, D, D + 1)."""
    attention = InfiniAttention
