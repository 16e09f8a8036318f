"""Truncated and recomputed back-propagation: the gradients of plain training, in less memory."""
import pytest
import torch
from small import CASES, EVERY_CARRY, MORE, assert_equal, gradients, make, make_case, tokens
from small import SEGMENT as l
from test_train import records

from lib import gradients as ways
from lib.contract import blank_carry, unit
from lib.gradients import backpropagate
from lib.rows import as_tuple, rowwise

FEW = pytest.mark.parametrize('name', [  # some carries are tuples
    'learned segment evolving gated', 'rotary sliding evolving gated', 'gpt, window', 'recurrent',
    'queued_fold'])
RECOMPUTE = pytest.mark.parametrize('recompute', [False, True])

def literal(model, x, y, carry, cut):
    """The loss of x, y over pieces of a unit in one graph, with the carry detached after every
    `cut` of them; and the last carry."""
    total, u = 0.0, unit(model)
    for i, (x_s, y_s) in enumerate(zip(x.split(u, dim=1), y.split(u, dim=1))):
        carry = rowwise(torch.detach, carry) if i % cut == 0 else carry
        _, loss, carry = model(x_s, y_s, carry)
        total = total + loss * x_s.size(1) / x.size(1)
    return total, rowwise(torch.detach, carry)

def check(name, recompute, T, cut, carried):
    """Of whole training where there is no cut, from nothing and from a carry; tokens of any kind of
    integer. No gradient flows into the first carry, and none hangs on the last."""
    model, x, y = make_case(name), tokens(2, T), tokens(2, T)
    first = rowwise(lambda c: (torch.rand_like(c) + 0.1).requires_grad_(),
                    blank_carry(model, 2)) if carried else None
    loss, last = literal(model, x, y, first, cut)
    loss.backward()
    expected = gradients(model)
    chunk = 0 if cut == 99 else cut * unit(model)
    found, after = backpropagate(model, x.to(torch.uint16), y.to(torch.uint16), first, chunk=chunk,
                                 recompute=recompute)
    assert_equal((found, after), (loss.detach(), last))
    assert_equal(gradients(model), expected)
    assert not carried or all(c.requires_grad and c.grad is None for c in as_tuple(first))
    assert not any(c.requires_grad for c in (found, *as_tuple(after)))

@EVERY_CARRY
@RECOMPUTE
def test_gradients_are_those_of_one_graph_with_the_carry_cut(name, recompute):
    """With the last chunk and the last segment short."""
    check(name, recompute, 3 * l + 1, 2, True)

@FEW
@RECOMPUTE
@pytest.mark.parametrize('T, cut, carried', [(5 * l, 1, False), (5 * l, 2, True),
                                             (5 * l, 99, False), (5 * l + 1, 99, True)])
def test_gradients_however_often_the_carry_is_cut(name, recompute, T, cut, carried):
    check(name, recompute, T, cut, carried)

@RECOMPUTE
def test_a_share_of_the_loss_is_added_to_the_gradient_that_is_there(recompute):
    model, x, y = make(), tokens(2, 4 * l), tokens(2, 4 * l)
    whole, _ = backpropagate(model, x, y)
    expected = gradients(model)
    parts = [backpropagate(model, x, y, share=share, recompute=recompute)[0]
             for share in (0.25, 0.75)]
    assert_equal((sum(parts), gradients(model)), (whole, expected))

@FEW
def test_recomputed_with_dropout_it_drops_the_same(name):
    """The masks of the first time, in the order of segments; and the random numbers go on as if
    nothing had been computed twice."""
    model, x, y = make(dropout=0.3, **{**CASES, **MORE}[name]), tokens(2, 13), tokens(2, 13)
    model.train()
    torch.manual_seed(1)
    loss, last = literal(model, x, y, None, cut=99)
    loss.backward()
    expected, following = gradients(model), torch.rand(1)
    torch.manual_seed(1)
    found, after = backpropagate(model, x, y, recompute=True)
    assert_equal((found, after), (loss.detach(), last))
    assert_equal(gradients(model), expected)
    assert torch.equal(torch.rand(1), following)

class Kept:
    """A tensor that autograd keeps, counted as long as it does."""
    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.now += tensor.nbytes
        Kept.peak = max(Kept.peak, Kept.now)

    def __del__(self):
        Kept.now -= self.tensor.nbytes

def peak_bytes(model, segments, **kwargs):
    """The most bytes, parameters aside, that autograd keeps at a time in a backward pass."""
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    Kept.now = Kept.peak = 0
    x, y = (tokens(4, segments * unit(model)) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t if t.untyped_storage().data_ptr() in storages else Kept(t),
            lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        backpropagate(model, x, y, **kwargs)
    return Kept.peak

@FEW
def test_memory_recomputed_or_truncated_does_not_grow_with_the_sequence(name):
    model = make_case(name)
    whole = [peak_bytes(model, n) for n in (8, 20)]
    recomputed = [peak_bytes(model, n, recompute=True) for n in (8, 20)]
    truncated = [peak_bytes(model, n, chunk=4 * unit(model)) for n in (8, 20)]
    assert whole[1] > 2 * whole[0]
    assert recomputed[0] == recomputed[1] < whole[0] / 4
    assert truncated[0] == truncated[1] < 0.7 * whole[0]

def test_training_truncated_and_recomputed(train, tmp_path, monkeypatch):
    """Chunks are plain gradient accumulation: the first update sees the same loss cut or not, the
    last one other weights. Recomputed where it is asked for."""
    losses, asked, recomputed = [], [], ways.recomputed
    monkeypatch.setattr(ways, 'recomputed', lambda *args: asked.append(1) or recomputed(*args))
    for i, settings in enumerate((dict(bptt_segments=2, recompute=True), {})):
        run = train(out_dir=tmp_path / str(i), dropout=0.0, max_iters=5, **settings)
        assert run.code == 0, run.err
        losses.append([loss for _, loss in records(tmp_path / str(i), 'loss')])
    cut, whole = losses
    assert cut[0] == pytest.approx(whole[0], abs=1e-6) and cut[-1] != whole[-1]
    assert len(asked) == 5 * 2  # chunks of two of the four segments
