"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881): memory tokens.

A segment s stands between m tokens that read the memory and the same m once more, to write it;
attention is causal from the first to the last of these. Section 3.2 has, as (a) to (d) here:
    H~_s^0 = [H_s^mem ; H_s^0 ; H_s^mem]                                       (a)
    H~_s^N = Transformer(H~_s^0)                                               (b)
    [H_s^read ; H_s^N ; H_s^write] = H~_s^N                                    (c)
    H_{s+1}^mem = H_s^write                                                    (d)
The first memory is learned, and gradient flows through all segments of a call.
Differs: GPT-2's blocks, whose norm comes first, so that the final norm ends what is written as it
does what is read out; rotary positions in the window of m + l + m, or learned ones in the segment.
State: memory * n_embd numbers, at 128 channels 2,048 bytes for m = 4, 6,144 for 12. Parameters: a
GPT's and the first memory, 796,416 or 797,440 of four layers of 128 and 65 tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn

from models.peer import Peer, SegmentConfig

@dataclass
class RMTConfig(SegmentConfig):
    """Sizes of an RMT. Raises ValueError."""
    memory: int = 4  # m, memory tokens

class RMT(Peer):
    """The carry is the memory, (B, m, C)."""

    def layout(self, config):
        self.first = nn.Parameter(torch.empty(config.memory, config.n_embd))  # as an embedding
        return super().layout(config)

    def step(self, x, carry):
        """A segment x (B, l, C) and the memory before it, each after the layers."""
        memory = self.first.expand(len(x), -1, -1) if carry is None else carry
        m, window = memory.size(1), torch.cat((memory, x, memory), dim=1)  # (a)
        window, _ = self.run_blocks(self.transformer.h, window)  # (B, m + l + m, C); (b)
        return window[:, m:-m], self.transformer.ln_f(window[:, -m:])  # (c), (d)
