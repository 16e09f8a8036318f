"""train.py: deterministic, exact in its updates, careful with what is on disk."""
import json
import math
from functools import partial

import pytest
import torch

import prepare
from lib.checkpoint import find_file
from lib.contract import count_parameters
from lib.records import load_record, metric

APART = {'config', 'provenance', 'seconds', 'tokens_per_s',  # of a run that is resumed
         'model_args', 'model_type', 'task', 'tokenizer', 'data'}  # texts, that stay anyhow
equal = partial(torch.testing.assert_close, rtol=0, atol=0)  # of values in values, too

def load(path):
    return torch.load(path, weights_only=True)  # nothing in a checkpoint needs trust

def lines(out_dir):
    return [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]

def records(out_dir, key):
    return [(line['iter'], line[key]) for line in lines(out_dir) if key in line]

def assert_same_runs(a, b):
    """Weights, optimizer, random numbers, state of the task and log, bit for bit; not the speed."""
    both = [[load(path / 'ckpt.pt'), load(path / 'last.pt'), *lines(path)] for path in (a, b)]
    for part in both[0] + both[1]:
        if 'run' in part:
            del part['run']['seconds'], part['run']['interval_seconds']
    both = [[{key: value for key, value in part.items() if key not in APART} for part in parts
             if 'event' not in part] for parts in both]
    equal(*both)

def watch(monkeypatch, act):
    """act(optimizer, n) before the n-th update of what follows."""
    step, steps = torch.optim.AdamW.step, []

    def watched(optimizer, *args, **kwargs):
        steps.append(1)
        act(optimizer, len(steps))
        return step(optimizer, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', watched)

def test_another_seed_gives_other_losses_and_they_fall(train, tmp_path):
    for name, n, seed in (('a', 12, 1), ('b', 2, 2)):
        done = train(out_dir=tmp_path / name, seed=seed, max_iters=n, decay_from=1.0)
        assert done.code == 0, done.err
    a, b = (records(tmp_path / name, 'loss') for name in 'ab')
    assert a[:2] != b and sum(dict(a[-5:]).values()) < sum(dict(a[:5]).values())

def test_log_lines_are_means_of_their_interval(train, tmp_path):
    for interval in (1, 5):
        train(out_dir=tmp_path / str(interval), log_interval=interval, max_iters=10)
    each, mean = (dict(records(tmp_path / name, 'loss')) for name in '15')
    assert mean == {it: pytest.approx(sum(each[it - n] for n in range(5)) / 5, abs=1e-5)
                    for it in (5, 10)}

def test_every_update_has_its_learning_rate_and_its_clipped_gradient(train, tmp_path, monkeypatch):
    seen = []

    def note(optimizer, step):
        gradient = [p.grad.flatten() for group in optimizer.param_groups for p in group['params']]
        seen.append((optimizer.param_groups[0]['lr'], torch.cat(gradient).norm().item()))
    watch(monkeypatch, note)
    train(warmup_iters=4, decay_from=0.5, learning_rate=0.01, min_lr=0.001, grad_clip=0.01)
    rates = [lr for lr, _ in seen]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, *[0.01] * 6, *(
        0.001 + 0.0045 * (1 + math.cos(n * math.pi / 10)) for n in range(10))])
    assert records(tmp_path / 'out', 'lr') == [(n + 1, lr) for n, lr in enumerate(rates)]
    assert all(norm == pytest.approx(0.01, rel=1e-3) for _, norm in seen)
    seen.clear()
    train(overwrite=True, decay_from=1.0, learning_rate=0.01, grad_clip=0.0)
    assert {lr for lr, _ in seen[2:]} == {0.01} and max(norm for _, norm in seen) > 0.1

