"""train.py: deterministic, exact in its updates, exact in resuming, careful with what is on disk."""
import json
import math

import pytest
import torch

import evaluate
import prepare as prepare_module


def records(out_dir, key):
    lines = [json.loads(line) for line in (out_dir / 'log.jsonl').read_text().splitlines()]
    return [(line['iter'], line[key]) for line in lines if key in line]


def final_weights(out_dir):
    return torch.load(out_dir / 'last.pt', weights_only=True)['model']


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('model_type', ['fold', 'gpt'])
def test_the_same_seed_gives_the_same_losses(train, tmp_path, model_type):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert train(model_type, out_dir=tmp_path / name, seed=seed, max_iters=30).code == 0
    a, b, c = (records(tmp_path / name, 'loss') for name in 'abc')
    assert len(a) == 30 and a == b and a != c
    assert same(final_weights(tmp_path / 'a'), final_weights(tmp_path / 'b'))
    assert a[-1][1] < a[0][1]


@pytest.mark.parametrize('model_type', ['fold', 'gpt'])
def test_killed_and_resumed_is_as_if_never_stopped(train, tmp_path, model_type, monkeypatch):
    how = dict(max_iters=25, eval_interval=10, log_interval=4, gradient_accumulation_steps=2)
    assert train(model_type, out_dir=tmp_path / 'whole', **how).code == 0
    step, steps = torch.optim.AdamW.step, []

    def killed_at_17(*args, **kwargs):
        steps.append(1)
        if len(steps) == 17:
            raise MemoryError('killed')
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch.optim.AdamW, 'step', killed_at_17)
        train(model_type, out_dir=tmp_path / 'parts', **how)
    assert train(model_type, out_dir=tmp_path / 'parts', init_from='resume', **how).code == 0
    assert same(final_weights(tmp_path / 'whole'), final_weights(tmp_path / 'parts'))
    for key in ('loss', 'val_loss', 'lr'):
        assert records(tmp_path / 'whole', key) == records(tmp_path / 'parts', key)


@pytest.mark.parametrize('n', [0, 1, 7])
def test_exactly_max_iters_updates_and_a_final_evaluation(train, tmp_path, monkeypatch, n):
    step, steps = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda *a, **k: steps.append(1) or step(*a, **k))
    assert train(max_iters=n, eval_interval=5).code == 0
    assert len(steps) == n
    assert [it for it, _ in records(tmp_path / 'out', 'val_loss')] == ([5, 7] if n == 7 else [n])


def test_evaluation_leaves_training_as_it_is(train, tmp_path):
    train(out_dir=tmp_path / 'a', eval_interval=2)
    train(out_dir=tmp_path / 'b', eval_interval=20)
    assert records(tmp_path / 'a', 'loss') == records(tmp_path / 'b', 'loss')


def test_log_lines_are_means_of_their_interval(train, tmp_path):
    train(out_dir=tmp_path / 'a', log_interval=1)
    train(out_dir=tmp_path / 'b', log_interval=5)
    each, mean = records(tmp_path / 'a', 'loss'), records(tmp_path / 'b', 'loss')
    assert [it for it, _ in mean] == [5, 10, 15, 20]
    for it, loss in mean:
        assert loss == pytest.approx(sum(x for _, x in each[it - 5:it]) / 5, abs=1e-5)


def test_accumulated_micro_steps_equal_one_large_step(train, tmp_path):
    train(out_dir=tmp_path / 'a', batch_size=8, dropout=0.0)
    train(out_dir=tmp_path / 'b', batch_size=2, gradient_accumulation_steps=4, dropout=0.0)
    a, b = (dict(records(tmp_path / name, 'loss')) for name in 'ab')
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-4)


def test_a_stretch_gives_the_gpt_the_data_of_the_fold(train, tmp_path):
    fold = train('fold', max_iters=0, batch_size=4, block_size=16).globals
    gpt = train('gpt', max_iters=0, batch_size=16, block_size=4, stretch=16, out_dir=tmp_path / 'gpt').globals
    for _ in range(3):
        for a, b in zip(fold['get_batch'](), gpt['get_batch']()):
            assert a.shape == (4, 16) and b.shape == (16, 4)
            assert torch.equal(a, b.view(4, 16))


def test_targets_are_the_next_tokens(train, data_dir):
    x, y = train(max_iters=0).globals['get_batch']()
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_learning_rate(train):
    lr = train(max_iters=0, warmup_iters=10, lr_decay_iters=110, learning_rate=1e-2, min_lr=1e-3).globals['lr_at']
    assert [lr(it) for it in range(9)] == sorted(lr(it) for it in range(9)) and lr(0) > 0
    assert lr(10) == pytest.approx(1e-2) and lr(60) == pytest.approx(5.5e-3) and lr(110) == lr(999) == pytest.approx(1e-3)


