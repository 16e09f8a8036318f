"""The benchmark: its records and ratios, the processes of its sides, and what it refuses."""
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import check, check_error
from small import make

import bench
from configurator import configure
from lib import records

FLAGS = ['--sizes=1+1x16x2', '--segment_size=4', '--batch_size=4', '--window=8', '--rounds=2',
         '--starts=2', '--steps=1', '--threads=1', '--block_sizes=4,8,16', '--device=cpu']

@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure('speed', '--key=value', side=iter([...])): the record; sides give what is listed."""
    def measure(part, *flags, **answers):
        monkeypatch.setattr(bench, 'in_process', lambda *job: next(answers[job[1]]))
        monkeypatch.setattr(records, 'ROOT', str(tmp_path))
        bench.main(configure(vars(bench), [*FLAGS, '--sides=fold,gpt', f'--parts={part}', *flags]))
        return records.load_record(tmp_path / 'out' / f'{part}.json')
    return measure

@pytest.mark.parametrize('kind, window', [('fold', 0), ('gpt', 4)])
def test_generation_by_a_clock_of_readings(measure, train, tmp_path, monkeypatch, kind, window):
    """The GPT beside it has a window of its own, whatever that of the run is."""
    assert train(kind, window=window, max_iters=1).code == 0
    monkeypatch.setattr('time.perf_counter', iter(range(10 ** 9)).__next__)
    made = measure('generation', f'--out_dir={tmp_path}/out', '--contexts=2,9', '--window_tokens=7')
    assert made['metrics']['ratio to the uncached GPT']['value'] == 1
    assert made['metrics']['tokens per second']['value'] == 7
    for name in (kind, 'GPT of window 192'):
        rates, sizes = ([(p['x'], p['value']) for p in made['curves'][f'{what}, {name}']['points']]
                        for what in ('tokens per second', 'bytes of state'))
        assert rates == [(2, 7), (9, 7)] and sizes[0][1] == sizes[1][1] > 0
    assert sizes[0][1] > 2 * 2 * 192 * 16 * 4  # keys and values of two layers, float32

def test_efficiency_and_points_of_memory(measure, monkeypatch):
    """A fold of 2 FLOPs where the GPT has 1: 2 * median(5 / 10, 2 / 20)."""
    monkeypatch.setattr(bench, 'flops_per_token', lambda model, T: 2 if model.unit > 1 else 1)
    starts = [dict(rate=rate, ready=ready, compiled=compiled, batch=4, mb=None)
              for rate, ready, compiled in
              ((5, 1, 'off'), (2, 3, 'kernels'), (10, 1, 'off'), (20, 1, 'off'))]
    found = measure('speed', fold=iter(starts[:2]), gpt=iter(starts[2:]))
    value = found['metrics']['1+1x16x2 fold, efficiency']
    assert [value[key] for key in ('value', 'low', 'high')] == pytest.approx([0.6, 0.2, 1])
    assert found['metrics']['1+1x16x2 fold, tokens per second']['value'] == 3.5
    assert found['metrics']['1+1x16x2 fold, seconds to start']['value'] == 2
    assert '1+1x16x2 fold: compiled: kernels, off' in found['notes']
    found = measure('memory', '--starts=3', '--memory_limit_gb=0.1', gpt=map(sys.exit, ['full']),
                    fold=iter([[9, 19], [10, 30], [9, 12], [9, 60], [9, 10], [9, 20]]))
    points = [(p['x'], p['value'], p['n']) for p in found['curves']['fold']['points']]
    assert points == [(4, 10, 3), (8, 11, 3)] and found['curves']['gpt']['points'] == []
    assert 'fold: 16 tokens' in found['notes'][0] and found['notes'][1:] == ['full']

def test_sides_work_in_processes_and_say_why_they_end():
    s = configure(vars(bench), FLAGS).as_dict()
    side = bench.train_side('speed', 'fold past=frozen truncated', '1+1x16x2', 8, s)
    assert min(side['rate'], side['ready']) > 0 and side['compiled'] == 'off'
    model, way = bench.make_side('fold recomputed past=frozen local=sliding', '1+1x16x2', 8,
                                 configure(vars(bench), FLAGS))
    assert (model.config.past, model.config.local, way) == ('frozen', 'sliding', 'recomputed')
    before, after = bench.in_process('memory', 'fold recomputed', '1+1x16x2', 16, s)
    assert 0 < before <= after
    why = '^error: fold at 1.1x16x3, 8 tokens, ended: .*n_head'
    with pytest.raises(SystemExit, match=why) as ended:
        bench.in_process('speed', 'fold', '1+1x16x3', 8, s)
    assert '\n' not in str(ended.value)

def test_larger_batches_while_they_give_more(monkeypatch):
    """Fewer updates of them between readings; what has to be ready first is not within turn()."""
    s = configure(vars(bench), [*FLAGS, '--steps=8', '--largest_batch=300', '--rounds=1'])
    rates, seen, turns = iter([0, 10, 0, 20, 0, 20.9]), [], []

    def rate(n, device, updates, steps):
        seen.append((n, steps))
        return next(rates)

    @contextmanager
    def turn():
        turns.append(len(seen))
        yield
    monkeypatch.setattr(bench, 'rate', rate)
    assert [found['batch'] for found in bench.speeds('gpt', '1+1x16x2', 8, s, turn)] == [4, 16, 64]
    assert seen[1::2] == [(256, 8), (640, 5), (2560, 5)] and turns == [1, 3, 5]

@pytest.mark.parametrize('fits', [0, 1])
def test_a_batch_without_memory_ends_the_sweep_and_keeps_what_was_found(monkeypatch, fits):
    s = configure(vars(bench), [*FLAGS, '--steps=8', '--largest_batch=300', '--rounds=1'])

    def rates():
        yield from (10.0 ** (i // 2) for i in range(2 * fits))
        raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, 'rate', lambda *args, some=rates(): next(some))
    found = bench.speeds('gpt', '1+1x16x2', 8, s)
    if fits:
        assert [row['rate'] for row in found] == [1]
    else:
        pytest.raises(torch.OutOfMemoryError, next, found)

def test_states_have_read_what_they_say():
    assert [int(x.read[0]) for x in bench.states_at('', make(), [2, 9], 'cpu')] == [2, 9]

def test_processes_share_a_batch(monkeypatch):
    s, seen = configure(vars(bench), FLAGS), []
    monkeypatch.setattr(bench.processes, 'WORLD', 2)
    monkeypatch.setattr(bench.processes, 'average_gradients', seen.append)
    monkeypatch.setattr(bench, 'backpropagate', lambda model, x, y, chunk, recompute, **_:
                        seen.append((x.shape, chunk, recompute)))
    for side in ('gpt', 'fold truncated', 'fold recomputed'):
        bench.make_updates(side, '1+1x16x2', 8, s)[0](1)
    assert seen[::2] == [((2, 8), 0, False), ((2, 8), 16 * 4, False), ((2, 8), 0, True)]
    for several in (s, s.replace(parts='speed', largest_batch=64)):
        check_error('several processes', bench.main, several)

@pytest.mark.parametrize('script, flags', [
    ('bench.py', [*FLAGS, '--parts=speed', '--steps=1000000']),
    ('compare.py', ['config/compare_shakespeare.py'])])
def test_a_signal_leaves_no_process(script, flags, tmp_path):
    flags = [*flags, f'--label={os.getpid()}' if script == 'bench.py' else f'--out_dir={tmp_path}']
    process = subprocess.Popen([sys.executable, script, *flags], cwd=records.ROOT, text=True,
                               stderr=subprocess.PIPE)
    children = f'/proc/{process.pid}/task/{process.pid}/children'
    while not (side := open(children).read().split()):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.3)  # the side is at work, or loads torch
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == ''
    pytest.raises(ProcessLookupError, os.kill, int(side[0]), 0)

@pytest.mark.parametrize('flag, why', [
    ('parts=speeds', 'of generation, speed'), ('steps=0', 'steps must be at least 1'),
    ('products=mkl', "'mkl'"), ('contexts=0', 'contexts'),
    ('sizes=2+2', '2+2x128x4'), ('sides=fold,,gpt', 'sides: one of them is empty'),
    ('sides=fold slow', "'truncated' or"), ('sides=fold n_embd=8', "'truncated' or"),
    ('sides=x', 'model_type'), ('block_sizes=10', 'block_size'), ('out_dir=no', 'no checkpoint')])
def test_bad_settings_are_refused_in_a_line(run, flag, why):
    check(run('bench.py', *FLAGS, f'--{flag}'), why)
