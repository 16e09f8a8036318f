"""Who multiplies float32 matrices on a CPU: oneDNN where that is faster and as exact, and attention takes the ways that then pay."""
import pytest
import torch

import model
import training
from model import attend

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(training, 'processor', lambda: 'vendor_id\t: AuthenticAMD')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')


def test_what_onednn_computes_is_float32(amd):
    """On whatever this machine is: either it is not taken, or its products are exact to float32's rounding."""
    taken = training.onednn_products()
    assert MATMUL.fp32_precision == ('bf16' if taken else 'ieee') and model.SHORT_WINDOW == (384 if taken else 64)
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    for product, exact in ((a @ b, a.double() @ b.double()), (torch.addmm(a[:, :100], a, b), a[:, :100].double() + a.double() @ b.double())):
        torch.testing.assert_close(product.double(), exact, rtol=0, atol=2e-4)  # bfloat16: 0.1


def test_a_processor_that_rounds_is_left_to_torch(amd, monkeypatch):
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: torch.matmul(a.bfloat16().float(), b.bfloat16().float()))
    assert not training.onednn_products()
    assert MATMUL.fp32_precision == 'ieee' and model.SHORT_WINDOW == 64


@pytest.mark.parametrize('vendor, capability', [('GenuineIntel', 'AVX512'), ('AuthenticAMD', 'AVX2'), ('', 'DEFAULT')])
def test_other_processors_are_left_to_torch(monkeypatch, vendor, capability):
    monkeypatch.setattr(training, 'processor', lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert not training.onednn_products() and MATMUL.fp32_precision == 'ieee'


@pytest.mark.parametrize('products, asked', [('auto', 1), ('torch', 0)])
def test_training_asks_for_it_unless_told_not_to(train, monkeypatch, products, asked):
    calls = []
    monkeypatch.setattr(training, 'onednn_products', lambda: calls.append(1))
    assert train(products=products, max_iters=1).code == 0 and len(calls) == asked


@pytest.mark.parametrize('n, S', [(12, 12), (12, 24), (24, 24), (100, 100)])
def test_attention_is_the_same_whichever_way_it_goes(monkeypatch, n, S):
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for T in (n, S, S))
    results = []
    for short_window, short_rows in ((64, 16), (384, 0), (384, 999)) + ((0, 0),) * (n == S):
        monkeypatch.setattr(model, 'SHORT_WINDOW', short_window)
        monkeypatch.setattr(model, 'SHORT_ROWS', short_rows)
        y = attend(q, k, v)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)
