"""What all tests share: a fresh random state, scripts run as from the command line, small data."""
import os
import runpy
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import compare
from configurator import configure
from lib.console import explain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = ''.join(f'{a} {b} says: {a * b}.\n' for a in range(40) for b in ('ape', 'bee', 'cow'))

@pytest.fixture(autouse=True)
def as_new(monkeypatch):
    """Random numbers, threads, signals and who multiplies as in a new process, whatever ran before,
    and whatever started the tests (in the background of a shell, SIGINT is ignored)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.mkldnn.matmul.fp32_precision = 'none'
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)

@pytest.fixture
def run(monkeypatch, capsys):
    """run('train.py', '--key=value', ...) as from the command line: code, out, err, globals."""
    def run(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        capsys.readouterr()
        code, error, names = 0, '', {}
        try:
            names = runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        except SystemExit as stop:  # a text goes to standard error, and the code is 1
            is_text = isinstance(stop.code, str)
            code, error = (1, stop.code + '\n') if is_text else (stop.code or 0, '')
        except Exception as failed:  # which the hook of configurator.py may explain
            if (line := explain(failed)) is None:
                raise
            code, error = 1, line + '\n'
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err + error, globals=names)
    return run

@pytest.fixture
def compare_here(run, monkeypatch):
    """compare_here('comparison.py', ...): compare.py and its scripts in this process, without
    their pictures; its error or ''."""
    async def call(s, script, **flags):
        done = run(script, *(f'--{key}={value}' for key, value in flags.items()), '--device=cpu')
        if done.code:
            raise SystemExit(done.err.splitlines()[-1])
        return done.out

    def compare_here(*argv):
        with monkeypatch.context() as patch:
            patch.setattr(compare, 'call', call)
            patch.setattr(compare, 'CALIBRATION', (300, 2))
            patch.setattr('lib.pictures.curves', lambda *args, **kwargs: None)
            try:
                compare.main(configure(vars(compare), [*map(str, argv)], 'comparison'))
                return ''
            except SystemExit as stop:
                return str(stop)
    return compare_here

@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder with a small prepared data set named 'tiny' (some 2000 characters)."""
    from prepare import prepare
    folder = tmp_path_factory.mktemp('data')
    (folder / 'tiny.txt').write_text(TEXT)
    prepare('tiny', file=str(folder / 'tiny.txt'), data_dir=str(folder))
    return folder

@pytest.fixture
def train(run, data_dir, tmp_path):
    """train(**settings): a run of train.py on the small data set, seconds long; settings count."""
    def train(model_type='fold', **settings):
        small = dict(data_dir=data_dir, dataset='tiny', out_dir=tmp_path / 'out', device='cpu',
                     model_type=model_type, n_embd=16, n_head=2, n_layer=2, n_local=1, n_global=1,
                     segment_size=4, block_size=16, batch_size=4, max_iters=20, eval_interval=10,
                     log_interval=1, warmup_iters=2, dropout=0.1)
        small.update(settings)
        return run('train.py', *(f'--{key}={value}' for key, value in small.items()))
    return train
