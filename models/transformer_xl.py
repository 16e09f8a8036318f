"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): a memory of one segment a layer.

Layer n also reads the segment before as that came out of layer n-1. Section 3.2 has, as (a) to (c)
here, SG being the stop of the gradient:
    h~_s^{n-1} = [SG(h_{s-1}^{n-1}) ; h_s^{n-1}]                               (a)
    q, k, v = W_q h_s^{n-1}, W_k h~_s^{n-1}, W_v h~_s^{n-1}                    (b)
    h_s^n = TransformerLayer(q, k, v)                                          (c)
Differs: rotary positions in the window of two segments, or learned ones in the segment, in place
of relative ones with biases (section 3.3); GPT-2's block, whose norm comes first; stop=False.
State: n_layer * segment_size * n_embd numbers, of 4 * 12 * 128 24,576 bytes. Parameters: a GPT's,
795,904 of four layers of 128 and 65 tokens.
"""
from dataclasses import dataclass

from model import GlobalBlock
from models.peer import Peer, SegmentConfig

@dataclass
class TransformerXLConfig(SegmentConfig):
    """Sizes of a Transformer-XL. Raises ValueError."""
    stop: bool = True  # no gradient flows into the memory, SG, as published

class XLBlock(GlobalBlock):
    """A layer that also sees the segment before: a fold's, whose past half is frozen."""

    def __init__(self, config):
        super().__init__(config)
        self.stop = config.stop

    def forward(self, x, memory=None):
        """x, memory (B, l, C): h_s^{n-1}, h_{s-1}^{n-1} -> h_s^n, and x as the next memory."""
        if memory is not None and self.stop:
            memory = memory.detach()  # SG of (a)
        output = super().forward(memory, x, frozen=True)[1]  # (b), (c)
        return output, x.clone()  # a view would keep all that was read

class TransformerXL(Peer):
    """The carry is a segment a layer: n_layer times (B, l, C)."""

    def layout(self, config):
        return [XLBlock(config) for _ in range(config.n_layer)]
