"""Who multiplies float32 matrices on a CPU: oneDNN where that is faster and as exact, and attention takes the ways that then pay."""
import pytest
import torch

import model
import training
from folds import gradients
from model import attend

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(training, 'processor', lambda: 'vendor_id\t: AuthenticAMD')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')


def test_what_onednn_computes_is_float32(amd):
    """On whatever this machine is: either it is not taken, or its products are exact to float32's rounding."""
    taken = training.onednn_products()
    assert MATMUL.fp32_precision == ('bf16' if taken else 'none') and model.SHORT_WINDOW == (384 if taken else 64)
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    for product, exact in ((a @ b, a.double() @ b.double()), (torch.addmm(a[:, :100], a, b), a[:, :100].double() + a.double() @ b.double())):
        torch.testing.assert_close(product.double(), exact, rtol=0, atol=2e-4)  # bfloat16: 0.1


def test_a_processor_that_rounds_is_left_to_torch(amd, monkeypatch):
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: torch.matmul(a.bfloat16().float(), b.bfloat16().float()))
    assert not training.onednn_products()
    assert MATMUL.fp32_precision == 'none' and model.SHORT_WINDOW == 64


@pytest.mark.parametrize('vendor, capability', [('GenuineIntel', 'AVX512'), ('AuthenticAMD', 'AVX2'), ('', 'DEFAULT')])
def test_other_processors_are_left_to_torch(monkeypatch, vendor, capability):
    monkeypatch.setattr(training, 'processor', lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert not training.onednn_products() and MATMUL.fp32_precision == 'none' and model.SHORT_WINDOW == 64


def test_it_is_not_taken_where_torch_has_it_not_or_it_fails(amd, monkeypatch):
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.onednn_products()
    assert MATMUL.fp32_precision == 'none'
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert not training.onednn_products()


@pytest.mark.parametrize('serves', [True, False])
@pytest.mark.parametrize('products', ['auto', 'onednn', 'torch'])
def test_training_takes_what_serves_and_says_which(train, tmp_path, monkeypatch, products, serves):
    """And goes on with it: resuming takes what the run had, or, of an older run, torch's."""
    calls = []
    monkeypatch.setattr(training, 'onednn_products', lambda: calls.append(1) or serves)
    taken = 'onednn' if serves and products != 'torch' else 'torch'
    done = train(products=products, max_iters=1)
    assert done.code == 0 and done.globals['config']['products'] == taken and len(calls) == (products != 'torch')
    assert ('do not serve' in done.out) == (products == 'onednn' and not serves)
    path = tmp_path / 'out' / 'last.pt'
    assert model.SHORT_ROWS == 16
    checkpoint = torch.load(path)
    assert checkpoint['config']['products'] == taken
    assert train(init_from='resume', max_iters=2).globals['config']['products'] == taken
    del checkpoint['config']['products']
    torch.save(checkpoint, path)
    assert train(init_from='resume', max_iters=3).globals['config']['products'] == 'torch'


@pytest.mark.parametrize('products, taken', [('auto', True), ('torch', False)])
def test_the_benchmark_takes_the_setting(amd, products, taken):
    import bench_training
    bench_training.make('full', '1+1x16x2', 24, {**bench_training.defaults(), 'device': 'cpu', 'products': products})
    assert (MATMUL.fp32_precision == 'bf16') == (taken and training.onednn_products())


def test_gradients_through_onednn_are_as_exact_as_torchs(amd):
    """In float32, of a fold with the backward pass written out and of a GPT, beside float64."""
    sizes = dict(block_size=96, vocab_size=50, n_head=2, n_embd=64)
    fold = model.FoldGPT(model.FoldConfig(n_local=1, n_global=2, **sizes))
    for net in (fold.double(), model.GPT(model.GPTConfig(n_layer=2, **sizes)).double()):
        x, y = torch.randint(50, (2, 4, 96))
        errors = []
        net(x, y)[1].backward()
        exact = gradients(net)
        for set_up in (lambda: None, training.onednn_products):
            set_up()
            training.compile_model(net.float(), len(x), 'auto', 'cpu')
            net.zero_grad(set_to_none=True)
            net(x, y)[1].backward()
            found = gradients(net)
            errors.append(max((found[name].double() - exact[name]).abs().max().item() for name in exact))
        assert errors[1] < 3 * errors[0] + 1e-7 and errors[0] < 1e-4


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
