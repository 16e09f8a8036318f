"""train.py: deterministic, exact in its updates, careful with what is on disk."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import prepare
from configurator import configure
from lib.records import load_record
from tasks import find_task

SMALL = dict(device='cpu', n_embd=16, n_head=2, n_layer=2, n_local=1, n_global=1, segment_size=4,
             block_size=16, batch_size=4, max_iters=20, eval_interval=10, log_interval=1,
             warmup_iters=2, dropout=0.1)
OF_TASK = {  # so easy that some answers are right from the start, and sequences walk on
    'text': dict(dataset='tiny'),
    'needle': dict(dataset='tiny', segment_size=4, batch_size=16, key_length=1, symbols=1,
                   longest=3, probe_distance=9, carry='gated', learning_rate=0.01),
    'pairs': dict(segment_size=6, block_size=24, names=5, symbols=2, pairs=3, together=2, fresh=2,
                  segments=2, questions=1, passed_at=-1.0)}


def starter(run, tmp_path, data_dir, monkeypatch):
    """train(**settings): a short run of train.py on any task, which draws no picture: that would
    take as long as the run."""
    monkeypatch.setattr('lib.pictures.curves', lambda *args, **kwargs: None)

    def train(model_type='fold', task='text', **settings):
        own = {} if task == 'pairs' else dict(data_dir=data_dir)
        values = dict(task=task, model_type=model_type, out_dir=tmp_path / 'out', **own)
        values = {**values, **SMALL, **OF_TASK[task], **settings}
        return run('train.py', *(f'--{key}={value}' for key, value in values.items()))
    return train


@pytest.fixture
def train(run, tmp_path, data_dir, monkeypatch):
    return starter(run, tmp_path, data_dir, monkeypatch)


def make_task(name, **settings):
    """A Task as train.py makes it, of its defaults and these settings."""
    module = find_task(name)
    defaults = configure({}, [], parts=lambda known: [module]).as_dict()
    return module.Task(SimpleNamespace(**{'seed': 1, 'init_from': 'scratch', **defaults, **SMALL,
                                          **OF_TASK[name], **settings}))


def load(path):
    return torch.load(path, weights_only=True)  # nothing in a checkpoint needs trust


def lines(out_dir):
    return [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]


def records(out_dir, key):
    return [(line['iter'], line[key]) for line in lines(out_dir) if key in line]


def final_weights(out_dir):
    return load(out_dir / 'last.pt')['model']


def same(a, b):
    """Whether two values out of checkpoints are equal, tensors bit for bit."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def watch(monkeypatch, act):
    """act(optimizer, n) before the n-th update of what follows."""
    step, steps = torch.optim.AdamW.step, []

    def watched(optimizer, *args, **kwargs):
        steps.append(1)
        act(optimizer, len(steps))
        return step(optimizer, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', watched)


@pytest.mark.parametrize('task, model_type', [('text', 'fold'), ('text', 'gpt'), ('needle', 'fold'),
                                              ('needle', 'gpt'), ('pairs', 'fold')])
def test_the_same_seed_gives_the_same_losses(train, tmp_path, task, model_type):
    """However often is evaluated on the way."""
    for name, seed, interval in (('a', 1, 20), ('b', 1, 3), ('c', 2, 20)):
        done = train(model_type, task, out_dir=tmp_path / name, seed=seed, eval_interval=interval)
        assert done.code == 0, done.err
    a, b, c = (records(tmp_path / name, 'loss') for name in 'abc')
    assert len(a) == 20 and a == b and a != c
    assert same(final_weights(tmp_path / 'a'), final_weights(tmp_path / 'b'))
    assert sum(loss for _, loss in a[-5:]) < sum(loss for _, loss in a[:5])


@pytest.mark.parametrize('n', [0, 1, 7])
def test_exactly_max_iters_updates_and_a_final_evaluation(train, tmp_path, monkeypatch, n):
    steps = []
    watch(monkeypatch, lambda optimizer, step: steps.append(step))
    assert train(max_iters=n, eval_interval=5).code == 0
    assert len(steps) == n
    evaluated = [it for it, _ in records(tmp_path / 'out', 'val_loss')]
    assert evaluated == ([5, 7] if n == 7 else [n])


def test_log_lines_are_means_of_their_interval(train, tmp_path):
    for interval in (1, 5):
        train(out_dir=tmp_path / str(interval), log_interval=interval)
    each, mean = records(tmp_path / '1', 'loss'), records(tmp_path / '5', 'loss')
    assert [it for it, _ in mean] == [5, 10, 15, 20]
    for it, loss in mean:
        assert loss == pytest.approx(sum(x for _, x in each[it - 5:it]) / 5, abs=1e-5)
    assert records(tmp_path / '5', 'tokens')[0] == (5, 5 * 4 * 16)


def test_accumulated_micro_batches_equal_one_large_batch(train, tmp_path):
    train(out_dir=tmp_path / 'a', batch_size=8, dropout=0.0)
    train(out_dir=tmp_path / 'b', batch_size=2, gradient_accumulation_steps=4, dropout=0.0)
    a, b = (dict(records(tmp_path / name, 'loss')) for name in 'ab')
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-4)


