"""The benchmark: its records and ratios, the processes of its sides, and what it refuses."""
import sys
from contextlib import nullcontext

import pytest

import bench
from configurator import configure
from lib import records
from lib.bench_sides import at_work

FLAGS = ['--sizes=1+1x16x2', '--segment_size=4', '--batch_size=4', '--window=8', '--rounds=2',
         '--starts=2', '--steps=1', '--threads=1', '--block_sizes=4,8,16', '--device=cpu']


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure('speed', '--key=value', side=iter([...])): the record; sides give what is listed."""
    def measure(part, *flags, **answers):
        monkeypatch.setattr(bench, 'at_work', lambda job, *n: nullcontext(answers[job[1]].__next__))
        monkeypatch.setattr(records, 'ROOT', str(tmp_path))
        bench.main(configure(vars(bench), [*FLAGS, '--sides=fold,gpt', f'--parts={part}', *flags]))
        return records.load_record(tmp_path / 'out' / f'{part}.json')
    return measure


def test_generation_by_a_clock_of_readings(measure, train, tmp_path, monkeypatch):
    assert train(max_iters=1).code == 0
    monkeypatch.setattr('time.perf_counter', iter(range(10 ** 9)).__next__)
    made = measure('generation', f'--out_dir={tmp_path}/out', '--contexts=2,9', '--window_tokens=7')
    assert made['metrics']['ratio to the uncached GPT']['value'] == 1
    for name in ('fold', 'GPT of window 192'):
        rates, sizes = ([(p['x'], p['value']) for p in made['curves'][f'{what}, {name}']['points']]
                        for what in ('tokens per second', 'bytes of state'))
        assert rates == [(2, 7), (9, 7)] and sizes[0][1] == sizes[1][1] > 0


def test_efficiency_and_points_of_memory(measure, monkeypatch):
    """A fold of 2 FLOPs where the GPT has 1: 2 * median(0.5, 0.7), then 2 * median(0.1, 0.2)."""
    monkeypatch.setattr(bench, 'flops_per_token', lambda model, T: 2 if model.unit > 1 else 1)
    found = measure('speed', fold=iter([9, 5, 7, 9, 2, 8]), gpt=iter([1, 10, 10, 1, 20, 40]))
    value = found['metrics']['1+1x16x2 fold, efficiency']
    assert [value[key] for key in ('value', 'low', 'high')] == pytest.approx([0.75, 0.3, 1.2])
    assert found['metrics']['1+1x16x2 fold, tokens per second']['value'] == 5.5
    found = measure('memory', '--starts=3', '--memory_limit_gb=0.1', gpt=map(sys.exit, ['full']),
                    fold=iter([[9, 19], [10, 30], [9, 12], [9, 60], [9, 10], [9, 20]]))
    points = [(p['x'], p['value'], p['n']) for p in found['curves']['fold']['points']]
    assert points == [(4, 10, 3), (8, 11, 3)] and found['curves']['gpt']['points'] == []
    assert 'fold: 16 tokens' in found['notes'][0] and found['notes'][1:] == ['full']


def test_sides_work_in_processes_and_say_why_they_end():
    s = configure(vars(bench), FLAGS).as_dict()
    with at_work(['speed', 'fold truncated', '1+1x16x2', 8, s], 2) as ask:
        assert ask() > 0 and ask() > 0
    with at_work(['memory', 'fold recomputed', '1+1x16x2', 1600, s]) as ask:
        before, after = ask()
        assert before < after < before + 40  # MB; + 70 with the graph of the whole sequence
    with at_work(['speed', 'fold', '1+1x16x3', 8, s]) as ask:
        pytest.raises(SystemExit, ask).match('^error: fold at 1.1x16x3, 8 tokens, ended: System')


@pytest.mark.parametrize('flag, why', [
    ('parts=speeds', 'none of generation, speed'), ('steps=0', 'steps must be at least 1'),
    ('processes=3', 'batch_size must'), ('products=mkl', "'mkl'"), ('compile=fast', "'fast'"),
    ('sizes=2+2', '2+2x128x4'), ('sides=fold slow', "'truncated' or"), ('contexts=0', 'contexts'),
    ('sides=x', 'model_type'), ('block_sizes=10', 'block_size'), ('out_dir=no', 'no checkpoint')])
def test_bad_settings_are_refused_in_a_line(run, flag, why):
    done = run('bench.py', *FLAGS, f'--{flag}')
    assert done.code == 1 and why in done.err and len(done.err.splitlines()) == 1
