"""Stops, kills and resuming: a run goes on as if nothing had happened."""
import os
import signal

import pytest
import torch

import kill_and_resume
from folds import assert_same_runs
from test_train import same


MODES = [dict(stream=True), dict(bptt_segments=3), dict(recompute=True),
         dict(stream=True, bptt_segments=1, recompute=True, gradient_accumulation_steps=2)]


def at_update(monkeypatch, n, act):
    """Call act() in the n-th update of what follows."""
    step, steps = torch.optim.AdamW.step, []

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == n:
            act()
        return step(*args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', counted)


def out_of_memory():
    raise MemoryError('killed')


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_resumes_bit_for_bit(train, tmp_path, mode, monkeypatch):
    how = dict(max_iters=34, eval_interval=15, checkpoint_interval=4, log_interval=3, batch_size=8, **mode)
    assert train(out_dir=tmp_path / 'whole', **how).code == 0
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_update(patch, 24, out_of_memory)
        train(out_dir=tmp_path / 'parts', **how)
    assert torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)['iter_num'] == 20
    assert train(out_dir=tmp_path / 'parts', init_from='resume', **how).code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits(train, tmp_path, monkeypatch, number):
    how = dict(max_iters=20, eval_interval=10, log_interval=4, stream=True)
    train(out_dir=tmp_path / 'whole', **how)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_update(patch, 7, lambda: os.kill(os.getpid(), number))
        stopped = train(out_dir=tmp_path / 'parts', **how)
    assert stopped.code == 0 and f'stopped by {number.name} after iteration 7 of 20, saved' in stopped.out
    assert '--init_from=resume' in stopped.out and 'done in' not in stopped.out
    assert torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)['iter_num'] == 7
    assert signal.getsignal(number) == before
    assert train(out_dir=tmp_path / 'parts', init_from='resume', **how).code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')


def test_a_second_signal_ends_at_once(train, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    at_update(monkeypatch, 7, twice)
    with pytest.raises(KeyboardInterrupt):
        train(eval_interval=5)
    assert torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['iter_num'] == 5


def test_a_torn_log_line_is_dropped(train, tmp_path):
    train(out_dir=tmp_path / 'whole', max_iters=20)
    train(out_dir=tmp_path / 'parts', max_iters=10, lr_decay_iters=20)
    for torn in ('{"iter": 11, "lo', '{"iter": 10, "event": "torn"}', '{"no": "iter"}\n', '[]\n'):  # the second lacks nothing but its line's end
        with open(tmp_path / 'parts' / 'log.jsonl', 'a') as f:
            f.write(torn)
        assert train(out_dir=tmp_path / 'parts', max_iters=10, lr_decay_iters=20, init_from='resume').code == 0
    assert train(out_dir=tmp_path / 'parts', max_iters=20, init_from='resume').code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('at', [10, 20])
def test_a_kill_between_the_two_checkpoints_is_undone(train, tmp_path, monkeypatch, at):
    """At the first evaluation there is no last.pt yet."""
    train(out_dir=tmp_path / 'whole')
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if os.path.basename(target) == 'ckpt.pt' and torch.load(target, weights_only=True)['iter_num'] == at:
            raise MemoryError('killed')
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, 'replace', killed)
        train(out_dir=tmp_path / 'parts')
    assert os.path.exists(tmp_path / 'parts' / 'last.pt') == (at == 20)
    assert train(out_dir=tmp_path / 'parts', init_from='resume').code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('whole', 'parts'))
    assert same(a['model'], b['model']) and a['iter_num'] == b['iter_num']


def test_checkpoints_more_often_than_evaluations_change_nothing(train, tmp_path):
    train(out_dir=tmp_path / 'a', stream=True)
    train(out_dir=tmp_path / 'b', stream=True, checkpoint_interval=1)
    assert_same_runs(tmp_path / 'a', tmp_path / 'b')


def test_streams_of_another_number_of_rows_are_refused(train):
    train(stream=True)
    refused = train(stream=True, init_from='resume', batch_size=2, max_iters=30)
    assert refused.code == 1 and 'streams are 4 rows' in refused.err and len(refused.err.splitlines()) == 1
    assert train(stream=False, init_from='resume', batch_size=2, max_iters=30).code == 0


@pytest.mark.parametrize('before, given, problem', [
    (dict(stream=True), ['--stretch=32'], 'draws no stretch'),
    (dict(stretch=32), ['--stream=True'], 'draws no stretch'),
    (dict(batch_size=8), ['--stretch=64'], ''),
    (dict(min_lr=0), ['--learning_rate=5e-5'], ''),
    (dict(), ['--threads=-1'], 'threads must be at least 0')])
def test_what_a_resumed_run_goes_on_with_is_checked(train, run, data_dir, tmp_path, before, given, problem):
    """And not the defaults, which it does not go on with."""
    train(max_iters=10, **before)
    done = run('train.py', f"--out_dir={tmp_path / 'out'}", f'--data_dir={data_dir}', '--init_from=resume', '--max_iters=12', *given)
    assert done.code == bool(problem) and problem in done.err and len(done.err.splitlines()) == bool(problem)


def test_the_precision_is_kept(train, run, data_dir, tmp_path):
    train(max_iters=10, dtype='bfloat16', compile='off')
    done = run('train.py', f"--out_dir={tmp_path / 'out'}", f'--data_dir={data_dir}', '--init_from=resume', '--max_iters=12')
    assert done.code == 0 and 'bfloat16; ' in done.out and done.globals['compile'] == 'off'


def test_weights_to_start_from_keep_their_width(train, tmp_path):
    train(out_dir=tmp_path / 'a', max_iters=1)
    done = train(init_from=tmp_path / 'a' / 'ckpt.pt', n_embd=32, max_iters=1)
    assert done.code == 0 and 'init_from: n_embd stays 16' in done.out


def test_killed_with_sigkill_and_resumed():
    kill_and_resume.main(2)
