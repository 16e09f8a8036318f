"""The comparison from start to report, on runs of seconds; what is equal in it; its arithmetic."""
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import compare
from configurator import configure
from lib import report
from lib.contract import count_parameters, make_model
from lib.records import load_record, metric
from tasks.text import Task

FILE = '''
seeds = [1, 2]
tokens = 384
ablation_tokens = 192
common = {'dataset': 'tiny', 'model_type': 'fold', 'n_local': 1, 'n_global': 1, 'n_layer': 2,
          'n_head': 2, 'n_embd': 16, 'segment_size': 12, 'block_size': 24, 'batch_size': 2,
          'warmup_iters': 1, 'log_interval': 2}
runs = {'fold': {}, 'GPT, window 12': {'model_type': 'gpt', 'block_size': 12, 'batch_size': 4,
                                       'stretch': 24}}
same_window = 'GPT, window 12'
ablations = {'as it is': {}, 'segments of 6': {'segment_size': 6}}
probe = {'histories': '0,12,24', 'swaps': '', 'targets': 4, 'words': 9, 'resamples': 20,
         'bins': '6,24'}
prompts = ['1 ape']
new_tokens = 12
'''
STOPPED = 'stopped; the same command goes on from here'


@pytest.fixture(scope='session')
def compared(data_dir, tmp_path_factory):
    """A whole comparison, interrupted and gone on with: (folder of the runs, the command)."""
    folder = tmp_path_factory.mktemp('compared')
    (folder / 'small.py').write_text(FILE)
    command = [sys.executable, os.path.join(ROOT, 'compare.py'), str(folder / 'small.py'),
               f"--out_dir={folder / 'runs'}", f'--data_dir={data_dir}', '--device=cpu']
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / 'runs' / 'fold_1' / 'last.pt').exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    with pytest.raises(SystemExit, match=f'process {first.pid} is at work in'):
        compare.main(configure(vars(compare), command[2:], 'comparison'))
    child = int((folder / 'runs' / 'fold_1' / '.lock').read_text())
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1 and errors.strip().endswith(STOPPED)
    with pytest.raises(ProcessLookupError):  # it has ended with compare.py
        os.kill(child, 0)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / 'runs', command


@pytest.fixture
def again(compared, tmp_path, monkeypatch):
    """again(changes of FILE, *flags): the comparison once more, in a copy of its folder and in
    this process; gives the copy, and what it ends with."""
    runs = shutil.copytree(compared[0], tmp_path / 'runs')
    monkeypatch.setattr(compare, 'place', lambda name, record: str(tmp_path / 'results' / name))

    def again(changes, *flags):
        text = FILE
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / 'small.py').write_text(text)
        argv = [str(tmp_path / 'small.py'), f'--out_dir={runs}', *compared[1][4:], *flags]
        try:
            compare.main(configure(vars(compare), argv, 'comparison'))
        except SystemExit as stop:
            return runs, str(stop)
        return runs, ''
    return again


def test_from_start_to_report(compared):
    """The report is made from the record alone, which holds all that is in its tables."""
    runs, record = compared[0], load_record(compared[0] / 'comparison.json')
    text = (runs / 'report.md').read_text()
    assert len(record['parts']) == 6 and not record['notes']
    assert '|  |' not in report.main_table(record)[4:] and report.main_table(record) in text
    for table in (report.difference_table, report.context_table, report.ablation_table):
        assert table(record) in text
    assert '### 1 ape\n\nfold, 1:\n\n    1 ape' in text and '| fold, 1 | +0.0' in text
    assert all(0 < (runs / f'{name}.png').stat().st_size < 300_000 for name in ('loss', 'context'))
    assert '| +' in text.split('## Remote')[1].split('## Ablations')[0]


def test_equal_means_equal(compared):
    """Parameters, tokens, the text and its order; another order for another seed."""
    parts = load_record(compared[0] / 'comparison.json')['parts']
    for ablation in (False, True):
        some = [part for part in parts if part['settings']['ablation'] is ablation]
        for name in ('parameters', 'tokens', 'text', 'scored'):
            assert len({part['metrics'][name]['value'] for part in some}) == 1 or ablation
        orders = {(part['seeds'][0], part['metrics']['order']['value']) for part in some}
        assert len(orders) == len({seed for seed, _ in orders}) == len({o for _, o in orders})