def test_every_update_has_its_learning_rate_and_its_clipped_gradient(train, monkeypatch):
    clip, step, seen = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step, []

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group['params']]
        seen.append((self.param_groups[0]['lr'], torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item()))
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', watched)
    lr_at = train(grad_clip=0.01, max_iters=12).globals['lr_at']
    assert [lr for lr, _ in seen] == [lr_at(it) for it in range(12)]
    assert all(norm == pytest.approx(0.01, rel=1e-3) for _, norm in seen)


def test_best_and_last_are_kept_apart(train, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(evaluate, 'token_losses', lambda model, tokens: torch.full((100,), next(losses)))
    assert train(max_iters=4, eval_interval=1).code == 0
    best, last = (torch.load(tmp_path / 'out' / name, weights_only=True) for name in ('ckpt.pt', 'last.pt'))
    assert (best['iter_num'], best['val_loss']) == (2, 2.0)
    assert (last['iter_num'], last['val_loss'], last['best_val_loss']) == (4, 4.0, 2.0)


def test_a_checkpoint_is_self_contained(train, tmp_path):
    train(seed=5)
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)  # nothing in it needs trust
    assert saved['config']['seed'] == 5 and saved['config']['segment_size'] == 4
    assert saved['tokenizer']['kind'] == 'char' and 'a' in saved['tokenizer']['chars']
    assert saved['optimizer']['state'] and saved['rng'].keys() >= {'data', 'torch'}
    assert saved['data']['dataset'] == 'tiny' and saved['provenance']['torch'] == torch.__version__


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoints(train, tmp_path, monkeypatch, value):
    train()
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*.pt')}
    assert before.keys() == {'ckpt.pt', 'last.pt'}
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', lambda *a, **k: cross_entropy(*a, **k) * float(value))
    stopped = train(init_from='resume', max_iters=40)
    assert stopped.code == 1 and 'loss is' in stopped.err and 'learning_rate' in stopped.err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*.pt')}


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path):
    train(max_iters=10)
    before = (tmp_path / 'out' / 'last.pt').read_bytes()
    stopped = train(init_from='resume', max_iters=11, learning_rate='1e38', grad_clip=0.0, decay_lr=False, warmup_iters=0)
    assert stopped.code == 1 and 'validation loss is nan at iteration 11' in stopped.err
    assert (tmp_path / 'out' / 'last.pt').read_bytes() == before


def test_a_run_is_not_overwritten_unless_told(train, tmp_path):
    train(seed=1)
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    refused = train(seed=2)
    assert refused.code == 1 and '--overwrite=True' in refused.err and '--init_from=resume' in refused.err
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before
    assert train(seed=2, overwrite=True).code == 0
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['config']['seed'] == 2


def test_an_overwritten_run_leaves_no_checkpoint_behind(train, tmp_path, monkeypatch):
    train()
    monkeypatch.setattr(evaluate, 'token_losses', lambda model, tokens: torch.tensor([math.nan]))
    assert train(overwrite=True).code == 1  # dies before its first checkpoint
    assert not list((tmp_path / 'out').glob('*.pt'))


def test_resuming_keeps_the_model_of_the_checkpoint(train, tmp_path):
    train(n_embd=16)
    assert train(n_embd=32, model_type='gpt', init_from='resume', max_iters=25).code == 0
    saved = torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)
    assert saved['model_type'] == 'fold' and saved['model_args']['n_embd'] == 16 and saved['iter_num'] == 25
    assert saved['config']['model_type'] == 'fold' and saved['config']['n_embd'] == 16


def test_resuming_goes_on_with_the_settings_of_the_run(train, run, tmp_path, data_dir):
    how = dict(batch_size=3, learning_rate=5e-3, weight_decay=0.3, max_iters=20)
    train(out_dir=tmp_path / 'whole', **how)
    train(out_dir=tmp_path / 'parts', **{**how, 'max_iters': 10, 'lr_decay_iters': 20})
    resumed = run('train.py', f"--out_dir={tmp_path / 'parts'}", f'--data_dir={data_dir}', '--init_from=resume',
                  '--max_iters=20', '--weight_decay=0.2', '--device=cpu')
    assert resumed.code == 0, resumed.err
    assert resumed.globals['batch_size'] == 3 and resumed.globals['learning_rate'] == 5e-3
    assert resumed.globals['optimizer'].param_groups[0]['weight_decay'] == 0.2  # given anew
    losses = [dict(records(tmp_path / name, 'loss')) for name in ('whole', 'parts')]
    assert losses[0][11] == losses[1][11]


