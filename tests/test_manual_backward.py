"""The backward pass that is written out gives the results and gradients of model.py's, in every mode; and serves where it can."""
import pytest
import torch

import manual_backward
import training
from folds import assert_close, batch, gradients, l, make_fold
from model import GPT, GPTConfig
from training import backpropagate


@pytest.mark.parametrize('sizes', [dict(), dict(n_local=0), dict(n_global=1), dict(bias=False)])
@pytest.mark.parametrize('how', [dict(), dict(chunk=2 * l), dict(recompute=True)])
@pytest.mark.parametrize('short_rows', [0, l + 1, 99])  # no window, those of one segment, all
def test_written_out_and_automatic_agree(sizes, how, short_rows, monkeypatch):
    """With a carry and without, of segments one of which is short: to rounding error in float64."""
    monkeypatch.setattr(manual_backward, 'SHORT_ROWS', short_rows)
    model, (x, y) = make_fold(**sizes), batch(4 * l + 2)
    carry = torch.randn(len(x), l, model.config.n_embd, dtype=torch.float64)
    for first in (None, carry):
        results = []
        for installed in (False, True):
            if installed:
                assert manual_backward.install(model)
            loss, last = backpropagate(model, x, y, first, **how)
            results.append((loss, last, gradients(model)))
            for name in ('local', 'fold'):
                model.__dict__.pop(name, None)
        (loss, last, grads), (loss_2, last_2, grads_2) = results
        torch.testing.assert_close((loss_2, last_2), (loss, last), rtol=0, atol=1e-10)
        assert_close(grads_2, grads, rtol=0, atol=1e-10)


def test_the_gradient_of_the_carry_agrees():
    model = make_fold()
    carry, grads = torch.randn(2, l, model.config.n_embd, dtype=torch.float64, requires_grad=True), []
    x, y = batch(3 * l)
    for _ in range(2):
        _, loss, last = model(x[:2], y[:2], carry)
        grads.append(torch.autograd.grad(loss + last.square().sum(), carry)[0])
        assert manual_backward.install(model)
    assert grads[0].abs().max() > 1e-6
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-10)


def test_it_keeps_nothing_where_no_gradient_is_wanted(monkeypatch):
    model, (x, _) = make_fold(), batch(3 * l)
    expected = model(x, all_logits=True)[0].detach()
    assert training.compile_model(model, 2, 'auto', 'cpu')  # what train.py does
    monkeypatch.setattr(manual_backward, 'loop', None)
    with torch.no_grad():
        torch.testing.assert_close(model(x, all_logits=True)[0], expected, rtol=0, atol=1e-10)


def test_it_is_not_taken_for_what_it_does_not_compute():
    gpt = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    for model in (make_fold(carry='gated'), make_fold(dropout=0.1), gpt):
        assert not training.compile_model(model, 2, 'manual', 'cpu') and 'fold' not in vars(model)
    assert not training.compile_model(make_fold(), 2, 'auto', 'cpu', torch.autocast('cpu', torch.bfloat16))


def test_attention_is_left_to_torch_and_other_products_are_not(monkeypatch):
    """In both directions; and what was set before is set afterwards."""
    seen, matmul = {}, torch.backends.mkldnn.matmul

    def watch(name):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, **more: seen.setdefault(name, set()).add(matmul.fp32_precision) or real(*args, **more))
    for name in ('bmm', 'baddbmm', 'mm'):
        watch(name)
    added = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, 'addmm_', lambda *args: seen.setdefault('addmm_', set()).add(matmul.fp32_precision) or added(*args))
    model, (x, y) = make_fold(), batch(2 * l)
    assert manual_backward.install(model)
    matmul.fp32_precision = 'bf16'
    backpropagate(model, x, y)
    assert seen == {'bmm': {'ieee'}, 'baddbmm': {'ieee'}, 'mm': {'bf16'}, 'addmm_': {'bf16'}} and matmul.fp32_precision == 'bf16'
