"""Stops, kills and resuming: a run goes on as if nothing had happened. Streams through a corpus."""
import os
import signal
import subprocess
import sys

import kill_and_resume
import pytest
import torch
from test_tasks import make_task
from test_train import final_weights, flags, lines, load, records, same, starter, watch

from lib.checkpoint import TO_RESUME
from lib.records import ROOT
from lib.rows import Rows


@pytest.fixture
def train(run, tmp_path, data_dir, monkeypatch):
    return starter(run, tmp_path, data_dir, monkeypatch)


@pytest.fixture
def resume(run, tmp_path):
    """resume('--key=value', ...): go on with a run, by the settings that it has."""
    return lambda *more, out_dir=tmp_path / 'out': run(
        'train.py', f'--out_dir={out_dir}', '--init_from=resume', '--device=cpu', *more)


def assert_same_runs(a, b):
    """Weights, optimizer, random numbers, state of the task and log, bit for bit; not the speed."""
    for name in ('ckpt.pt', 'last.pt'):
        x, y = (load(folder / name) for folder in (a, b))
        for saved in (x, y):
            for part, key in ((saved, 'config'), (saved, 'provenance'), (saved['run'], 'seconds'),
                              (saved['run'], 'interval_seconds')):
                del part[key]
        assert x.keys() == y.keys() and [key for key in x if not same(x[key], y[key])] == []
    x, y = ([{key: value for key, value in line.items() if key not in ('tokens_per_s', 'seconds')}
             for line in lines(folder) if 'event' not in line] for folder in (a, b))
    assert x == y


def out_of_memory(*args):
    raise MemoryError('killed')


@pytest.mark.parametrize('mode', [
    dict(), dict(model_type='gpt', gradient_accumulation_steps=2), dict(stream=True),
    dict(bptt_segments=3), dict(recompute=True, carry='gated'), dict(dtype='bfloat16'),
    dict(stream=True, bptt_segments=1, recompute=True, gradient_accumulation_steps=2),
    dict(task='needle'), dict(task='needle', filler='text', key_length=2, carry='plain'),
    dict(task='needle', model_type='gpt'), dict(task='pairs'), dict(task='pairs', passed_at=2.0)])
def test_every_mode_resumes_bit_for_bit(train, resume, tmp_path, mode, monkeypatch):
    settings = dict(max_iters=34, eval_interval=15, checkpoint_interval=4, log_interval=3, **mode)
    assert train(out_dir=tmp_path / 'whole', **settings).code == 0
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        watch(patch, lambda optimizer, n: n < 24 or out_of_memory())
        train(**settings)
    saved = load(tmp_path / 'out' / 'last.pt')
    assert saved['iter_num'] == 20
    if mode in (dict(task='needle'), dict(task='pairs')):
        assert len(saved['task_state']['processes'][0]['walkers']['keys' if 'needle' in
                                                                  mode.values() else 'names']) > 1
    assert resume().code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'out')


@pytest.mark.parametrize('task', ['text', 'needle'])
def test_a_kill_at_any_moment_is_undone(train, resume, tmp_path, monkeypatch, task):
    """Before any update, any evaluation and any file that is put in its place: between the save
    before an evaluation and that evaluation, and between the two files after it, too."""
    settings = dict(task=task, max_iters=2, eval_interval=1)
    moments, at, replace = [], None, os.replace
    evaluate = type(make_task(task)).evaluate if task == 'needle' else None

    def moment(call, *args):
        moments.append(call)
        if len(moments) == at:
            out_of_memory()
        return call(*args)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_update_saves_and_ends(train, resume, tmp_path, monkeypatch, number):
    settings = dict(log_interval=4, stream=True)
    train(out_dir=tmp_path / 'whole', **settings)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        watch(patch, lambda optimizer, n: n != 7 or os.kill(os.getpid(), number))
        stopped = train(**settings)
    assert stopped.code == 0 and f'stopped by {number.name} after iteration 7 of 20' in stopped.out
    assert load(tmp_path / 'out' / 'last.pt')['iter_num'] == 7
    assert signal.getsignal(number) == before
    assert resume().code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'out')


def test_a_second_signal_ends_at_once(train, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    watch(monkeypatch, lambda optimizer, n: n != 7 or twice())
    with pytest.raises(KeyboardInterrupt):
        train(eval_interval=5)
    assert load(tmp_path / 'out' / 'last.pt')['iter_num'] == 5
