"""The comparison from start to report, on runs of seconds; what is equal in it; and what the report works out."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import compare
import report
from checkpoint import make_model
from conftest import ROOT

FILE = '''
seeds = [1, 2]
tokens = 384
ablation_tokens = 192
common = dict(dataset='tiny', n_local=1, n_global=1, n_layer=2, n_head=2, n_embd=16, segment_size=12, block_size=24,
              batch_size=2, warmup_iters=1, log_interval=2, device='cpu')
runs = {'fold': dict(), 'GPT, window 12': dict(model_type='gpt', block_size=12, batch_size=4, stretch=24),
        'GPT, window 24': dict(model_type='gpt')}
same_window, full_window = 'GPT, window 12', 'GPT, window 24'
ablations = {'as it is': dict(), 'carry dropped': dict(model_type='fold_dropped'), 'segments of 6': dict(segment_size=6)}
probe = dict(histories='0,12,24', swaps='', targets=4, words=3, draws=20, bins='12,24')
prompts = ['1 ape']
new_tokens = 12
'''


@pytest.fixture(scope='session')
def compared(data_dir, tmp_path_factory):
    """A whole comparison, interrupted and gone on with: (folder of the runs, folder of the report, the command)."""
    folder = tmp_path_factory.mktemp('compared')
    (folder / 'small.py').write_text(FILE)
    command = [sys.executable, os.path.join(ROOT, 'compare.py'), str(folder / 'small.py'), f"--out_dir={folder / 'runs'}",
               f"--results_dir={folder / 'results'}", f'--data_dir={data_dir}', '--device=cpu']
    begun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / 'runs' / 'fold_1' / 'last.pt').exists():
        assert begun.poll() is None, begun.communicate()
        time.sleep(0.1)
    begun.send_signal(signal.SIGINT)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode == 1 and err.strip() == 'stopped; the same command goes on from here'
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / 'runs', folder / 'results', command


def rows_of(results):
    return json.loads((results / 'report.json').read_text())['runs']


def test_from_start_to_report(compared):
    runs, results, _ = compared
    assert len(rows_of(results)) == 9 and not any('failed' in row for row in rows_of(results))
    text = (results / 'report.md').read_text()
    for words in ('| fold |', '| GPT, window 24 |', '| carry dropped |', '## Remote co-occurrence', '### 1 ape', 'At equal FLOPs'):
        assert words in text
    assert all(0 < (results / name).stat().st_size < 300_000 for name in ('loss.png', 'context.png'))


def test_equal_means_equal(compared):
    """Parameters, tokens, what is scored, and the very batches: the state of their random numbers, and the text behind it."""
    rows = rows_of(compared[1])
    for ablation in (False, True):
        some = [row for row in rows if row['ablation'] is ablation]
        assert len({row['parameters'] for row in some}) == len({row['tokens'] for row in some}) == 1
        assert len({row['data']['sha256'] for row in some}) == len({row['eval_tokens'] for row in some}) == 1
        for seed in {row['seed'] for row in some}:
            assert len({row['order'] for row in some if row['seed'] == seed}) == 1
    assert len({row['order'] for row in rows if not row['ablation']}) == 2  # another seed, another order
    scored = {row['probe']['tokens_scored'] for row in rows if row['settings'].get('segment_size') == 12}
    assert len(scored) == 1


def test_every_model_sees_the_same_batches(train, tmp_path):
    windows = dict(gpt=dict(block_size=4, batch_size=16, stretch=16), fold=dict(block_size=16, batch_size=4))
    batches = []
    for kind, settings in windows.items():
        names = train(kind, out_dir=tmp_path / kind, max_iters=1, **settings).globals
        x, y = names['get_batch']()
        batches.append((x.flatten(), y.flatten()))
    assert all(torch.equal(a, b) for a, b in zip(*batches))


def test_what_is_there_is_not_done_again(compared):
    runs, results, command = compared
    before = {path: path.stat().st_mtime_ns for path in runs.glob('*/*.pt')}
    (runs / 'fold_1' / 'samples.json').unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and (runs / 'fold_1' / 'samples.json').exists()
    assert {path: path.stat().st_mtime_ns for path in runs.glob('*/*.pt')} == before


def test_what_was_asked_otherwise_is_asked_again(compared, tmp_path):
    """Of one run; the report puts what others were asked otherwise under heads of its own."""
    runs, results, command = compared
    some = shutil.copytree(runs, tmp_path / 'runs')
    (tmp_path / 'small.py').write_text(FILE.replace("bins='12,24'", "bins='12,18,24'").replace("['1 ape']", "['1 ape', '2']"))
    command = [*command[:2], str(tmp_path / 'small.py'), f'--out_dir={some}', f"--results_dir={tmp_path / 'results'}", *command[5:]]
    before = {path: path.stat().st_mtime_ns for path in some.glob('*/*.json')}
    done = subprocess.run([*command, '--only=fold'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    changed = {(path.parent.name, path.name) for path, time in before.items() if path.stat().st_mtime_ns != time}
    asked = {(name, f'{how}{what}.json') for name in ('fold_1', 'fold_2') for how in ('', 'how_') for what in ('probe', 'samples')}
    assert changed == asked - {('fold_2', 'samples.json'), ('fold_2', 'how_samples.json')}
    text = (tmp_path / 'results' / 'report.md').read_text()
    assert '| model, seed | 12 to 17 | 12 to 23 | 18 to 23 |' in text and '### 2' in text


def test_a_report_keeps_runs_whose_folders_are_gone(compared, tmp_path):
    """With the same settings, and as what they are: no time is compared with theirs. Only what is asked for is run."""
    runs, results, command = compared
    some = shutil.copytree(runs, tmp_path / 'runs', ignore=shutil.ignore_patterns('fold_*', 'ablation_as_it_is_1', 'GPT_window_12_2'))
    shutil.copytree(results, tmp_path / 'results')
    command = [*command[:3], f'--out_dir={some}', f"--results_dir={tmp_path / 'results'}", *command[5:]]
    done = subprocess.run([*command, '--only=GPT, window 12; carry dropped'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (some / 'GPT_window_12_2').exists() and not (some / 'fold_1').exists()
    old, new = ({(row['name'], row['seed'], row['ablation']): row for row in rows_of(folder)} for folder in (results, tmp_path / 'results'))
    kept = {key for key, row in new.items() if 'kept' in row}
    assert kept == {('fold', 1, False), ('fold', 2, False), ('as it is', 1, True)} and len(new) == 9
    assert all({**old[key], 'kept': True} == new[key] for key in kept)
    report_of = [json.loads((folder / 'report.json').read_text()) for folder in (results, tmp_path / 'results')]
    assert [sorted(r['full_window']) for r in report_of] == [['FLOPs', 'time', 'tokens'], ['FLOPs', 'tokens']]
    costs = [[[m[key] for key in ('flops_per_token', 'state_bytes')] for m in r['models'] + r['ablations']] for r in report_of]
    assert costs[0] == costs[1] and len(costs[0]) == 6
    assert 'Kept from an earlier report' in (tmp_path / 'results' / 'report.md').read_text()

    def said(name, text=FILE):
        (tmp_path / 'small.py').write_text(text)
        found = compare.plan(compare.read_comparison(str(tmp_path / 'small.py')), str(some))
        return report.gather(next(run for run in found if run.name == name), list(new.values()))
    assert 'kept' in said('fold')
    assert said('fold', FILE.replace("'fold': dict()", "'fold': dict(dropout=0.1)"))['failed'] == 'not run to its end'
    stale = said('GPT, window 24', FILE.replace("(model_type='gpt')", "(model_type='gpt', dropout=0.1)"))
    assert "another dropout, train.py's own in place of 0.1" in stale['failed']
    for change in (('n_embd=16', 'n_embd=32'), ("dataset='tiny'", "dataset='other'"), ('warmup_iters=1, ', '')):  # one left out, too
        assert f"another {change[0].split('=')[0]}, " in said('GPT, window 24', FILE.replace(*change))['failed']
    (some / 'GPT_window_24_1' / 'settings.json').unlink()  # as an earlier version left it: by what its log says
    assert 'failed' not in said('GPT, window 24', FILE.replace('warmup_iters=1, ', ''))
    assert 'another n_embd, 16 in place of 32' in said('GPT, window 24', FILE.replace('n_embd=16', 'n_embd=32'))['failed']
    done = subprocess.run([*command, '--only_report=True', '--only=fold'], capture_output=True, text=True)
    assert done.returncode == 1 and 'none of the runs asked for is complete' in done.stderr


def test_a_run_that_fails_is_reported_and_stops_no_other(compared, data_dir, tmp_path):
    runs, _, command = compared
    (tmp_path / 'small.py').write_text(FILE.replace("'GPT, window 24': dict(model_type='gpt')",
                                                    "'GPT, window 24': dict(model_type='gpt', n_head=3)"))
    done = subprocess.run([*command[:2], str(tmp_path / 'small.py'), f"--results_dir={tmp_path / 'results'}", *command[3:4],
                           *command[5:]], capture_output=True, text=True)
    failed = [row for row in rows_of(tmp_path / 'results') if 'failed' in row]
    assert done.returncode == 1 and '2 of 9 runs are not complete' in done.stdout
    assert {row['name'] for row in failed} == {'GPT, window 24'} and 'another n_head, 2 in place of 3' in failed[0]['failed']
    assert 'another n_head' in (tmp_path / 'results' / 'report.md').read_text()


def test_only_names_runs(run, tmp_path):
    (tmp_path / 'small.py').write_text(FILE)
    for only in ('GPT, window 13', ';'):
        refused = run('compare.py', tmp_path / 'small.py', f'--out_dir={tmp_path}', f'--only={only}')
        assert refused.code == 1 and f"only={only!r} is none of the runs, which are fold; GPT, window 12;" in refused.err


@pytest.mark.parametrize('change, words', [
    (('seeds = [1, 2]', 'seeds = []'), 'seeds be different whole numbers'), (('seeds = [1, 2]', 'seeds = [1, 1]'), 'different whole numbers'),
    (('batch_size=2', 'batch_size=0'), "batch_size must be a whole number from 1 on, not 0"), (('batch_size=2', "batch_size='2'"), "not '2'"),
    (("['1 ape']", '[3]'), 'a prompt a text, not 3'), (("'as it is': dict()", "'as it is': 3"), 'a run must be a dict'), (('tokens = 384', 'tokens = 385'), 'must divide the 385'),
    (('tokens = 384', "tokens = 'all'"), "tokens must be of type int, not 'all'"), (('prompts', 'prompt'), 'did you mean prompts?'),
    (("same_window, full_window = 'GPT, window 12'", "same_window, full_window = 'GPT'"), 'is none of the runs'),
    (("'segments of 6'", "'as_it is'"), 'differ in no letter'), (('new_tokens = 12', 'new_tokens ='), 'SyntaxError')])
def test_a_wrong_comparison_gets_one_line(run, tmp_path, change, words):
    (tmp_path / 'wrong.py').write_text(FILE.replace(*change))
    refused = run('compare.py', tmp_path / 'wrong.py', f'--out_dir={tmp_path}')
    assert refused.code == 1 and words in refused.err and len(refused.err.strip().splitlines()) == 1


def test_without_runs_an_older_report_is_kept(run, tmp_path):
    (tmp_path / 'small.py').write_text(FILE)
    (tmp_path / 'report.json').write_text('older')
    refused = run('compare.py', tmp_path / 'small.py', '--only_report=True', f"--out_dir={tmp_path / 'runs'}", f'--results_dir={tmp_path}')
    assert refused.code == 1 and 'no run is complete' in refused.err and (tmp_path / 'report.json').read_text() == 'older'


def test_a_comparison_must_be_named(run):
    assert 'name a comparison' in run('compare.py').err and 'not found' in run('compare.py', 'config/nowhere.py').err


def test_the_arithmetic_of_the_report():
    curve = [[10, 3.0], [20, 2.0], [40, 1.0]]
    assert [report.at(curve, x) for x in (5, 10, 15, 30, 40, 50)] == [None, 3.0, 2.5, 1.5, 1.0, 1.0]
    fold = dict(name='fold', tokens=40, flops_per_token=2, tokens_per_s=1, curve=curve, loss=1.0, sd=0.1, kept=False)
    gpt = dict(name='GPT', tokens=40, flops_per_token=4, tokens_per_s=2, curve=[[10, 2.0], [20, 1.5], [40, 1.2]], loss=1.2, sd=0.02,
               kept=False)
    assert report.standing(fold, gpt) == {'tokens': {'fold': 1.0, 'GPT': 1.2}, 'FLOPs': {'fold': 1.0, 'GPT': 1.5},
                                          'time': {'fold': 2.0, 'GPT': 1.2}}
    assert list(report.standing(fold, {**gpt, 'kept': True})) == ['tokens', 'FLOPs']
    assert report.gap(fold, gpt) == {'below': pytest.approx(0.2), 'sd': 0.1, 'in_sd': pytest.approx(2.0)}


def test_the_tables_over_histories():
    def probed(*rows):
        return {'context_curve': [dict(history=h, loss={'mean': loss}, **({'gain': gain} if gain else {})) for h, loss, gain in rows],
                'preserved_context': 0}
    gain = {'mean': 0.5, 'low': 0.25, 'high': 0.75}
    rows = [dict(name='a', seed=1, probe=probed((0, 2.5, gain), (12, 2.0, None))),
            dict(name='b', seed=1, probe=probed((0, 3.0, gain), (24, 2.0, None)))]
    assert report.context_table(rows, report.loss_cell).splitlines()[2:] == ['| a, 1 | 2.5000 | 2.0000 |  | 0 |', '| b, 1 | 3.0000 |  | 2.0000 | 0 |']
    assert report.context_table(rows, report.worth_cell).splitlines()[2] == '| a, 1 | 0.5000 [0.2500, 0.7500] | reference |  | 0 |'


@pytest.mark.parametrize('kind, T', [('fold', 48), ('gpt', 48), ('gpt', 96)])
def test_flops_are_those_of_the_documented_count(kind, T):
    """Of windows for which attention is a fused kernel, too, which torch's counter does not see on a CPU."""
    from flops import flops_per_token
    model = make_model(kind, dict(block_size=T, segment_size=12, vocab_size=11, n_head=2, n_embd=16, n_layer=3, n_local=1, n_global=2))
    assert report.flops_per_token(model) == float(flops_per_token(model, T))