def test_best_and_last_are_kept_apart(train, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr('tasks.text.token_losses',
                        lambda *args: torch.full((100,), next(losses)))
    assert train(max_iters=4, eval_interval=1).code == 0
    assert find_file(str(tmp_path / 'out')).endswith('ckpt.pt')
    best, last = (load(tmp_path / 'out' / name) for name in ('ckpt.pt', 'last.pt'))
    assert (best['iter_num'], best['run']['val']['val_loss'], best['best_val_loss']) == (2, 2, 2)
    assert (last['iter_num'], last['run']['val']['val_loss'], last['best_val_loss']) == (4, 4, 2)

@pytest.mark.parametrize('task', ['text', 'needle'])
def test_a_run_leaves_a_checkpoint_that_explains_itself_and_a_record(train, tmp_path, task):
    """After exactly max_iters updates and a final evaluation."""
    done = train(task=task, seed=5, max_iters=5, eval_interval=3).globals
    saved = load(tmp_path / 'out' / 'ckpt.pt')
    assert saved['task'] == task and saved['config']['seed'] == 5
    states = load(tmp_path / 'out' / 'last.pt')['optimizer']['state'].values()
    assert {int(state['step']) for state in states} == {5}
    assert [*dict(records(tmp_path / 'out', 'val_loss'))] == [3, 5]
    record, log = load_record(str(tmp_path / 'out' / 'record.json')), lines(tmp_path / 'out')
    assert (record['what'], record['seeds']) == ('training', [5])
    found = record['metrics']
    assert found['loss'] == metric(log[-1]['val_loss'], log[-1]['val_error'])
    assert [found[key]['value'] for key in ('tokens', 'parameters', 'minutes')] == [
        log[-2]['tokens'], count_parameters(done['model']), done['run'].seconds / 60]
    for key, name, n in (('loss', 'training loss', 5), ('val_loss', 'validation loss', 2)):
        points = [{'x': line['tokens'], 'value': line[key]} for line in log if key in line]
        assert record['curves'][name]['points'] == points and len(points) == n

@pytest.mark.parametrize('cause, problem', [
    (None, 'training loss is nan'), (1e39, 'a weight is'), (1e37, 'validation loss is'),
    ('last', 'a weight is nan')])
def test_what_is_not_finite_stops_and_is_not_saved(train, trained, monkeypatch, cause, problem):
    out = trained()
    best, last = ((out / name).read_bytes() for name in ('ckpt.pt', 'last.pt'))
    settings, loss = dict(max_iters=2), torch.nn.functional.cross_entropy
    if cause is None:
        monkeypatch.setattr(torch.nn.functional, 'cross_entropy',
                            lambda *args, **kwargs: loss(*args, **kwargs) * math.nan)
    elif cause == 'last':  # of all parameters, and no other
        monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_',
                            lambda parameters, most: [*parameters][-1].grad.fill_(math.nan))
    else:
        settings.update(learning_rate=cause, grad_clip=0.0, decay_from=1.0, warmup_iters=0)
    stopped = train(init_from='resume', **settings)
    assert stopped.code == 1 and problem in stopped.err and 'at iteration 2' in stopped.err
    assert (out / 'ckpt.pt').read_bytes() == best
    assert 'validation' in problem or (out / 'last.pt').read_bytes() == last

def test_a_run_is_not_overwritten_unless_told(train, trained, monkeypatch):
    out = trained()
    before = (out / 'ckpt.pt').read_bytes()
    refused = train(seed=2)
    assert refused.code == 1 and '--overwrite=True' in refused.err
    assert (out / 'ckpt.pt').read_bytes() == before
    monkeypatch.setattr('tasks.text.token_losses', lambda *args: torch.tensor([math.nan]))
    assert train(seed=2, overwrite=True).code == 1  # in its first evaluation
    assert {path.name for path in out.iterdir()} == {'.lock', 'last.pt', 'log.jsonl'}
    saved = load(out / 'last.pt')
    assert (saved['config']['seed'], saved['iter_num']) == (2, 10)  # saved before it

@pytest.mark.parametrize('source, target, window', [
    ('fold', 'gpt', 4), ('gpt', 'gpt', 12), ('nanogpt', 'fold', 4)])
def test_the_weights_of_either_model_start_the_other(train, tmp_path, source, target, window):
    train(source.removeprefix('nano'), out_dir=tmp_path / 'source', max_iters=2)
    path = tmp_path / 'source' / 'ckpt.pt'
    saved = load(path)
    if source == 'nanogpt':  # which says less
        compiled = {f'_orig_mod.{name}': value for name, value in saved['model'].items()}
        torch.save({'model': compiled, 'model_args': saved['model_args'], 'config': {}}, path)
    started = train(target, init_from=path, max_iters=0, n_embd=64, n_layer=7, bias=True,
                    block_size=window)
    assert started.code == 0 and 'init_from: n_embd stays 16' in started.out, started.err
    a, last = saved['model'], load(tmp_path / 'out' / 'last.pt')
    b, wpe = last['model'], 'transformer.wpe.weight'
    equal({**a, wpe: a[wpe][:window]}, b)
    assert [last['config'][key] for key in ('n_embd', 'n_layer', 'bias')] == [16, 2, False]

def test_a_key_that_the_checkpoint_has_not_is_taken_as_given(train, tmp_path):
    assert train('gpt', out_dir=tmp_path / 'source', max_iters=0).code == 0
    assert train('transformer_xl', init_from=tmp_path / 'source', stop=False, max_iters=0).code == 0
    assert load(tmp_path / 'out' / 'last.pt')['model_args']['stop'] is False

def test_without_network_another_data_set_is_used_and_named(train, tmp_path, monkeypatch, data_dir):
    """The one that is missing is prepared, once."""
    real, seen = prepare.prepare, []

    def no_network(name, **kwargs):
        seen.append(name)
        if name == 'shakespeare':
            raise prepare.DownloadError('error: no network')
        return real(name, file=str(data_dir / 'tiny.txt'), **kwargs)
    monkeypatch.setattr('tasks.text.prepare', no_network)
    settings = dict(dataset='shakespeare', data_dir=tmp_path)
    stopped = train(**settings)
    assert stopped.code == 1 and 'no network' in stopped.err
    done = train(offline_dataset='mine', **settings)
    assert done.code == 0 and "TRAINING ON 'mine' INSTEAD" in done.out
    again = train(init_from='resume', max_iters=25, **settings)
    assert seen == ['shakespeare', 'shakespeare', 'mine']
    logged = [line for line in (done.out + again.out).splitlines() if line.startswith('iter ')]
    assert len(logged) == sum('[data: mine, in place of shakespeare]' in x for x in logged) == 28
    assert load(tmp_path / 'out' / 'ckpt.pt')['data']['dataset'] == 'mine'
