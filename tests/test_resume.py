"""Stops, kills and resuming: a run goes on as if nothing had happened. Streams through a corpus."""
import os
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT, check, flags
from test_train import assert_same_runs, load, records, watch

import tasks.text
from lib import checkpoint
from lib.checkpoint import TO_RESUME
from lib.processes import Stop, end_on_signals

@pytest.fixture
def resume(start, tmp_path):
    """resume('--key=value', ...): go on with a run, by the settings that it has."""
    return lambda *more, out_dir=tmp_path / 'out': start(
        f'--out_dir={out_dir}', '--init_from=resume', '--device=cpu', *more)

def kill(*args):
    raise KeyboardInterrupt  # which nothing catches

@pytest.mark.parametrize('mode', [
    dict(model_type='gpt', gradient_accumulation_steps=2), dict(recompute=True, carry='gated'),
    dict(stream=True, bptt_segments=1, recompute=True, gradient_accumulation_steps=2),
    dict(task='needle'), dict(task='pairs'), dict(task='pairs', passed_at=2.0),
    dict(task='track'), dict(task='mqar'), dict(task='facts', hops=2)])
def test_every_mode_resumes_bit_for_bit(train, resume, tmp_path, mode, monkeypatch):
    """And saving more often changes nothing."""
    settings = dict(max_iters=9, eval_interval=5, log_interval=3, **mode)
    assert train(out_dir=tmp_path / 'whole', **settings).code == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch(patch, lambda optimizer, n: n < 9 or kill())
        train(checkpoint_interval=4, **settings)
    saved = load(tmp_path / 'out' / 'last.pt')
    assert saved['iter_num'] == 8
    if mode in (dict(task='needle'), dict(task='pairs'), dict(task='track')):
        assert len(saved['task_state']['processes'][0]['walkers']['carry']) > 1
    assert resume().code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'out')

def test_a_kill_at_any_moment_is_undone(train, resume, tmp_path, monkeypatch):
    """Before any update, any evaluation and any file that is put in its place: between the save
    before an evaluation and that evaluation, and between the two files after it, too."""
    count, at, settings = 0, None, dict(max_iters=2, eval_interval=1, dropout=0.0)

    def moment(call):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            return kill() if count == at else call(*args, **kwargs)
        return counted
    losses = tasks.text.token_losses
    monkeypatch.setattr(tasks.text, 'token_losses', lambda *args: -losses(*args))  # 1 is best
    train(out_dir=tmp_path / 'whole', **settings)
    assert load(tmp_path / 'whole' / 'ckpt.pt')['iter_num'] == 1
    for owner, name in ((os, 'replace'), (torch.optim.AdamW, 'step'),
                        (tasks.text.Task, 'evaluate')):
        monkeypatch.setattr(owner, name, moment(getattr(owner, name)))
    for at in range(1, 100):
        count, folder = 0, tmp_path / str(at)
        try:
            done = train(out_dir=folder, **settings)
            break  # there are fewer moments
        except KeyboardInterrupt:
            saved = any((folder / name).exists() for name in ('ckpt.pt', 'last.pt'))
            done = resume(out_dir=folder) if saved else train(out_dir=folder, **settings)
        assert done.code == 0, (at, done.err)
        assert_same_runs(tmp_path / 'whole', folder)
    assert 12 < at < 20

def test_a_signal_finishes_the_update_saves_and_ends(train, resume, tmp_path, monkeypatch):
    settings = dict(log_interval=4, stream=True)
    train(out_dir=tmp_path / 'whole', **settings)
    before = signal.getsignal(signal.SIGHUP)
    with monkeypatch.context() as patch:
        watch(patch, lambda optimizer, n: n != 7 or os.kill(os.getpid(), signal.SIGHUP))
        stopped = train(**settings)
    assert stopped.code == 0 and 'stopped by SIGHUP after iteration 7 of 20' in stopped.out
    assert signal.getsignal(signal.SIGHUP) == before and resume().code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'out')