def test_every_model_sees_the_same_batches(data_dir):
    batches = []
    for sizes in ({'block_size': 4, 'batch_size': 16, 'stretch': 16},
                  {'block_size': 16, 'batch_size': 4, 'stretch': 0}):
        s = SimpleNamespace(dataset='tiny', offline_dataset='', data_dir=str(data_dir), seed=7,
                            stream=False, eval_tokens=0, gradient_accumulation_steps=1, **sizes)
        batches.append([tokens.flatten() for tokens in Task(s).random_sequences()])
    assert all(torch.equal(a, b) for a, b in zip(*batches))


def test_only_what_is_missing_or_asked_otherwise_is_made_again(again, compared):
    """Of the runs that are named; the others, asked otherwise, are left out of the report."""
    before = {path.relative_to(compared[0]): path.read_bytes()
              for path in compared[0].glob('*/*') if path.suffix in ('.pt', '.json')}
    runs, error = again({"'1 ape'": "'1 ape', '2 b'", "'6,24'": "'6,18'"}, '--only=fold')
    assert not error
    changed = {str(path) for path, old in before.items() if (runs / path).read_bytes() != old}
    assert changed == {'fold_1/probe.json', 'fold_2/probe.json', 'fold_1/samples.json'}
    record = load_record(runs / 'comparison.json')
    assert len(record['parts']) == 2 and len(record['notes']) == 4
    assert record['parts'][0]['notes'][1].startswith('2 b')
    assert '### 2 b' in (runs / 'report.md').read_text()


def test_a_run_that_fails_is_reported_and_stops_no_other(again):
    """A folder that holds another run, and a run that train.py refuses."""
    runs, error = again({"'n_embd': 16": "'n_embd': 16, 'dropout': 0.1",
                         "{'fold': {}": "{'fold': {'dropout': 0.0}, 'three heads': {'n_head': 3}"},
                        '--seeds=1', '--only=as it is; three heads; GPT, window 12')
    assert error == 'error: no run is complete in ' + str(runs) + '; a report there is kept'
    runs, error = again({"runs = {": "runs = {'three heads': {'n_head': 3}, ",
                         "as it is': {}": "as it is': {'dropout': 0.1}"}, '--seeds=1')
    assert error == 'error: 2 of 5 runs are not complete'
    notes = load_record(runs / 'comparison.json')['notes']
    assert 'three heads, seed 1: error: n_embd=16 must be a multiple of n_head=3' in notes
    assert 'holds a run with another dropout, None in place of 0.1: delete it' in notes[1]
    assert f'Left out: {notes[0]}.' in (runs / 'report.md').read_text()


def test_results_are_written_if_asked(again, tmp_path):
    assert again({}, '--only_report=True', '--record=True')[1] == ''
    assert len(load_record(tmp_path / 'results' / 'small.json')['parts']) == 6
    assert 'results/ is for whole' in again({}, '--record=True', '--quick=True')[1]
    assert "the runs are fold; GPT, window 12; as it is" in again({}, '--only=fold; GPT')[1]


@pytest.mark.parametrize('old, new, words', [
    ('seeds = [1, 2]', 'seeds = []', 'seeds be different numbers'),
    ('seeds = [1, 2]', 'seeds = [1, 1]', 'seeds be different numbers'),
    ("'batch_size': 2", "'batch_size': 0", 'must be whole numbers from 1 on, not [0, 24, 1]'),
    ("'batch_size': 2", "'batch_size': '2'", "not ['2', 24, 1]"),
    ("['1 ape']", '[3]', 'each of prompts must be of type str, not 3'),
    ("'as it is': {}", "'as it is': 3", 'each of ablations must be of type dict, not 3'),
    ('tokens = 384', 'tokens = 385', '48 tokens an update, which must divide the 385 of tokens'),
    ('tokens = 384', "tokens = 'all'", "tokens must be of type int, not 'all'"),
    ('prompts', 'prompt', 'did you mean prompts?'),
    ("window = 'GPT, window 12'", "window = 'GPT'", 'is none of the runs'),
    ("'segments of 6'", "'as_it_is'", 'differ in no letter'),
    ('new_tokens = 12', 'new_tokens =', 'SyntaxError')])