def test_a_stretch_gives_the_gpt_the_data_of_the_fold(data_dir):
    fold = make_task('text', data_dir=data_dir, batch_size=4, block_size=16)
    gpt = make_task('text', data_dir=data_dir, batch_size=16, block_size=4, stretch=16)
    for _ in range(3):
        (x, y), others = fold.random_sequences(), gpt.random_sequences()
        assert x.shape == (4, 16) and torch.equal(x[:, 1:].int(), y[:, :-1].int())
        assert all(b.shape == (16, 4) and torch.equal(a, b.view(4, 16))
                   for a, b in zip((x, y), others))


def test_every_update_has_its_learning_rate_and_its_clipped_gradient(train, tmp_path, monkeypatch):
    seen = []

    def note(optimizer, step):
        gradient = [p.grad.flatten() for group in optimizer.param_groups for p in group['params']]
        seen.append((optimizer.param_groups[0]['lr'], torch.cat(gradient).norm().item()))
    watch(monkeypatch, note)
    train(warmup_iters=4, decay_from=0.5, learning_rate=0.01, min_lr=0.001, grad_clip=0.01)
    rates = [lr for lr, _ in seen]
    assert rates[:11] == pytest.approx([0.002, 0.004, 0.006, 0.008] + [0.01] * 7)
    assert rates[15] == pytest.approx(0.0055)
    assert rates[19] == pytest.approx(0.001 + 0.0045 * (1 + math.cos(0.9 * math.pi)))
    assert records(tmp_path / 'out', 'lr') == [(n + 1, lr) for n, lr in enumerate(rates)]
    assert all(norm == pytest.approx(0.01, rel=1e-3) for _, norm in seen)
    seen.clear()
    train(overwrite=True, decay_from=1.0, learning_rate=0.01, grad_clip=0.0)
    assert {lr for lr, _ in seen[2:]} == {0.01} and max(norm for _, norm in seen) > 0.1


def test_best_and_last_are_kept_apart(train, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr('tasks.text.token_losses',
                        lambda model, tokens: torch.full((100,), next(losses)))
    assert train(max_iters=4, eval_interval=1).code == 0
    best, last = (load(tmp_path / 'out' / name) for name in ('ckpt.pt', 'last.pt'))
    assert (best['iter_num'], best['run']['val']['val_loss'], best['best_val_loss']) == (2, 2, 2)
    assert (last['iter_num'], last['run']['val']['val_loss'], last['best_val_loss']) == (4, 4, 2)


@pytest.mark.parametrize('task', OF_TASK)
def test_a_run_leaves_a_checkpoint_that_explains_itself_and_a_record(train, tmp_path, task):
    train(task=task, seed=5)
    saved = load(tmp_path / 'out' / 'ckpt.pt')
    assert saved['config']['seed'] == 5 and saved['config']['n_embd'] == 16
    assert saved['task'] == task and saved['model_args']['vocab_size'] > 10
    assert saved['provenance']['versions']['torch'] == torch.__version__
    if task == 'text':
        assert 'a' in saved['tokenizer']['chars'] and saved['data']['dataset'] == 'tiny'
    record, log = load_record(str(tmp_path / 'out' / 'record.json')), lines(tmp_path / 'out')
    scored = [line for line in log if 'val_loss' in line]
    assert (record['what'], record['seeds'], record['settings']['task']) == ('training', [5], task)
    assert record['metrics']['loss']['value'] == scored[-1]['val_loss']
    assert record['metrics']['tokens']['value'] == scored[-1]['tokens'] == log[-2]['tokens']
    assert record['curves']['validation loss']['points'] == [
        {'x': line['tokens'], 'value': line['val_loss']} for line in scored]
    assert len(record['curves']['training loss']['points']) == 20


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_loss_that_is_not_finite_stops_and_saves_nothing(train, tmp_path, monkeypatch, value):
    train()
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*.pt')}
    assert before.keys() == {'ckpt.pt', 'last.pt'}
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy',
                        lambda *args, **kwargs: cross_entropy(*args, **kwargs) * float(value))
    stopped = train(init_from='resume', max_iters=40)
    assert stopped.code == 1 and f'loss is {value} at iteration 21' in stopped.err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*.pt')}


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path):
    train(max_iters=10)
    before = (tmp_path / 'out' / 'last.pt').read_bytes()
    stopped = train(init_from='resume', max_iters=11, learning_rate=1e38, grad_clip=0.0,
                    decay_from=1.0, warmup_iters=0)
    assert stopped.code == 1 and 'at iteration 11' in stopped.err
    assert (tmp_path / 'out' / 'last.pt').read_bytes() == before


