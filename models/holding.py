"""A fold that is trained to hold what it has read: a reconstruction loss, as Trinh et al. 2018
(arXiv 1803.00144) add to that of an RNN.

In training, the output of each token is also asked for the tokens k segments before it:
    loss = CE(head(x_t), token_{t+1}) + hold_weight * mean_k CE(W_o W_k norm(x_t), token_{t-kl})
with the norm and the matrix W_o of the head, and three k of 1..hold, drawn at every call. A carry
that holds them hands on, place by place, what the one before it held. The W_k are of no use after
training: logits, carry and state are a fold's. What a call does not read it cannot ask for, so that
chunks as short as a segment train a fold.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import FoldConfig
from models.cached import FoldGPT

DRAWN = 3  # k of a call

@dataclass
class HoldingConfig(FoldConfig):
    """Sizes of a fold that is taught to hold. Raises ValueError."""
    hold: int = 8             # segments back whose tokens are asked for
    hold_weight: float = 0.1  # of that loss

    def __post_init__(self):
        super().__post_init__()
        if self.hold_weight < 0:
            raise ValueError(f'hold_weight must be at least 0, not {self.hold_weight}')

class HoldingFold(FoldGPT):
    """A fold with matrices W_k, of training alone."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.hold = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(config.hold))

    def head(self, x, targets=None):
        logits, loss = super().head(x, targets)
        if self.training and targets is not None:
            loss = loss + self.config.hold_weight * self.reconstruction(x, targets)
        return logits, loss

    def reconstruction(self, x, targets):
        """The mean loss, in nats, of tokens some segments before outputs x (B, T, C); targets
        (B, T) are the tokens after these."""
        losses, x = [], self.transformer.ln_f(x)
        for k in torch.randperm(self.config.hold, device='cpu')[:DRAWN].tolist():
            back = (k + 1) * self.config.segment_size
            logits = self.lm_head(self.hold[k](x[:, back + 1:]))
            wanted = targets[:, :max(0, targets.size(1) - back - 1)]
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1,
                                   reduction='sum')
            losses.append(loss / (wanted >= 0).sum().clamp(min=1))
        return torch.stack(losses).mean()
