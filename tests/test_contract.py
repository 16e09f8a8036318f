"""One computation and one contract: what model.py says holds everywhere, and so does a model that
has nothing but a forward pass and a config."""
import numpy as np
import pytest
import torch
from conftest import check
from small import KEYS, TOYS, Recurrent, all_logits, assert_equal, gradients, make, tokens
from test_train import records
from torch.nn import functional as F

from lib.checkpoint import load, load_model
from lib.contract import carries, check_contract, unit
from lib.gradients import backpropagate
from lib.rows import rowwise
from lib.scoring import token_losses
from lib.streaming import check_reading, generate, new_state, read_
from model import MLP, CausalSelfAttention, FoldGPT
from models import MODELS
from prepare import Tokenizer

OWN = {kind: {'width': 7} for kind in TOYS}  # keys
SMALL = dict(block_size=16, decay_from=1.0, learning_rate=0.01, stream=True, max_iters=8,
             eval_interval=4)

def halved(self, x, mlp=MLP.forward):
    return 0.5 * mlp(self, x)

def scaled(self, x, before=None, cache=None, attention=CausalSelfAttention.forward):
    return attention(self, 1.5 * x, before, cache)

@pytest.mark.parametrize('kind', [*MODELS, *TOYS])
def test_every_model_keeps_the_contract(kind):
    """Shapes, the mean loss, rows first in the carry, and logits that are the same piece by piece:
    those of a model of your own as well, once it is in MODELS."""
    model = make(kind)
    B, T = 2, min(3 * unit(model), model.config.block_size)
    idx, targets = tokens(B, T), tokens(B, T)
    targets[0, 0] = -1
    logits, loss, carry = model(idx, targets)
    last, none, _ = model(idx)
    assert logits.shape == (B, T, model.config.vocab_size) and none is None
    assert_equal(last, logits[:, -1:])
    assert_equal(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    rowwise(lambda c: assert_equal(len(c), B), carry)
    check_reading(model)

def streamed(model, idx):
    """The logits after every token of idx (1, T), read one by one."""
    state = new_state(model)
    assert (state.cache is not None) == bool(getattr(model, 'extend', None))
    return torch.stack([read_(model, token, state).clone() for token in idx.split(1, 1)], dim=1)

def everywhere(model, x, y):
    """Training loss and gradient, what is written, evaluation losses; all of one forward pass."""
    loss, _ = backpropagate(model, x, y)
    text = generate(model, x[:, :5], 25, generator=torch.Generator().manual_seed(1))
    scored = token_losses(model, x[0])
    logits = all_logits(model, x).detach()
    assert_equal(streamed(model, x), logits)
    assert_equal(loss, F.cross_entropy(logits[0], y[0]))
    nats = F.cross_entropy(logits[0, :-1], x[0, 1:], reduction='none')
    torch.testing.assert_close(scored.double(), nats, rtol=0, atol=1e-5)
    return loss, gradients(model)['transformer.wte.weight'], text, scored

EDITS = (MLP, halved), (CausalSelfAttention, scaled)

@pytest.mark.parametrize('kind, sizes', [
    ('gpt', {'block_size': 30}), ('fold', {}), ('fold', {'segment_size': 20}),
    ('gpt', {'block_size': 30, 'window': 6}), ('fold', {'carry': 'gated'}),
    *(('fold', KEYS[i]) for i in (10, 21)), ('queued_fold', {})])
def test_an_edit_to_model_py_holds_everywhere(kind, sizes, monkeypatch):
    """Training loss and gradient, evaluation loss and what is written change, and all of them are
    those of the edited forward pass; the caches go on serving."""
    model, x, y = make(kind, **{'block_size': 60, **sizes}), tokens(1, 30), tokens(1, 30)
    found = []
    for part, forward in ((MLP, MLP.forward), *EDITS):
        with monkeypatch.context() as patch:
            patch.setattr(part, 'forward', forward)
            found.append(everywhere(model, x, y))
    for before, *others in zip(*found):
        assert all((before != after).any() for after in others)

@pytest.fixture
def toys(monkeypatch):
    for name, pair in TOYS.items():
        monkeypatch.setitem(MODELS, name, pair)

def test_fused_attention_that_sees_the_future_is_refused(monkeypatch):
    """Which only a window of many tokens takes."""
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr('torch.nn.functional.scaled_dot_product_attention',
                        lambda *args, is_causal: real(*args))
    with pytest.raises(SystemExit, match='sees what is still to come'):
        check_reading(make('gpt', block_size=140))

def test_a_leak_beyond_a_few_tokens_or_that_training_opens_is_found(
        train, run, tmp_path, monkeypatch):
    real = FoldGPT.forward

    def leak(scale):  # logits see what is one token ahead
        def forward(self, idx, *more, **named):
            logits, *rest = real(self, idx, *more, **named)
            return logits + F.pad(logits[:, 1:], (0, 0, 0, 1)) * scale(self, idx.size(1)), *rest
        monkeypatch.setattr('model.FoldGPT.forward', forward)
    leak(lambda model, T: model.lm_head.weight.std() * (T > 64))
    done = train(max_iters=1, block_size=72, dropout=0.0)
    assert done.code == 1 and 'sees what is still to come' in done.err
    assert not (tmp_path / 'out' / 'last.pt').exists()

    leak(lambda model, T: model.transformer.ln_f.bias[0])
    done = train(max_iters=3, bias=True, dropout=0.0)
    assert done.code == 1 and 'sees what is still to come' in done.err
    assert (tmp_path / 'out' / 'last.pt').exists() and 'iter 3: validation' not in done.out
    assert 'sees what is still to come' in run('probe.py', f"--out_dir={tmp_path / 'out'}").err

BROKEN = [lambda *found: found[:2], lambda *found: found[0], lambda *found: None,
          lambda logits, loss, c: (logits[:, 0], loss, c), lambda logits, loss, c: (logits, 0.0, c),
          lambda logits, loss, c: (logits[..., 1:], loss, c), lambda y, loss, c: (y, None, c),
          lambda logits, loss, c: (logits, loss, c[0].T), lambda *found: (*found[:2], (found[2],)),
          lambda logits, loss, c: (logits, loss, (c[0], c[1][None])),
          lambda logits, loss, c: (logits, loss, {'carry': c})]

def test_a_model_that_breaks_the_contract_is_told_in_a_line(toys, train, tmp_path, monkeypatch):
    forward = Recurrent.forward
    for change in BROKEN:
        monkeypatch.setattr(Recurrent, 'forward', lambda *args, change=change, **kwargs: change(
            *forward(*args, **kwargs)))
        with pytest.raises(SystemExit, match=r'Recurrent.forward\(\) must return logits \(B, T, V'):
            check_contract(make('recurrent'))
    check(train('recurrent', **SMALL), 'lib/contract.py')
    assert not (tmp_path / 'out' / 'last.pt').exists()

@pytest.mark.parametrize('kind', [*TOYS, 'queued_fold'])
def test_a_model_with_nothing_but_forward_does_all_that_others_do(
        kind, toys, run, train, data_dir, tmp_path):
    folder, again = tmp_path / 'run', tmp_path / 'again'
    for out_dir, settings in ((folder, {}), (again, {'max_iters': 4}),
                              (again, {'init_from': 'resume'})):
        done = train(kind, out_dir=out_dir, **{**SMALL, **OWN.get(kind, {}), **settings})
        assert done.code == 0, done.err
    saved, resumed = load(folder / 'last.pt'), load(again / 'last.pt')
    assert all(torch.equal(value, resumed['model'][name]) for name, value in saved['model'].items())
    model, tokenizer = load_model(saved).eval(), Tokenizer(saved['tokenizer'])
    assert kind not in TOYS or model.config.width == 7

    scored = [loss for _, loss in records(folder, 'val_loss')]
    val = torch.from_numpy(np.fromfile(data_dir / 'tiny' / 'val.bin', np.uint16).astype(np.int64))
    loss = token_losses(model, val).mean().item()
    assert scored[0] > loss == pytest.approx(scored[-1], abs=1e-6)
    if carries(model):
        nats = F.cross_entropy(all_logits(model, val[None, :99])[0], val[1:100], reduction='none')
        torch.testing.assert_close(token_losses(model, val[:100]), nats, rtol=0, atol=1e-5)

    model, idx = model.double(), val[None, :16]
    assert_equal(streamed(model, idx), all_logits(model, idx).detach())
    written = run('sample.py', f'--out_dir={folder}', '--start=ape', '--temperature=0',
                  '--max_new_tokens=20')
    expected = generate(model, torch.tensor([tokenizer.encode('ape').tolist()]), 20, temperature=0)
    assert written.code == 0 and written.out == tokenizer.decode(expected[0].tolist()) + '\n'