def test_a_signal_that_is_ignored_stays_so():
    """As nohup has it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Stop()
    end_on_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

def test_what_was_loaded_to_resume_is_let_go(train, resume, monkeypatch):
    """Before an update: a resumed run takes no more memory than another."""
    train(max_iters=1)
    real, loaded, alive = checkpoint.load_to_resume, [], []

    def load_to_resume(*args):
        found = real(*args)
        loaded.extend(map(weakref.ref, found['model'].values()))
        return found
    monkeypatch.setattr(checkpoint, 'load_to_resume', load_to_resume)
    watch(monkeypatch, lambda optimizer, n: alive.append(sum(ref() is not None for ref in loaded)))
    assert resume('--max_iters=2').code == 0 and loaded and alive == [0]

def test_a_second_signal_ends_at_once(train, tmp_path, monkeypatch):
    watch(monkeypatch, lambda optimizer, n: n != 7 or [
        os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(eval_interval=5)
    assert load(tmp_path / 'out' / 'last.pt')['iter_num'] == 5

def test_a_folder_has_one_process_and_a_closed_pipe_saves(train, resume, tmp_path, data_dir):
    command = flags(tmp_path / 'out', data_dir, max_iters=3000, eval_interval=3000)
    other = subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *command],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith('iter 3') for line in other.stdout)
    for refused in (train(overwrite=True), resume()):
        check(refused, f'process {other.pid} is at work in')
    other.stdout = other.stdout.close()
    assert other.communicate(timeout=100)[1] == '' and other.returncode == 0
    done = load(tmp_path / 'out' / 'last.pt')['iter_num']
    assert 3 <= done < 3000 and resume(f'--max_iters={done + 1}').code == 0

def test_torn_lines_and_files_are_dropped_and_a_finished_run_stays(train, resume, tmp_path):
    train(out_dir=tmp_path / 'whole', decay_from=1.0)
    train(max_iters=10, decay_from=1.0)
    for torn in ('{"no": "iter"}\n[]\n\xff\n{"iter": 9, {"iter": 9}\n{"iter": 11, "lo',
                 '{"iter": 9, "event": "torn"}'):
        with open(tmp_path / 'out' / 'log.jsonl', 'a', encoding='latin-1') as f:
            f.write(torn)
        (tmp_path / 'out' / '.last.pt.99999.tmp').write_bytes(b'torn')
        done = resume()
        assert done.code == 0 and 'nothing left to train' in done.out
    assert resume('--max_iters=20').code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('.*.tmp'))

def test_a_resumed_run_keeps_its_settings(train, resume, tmp_path, data_dir):
    train('rmt', max_iters=10, batch_size=3, learning_rate=5e-3, dtype='bfloat16', compile='off',
          threads=1, memory=2, beta1=0.8, beta2=0.95)
    done = resume('--max_iters=12', '--weight_decay=0.2', '--batch_size=6', '--seed=5',
                  '--n_embd=32', '--dataset=other', '--memory=3', '--set_aside=0.5',
                  '--document=a', '--eval_tokens=90')
    assert done.code == 0 and ', bfloat16\n' in done.out, done.err
    s = done.globals['s']
    assert (s.learning_rate, s.threads, s.compile, s.data_dir) == (5e-3, 1, 'off', str(data_dir))
    for key, value in (('seed', 1337), ('n_embd', 16), ('dataset', 'tiny'), ('memory', 2),
                       ('set_aside', 0.0), ('document', ''), ('eval_tokens', 0)):
        assert f'resume: {key} stays {value!r}' in done.out
        assert load(tmp_path / 'out' / 'last.pt')['config'][key] == value
    assert [group['weight_decay'] for group in done.globals['optimizer'].param_groups] == [0.2, 0]
    assert done.globals['optimizer'].param_groups[0]['betas'] == (0.8, 0.95)
    tokens = dict(records(tmp_path / 'out', 'tokens'))
    assert (tokens[10], tokens[11], tokens[12]) == (10 * 48, 10 * 48 + 96, 10 * 48 + 192)

@pytest.mark.parametrize('before, given, problem', [
    (dict(stretch=32), ['--stream=True'], 'stretch'),
    (dict(min_lr=0), ['--learning_rate=5e-5'], ''),
    (dict(stream=True), ['--batch_size=2'], '4 rows'),
    (dict(stream=True), ['--batch_size=2', '--stream=False'], ''),
    (dict(stream=True), ['--batch_size=2', '--gradient_accumulation_steps=2'], ''),
    (dict(task='facts', dataset='story'), ['--hops=2', '--line=60'], ''),
    (dict(task='needle'), ['--symbols=5', '--key_length=2', '--batch_size=2'], ''),
    (dict(task='pairs'), ['--dropout=0.5', '--fresh=5'], 'fresh=5')])
def test_what_a_resumed_run_goes_on_with_is_checked(train, resume, before, given, problem):
    """And not the defaults, which it does not go on with."""
    train(max_iters=2, **before)
    done = resume('--max_iters=3', *given)
    assert done.code == len(done.err.splitlines()) == bool(problem) and problem in done.err

def test_what_cannot_be_resumed_is_told_in_a_line(trained, resume, monkeypatch):
    out = trained()
    best, last = (out / name for name in ('ckpt.pt', 'last.pt'))
    good = load(last)

    def refused(words, **changes):
        content = {**good, **changes}
        torch.save({key: content[key] for key in content if content[key] is not None}, last)
        done = resume('--max_iters=4')
        check(done, words)
        return done.err
    for key in TO_RESUME.keys() - {'task'}:  # of nanoGPT's, which does not name it, it is text
        assert f'--init_from={last}' in refused(f'{key!r} is missing', **{key: None})
    refused('is not the text that the run', data={**good['data'], 'sha256': '0' * 64})
    refused('knows 9 tokens, the data has', model_args={**good['model_args'], 'vocab_size': 9})
    os.replace(best, last)
    (out / 'log.jsonl').unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch(patch, kill)
        resume('--max_iters=3')
    assert last.exists() and resume('--max_iters=3').code == 0