def test_a_run_is_not_overwritten_unless_told(train, tmp_path, monkeypatch):
    train(seed=1)
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    refused = train(seed=2)
    assert refused.code == 1 and '--overwrite=True' in refused.err
    assert '--init_from=resume' in refused.err
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before
    monkeypatch.setattr('tasks.text.token_losses', lambda *args: torch.tensor([math.nan]))
    assert train(seed=2, overwrite=True).code == 1  # before its first evaluation is done
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'.lock', 'last.pt', 'log.jsonl'}
    assert load(tmp_path / 'out' / 'last.pt')['config']['seed'] == 2


@pytest.mark.parametrize('source, target, window', [
    ('gpt', 'fold', 4), ('fold', 'gpt', 4), ('gpt', 'gpt', 16), ('nanogpt', 'fold', 4)])
def test_the_weights_of_either_model_start_the_other(train, tmp_path, source, target, window):
    train(source.removeprefix('nano'), out_dir=tmp_path / 'source', max_iters=2)
    saved, path = load(tmp_path / 'source' / 'ckpt.pt'), tmp_path / 'source' / 'ckpt.pt'
    if source == 'nanogpt':  # which says less
        path, weights = tmp_path / 'nano.pt', saved['model']
        compiled = {f'_orig_mod.{name}': value for name, value in weights.items()}
        torch.save({'model': compiled, 'model_args': saved['model_args'], 'config': {}}, path)
    sizes = dict(block_size=window) if target == 'gpt' else {}
    started = train(target, init_from=path, max_iters=0, n_embd=64, n_layer=7, bias=True, **sizes)
    assert started.code == 0 and 'init_from: n_embd stays 16' in started.out, started.err
    a, last = saved['model'], load(tmp_path / 'out' / 'last.pt')
    b, wpe = last['model'], 'transformer.wpe.weight'
    assert len(b[wpe]) == window and torch.equal(a.pop(wpe)[:window], b.pop(wpe)) and same(a, b)
    assert [last['config'][key] for key in ('n_embd', 'n_layer', 'bias')] == [16, 2, False]


def no_network(dataset, **kwargs):
    raise prepare.DownloadError('error: no network')


def test_without_network_the_offline_data_set_is_used_and_named(train, tmp_path, monkeypatch):
    monkeypatch.setattr('tasks.text.prepare', no_network)
    stopped = train(dataset='shakespeare')
    assert stopped.code == 1 and 'no network' in stopped.err
    done = train(dataset='shakespeare', offline_dataset='tiny')
    assert done.code == 0 and "TRAINING ON 'tiny' INSTEAD" in done.out
    again = train(dataset='shakespeare', init_from='resume', max_iters=25)
    logged = [line for line in (done.out + again.out).splitlines() if line.startswith('iter ')]
    assert len(logged) == 28
    assert all('[data: tiny, in place of shakespeare]' in line for line in logged)
    saved = load(tmp_path / 'out' / 'ckpt.pt')
    assert saved['data']['dataset'] == saved['config']['dataset'] == 'tiny'
    assert saved['data']['wanted'] == 'shakespeare'


def test_a_missing_data_set_is_prepared_once(train, tmp_path, monkeypatch, data_dir):
    seen, real = [], prepare.prepare
    monkeypatch.setattr('tasks.text.prepare', lambda name, **kwargs: seen.append(name) or real(
        name, file=str(data_dir / 'tiny.txt'), **kwargs))
    for again in (False, True):
        done = train(dataset='mine', data_dir=tmp_path / 'data', max_iters=1, overwrite=again)
        assert done.code == 0
    assert seen == ['mine']