def test_a_wrong_comparison_gets_one_line(run, tmp_path, old, new, words):
    (tmp_path / 'wrong.py').write_text(FILE.replace(old, new, 1))
    refused = run('compare.py', tmp_path / 'wrong.py', f'--out_dir={tmp_path}')
    assert refused.code == 1 and words in refused.err and refused.err.count('\n') == 1


def test_a_comparison_must_be_named(run):
    assert 'name a comparison' in run('compare.py').err
    assert 'not found' in run('compare.py', 'config/nowhere.py').err


def part(name, seed, loss, ablation=False):
    return {'settings': {'name': name, 'seed': seed, 'ablation': ablation}, 'curves': {},
            'metrics': {'loss': metric(loss)}}


@pytest.mark.parametrize('losses, value, error, verdict', [
    ([1.0, 1.2, 1.1], -0.5, (2 * 0.01 / 3) ** 0.5, 'ahead'), ([2.2, 2.0, 2.1], 0.5, None, 'behind'),
    ([1.4, 1.6, 1.5], -0.1, None, 'open'), ([1.0], -0.6, None, 'open')])
def test_differences_of_means_over_seeds(losses, value, error, verdict):
    parts = [part('a', seed, loss) for seed, loss in enumerate(losses)]
    parts += [part('b', seed, loss) for seed, loss in enumerate([1.5, 1.7, 1.6])]
    parts += [part('short', 0, 3.0, True), part('other', 0, 2.9, True)]
    c = {'runs': {'a': {}, 'b': {}}, 'same_window': 'b', 'full_window': '',
         'ablations': {'short': {}, 'other': {}}}
    found = report.differences(parts, c)
    assert found.keys() == {'a minus b', 'other minus short'}
    assert found['a minus b']['value'] == pytest.approx(value)
    assert error is None or found['a minus b']['error'] == pytest.approx(error)
    assert f'| {verdict} |' in report.difference_table({'metrics': found}).splitlines()[2]


def test_tables_of_curves():
    """Runs whose curves have other points; a point without a value has an empty cell."""
    points = [[{'x': 0, 'value': 2.5}, {'x': 12, 'value': 2.0}], [{'x': 24, 'value': 3.0}]]
    parts = [{**part('a', seed, 1.0), 'curves': {'context curve': {'points': some}}}
             for seed, some in enumerate(points)]
    assert report.context_table({'parts': parts}).splitlines() == [
        '|  | 0 | 12 | 24 | preserved context |', '| --- | --- | --- | --- | --- |',
        '| a, 0 | 2.5000 | 2.0000 |  |  |', '| a, 1 |  |  | 3.0000 |  |']


@pytest.mark.parametrize('name, seeds', [
    ('compare_shakespeare', 3), ('compare_python', 3), ('compare_shakespeare_gpu', 3),
    ('compare_python_long', 1), ('compare_python_longest', 1), ('compare_python_reach', 1),
    ('compare_bpe', 1)])
def test_the_plans_of_the_comparisons_in_the_repository(name, seeds):
    """The same tokens, and models of the same parameters but for what a run is there to change."""
    c = compare.read_comparison(os.path.join(ROOT, 'config', f'{name}.py'))
    found = compare.plan(c, 'runs')
    assert len(c['seeds']) == seeds
    assert len(found) == seeds * len(c['runs']) + len(c['ablations'])
    for ablation in (False, True):
        some = [run for run in found if run.ablation is ablation]
        sizes = [run.settings for run in some if run.settings.get('carry') != 'gated'
                 and run.settings['n_embd'] == c['common']['n_embd']]
        assert len({run.tokens for run in some}) <= 1
        assert len({count_parameters(make_model(size['model_type'], {
            **size, 'bias': False, 'vocab_size': 65})) for size in sizes}) <= 1
