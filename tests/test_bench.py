"""The benchmark: its records and ratios, its sides' processes, and what it refuses."""
import itertools
import os
from contextlib import contextmanager

import pytest

import bench
from configurator import configure
from lib import checkpoint, records, streaming
from lib.contract import make_model, model_args

TINY = {'sizes': '1+1x16x2', 'segment_size': 4, 'batch_size': 4, 'window': 8, 'steps': 1,
        'device': 'cpu', 'threads': 1, 'products': 'torch', 'block_sizes': '8,16,32,64'}


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure('speed', key=value, ...): the record that bench.py writes."""
    monkeypatch.setattr(records, 'ROOT', str(tmp_path))

    def measure(part, **settings):
        flags = [f'--{key}={value}' for key, value in {**TINY, 'parts': part, **settings}.items()]
        bench.main(configure(vars(bench), flags))
        return records.load_record(tmp_path / 'out' / f'{part}.json')
    return measure


def settings():
    return configure(vars(bench), [f'--{key}={value}' for key, value in TINY.items()]).as_dict()


def sides(monkeypatch, answers):
    """Sides that measure nothing, but give the answers listed for their name, one after another."""
    @contextmanager
    def at_work(job, n=1):
        yield lambda: next(answers[job[1]])
    monkeypatch.setattr(bench, 'at_work', at_work)


@pytest.mark.parametrize('n', [3, 8])
def test_generation_counts_the_tokens_that_it_generates(measure, tmp_path, monkeypatch, n):
    """By a clock that goes on by a second each time it is read: half a second a token would do."""
    model = make_model('fold', {'block_size': 8, 'vocab_size': 9, 'segment_size': 4, 'n_local': 1,
                                'n_global': 1, 'n_head': 2, 'n_embd': 8})
    checkpoint.save(tmp_path / 'ckpt.pt', {'model_type': 'fold', 'model_args': model_args(model),
                                           'model': model.state_dict()})
    ticks, drawn, sample = itertools.count(), [], streaming.sample_token
    monkeypatch.setattr('time.perf_counter', lambda: float(next(ticks)))
    for module in (bench, streaming):
        monkeypatch.setattr(module, 'sample_token', lambda *args, **kwargs: (
            drawn.append(1), sample(*args, **kwargs))[1])
    found = measure('generation', out_dir=tmp_path, contexts='2,9', gpt_window=4, rounds=2,
                    window_tokens=n)
    assert len(drawn) == 3 * (2 * 2 + 1) * n and (tmp_path / 'out' / 'generation.png').exists()
    assert found['metrics']['flat ratio'] == {'value': 1.0, 'error': None, 'n': 2, 'low': 1.0,
                                              'high': 1.0}
    assert found['metrics']['tokens per second, uncached']['value'] == n
    for name in ('fold', 'GPT of window 4'):
        points = found['curves'][f'tokens per second, {name}']['points']
        assert [(point['x'], point['value']) for point in points] == [(2, n), (9, n)]
        few, many = found['curves'][f'bytes of state, {name}']['points']
        assert few['value'] == many['value'] > 0
