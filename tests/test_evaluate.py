"""Validation loss: every token once, in order, with the context that the model type is due."""
import os

import pytest
import torch
from torch.nn import functional as F

import checkpoint
import evaluate
from evaluate import mean_and_error, token_losses
from model import GPT, FoldConfig, FoldGPT, GPTConfig

SIZES = dict(vocab_size=7, n_head=2, n_embd=8)


def fold(l=4):
    return FoldGPT(FoldConfig(block_size=4 * l, segment_size=l, n_local=1, n_global=1, dropout=0.5, **SIZES))


def nats(model, context, target, carry=None):
    return F.cross_entropy(model(context[None], carry=carry)[0][0], target[None]).item()


def test_a_fold_reads_parallel_streams_and_keeps_the_carry(monkeypatch):
    monkeypatch.setattr(evaluate, 'STREAMS', 3)
    monkeypatch.setattr(evaluate, 'MIN_SEGMENTS', 2)
    monkeypatch.setattr(evaluate, 'tokens_per_call', lambda model: 30)  # two segments a row and call
    model, tokens = fold(), torch.randint(7, (60,))
    losses = token_losses(model, tokens)
    model.eval()
    S = 20  # ceil(59 / 3) in whole segments of 4
    expected = [nats(model, tokens[t // S * S:t + 1], tokens[t + 1]) for t in range(59)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('w, n', [(1, 9), (6, 30), (6, 31), (5, 33), (8, 3)])
def test_a_gpt_advances_by_half_its_window(w, n):
    model, tokens = GPT(GPTConfig(block_size=w, n_layer=2, **SIZES)), torch.randint(7, (n + 1,))
    losses = token_losses(model, tokens)
    model.eval()
    h = max(1, w // 2)
    first = [0 if t < w else -(-(t - w + 1) // h) * h for t in range(n)]  # start of the window that scores token t
    assert all(t < w or t - start >= w - h for t, start in enumerate(first))
    expected = [nats(model, tokens[start:t + 1], tokens[t + 1]) for t, start in enumerate(first)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('model', [fold(), GPT(GPTConfig(block_size=4, n_layer=2, dropout=0.5, **SIZES))])
def test_deterministic_without_dropout_and_without_the_training_rng(model):
    tokens, state = torch.randint(7, (50,)), torch.get_rng_state()
    model.train()
    a, b = token_losses(model, tokens), token_losses(model, tokens)
    assert torch.equal(a, b) and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_both_models_score_the_same_tokens():
    tokens = torch.randint(7, (777,))
    for model in (fold(), GPT(GPTConfig(block_size=4, n_layer=2, **SIZES))):
        assert token_losses(model, tokens).shape == (776,)


def test_standard_error_respects_dependent_neighbors():
    independent = torch.randn(20000)
    mean, error = mean_and_error(independent)
    assert mean == pytest.approx(independent.mean().item(), abs=1e-6)
    assert error == pytest.approx(1 / 20000 ** 0.5, rel=0.3)
    dependent = torch.randn(200).repeat_interleave(100)  # 200 values, each 100 times: 200 facts and not 20,000
    assert mean_and_error(dependent)[1] == pytest.approx(1 / 200 ** 0.5, rel=0.3)


def test_a_result_that_cannot_be_written_leaves_the_older_one(tmp_path):
    path = str(tmp_path / 'results' / 'loss.json')
    checkpoint.save_result(path, {'loss': 1})
    with pytest.raises(TypeError):
        checkpoint.save_result(path, {'loss': 2, 'what no JSON can hold': object()})
    assert checkpoint.load_result(path) == {'loss': 1}
    (tmp_path / 'file').write_text('no folder')
    for call in (lambda: checkpoint.save_result(str(tmp_path / 'file' / 'loss.json'), {}),
                 lambda: checkpoint.load_result(str(tmp_path / 'file')), lambda: checkpoint.load_result(str(tmp_path / 'none'))):
        with pytest.raises(SystemExit, match='error: .*(cannot write|is no result)'):
            call()


def test_results_say_nothing_of_the_folders_of_this_machine(tmp_path, monkeypatch):
    inside, outside = os.path.join(checkpoint.ROOT, 'results', 'a.json'), str(tmp_path / 'b.json')
    monkeypatch.setattr('sys.argv', [inside.replace('a.json', 'probe.py'), f'--out_dir={inside}', outside, '--start=KING'])
    assert checkpoint.provenance()['command'] == f"probe.py --out_dir={os.path.join('results', 'a.json')} b.json --start=KING"
    kept = checkpoint.portable({'a': inside, 'b': outside, 'c': 1, 'd': 'out/x'})
    assert kept == {'a': os.path.join('results', 'a.json'), 'b': 'b.json', 'c': 1, 'd': 'out/x'}
