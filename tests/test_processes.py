"""Several processes learn like one, stop as one, and resume."""
import os
import runpy
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, flags
from test_tasks import make_task
from test_train import equal, load, records

SCRIPT = os.path.join(ROOT, 'train.py')

def start(words, others=None):
    """Two processes as torchrun starts them, at half its cost: on two machines if the second has
    other words."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        group = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                     MASTER_PORT=str(free.getsockname()[1]))
    return [subprocess.Popen([sys.executable, SCRIPT, *own], stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE, env={**group, 'RANK': n, 'LOCAL_RANK': local})
            for n, own, local in zip('01', (words, others or words), '00' if others else '01')]

def finish(processes, code=0):  # what they print on standard error
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        [process.kill() for process in processes]
    assert [process.returncode for process in processes] == [code, code], errors
    return errors

def assert_close_runs(one, two, updates):
    for key in ('loss', 'val_loss', 'tokens'):
        a, b = (dict(records(folder, key)) for folder in (one, two))
        assert b == pytest.approx(a, abs=1e-5) and (key == 'val_loss' or len(a) == updates)

def test_two_machines_learn_from_their_own_copies_of_the_data(train, data_dir, tmp_path):
    """Two agents of torchrun that meet on the loopback interface; one of them writes."""
    settings = dict(dropout=0.0, max_iters=6, threads=1, carry='gated', recompute=True,
                    position='rotary', past='frozen')
    train(out_dir=tmp_path / 'one', **settings)
    shutil.copytree(data_dir, tmp_path / 'copy')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    agents = [subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
         '--rdzv-backend=c10d', f'--rdzv-endpoint={endpoint}', SCRIPT,
         *flags(tmp_path / name, data, **settings)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT) for name, data in (('a', data_dir), ('b', tmp_path / 'copy'))]
    output = ''.join(agent.communicate(timeout=200)[0] for agent in agents)
    assert output.count('iter 6: loss') == output.count('2 processes') == 1, output[-3000:]
    written = [name for name in 'ab' if (tmp_path / name).exists()]
    assert len(written) == 1 and (tmp_path / written[0] / 'loss.png').stat().st_size > 1000
    assert_close_runs(tmp_path / 'one', tmp_path / written[0], 6)

def test_machines_with_other_data_or_settings_end_in_a_line(train, data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir / 'story', tmp_path / 'other' / 'tiny')
    both = start(*(flags(tmp_path / 'out', data) for data in (data_dir, tmp_path / 'other')))
    errors = finish(both, code=1)
    assert 'is not the same on all machines' in errors[1], errors
    assert all(error.count('\n') <= 1 for error in errors), errors
    monkeypatch.setattr('lib.processes.from_all', lambda value: [value, {**value, 'max_iters': 9}])
    assert 'have different settings' in train().err

def test_streams_of_two_processes_that_nobody_reads_go_on_in_one(train, data_dir, tmp_path):
    """Both stop, though the pipe was closed before they began."""
    settings = dict(stream=True, block_size=80, bptt_segments=3, gradient_accumulation_steps=2,
                    dropout=0.0, max_iters=9, threads=1, decay_from=1.0, position='rotary',
                    local='sliding')
    train(out_dir=tmp_path / 'one', **settings)
    first, second = start(flags(tmp_path / 'two', data_dir, **settings))
    first.stdout = first.stdout.close()
    assert finish([first, second]) == ['', '']
    assert load(tmp_path / 'two' / 'last.pt')['iter_num'] == 1
    assert train(out_dir=tmp_path / 'two', init_from='resume', **settings).code == 0
    assert_close_runs(tmp_path / 'one', tmp_path / 'two', 9)

def test_needle_runs_stop_when_nobody_reads_on_and_resume_bit_for_bit(data_dir, tmp_path):
    """What each process saved is what it goes on with: resumed for no update, it saves the same."""
    settings = dict(task='needle', filler='text', eval_interval=15, max_iters=30,
                    decay_from=1.0, threads=1)
    first, second = start(flags(tmp_path, data_dir, **settings))
    assert any(line.startswith('iter 3') for line in first.stdout)
    first.stdout = first.stdout.close()
    assert finish([first, second]) == ['', '']
    saved = load(tmp_path / 'last.pt')
    assert 3 <= saved['iter_num'] < 30
    assert all(len(own['walkers']['carry']) for own in saved['task_state']['processes'])
    with pytest.raises(SystemExit, match='is one of 2 processes'):
        make_task('needle').load_state(saved['task_state'], 'cpu')
    again = dict(settings, init_from='resume', max_iters=saved['iter_num'])
    finish(start(flags(tmp_path, data_dir, **again)))
    kept = 'model', 'optimizer', 'rng', 'task_state', 'iter_num'
    equal(*([content[key] for key in kept] for content in (load(tmp_path / 'last.pt'), saved)))

def test_an_error_of_the_one_that_writes_ends_all(data_dir, tmp_path):
    """Where the log is to be, something else is: one line, nothing from the other."""
    (tmp_path / 'out' / 'log.jsonl' / 'x').mkdir(parents=True)
    errors = finish(start(flags(tmp_path / 'out', data_dir, overwrite=True)), code=1)
    assert 'log.jsonl is of another kind' in errors[0] and errors[0].count('\n') == 1
    assert errors[1] == ''

@pytest.mark.parametrize('environment, words', [
    (dict(RANK='1'), 'RANK=1'), (dict(LOCAL_RANK='5'), 'LOCAL_RANK=5'),
    (dict(WORLD_SIZE='x'), 'WORLD_SIZE='), (dict(WORLD_SIZE='2'), 'torchrun'),
    (dict(WORLD_SIZE=''), '')])
def test_an_environment_that_is_not_torchruns_is_told(monkeypatch, environment, words):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    try:
        found = runpy.run_path(os.path.join(ROOT, 'lib', 'processes.py'))['join']('cpu')
        assert found == 'cpu' and not words
    except SystemExit as refused:
        assert words and words in refused.code

def test_a_machine_that_dies_ends_the_others_with_a_line(data_dir, tmp_path):
    words = flags(tmp_path / 'out', data_dir, max_iters=100_000, checkpoint_interval=2, threads=1)
    one, two = start(words, words)
    try:
        assert any(line.startswith('iter 4') for line in one.stdout)
        two.kill()
        error = one.communicate(timeout=100)[1]
    finally:
        [process.kill() for process in (one, two)]
    assert one.returncode == 1 and 'error: another process ended' in error, error
    assert len(error.splitlines()) == 1 and load(tmp_path / 'out' / 'last.pt')['iter_num'] >= 2
