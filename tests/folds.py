"""Small models in float64, and what tests of training compare: gradients, memory, runs."""
import torch

from model import FoldConfig, FoldGPT
from test_train import final_weights, records, same

l, VOCAB = 3, 11
EXACT = dict(rtol=0, atol=1e-10)


def make_fold(segments=8, dropout=0.0, l=l, n_local=2, n_global=2, carry='plain', bias=True):
    model = FoldGPT(FoldConfig(block_size=segments * l, segment_size=l, vocab_size=VOCAB, n_head=2, n_embd=8, bias=bias,
                               n_local=n_local, n_global=n_global, dropout=dropout, carry=carry)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def batch(T, B=2):
    return torch.randint(VOCAB, (B, T)), torch.randint(VOCAB, (B, T))


def gradients(model):
    """The gradients there are, as copies, taken off the model."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=name)


class Held:
    """A tensor that autograd keeps, counted as long as it does."""
    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.nbytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.tensor.nbytes


def peak_bytes(work, parameters):
    """The most bytes that autograd keeps at a time during work(), without the parameters themselves."""
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    Held.now = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t if t.untyped_storage().data_ptr() in storages else Held(t),
            lambda kept: kept.tensor if isinstance(kept, Held) else kept):
        work()
    return Held.peak


def assert_same_runs(a, b):
    assert same(final_weights(a), final_weights(b))
    for key in ('loss', 'val_loss', 'lr'):
        assert records(a, key) == records(b, key), key
    x, y = (torch.load(path / 'last.pt', weights_only=True)['stream'] for path in (a, b))
    assert x is y is None or all(torch.equal(x[key], y[key]) for key in x)
