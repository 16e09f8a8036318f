"""Recomputed and truncated back-propagation: the gradients of plain training, in less memory."""
import os

import pytest
import torch

from folds import EXACT, VOCAB, assert_close, batch, gradients, l, make_fold, peak_bytes
from model import FoldConfig, FoldGPT
from test_train import records
from training import backpropagate


@pytest.mark.parametrize('dropout', [0.0, 0.2])
@pytest.mark.parametrize('T', [l, 5 * l, 5 * l + 1])
@pytest.mark.parametrize('carried', [False, True])
@pytest.mark.parametrize('kind', ['plain', 'gated'])
def test_recomputed_gradients_are_the_full_ones(dropout, T, carried, kind):
    """With dropout the full side runs segment by segment too: only so are its masks drawn in the same order."""
    model, (x, y) = make_fold(dropout=dropout, carry=kind), batch(T)
    first = torch.randn(2, l, 8, dtype=torch.float64) if carried else None
    torch.manual_seed(1)
    losses, carry = [], first
    size = l if dropout else T
    for x_s, y_s in zip(x.split(size, dim=1), y.split(size, dim=1)):
        _, loss, carry = model(x_s, y_s, carry)
        losses.append(loss * x_s.size(1) / T)
    sum(losses).backward()
    full, after = gradients(model), torch.rand(1)
    torch.manual_seed(1)
    loss, last = backpropagate(model, x, y, first, recompute=True)
    torch.testing.assert_close(loss, sum(losses).detach(), **EXACT)
    torch.testing.assert_close(last, carry.detach(), **EXACT)
    assert_close(gradients(model), full, **EXACT)
    assert torch.equal(torch.rand(1), after)  # the random numbers go on as if nothing had been computed twice


def test_memory_of_recomputation_grows_by_the_carries():
    """By what autograd keeps, and by every byte that the process takes: nodes of a graph are not tensors."""
    B, C, l = 4, 32, 6
    model = FoldGPT(FoldConfig(block_size=l, segment_size=l, vocab_size=VOCAB, n_head=2, n_embd=C, n_local=2, n_global=2))
    few, many = (peak_bytes(lambda: backpropagate(model, *batch(n * l, B), recompute=True), model.parameters())
                 for n in (8, 24))
    assert few == many
    few, many = (peak_bytes(lambda: backpropagate(model, *batch(n * l, B)), model.parameters()) for n in (8, 24))
    assert many > 2.5 * few


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the system does not tell')
def test_a_segment_more_costs_its_carry_and_tokens():
    import bench_training
    settings = dict(vocab_size=65, segment_size=12, batch_size=16, bptt_segments=16, products='torch', compile='off', device='cpu', threads=1)
    few, many = (bench_training.in_own_process('recomputed', '1+1x128x4', n * 12, settings) for n in (16, 416))
    carry, share = 16 * 12 * 128 * 4, 16 * 12 * (2 * 8 + 65 * 4)
    assert many['training_mb'] - few['training_mb'] <= 400 * 1.3 * (carry + share) / 1e6
    assert many['training_mb'] - few['training_mb'] >= 300 * carry / 1e6  # it was measured at all


