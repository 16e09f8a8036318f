"""The loss: every token once, in order, with the history that the kind of model is due."""
import pytest
import torch
from small import V, make
from torch.nn import functional as F

from lib import scoring
from lib.scoring import last_losses, mean_and_error, token_losses

def gpt(window=4):
    return make('gpt', block_size=window, dropout=0.5)

def toy(window):
    model = make('windowed')
    model.config.block_size = window
    return model

def fold(n=4):
    return make(block_size=4 * n, segment_size=n, dropout=0.5)

def nats(model, history, target):
    """The loss of one token after a history of its own."""
    with torch.no_grad():
        return F.cross_entropy(model(history[None])[0][0, -1:], target[None]).item()

@pytest.mark.parametrize('model, streams, S', [
    (fold(), 3, 20), (make('recurrent'), 3, 20), (make('recurrent'), 16, 15)])  # 12 at least
def test_a_model_with_a_carry_reads_parallel_streams_and_keeps_it(model, streams, S, monkeypatch):
    monkeypatch.setattr(scoring, 'STREAMS', streams)
    monkeypatch.setattr(scoring, 'MIN_SEGMENTS', 1)
    monkeypatch.setattr(scoring, 'tokens_per_call', lambda model: 30)  # two segments of a row
    tokens, read = torch.randint(V, (60,)), []
    losses = token_losses(model, tokens, read.append)
    expected = [nats(model, tokens[t // S * S:t + 1], tokens[t + 1]) for t in range(59)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)
    assert read == sorted(read) and len(read) > 1 and read[-1] >= 60

@pytest.mark.parametrize('w, n', [(1, 9), (6, 30), (6, 31), (5, 33), (8, 3), (8, 8)])
def test_a_window_advances_by_half_its_width(w, n, monkeypatch):
    monkeypatch.setattr(scoring, 'tokens_per_call', lambda model: 20)
    tokens, h = torch.randint(V, (n + 1,)), max(1, w // 2)
    first = [0 if t < w else -(-(t - w + 1) // h) * h for t in range(n)]  # of t's window
    for model in (gpt(w), toy(w)):
        losses = token_losses(model, tokens)
        expected = [nats(model, tokens[start:t + 1], tokens[t + 1])
                    for t, start in enumerate(first)]
        assert losses.tolist() == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize('T', [5, 8, 11, 12, 20, 40])
@pytest.mark.parametrize('n', [1, 5])
def test_last_losses_are_those_with_all_that_a_model_sees_of_the_row(T, n, monkeypatch):
    monkeypatch.setattr(scoring, 'tokens_per_call', lambda model: 2 * T)  # not all rows at once
    rows = torch.randint(V, (3, T + 1))
    for model, sees in ((gpt(11), 11), (toy(11), 11), (fold(6), T),
                        (make('recurrent'), T)):
        expected = [[nats(model, row[max(0, t - sees):t], row[t]) for t in range(T - n + 1, T + 1)]
                    for row in rows]
        torch.testing.assert_close(last_losses(model, rows, n), torch.tensor(expected).double(),
                                   rtol=0, atol=1e-5)

@pytest.mark.parametrize('model', [fold(), gpt(), make('recurrent')])
def test_without_dropout_and_without_the_random_numbers_of_training(model):
    tokens, state = torch.randint(V, (777,)), torch.get_rng_state()
    model.train()
    a, b = token_losses(model, tokens), token_losses(model, tokens)
    assert torch.equal(a, b) and model.training and a.shape == (776,)
    assert torch.equal(torch.get_rng_state(), state)

def test_the_standard_error_respects_dependent_neighbors():
    independent = torch.randn(20000)
    mean, error = mean_and_error(independent)
    assert mean == pytest.approx(independent.mean().item(), abs=1e-6)
    assert error == pytest.approx(1 / 20000 ** 0.5, rel=0.3)
    dependent = torch.randn(200).repeat_interleave(100)  # 200 facts, not 20,000
    assert mean_and_error(dependent)[1] == pytest.approx(1 / 200 ** 0.5, rel=0.3)
    assert mean_and_error(independent[:99])[1] is None and mean_and_error(independent[:100])[1] > 0
