"""What all tests share: a fresh random state, scripts run as from the command line, small data."""
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ['CUDA_VISIBLE_DEVICES'] = ''  # tests are of the CPU; a GPU's are in tests/gpu/

import pytest
import torch
from web import web  # noqa: F401 (a fixture)

import compare
from configurator import configure
from lib.console import explain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = ''.join(f'{a} {b} says: {a * b}.\n' for a in range(40) for b in ('ape', 'bee', 'cow'))
PANGRAM = 'The quick brown fox jumps over that lazy dog; ABCDW?. '

SMALL = dict(device='cpu', n_embd=16, n_head=2, n_layer=2, n_local=1, n_global=1, segment_size=4,
             block_size=16, batch_size=4, max_iters=20, eval_interval=10, log_interval=1,
             warmup_iters=2, dropout=0.1, threads=1)
OF_TASK = {  # so easy that some answers are right from the start, and sequences walk on
    'text': dict(dataset='tiny'),
    'needle': dict(dataset='tiny', batch_size=64, key_length=1, symbols=1, longest=3,
                   probe_distance=9, carry='gated', learning_rate=0.01),
    'pairs': dict(segment_size=6, block_size=24, names=5, symbols=2, pairs=3, together=2, fresh=2,
                  segments=2, questions=1, passed_at=-1.0),
    'mqar': dict(lengths='16:3,20:2', vocabulary=12, block_size=20),
    'track': dict(cups=2, every=2, symbols=1, longest=2, probe_distance=9, batch_size=32),
    'facts': dict(dataset='story', longest=2, probe_distance=9, block_size=96,
                  segment_size=12)}

def flags(out_dir, data_dir='', task='text', **settings):
    """The command line of a run of train.py, a second long."""
    own = dict(data_dir=data_dir) if task in ('text', 'needle', 'facts') else {}
    values = {'task': task, 'out_dir': out_dir, **own, **SMALL, **OF_TASK.get(task, {}), **settings}
    return [f'--{key}={value}' for key, value in values.items()]

def check(done, *parts):
    """A script that ended with one line of error; before it, it may say whose model it took."""
    *said, error = done.err.splitlines() or ['']
    assert done.code == 1 and error.startswith('error: '), (done.code, done.err)
    assert not said or len(said) == 1 and ', trained on ' in said[0], done.err
    assert all(part in error for part in parts), error

def check_error(words, call, *args, kind=SystemExit, **kwargs):
    """A SystemExit in one line that holds all of the words, which | separates."""
    with pytest.raises(SystemExit) as caught:
        call(*args, **kwargs)
    message = caught.value.code
    assert type(caught.value) is kind and message.startswith('error: ')
    assert '\n' not in message and len(message) < 600, message
    assert all(word in message for word in words.split('|')), message

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
    monkeypatch.setattr(os, 'fsync', lambda file: None)  # 7 ms each

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
        except Exception as failed:  # which the hook of lib/start.py may explain
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
    """A folder with small prepared data sets, 'tiny' (some 2000 characters) and 'story', which has
    all letters."""
    from prepare import prepare
    folder = tmp_path_factory.mktemp('data')
    for name, text in ('tiny', TEXT), ('story', PANGRAM * 40):
        (folder / f'{name}.txt').write_text(text)
        prepare(name, file=str(folder / f'{name}.txt'), data_dir=str(folder))
    return folder

@pytest.fixture
def start(run, monkeypatch):
    """start('--key=value', ...): train.py without its picture and its FLOPs: they take as long."""
    def start(*args):
        with monkeypatch.context() as patch:
            patch.setattr('lib.pictures.curves', lambda *args, **kwargs: None)
            patch.setattr('lib.contract.flops_per_token', lambda *args: None)
            patch.setattr('lib.records.git', lambda words: '')
            return run('train.py', *args)
    return start

@pytest.fixture
def train(start, data_dir, tmp_path):
    """train(**settings): such a run on any task, a second long."""
    return lambda model_type='fold', task='text', out_dir=tmp_path / 'out', **settings: start(
        *flags(out_dir, **{'data_dir': data_dir, 'task': task, 'model_type': model_type,
                           **settings}))

@pytest.fixture
def trained(train, tmp_path, tmp_path_factory):
    """trained(**settings): a copy, tmp_path/'out', of such a run of one update."""
    def trained(name='out', **settings):
        kept = tmp_path_factory.getbasetemp() / f'trained {settings}'
        assert kept.exists() or train(out_dir=kept, **{'max_iters': 1, **settings}).code == 0
        return Path(shutil.copytree(kept, tmp_path / name))
    return trained

@pytest.fixture
def compiler(monkeypatch):
    """compiler(backend): torch.compile with it, until the test ends."""
    real = torch.compile
    yield lambda backend: monkeypatch.setattr(
        torch, 'compile', lambda f, **kwargs: real(f, backend=backend, **kwargs))
    torch.compiler.reset()
    torch.compiler.set_stance('default')

@pytest.fixture
def model_dir(trained):
    """A folder that holds nothing but a trained model's checkpoint."""
    out = trained(learning_rate=3e-3, max_iters=30)
    for path in out.iterdir():
        path.name == 'ckpt.pt' or path.unlink()
    return out
