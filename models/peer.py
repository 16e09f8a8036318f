"""What the peers share: a GPT's embeddings, blocks, head and optimizer groups, and a memory."""
from dataclasses import dataclass

import torch
import torch.nn as nn

from model import GPT, Block, CausalSelfAttention, GPTConfig

@dataclass
class PeerConfig(GPTConfig):
    """Sizes of a GPT whose window does not slide. Raises ValueError."""

    def __post_init__(self):
        super().__post_init__()
        if self.window:
            raise ValueError("window is a GPT's: any other model takes window=0")

@dataclass
class SegmentConfig(PeerConfig):
    """Sizes of a model that reads segment after segment. Raises ValueError."""
    block_size: int = 768   # tokens of a training sequence, whole segments
    segment_size: int = 12  # tokens of a segment

@dataclass
class PlacelessConfig(PeerConfig):
    """Sizes of a model whose recurrence alone tells what came before what: position becomes 'none'.
    Raises ValueError."""
    position: str = 'none'

    def __post_init__(self):
        if self.position == 'rotary':
            raise ValueError("position='rotary' means nothing to a model without places: take "
                             "position='none'")
        self.position = 'none'
        super().__post_init__()

class Peer(GPT):
    """A GPT that reads a piece and then updates its memory, the carry: one tensor a layer unless
    step() says otherwise. A piece is `unit` tokens, or `at_once` where a memory is exact after any
    token."""
    attention = CausalSelfAttention  # of a layer; as `before` it takes the memory, or None
    at_once = 0

    def layout(self, config, width=0):
        """As GPT's; width: of the MLPs, chosen so that the parameters number a GPT's."""
        blocks = [Block(config) for _ in range(config.n_layer)]
        for block in blocks:
            block.attn = self.attention(config)
            if width:
                block.mlp.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
                block.mlp.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        return blocks

    def forward(self, idx, targets=None, carry=None):
        """As GPT's, for any T >= 1 from where a carry is valid."""
        outputs = []
        for x in self.embed(idx).split(self.at_once or self.unit, dim=1):
            x, carry = self.step(x, carry)
            outputs.append(x)
        return *self.head(torch.cat(outputs, dim=1), targets), carry

    def step(self, x, carry):
        """x (B, n, C) -> (B, n, C) after all layers, and the carry after it."""
        memories = []
        for block, memory in zip(self.transformer.h, carry or [None] * len(self.transformer.h)):
            x, memory = block(x, memory)
            memories.append(memory)
        return x, tuple(memories)
