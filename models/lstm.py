"""LSTM of two layers (Hochreiter and Schmidhuber 1997; as in Zaremba et al. 2014, arXiv 1409.2329).

For every token t and layer l, x^0 being the embedding and x^l the output h^l of layer l:
    i, f, o = sigmoid(W x_t^{l-1} + U h_{t-1}^l + b),  g = tanh(W x_t^{l-1} + U h_{t-1}^l + b)
    c_t = f * c_{t-1} + i * g
    h_t = o * tanh(c_t)                                                        section 3.1
Differs: the embedding is normed, as in a GPT's first layer, and a matrix leads from h^2 to the
channels of the tied embedding, before the final norm.
Its hidden size H makes it as large as a GPT of n_layer: 12 H^2 + 5 H C = 12 n_layer C^2.
State: 4 * H numbers, at 128 channels and n_layer=4 H is 230 and the state 3,680 bytes. Parameters:
794,128 with 65 tokens. n_head and bias mean nothing here: the gates always have biases.
"""
import torch.nn as nn
from torch.nn import functional as F

from models.peer import Peer

class LSTM(Peer):
    """The carry is h and c of both layers, each (B, 2, H)."""
    at_once = 1024

    def __init__(self, config):
        super().__init__(config)
        self.transformer.h[0].reset_parameters()  # torch's own, in place of a GPT's

    def layout(self, config):
        C, n = config.n_embd, config.n_layer
        H = int(C * ((n + 25 / 576) ** 0.5 - 5 / 24))
        lstm = nn.LSTM(C, H, num_layers=2, dropout=config.dropout, batch_first=True)
        return [lstm, nn.Linear(H, C, bias=False)]

    def step(self, x, carry):
        lstm, output = self.transformer.h
        state = carry and tuple(part.transpose(0, 1).contiguous() for part in carry)  # (2, B, H)
        x, state = lstm(F.layer_norm(x, x.shape[-1:]), state)
        return output(x), tuple(part.transpose(0, 1) for part in state)
