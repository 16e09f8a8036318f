"""The comparison from start to report, on runs of seconds; what is equal in it; its arithmetic."""
import asyncio
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check

import compare
from configurator import configure
from lib import report
from lib.contract import count_parameters, make_model
from lib.device import LONG
from lib.records import load_record, metric

FILE = '''
seeds = [1, 2]
tokens, budgets = 384, []
common = {'dataset': 'tiny', 'model_type': 'fold', 'n_local': 1, 'n_global': 1, 'n_layer': 2,
          'n_head': 2, 'n_embd': 16, 'segment_size': 12, 'block_size': 24, 'batch_size': 2,
          'warmup_iters': 1, 'log_interval': 2}
runs = {'fold': {}, 'GPT, window 12': {'model_type': 'gpt', 'block_size': 12, 'batch_size': 4,
                                       'stretch': 24}}
probe = {'histories': '0,12,24', 'targets': 4, 'words': 9, 'resamples': 20,
         'bins': '96,192,480'}
prompts = ['1 ape']
new_tokens = 12
'''

@pytest.fixture
def compared(data_dir, tmp_path_factory, compare_here):
    """A whole comparison, interrupted and gone on with: (folder of the runs, flags)."""
    folder = tmp_path_factory.getbasetemp() / 'compared'
    runs, flags = folder / 'runs', [f'--data_dir={data_dir}', '--device=cpu']
    if folder.exists():
        return runs, flags
    folder.mkdir()
    (folder / 'small.py').write_text(FILE)
    argv = [str(folder / 'small.py'), f'--out_dir={runs}', *flags]
    first = subprocess.Popen([sys.executable, os.path.join(ROOT, 'compare.py'), *argv],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (runs / 'fold_1' / 'last.pt').exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    assert f'process {first.pid} is at work in' in compare_here(*argv)
    child = int((runs / 'fold_1' / '.lock').read_text())
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert errors.endswith('stopped; the same command goes on from here\n')
    with pytest.raises(ProcessLookupError):  # it has ended with compare.py
        os.kill(child, 0)
    assert compare_here(*argv) == ''
    return runs, flags

@pytest.fixture
def again(compared, compare_here, tmp_path, monkeypatch):
    """again(changes of FILE, *flags): once more in a copy of the folder; the copy, the error."""
    runs = shutil.copytree(compared[0], tmp_path / 'runs')
    (tmp_path / 'results').mkdir()
    results = tmp_path / 'results'
    monkeypatch.setattr(compare, 'result_path', lambda name, in_results: str(results / name))

    def again(changes, *flags):
        text = FILE
        for old, new in changes.items():
            text = text.replace(old, new)
        (tmp_path / 'small.py').write_text(text)
        return runs, compare_here(tmp_path / 'small.py', f'--out_dir={runs}', *compared[1], *flags)
    return again

def test_from_start_to_report(compared):
    runs, record = compared[0], load_record(compared[0] / 'comparison.json')
    text = (runs / 'report.md').read_text()
    assert len(record['parts']) == 4 and not record['notes']
    for models in report.by_budget(record['parts']).values():
        main = report.table(models, report.MAIN)
        assert '|  |' not in main[4:] and main in text
    assert '\n|  | 0 | 12 | 24 | preserved context |\n' in text
    assert report.difference_table(record) in text
    assert '## After 1 ape\n\nfold, 1:\n\n    1 ape' in text and '|  | 96 | 192 |' in text
    assert {'loss.png', 'context.png'} < {*os.listdir(runs)}
    for name in ('parameters', 'tokens', 'text'):  # equal means equal
        assert len({part['metrics'][name]['value'] for part in record['parts']}) == 1
    for seed in (1, 2):
        first, second = (torch.load(runs / f'{name}_{seed}' / 'last.pt', weights_only=True)
                         for name in ('fold', 'GPT_window_12'))
        assert torch.equal(first['task_state']['generator'], second['task_state']['generator'])

def test_a_script_gives_what_it_prints_or_its_complaint(compared):
    """Each in a process of its own."""
    s, run = SimpleNamespace(device='cpu', threads=1), compared[0] / 'fold_1'
    text = compare.call(s, 'sample.py', start='1 ape', seed=1337, max_new_tokens=12, out_dir=run)
    assert [asyncio.run(text)] == json.loads((run / 'samples.json').read_text())['texts']
    with pytest.raises(SystemExit, match='^error: .*unknown key --device'):
        asyncio.run(compare.call(s, 'prepare.py'))

def test_only_what_is_missing_or_asked_otherwise_is_made_again(again, compared):
    before = {path.relative_to(compared[0]): path.read_bytes()
              for path in compared[0].glob('*/*') if path.suffix in ('.pt', '.json')}
    runs, error = again({"'1 ape'": "'1 ape', '2 b'", "'96,192,480'": "'96,480'"}, '--only=fold')
    changed = {str(path) for path, old in before.items() if (runs / path).read_bytes() != old}
    assert changed == {'fold_1/probe.json', 'fold_2/probe.json', 'fold_1/samples.json'}
    record = load_record(runs / 'comparison.json')
    assert len(record['parts']) == 2 and len(record['notes']) == 2 and not error
    assert record['parts'][0]['notes'][1].startswith('2 b')

@pytest.mark.parametrize('begun', [True, False])
def test_a_run_goes_on_and_its_last_weights_are_probed(tmp_path, monkeypatch, begun):
    calls, last = [], tmp_path / 'last.pt'
    settings = {'init_from': 'out/b', 'gradient_accumulation_steps': 1}

    async def call(s, script, **flags):
        calls.append((script, flags.get('init_from'), flags['out_dir']))
        (tmp_path / 'record.json').write_text('{"what": "training", "settings": {}}')
    monkeypatch.setattr(compare, 'call', call)
    if begun:
        last.touch()
        (tmp_path / 'settings.json').write_text(json.dumps(settings))
    run = compare.Run('a', 'tokens', 1, settings, 4, tmp_path,
                      {'record.json': {}, 'probe.json': {'words': 5}})
    asyncio.run(compare.work(SimpleNamespace(data_dir=''), run, asyncio.Semaphore(1)))
    start = 'resume' if begun else 'out/b'
    assert calls == [('train.py', start, tmp_path), ('probe.py', None, last)]

def test_a_run_that_fails_is_reported_and_stops_no_other(again):
    runs, error = again({"24}": "24, 'n_layer': 1}, 'three heads': {'n_head': 3}",
                         '[]': '["flops"]'}, '--seeds=1')
    assert error == 'error: 3 of 5 runs are not complete'
    record = load_record(runs / 'comparison.json')
    parts, notes = record['parts'], record['notes']
    assert 'holds a run with another n_layer, 2 in place of 1: delete it' in notes[0]
    assert notes[1].endswith('n_embd=16 must be a multiple of n_head=3')
    assert 'equal flops, seed 1: what its tokens cost is not known' in notes[2]
    assert f"Left out: {'; '.join(notes)}." in (runs / 'report.md').read_text()
    assert [part['settings']['budget'] for part in parts] == ['tokens, flops', 'flops']
    spent, other = (part['metrics']['flops_per_token']['value'] * part['metrics']['tokens']['value']
                    for part in parts)
    iters = parts[1]['settings']['max_iters']  # to half an update, with a schedule of its own
    assert abs(other - spent) <= 0.5 * other / iters and iters != parts[0]['settings']['max_iters']
    assert parts[1]['curves'].keys() == {'validation loss'}
    assert report.by_budget(parts)['flops'].keys() == {'fold', 'GPT, window 12'}
    _, error = again({"runs = {": "runs = {'three heads': {'n_head': 3}, "}, '--only=three heads')
    assert error == f'error: no run is complete in {runs}; a report there is kept'

def test_results_are_written_if_asked(again, run, tmp_path, monkeypatch):
    assert 'name a comparison' in run('compare.py').err
    assert again({}, '--record=True')[1] == ''
    assert len(load_record(tmp_path / 'results' / 'small.json')['parts']) == 4
    assert 'no --record with' in again({}, '--record=True', '--quick=True')[1]
    monkeypatch.setattr(compare, 'calibrate', None)  # a misspelled run is told before any work
    assert 'fold; GPT, window' in again({'[]': '["flops"]'}, '--only=fold; GPT')[1]

@pytest.mark.parametrize('old, new, words', [
    ('[1, 2]', '[1, 1]', 'seeds must be different numbers'),
    ("'fold': {}", "'fold': {'windw': 3}", "key 'windw' of run 'fold': did you mean window?"),
    ("'fold': {}", "'fold': {'seed': 3}", "seed of run 'fold' is set by compare.py"),
    ("'fold': {}", "'fold': 3", 'each of runs must be of type dict, not 3'),
    ('384, []', '385, []', 'divides tokens=385, not [2, 24, 1]'),
    ('384, []', "'all', []", "tokens must be of type int, not 'all'"),
    ('384, []', '0, []', 'tokens or updates must be above 0'),
    ('384, []', "0, ['flops']\nupdates = 4", 'take tokens in place'),
    ('384, []', "384, ['flops', 'flops']", 'budgets must be some of'),
    ("'targets'", "'target'", "probe 'target': did you mean targets?"),
    ("'targets'", "'seed'", "unknown key of probe 'seed'"),
    ("'dataset'", "'task': 'needle', 'dataset'", 'tasks but text take `updates`'),
    ('384, []', "384, ['flop']", "budgets must be some of ('flops', 'seconds')"),
    ('prompts', 'prompt', 'did you mean prompts?'), ('12\n', '\n', 'SyntaxError'),
    ("'fold': {}", "'fold': {}, 'fold.': {}", 'differ in no letter')])
def test_a_wrong_comparison_gets_one_line(run, tmp_path, old, new, words):
    (tmp_path / 'wrong.py').write_text(FILE.replace(old, new, 1))
    check(run('compare.py', tmp_path / 'wrong.py', f'--out_dir={tmp_path}'), words)

def part(name, seed, loss, **settings):
    return {'settings': {'name': name, 'seed': seed, 'budget': 'tokens', **settings},
            'metrics': {'loss': metric(loss)}}

@pytest.mark.parametrize('losses, value, error, verdict', [
    ([1.0, 1.2, 1.1], -0.5, (2 * 0.01 / 3) ** 0.5, 'ahead'), ([2.2, 2.0, 2.1], 0.5, None, 'behind'),
    ([1.4, 1.6, 1.5], -0.1, None, 'open'), ([1.0], -0.6, None, 'open')])
def test_differences_of_means_over_seeds(losses, value, error, verdict):
    parts = [part('a', seed, loss) for seed, loss in enumerate(losses)]
    parts += [part('b', seed, loss) for seed, loss in enumerate([1.5, 1.7, 1.6])]
    other = [part(name, 0, 9.0, cups=5) for name in ('d', 'e')]  # not beside the others
    of_several = report.differences(parts + other)
    pairs = {name for name in of_several if 'minus' in name}
    assert pairs == {'a minus b, equal tokens, ', 'd minus e, equal tokens, 5'}
    found = report.differences(parts + [part('c', 0, 1.0)])
    names = *'abc', 'a minus b', 'a minus c'
    assert found.keys() == {f'{name}, equal tokens' for name in names}
    assert found['b, equal tokens']['value'] == pytest.approx(1.6)
    assert found['b, equal tokens']['sd'] == pytest.approx(0.1)
    assert found['a minus b, equal tokens']['value'] == pytest.approx(value)
    assert error is None or found['a minus b, equal tokens']['error'] == pytest.approx(error)
    assert found['a minus b, equal tokens']['verdict'] == verdict

def test_the_curves_of_a_picture_are_of_one_budget(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, 'curves', lambda path, title, shown, log: drawn.append(shown))
    points = {'tokens': 5, 'flops': 7}
    parts = [{**part(name, 1, 2.0), 'notes': [], 'curves': {'validation loss': {'points': [
        {'x': x, 'value': 2.0}]}}} for name in 'ab' for x in points.values()]
    for one, budget in zip(parts, 2 * [*points]):
        one['settings']['budget'] = budget
        one['metrics']['text'] = metric('ape')
    about = dict.fromkeys(('command', 'commit', 'date', 'hardware'), '')
    report.write({**about, 'parts': parts, 'settings': {'jobs': 1, 'prompts': []}, 'notes': [],
                  'metrics': report.differences(parts)}, tmp_path)
    assert [[len(curve['points']) for curve in shown.values()] for shown in drawn] == [[1, 1]]

def test_what_a_token_costs_is_measured_in_turns_and_anew_for_other_settings(tmp_path, monkeypatch):
    calls, s = [], SimpleNamespace(jobs=1, threads=1, device='cpu', data_dir='')

    async def call(s, script, out_dir, **flags):
        assert flags['eval_tokens'] == 2000 + 2 * flags['block_size']
        calls.append(out_dir.name)

    def load_record(path):
        rate = {'calibration_a': 100, 'calibration_b': 250}[path.parent.name] * len(calls)
        return {'metrics': {'flops_per_token': {'value': 7}, 'tokens_per_s': {'value': rate}}}
    monkeypatch.setattr(compare, 'call', call)
    monkeypatch.setattr(compare, 'load_record', load_record)
    run = {'batch_size': 1, 'block_size': 4}
    c = {**compare.KEYS, 'tokens': 40, 'runs': {'a': run, 'b': run}}
    costs = asyncio.run(compare.calibrate(s, c, tmp_path))
    assert calls == ['calibration_a', 'calibration_b'] * 3
    assert {name: (cost['flops'], cost['seconds']) for name, cost in costs.items()} == {
        'a': (7, 1 / 300), 'b': (7, 1 / 1000)}  # medians, of the third and fourth call
    assert asyncio.run(compare.calibrate(s, c, tmp_path)) == costs and len(calls) == 6
    c['runs'] = {'a': run, 'b': {**run, 'block_size': 8}}
    asyncio.run(compare.calibrate(s, c, tmp_path))
    assert calls[6:] == ['calibration_b'] * 3
    s.threads = 2
    asyncio.run(compare.calibrate(s, c, tmp_path))
    assert len(calls) == 15

@pytest.mark.parametrize('device, given, jobs', [('cuda', '0', 1), ('cpu', '0', 2),
                                                 ('cuda', '3', 3)])
def test_runs_at_a_time(tmp_path, monkeypatch, device, given, jobs):
    """One on a GPU; and what calibrates a long run there is compiled as that is."""
    async def call(s, script, **flags):
        assert flags['compile'] == ('off' if device == 'cpu' else 'kernels')
        raise SystemExit

    async def work_on(s, runs):
        raise SystemExit(s.jobs)
    monkeypatch.setattr(compare, 'pick_device', lambda name: device)
    monkeypatch.setattr(compare, 'call', call)
    monkeypatch.setattr(compare, 'work_on', work_on)
    text = FILE.replace('384, []', f"{48 * LONG}, ['seconds']")
    (tmp_path / 'small.py').write_text(text)
    argv = [str(tmp_path / 'small.py'), f"--out_dir={tmp_path / 'runs'}", f'--jobs={given}']
    with pytest.raises(SystemExit, match=f'^{jobs}$'):
        compare.main(configure(vars(compare), argv, 'comparison'))

def test_the_plans_of_the_comparisons_in_the_repository():
    """The same tokens, and models of the same parameters but for what a run is there to change."""
    for name in glob.glob('compare_*', root_dir=f'{ROOT}/config'):
        c = compare.read_comparison(os.path.join(ROOT, 'config', name))
        costs = {name: {'flops': 5e6, 'seconds': 1e-4} for name in c['runs']}
        found = compare.plan(c, 'runs', costs)
        quick = compare.plan(c, 'runs', {}, quick=True)
        assert {run.settings['max_iters'] for run in quick} == {4}, name
        assert all(run.settings.get('eval_tokens', 0) == (
            0 if 'task' in run.settings else compare.few_tokens(run.settings))
            for run in quick), name
        some = [run for run in found if run.seed == c['seeds'][0]]
        sizes = [{**run.settings, 'bias': False, 'vocab_size': 65} for run in some
                 if run.settings.get('carry') != 'gated']
        lengths = {run.settings['max_iters'] if c['updates'] else run.tokens for run in some}
        with torch.device('meta'):
            counts = [count_parameters(make_model(size['model_type'], size)) for size in sizes]
        peers = {size['model_type'] for size in sizes} - {'fold', 'gpt'}
        near = 1.03 if peers else 1  # a peer's size can be near
        assert len(lengths) == 1 and max(counts) <= min(counts) * near, name
