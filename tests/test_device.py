"""The machine: who multiplies on a CPU, what is compiled, devices, threads and memory."""
import sys

import pytest
import torch
from test_train import equal, load, records

from lib import device
from lib.checkpoint import load_model
from lib.pictures import curves
from lib.scoring import token_losses

MATMUL = torch.backends.mkldnn.matmul

@pytest.fixture
def amd(monkeypatch):
    """A processor on which oneDNN is tried; what it computes is this one's."""
    monkeypatch.setattr(device, 'cpu_info', lambda: 'vendor_id\t: AuthenticAMD')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512')

def test_what_is_taken_computes_float32(amd):
    """On whatever this machine is; bfloat16 would be off by 0.1."""
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    taken = device.choose_products('auto')
    assert MATMUL.fp32_precision == ('bf16' if taken == 'onednn' else 'none')
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0, atol=2e-4)

def test_a_processor_that_rounds_is_left_to_torch(amd, monkeypatch, capsys):
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: torch.matmul(
        a.bfloat16().float(), b.bfloat16().float()))
    assert device.choose_products('onednn') == 'torch' and MATMUL.fp32_precision == 'none'
    assert "oneDNN's products do not serve on this machine" in capsys.readouterr().out

def test_others_are_left_to_torch(monkeypatch):
    for vendor, capability, products in (
            ('GenuineIntel', 'AVX512', 'auto'), ('AuthenticAMD', 'AVX2', 'onednn'),
            ('AuthenticAMD', 'AVX512', 'torch')):
        monkeypatch.setattr(device, 'cpu_info', lambda: vendor)
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
        assert device.choose_products(products) == 'torch' and MATMUL.fp32_precision == 'none'

def test_training_records_who_multiplies_and_goes_on_with_it(train, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(device, 'choose_products', lambda asks: asked.append(asks) or 'onednn')
    assert train(max_iters=1).globals['s'].products == 'onednn'
    assert train(init_from='resume', max_iters=2).code == 0 and asked == ['auto', 'onednn']
    assert load(tmp_path / 'out' / 'last.pt')['config']['products'] == 'onednn'

@pytest.mark.filterwarnings('ignore')  # torch warns of itself
@pytest.mark.parametrize('works', [True, False])
def test_what_is_compiled_computes_the_same_or_is_left_out(train, tmp_path, compiler, works):
    calls = []

    def backend(graph, inputs):
        assert works, 'no compiler\nhere'
        return lambda *args: calls.append(1) or graph(*args)
    compiler(backend)
    train(out_dir=tmp_path / 'a', n_global=2, max_iters=3)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # and all of it is
        for _ in range(1 if works else 2):  # a second trial is no better than the first
            done = train(compile='kernels', n_global=2, max_iters=3, overwrite=True)
    assert done.code == 0 and (len(calls) > 10) == works, done.err
    assert ('does not work here (BackendCompilerFailed: ' in done.err) != works
    a, b = (load(tmp_path / name / 'last.pt')['model'] for name in ('a', 'out'))
    equal(a, b, **(dict(rtol=1e-3, atol=1e-4) if works else {}))

def test_validation_is_in_float32(train, tmp_path):
    job = train(dtype='bfloat16', max_iters=2, eval_interval=2).globals['job']
    saved = load(tmp_path / 'out' / 'last.pt')
    found = token_losses(load_model(saved), job.val_data)
    assert saved['run']['val']['val_loss'] == pytest.approx(found.double().mean().item(), abs=1e-7)
    train(dtype='float32', out_dir=tmp_path / 'b', max_iters=2, dropout=0.0)
    train(dtype='bfloat16', out_dir=tmp_path / 'c', max_iters=2, dropout=0.0)
    a, b = (records(tmp_path / name, 'loss')[0][1] for name in 'bc')
    assert 0 < abs(a - b) < 0.01  # but training is not
    device.pick_device('cpu')
    assert not torch.backends.cudnn.allow_tf32

def test_without_matplotlib_a_run_ends_well_and_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    curves(tmp_path / 'loss.png', 'title', {'a': {'x': 'x', 'y': 'y', 'points': []}})
    assert 'loss.png is not drawn: ' in capsys.readouterr().out
    assert not (tmp_path / 'loss.png').exists()

def test_as_many_threads_as_there_are_idle_cores(monkeypatch, tmp_path, capsys):
    """Unless a number is given, or the environment has one."""
    load, idle = tmp_path / 'loadavg', device.idle_cores
    monkeypatch.setattr(device.os, 'cpu_count', lambda: 4)
    assert idle(tmp_path / 'none') == 4
    monkeypatch.setattr(device, 'usable_cores', lambda: 4)
    monkeypatch.setattr(device, 'idle_cores', lambda: idle(load))
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    for threads, variable, running, wanted in ((0, 0, 3, 2), (0, 0, 1, 4), (0, 0, 9, 1),
                                               (3, 0, 9, 3), (0, 1, 9, 4)):
        torch.set_num_threads(4)
        load.write_text(f'0.50 0.40 0.30 {running}/99 1234\n')
        if variable:
            monkeypatch.setenv('OMP_NUM_THREADS', '4')
        device.set_threads(threads)
        assert torch.get_num_threads() == wanted
        assert ('other work' in capsys.readouterr().err) == (wanted < 3)