@pytest.mark.parametrize('k', [1, 2, 3, 8])  # 3: the last chunk is shorter
@pytest.mark.parametrize('recompute', [False, True])
def test_truncated_at_k_is_full_with_the_carry_detached_there(k, recompute):
    model, (x, y) = make_fold(), batch(8 * l)
    loss, last = backpropagate(model, x.to(torch.uint16), y.to(torch.uint16), chunk=k * l, recompute=recompute)
    truncated = gradients(model)

    outputs, carry = [], None
    for s, x_s in enumerate(model.local(x).split(l, dim=1)):  # one graph over all segments, cut before each k-th
        carry = carry.detach() if s and s % k == 0 else carry
        _, carry = model.fold(x_s, carry)
        outputs.append(carry)
    _, expected = model.head(torch.cat(outputs, dim=1), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(last, carry.detach(), **EXACT)
    assert_close(truncated, gradients(model), **EXACT)


@pytest.mark.parametrize('recompute', [False, True])
def test_no_gradient_passes_a_cut_and_within_it_does(recompute):
    """The position embedding's place 0 is read in every segment; each time in a copy of its own, to tell them apart."""
    for k in (1, 2, 4, 8):
        model, (x, y) = make_fold(), batch(8 * l)
        reached = gradient_of_the_last_loss(model, x, y, k, recompute)
        assert len(reached) == 8
        for s, gradient in enumerate(reached):
            assert (gradient > 0) == (s // k == 7 // k), (k, s)


def gradient_of_the_last_loss(model, x, y, k, recompute):
    """How much gradient the loss at the last token sends into each segment's embedding."""
    embed, head, reached = model.embed, model.head, {}

    def noted_embed(segments, first=0):
        out = embed(segments, first)
        if out.requires_grad:
            for s in range(8):
                here = (segments == x[0, s * l:(s + 1) * l]).all(dim=1).nonzero()[:, 0]
                if len(here):
                    out.register_hook(lambda g, s=s, i=here[0]: reached.__setitem__(s, g[i].abs().sum().item()))
        return out

    def last_head(hidden, targets=None, all_logits=False):
        logits, loss = head(hidden, targets, all_logits)
        if targets is not None and not torch.equal(targets[:, -1], y[:, -1]):
            loss = loss * 0
        elif targets is not None:
            loss = logits[:, -1].square().sum()
        return logits, loss
    while len({tuple(row) for row in x[0].view(8, l).tolist()} | {tuple(row) for row in x[1].view(8, l).tolist()}) < 16:
        x.random_(VOCAB)  # all segments different, so that each is known by its tokens
    y.fill_(1)
    y[:, -1] = 2  # the mark of the last token
    model.embed, model.head = noted_embed, last_head
    backpropagate(model, x, y, chunk=k * l, recompute=recompute)
    return [reached[s] for s in range(8)]


def test_truncated_memory_does_not_depend_on_the_block_size():
    model, sizes = make_fold(), set()
    for segments in (4, 8, 64):
        sizes.add(peak_bytes(lambda: backpropagate(model, *batch(segments * l), chunk=4 * l), model.parameters()))
    assert len(sizes) == 2  # the first chunk of a sequence has no past half; from the second on, never more
    assert peak_bytes(lambda: backpropagate(model, *batch(64 * l)), model.parameters()) > 10 * max(sizes)


def test_chunks_are_plain_gradient_accumulation(train, tmp_path):
    """The first update sees the same losses cut or not, the last one other weights."""
    train(out_dir=tmp_path / 'a', bptt_segments=2, dropout=0.0)
    train(out_dir=tmp_path / 'b', bptt_segments=2, recompute=True, dropout=0.0)
    train(out_dir=tmp_path / 'c', dropout=0.0)
    a, b, c = (dict(records(tmp_path / name, 'loss')) for name in 'abc')
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-5)
    assert a[1] == pytest.approx(c[1], abs=1e-6) and a[20] != c[20]


def test_speed_is_taken_over_all_starts_and_against_the_fastest_gpt(monkeypatch):
    """A fold with 2 FLOPs where the GPT has 1, two rounds after each of two starts: ratios 0.5, 0.7 and 0.1, 0.2."""
    import bench_training
    names = [mode + more for more in ('', ', 2 processes') for mode in bench_training.MODES]
    counted = {name: (1.0 if name.startswith('gpt') else 2.0, 7, 1) for name in names}
    starts = iter([([5.0, 7.0], [10.0, 10.0]), ([2.0, 8.0], [20.0, 40.0])])

    def alternate(size, c):
        fold, gpt = next(starts)
        rates = {'gpt': [1.0, 1.0], 'gpt, 2 processes': gpt}
        return counted, {name: rates.get(name, fold) for name in names}
    monkeypatch.setattr(bench_training, 'alternate', alternate)
    rows = bench_training.measure_speed('1+1x8x1', {'starts': 2})
    for name in ('full', 'full, 2 processes'):
        assert rows[name]['tokens_per_s'] == 6.0 and rows[name]['all'] == [5.0, 7.0, 2.0, 8.0]
        assert rows[name]['ratio'] == pytest.approx(0.35) and rows[name]['efficiency'] == pytest.approx(0.7)
        assert rows[name]['by_start'] == pytest.approx([1.2, 0.3])
    assert rows['gpt, 2 processes']['by_start'] == [1.0, 1.0] and rows['gpt']['efficiency'] < 0.1


def test_a_memory_point_is_the_median_of_its_processes(monkeypatch):
    import bench_training
    peaks = iter([5.0, 1.0, 3.0, 8.0, 9.0, 7.0])
    monkeypatch.setattr(bench_training, 'in_own_process', lambda mode, size, T, c: {'block_size': T, 'peak_mb': next(peaks)})
    points = bench_training.memory_curve('full', '1+1x8x1', {'block_sizes': '12,24', 'tries': 3, 'segment_size': 12, 'memory_limit_gb': 1.0})
    assert [point['peak_mb'] for point in points] == [3.0, 8.0]


@pytest.mark.parametrize('per_token, chunk, l', [(1.2, 4, 64), (6.0, 4, 12), (0.01, 16, 12), (10.0, 4, 12), (100.0, 16, 12), (400.0, 4, 12), (0.001, 16, 12)])
def test_the_longest_sequence_is_found(monkeypatch, per_token, chunk, l):
    """Where a token takes so many MB of 1700, up to 20000 tokens: within 3 % or a segment, in few tries, from any start."""
    import bench_training
    tried = []

    def point(mode, size, T, c):
        tried.append(T)
        return {'block_size': T, 'before_mb': 300, 'training_mb': per_token * T, 'peak_mb': 300 + per_token * T}
    monkeypatch.setattr(bench_training, 'in_own_process', point)
    found = bench_training.longest('full', '1+1x8x1', dict(budget_gb=2.0, bptt_segments=chunk, segment_size=l, longest_cap=20000))
    best, cap = found['block_size'], 20000 // l * l
    assert found['capped'] == (best == cap) and best % l == 0 and len(tried) < 25
    assert best == min(cap, 1700 / per_token // l * l) if best < 33 * l else 0.97 * min(cap, 1700 / per_token) <= best <= 1700 / per_token