def test_another_text_of_the_same_name_is_not_resumed(train, tmp_path):
    train()
    path = tmp_path / 'out' / 'last.pt'
    saved = torch.load(path, weights_only=True)
    saved['data']['sha256'] = '0' * 64
    torch.save(saved, path)
    stopped = train(init_from='resume', max_iters=25)
    assert stopped.code == 1 and 'is not the text' in stopped.err


def test_the_recorded_sizes_are_those_of_the_model(train, tmp_path):
    train(out_dir=tmp_path / 'source')
    train(init_from=tmp_path / 'source' / 'ckpt.pt', n_embd=64, n_layer=7, bias=True, max_iters=1)
    saved = torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)
    assert [saved['config'][key] for key in ('n_embd', 'n_layer', 'bias')] == [16, 2, False]


def test_resuming_a_finished_run_does_no_harm(train, tmp_path):
    train()
    before = final_weights(tmp_path / 'out')
    again = train(init_from='resume')
    assert again.code == 0 and 'nothing left to train' in again.out
    assert same(before, final_weights(tmp_path / 'out'))


@pytest.mark.parametrize('source, target, window', [('gpt', 'fold', 4), ('fold', 'gpt', 4), ('gpt', 'gpt', 16), ('fold', 'fold', 4)])
def test_the_weights_of_either_model_start_the_other(train, tmp_path, source, target, window):
    train(source, out_dir=tmp_path / 'source')
    block_size = dict(block_size=window) if target == 'gpt' else {}
    started = train(target, out_dir=tmp_path / 'target', init_from=tmp_path / 'source' / 'ckpt.pt', max_iters=0, **block_size)
    assert started.code == 0, started.err
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)['model'] for name in ('source', 'target'))
    wpe = 'transformer.wpe.weight'
    assert b[wpe].shape[0] == window and torch.equal(a.pop(wpe)[:window], b.pop(wpe))
    assert same(a, b)


def test_a_nanogpt_checkpoint_starts_a_fold(train, tmp_path):
    train('gpt', out_dir=tmp_path / 'source')
    saved = torch.load(tmp_path / 'source' / 'ckpt.pt', weights_only=True)
    args = {key: saved['model_args'][key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    torch.save({'model': saved['model'], 'model_args': args, 'iter_num': 3, 'config': {}}, tmp_path / 'nano.pt')
    started = train('fold', init_from=tmp_path / 'nano.pt')
    assert started.code == 0, started.err


def no_network(monkeypatch):
    real = prepare_module.prepare

    def prepare(dataset, **how):
        if dataset == 'shakespeare':
            raise prepare_module.DownloadError('error: no network')
        return real(dataset, **how)
    monkeypatch.setattr(prepare_module, 'prepare', prepare)


def test_without_network_the_offline_data_set_is_used_and_named_everywhere(train, tmp_path, monkeypatch):
    no_network(monkeypatch)
    done = train(dataset='shakespeare', offline_dataset='tiny')
    assert done.code == 0 and "TRAINING ON 'tiny' INSTEAD" in done.out
    logged = [line for line in done.out.splitlines() if line.startswith('iter ')]
    assert logged and all('[data: tiny, in place of shakespeare]' in line for line in logged)
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'log.jsonl').read_text().splitlines()]
    assert all(line['dataset'] == 'tiny' for line in lines)
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['data']['dataset'] == saved['config']['dataset'] == 'tiny' and saved['data']['wanted'] == 'shakespeare'
    resumed = train(dataset='shakespeare', init_from='resume', max_iters=25)
    assert resumed.code == 0 and '[data: tiny, in place of shakespeare]' in resumed.out


def test_without_network_and_without_an_offline_data_set_it_stops(train, monkeypatch):
    no_network(monkeypatch)
    stopped = train(dataset='shakespeare')
    assert stopped.code == 1 and 'no network' in stopped.err


def test_a_missing_data_set_is_prepared(train, tmp_path, monkeypatch, data_dir):
    seen = []
    real = prepare_module.prepare

    def prepare(dataset, **how):
        seen.append(dataset)
        return real(dataset, file=str(data_dir / 'tiny.txt'), **how)
    monkeypatch.setattr(prepare_module, 'prepare', prepare)
    for again in (False, True):
        assert train(dataset='mine', data_dir=tmp_path / 'data', max_iters=1, overwrite=again).code == 0
    assert seen == ['mine']
