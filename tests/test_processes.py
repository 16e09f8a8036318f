"""Several processes learn like one."""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from test_train import records


def in_processes(n, data_dir, out_dir, refused='', **settings):
    """A run of train.py in n gloo processes, that of conftest's settings; what it prints, or why it is refused."""
    how = dict(data_dir=data_dir, dataset='tiny', out_dir=out_dir, device='cpu', n_embd=16, n_head=2, n_local=1, n_global=1,
               segment_size=4, batch_size=4, log_interval=1, warmup_iters=2, threads=1, **settings)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    done = subprocess.run([*command, os.path.join(ROOT, 'train.py'), *(f'--{key}={value}' for key, value in how.items())],
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (not refused) and refused in done.stderr, done.stderr[-3000:]
    return done.stderr if refused else done.stdout


@pytest.mark.parametrize('mode', [
    dict(block_size=16), dict(carry='gated', block_size=16, recompute=True),
    dict(stream=True, block_size=32, bptt_segments=3, gradient_accumulation_steps=2, recompute=True)])
def test_two_processes_learn_like_one(train, data_dir, tmp_path, mode):
    """With a gate that the last backward pass does not meet, too; and of streams, of which rows begin anew on the way, the
    second half resumed by one process."""
    how = dict(eval_interval=25, lr_decay_iters=50, **mode)
    train(out_dir=tmp_path / 'one', max_iters=50, dropout=0.0, **how)
    first = 35 if 'stream' in mode else 50
    printed = in_processes(2, data_dir, tmp_path / 'two', max_iters=first, **how)
    assert printed.count(f'iter {first}: loss') == 1 and '2 processes' in printed
    if first < 50:
        assert train(out_dir=tmp_path / 'two', max_iters=50, init_from='resume', dropout=0.0, **how).code == 0
    for key in ('loss', 'val_loss'):
        one, two = ([pair for pair in records(tmp_path / name, key) if pair[0] != 35 or key == 'loss'] for name in ('one', 'two'))
        assert [it for it, _ in one] == [it for it, _ in two] and len(one) == (50 if key == 'loss' else 2)
        assert [x for _, x in two] == pytest.approx([x for _, x in one], abs=1e-5)


@pytest.mark.parametrize('full', ['out', 'log.jsonl', 'last.pt'])
def test_an_error_of_the_one_that_writes_ends_all(data_dir, tmp_path, full):
    """Where the folder, the log or the checkpoint is to be, something else is: one line, no traceback of the other
    (torchrun adds its own)."""
    (tmp_path / 'out' / full / 'x').mkdir(parents=True) if full != 'out' else (tmp_path / 'out').write_text('')
    err = in_processes(2, data_dir, tmp_path / 'out', 'error: cannot write', block_size=16, max_iters=2, overwrite=True)
    assert 'RuntimeError' not in err and 'train.py", line' not in err and err.count('error: cannot write') == 1


def test_the_benchmark_in_two_processes_makes_the_same_update(tmp_path, monkeypatch):
    """And its sides answer, one for all of their processes."""
    import bench_training
    c = dict(bench_training.defaults(), window=24, batch_size=4, device='cpu', steps=1, rounds=1, processes='2')
    script = tmp_path / 'update.py'
    script.write_text(f"""
import sys
sys.path.insert(0, {ROOT!r})
import torch
import bench_training
import training
c = {c!r}
training.join('cpu')
torch.manual_seed(1)
rows, inner = [], training.backpropagate
training.backpropagate = lambda model, x, *rest, **how: (rows.append(len(x)), inner(model, x, *rest, **how))[1]
model, _, update = bench_training.make('full', '1+1x16x2', 24, c)
update(*bench_training.batch(24, c))
print(rows + [p.detach().double().sum().item() for p in model.parameters()])
training.leave(training.Stop())
""")
    alone = [sys.executable, str(script)]
    two = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    a, b = (subprocess.run(command, capture_output=True, text=True, timeout=120) for command in (alone, two))
    assert not a.returncode and not b.returncode, a.stderr + b.stderr
    (rows, *weights), (rows_alone, *weights_alone) = json.loads(b.stdout), json.loads(a.stdout)
    assert (rows, rows_alone) == (2, 4) and weights == pytest.approx(weights_alone, abs=1e-5)
    monkeypatch.setattr(bench_training, 'MODES', ('full', 'gpt'))
    counted, speeds = bench_training.alternate('1+1x16x2', c)
    assert list(counted) == ['full, 2 processes', 'gpt, 2 processes']
    assert all(len(some) == 1 and some[0] > 0 for some in speeds.values()) and {row[2] for row in counted.values()} == {1}


def test_the_benchmark_ends_when_one_of_its_processes_does(monkeypatch):
    import bench_training

    def launch(side, *how):
        for command in ('input()', 'exit(3)'):  # the first waits for the second
            side.append(subprocess.Popen([sys.executable, '-c', command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))
    monkeypatch.setattr(bench_training, 'launch', launch)
    monkeypatch.setattr('checkpoint.pick_device', lambda device: device)
    with pytest.raises(SystemExit, match="2 processes find no device each on 'mps'"):
        bench_training.check({**bench_training.defaults(), 'processes': '1,2', 'device': 'mps'})
    with pytest.raises(SystemExit, match='process 1 of full, 2 processes at 1x1x8 ended with code 3'):
        bench_training.alternate('1x1x8', dict(processes='2', rounds=1))
