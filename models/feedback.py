"""Feedback Transformer (Fan et al. 2020, arXiv 2002.09402): a memory of the last tokens.

Every layer l reads one memory, made of all layers, token after token; section 3, as (a) and (b):
    z_t^l = Attn(x_t^l, [m_{t-tau}, ..., m_{t-1}])                             (a)
    m_t = sum_l softmax(w)_l x_t^l, with the embedding for l = 0               (b)
Keys and values are the same in all layers, as there. Before the text stand tau memories of 0.
Differs: rotary positions in the memory, not relative ones; GPT-2's blocks, and a norm before the
memory is read; MLPs of (5 - 1 / n_layer) n_embd, as W_K and W_V are shared. State: memory * n_embd
numbers, of 12 * 128 6,144 bytes. Parameters: 796,037 of four layers of 128 and 65 tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import CausalSelfAttention
from models.peer import Peer, PeerConfig

@dataclass
class FeedbackConfig(PeerConfig):
    """Sizes of a Feedback Transformer. Raises ValueError."""
    memory: int = 12          # tau, tokens whose memory is seen
    position: str = 'rotary'  # in the memory; 'learned' becomes this; or 'none'

    def __post_init__(self):
        self.position = 'rotary' if self.position == 'learned' else self.position
        super().__post_init__()

class FeedbackAttention(CausalSelfAttention):
    def forward(self, x, memory):
        """x (B, 1, C) -> (B, 1, C); memory: turned keys, and values, each (B, H, tau, D)."""
        q = self.heads(self.c_attn(x))[:, 0]  # (B, H, 1, D)
        return self.c_proj(self.attend(q, *memory).transpose(1, 2).reshape(x.shape)), None

class Feedback(Peer):
    """The carry is the memory, (B, tau, C)."""
    attention, at_once = FeedbackAttention, 1024

    def layout(self, config):
        C, n, bias = config.n_embd, config.n_layer, config.bias
        self.ln_m, self.w = nn.LayerNorm(C, bias=bias), nn.Parameter(torch.zeros(n + 1))
        self.c_memory = nn.Linear(C, 2 * C, bias=bias)  # W_K, W_V
        blocks = super().layout(config, width=5 * C - C // n)
        for block in blocks:
            block.attn.c_attn = nn.Linear(C, C, bias=bias)  # W_Q alone
        return blocks

    def step(self, x, carry):
        attn, outputs, tau = self.transformer.h[0].attn, [], self.config.memory
        memory = x.new_zeros(len(x), tau, x.size(-1)) if carry is None else carry
        seen = attn.heads(self.c_memory(self.ln_m(memory)))  # (B, 2, H, tau, D)
        for x_t in x.split(1, dim=1):  # whose place is the last
            layers, kv = [x_t], (attn.turn(F.pad(seen[:, 0], (0, 0, 0, 1)))[:, :, :-1], seen[:, 1])
            for block in self.transformer.h:
                layers.append(block(layers[-1], kv)[0])  # (a)
            m_t = torch.stack(layers, dim=-1) @ self.w.softmax(dim=0)  # (B, 1, C); (b)
            memory = torch.cat((memory[:, 1:], m_t), dim=1)
            seen = torch.cat((seen[:, :, :, 1:], attn.heads(self.c_memory(self.ln_m(m_t)))), dim=3)
            outputs.append(layers[-1])
        return torch.cat(outputs, dim=1), memory