@pytest.mark.parametrize('name, least', [('compare_shakespeare', 3), ('compare_python', 3), ('compare_shakespeare_gpu', 3),
                                         ('compare_python_long', 1),
                                         ('compare_python_longest', 1), ('compare_bpe', 1)])
def test_the_plans_of_the_comparisons_in_the_repository(name, least):
    """Three seeds or more where losses are compared, the same tokens, and models of the same parameters."""
    c = compare.read_comparison(os.path.join(ROOT, 'config', f'{name}.py'))
    found = compare.plan(c, 'runs')
    assert len(c['seeds']) >= least
    assert len({run.folder for run in found}) == len(found) == len(c['seeds']) * len(c['runs']) + len(c['ablations'])
    for ablation in (False, True):
        some = [run for run in found if run.ablation is ablation]
        assert len({compare.tokens_of(run) for run in some}) <= 1
        sizes = [{'bias': False, **run.settings, 'vocab_size': 65} for run in some if run.settings.get('carry') != 'gated']
        assert len({make_model(size['model_type'], size).num_params() for size in sizes}) <= 1


def test_the_plan_of_what_moves_the_reach():
    """Models of other sizes among its changes; each of these differs from the first in one thing, at the same tokens."""
    found = compare.plan(compare.read_comparison(os.path.join(ROOT, 'config', 'compare_python_reach.py')), 'runs')
    for some in ([run for run in found if run.ablation == kind] for kind in (False, True)):
        assert len({compare.tokens_of(run) for run in some}) == 1
    first, *changed = [run for run in found if run.ablation]
    told = {key for run in changed for key in run.settings if key != 'max_iters' and not key.endswith('_interval')}
    apart = [{key for key in told if run.settings.get(key) != first.settings.get(key)} for run in changed]
    assert all(len(keys) == 1 or keys in ({'n_local', 'n_global'}, {'batch_size', 'block_size', 'stretch'}) for keys in apart)
