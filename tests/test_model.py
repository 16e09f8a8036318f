"""What must always hold of the two models: to rounding error in float64, wherever it is of that."""
import math
import os

import pytest
import torch
from literal import Literal
from small import (
    ALL_KEYS,
    KEYS,
    SEGMENT,
    SIZES,
    C,
    V,
    all_logits,
    assert_equal,
    gradients,
    make,
    reach,
    tokens,
)

from lib.checkpoint import load_weights
from lib.contract import adamw, blank_carry, count_parameters, flops_per_token, make_model
from lib.gradients import backpropagate
from lib.rows import rowwise
from model import GPT, GlobalBlock, GPTConfig, LocalBlock

l = SEGMENT
EVERY = pytest.mark.parametrize('kind, sizes', [
    *(('fold', keys) for keys in KEYS), ('fold', {'n_local': 0, 'n_global': 1}),
    ('fold', {'segment_size': 1}), ('gpt', {}), ('gpt', {'window': l}),
    ('gpt', {'window': l, 'position': 'rotary'}), ('gpt', {'position': 'rotary'})])

def small_gpt(**sizes):
    """The baseline with the window of the small fold's segment."""
    return make('gpt', **{'block_size': l, **sizes})

def folded(gpt, n_local, **keys):
    """A fold with a GPT's weights, key for key."""
    c = gpt.config
    fold = make('fold', n_local=n_local, n_global=c.n_layer - n_local, bias=c.bias,
                **{'position': c.position, **keys})
    fold.load_state_dict(gpt.state_dict())
    return fold

@pytest.mark.parametrize('bias', ['bias', 'nobias'])
def test_the_baseline_is_nanogpt(bias):
    """Its weights, key for key: logits, loss, every gradient, and 20 updates."""
    folder = os.path.join(os.path.dirname(__file__), 'golden')
    golden = torch.load(os.path.join(folder, f'nanogpt_{bias}.pt'), weights_only=True)
    model, train, losses = GPT(GPTConfig(**golden['config'])), golden['train'], []
    model.load_state_dict(golden['state_dict'])
    logits, loss, carry = model(*(golden[key].long() for key in ('idx', 'targets')))
    loss.backward()
    assert carry is None and abs(loss.item() - golden['loss']) < 2e-6
    torch.testing.assert_close(logits, golden['logits'], rtol=1e-5, atol=2e-6)
    for name, grad in gradients(model).items():
        expected = golden['grads'].pop(name)
        assert (grad - expected).abs().max() <= 2e-5 * expected.abs().max(), name
    assert not golden['grads']
    rates = [train[key] for key in ('weight_decay', 'learning_rate', 'betas')]
    optimizer = adamw(model, *rates, 'cpu')
    for x, y in zip(train['x'].long(), train['y'].long()):
        losses.append(backpropagate(model, x, y)[0].item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), train['grad_clip'])
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(train['losses'], abs=5e-5)  # updates amplify rounding

@pytest.mark.parametrize('kind', ['gpt', 'fold'])
def test_only_matrices_and_embeddings_decay(kind):
    model = make(kind, carry='gated')
    decayed, kept = adamw(model, 0.1, 1e-3, (0.9, 0.99), 'cpu').param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed['weight_decay'] == 0.1 and kept['weight_decay'] == 0
    parts = [[names[id(p)] for p in group['params']] for group in (kept, decayed)]
    assert parts[0] == [name for name in names.values() if 'bias' in name or '.ln_' in name]
    assert sorted(sum(parts, [])) == sorted(names.values())

@pytest.mark.parametrize('kind', ['gpt', 'fold'])
def test_initialization(kind):
    model = make_model(kind, dict(block_size=64, segment_size=64, vocab_size=300, n_layer=8,
                                  n_local=3, n_global=5, n_head=2, n_embd=128, carry='gated'))
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
        if p.dim() == 2 and 'gate' not in name:
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        elif 'gate' not in name:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert kind == 'gpt' or (model.carry_gate.bias.sigmoid() > 0.7).all()  # it starts by keeping

def test_dropout_in_training_alone_of_embeddings_attention_and_both_branches(monkeypatch):
    model, rates = make('gpt', dropout=0.5), []
    monkeypatch.setattr(torch, 'dropout', lambda x, p, on: rates.append(p * on) or x)
    for training in (True, False):
        model.train(training)(tokens(1, l))
    assert rates.count(0.5) == 1 + 3 * model.config.n_layer == sum(map(bool, rates))

@pytest.mark.parametrize('kind, L', [('gpt', 80), ('fold', 160)])
def test_windows_short_and_long_attend_alike(kind, L, monkeypatch):
    """The fused kernel that long windows use, and the softmax spelled out for short ones."""
    model, idx = make(kind, block_size=L, segment_size=80), tokens(2, L)
    monkeypatch.setattr('model.FUSED_FROM', 65)
    long = all_logits(model, idx)
    for T in (1, 30, 64, 65):
        assert_equal(all_logits(model, idx[:, :T]), long[:, :T])
    monkeypatch.setattr('model.FUSED_FROM', 1000)
    assert_equal(all_logits(model, idx), long)

@pytest.mark.parametrize('n_local, n_global, bias, keys', [
    (0, 2, False, {}), (1, 3, False, {}), (3, 1, True, KEYS[18]),
    *((2, 2, True, keys) for keys in KEYS[:24] if keys['carry'] == 'plain')])
def test_one_segment_is_a_gpt(n_local, n_global, bias, keys):
    """Parameters, logits, loss and gradients."""
    gpt = small_gpt(n_layer=n_local + n_global, bias=bias,
                    position=keys.get('position', 'learned'))
    fold = folded(gpt, n_local, **keys)
    shapes = [[(k, v.shape) for k, v in model.state_dict().items()] for model in (gpt, fold)]
    assert shapes[0] == shapes[1] and count_parameters(fold) == count_parameters(
        make('gpt', block_size=99, n_layer=n_local + n_global, bias=bias))  # places are not counted
    assert [*map(type, fold.transformer.h)] == [LocalBlock] * n_local + [GlobalBlock] * n_global
    idx, targets = tokens(2, l), tokens(2, l)
    assert_equal(all_logits(gpt, idx), all_logits(fold, idx))
    assert_equal(*(backpropagate(model, idx, targets)[0] for model in (gpt, fold)))
    assert_equal(gradients(gpt), gradients(fold))

@pytest.mark.parametrize('n_local, n_global', [(0, 1), (2, 2), (1, 3)])
def test_the_equations(n_local, n_global):
    model, idx = make(n_local=n_local, n_global=n_global), tokens(2, 4 * l)
    for row, logits in zip(idx, all_logits(model, idx).detach()):
        assert_equal(logits, Literal(model).logits(row.tolist()))

@ALL_KEYS
def test_the_equations_with_each_combination_of_keys(keys):
    model, idx = make(rotary_base=50.0, **keys), tokens(1, 4 * l)
    assert_equal(all_logits(model, idx).detach()[0], Literal(model).logits(idx[0].tolist()))

@pytest.mark.parametrize('kind, sizes', [*(('fold', keys) for keys in KEYS),
                                         ('gpt', {'window': l, 'position': 'rotary'})])
def test_chunks_with_the_carry_passed_equal_one_call(kind, sizes):
    model, idx = make(kind, **sizes), tokens(3, 8 * l)
    whole, _, last = model(idx, idx)
    for sizes in ([1, 7], [2, 3, 3], [1] * 8):  # segments
        parts, carry = [], None
        for chunk in idx.split([n * l for n in sizes], dim=1):
            logits, _, carry = model(chunk, chunk, carry)
            parts.append(logits)
        assert_equal((torch.cat(parts, dim=1), carry), (whole, last))
    for T in (1, l, l + 2, 2 * l + 1):  # a short last segment changes and carries on nothing
        logits, _, short = model(idx[:, :T], idx[:, :T])
        assert_equal(logits, whole[:, :T])
        if T % l:
            with pytest.raises(ValueError, match='carry .*of a (whole )?segment'):
                model(idx, carry=short)

@EVERY
def test_causality(kind, sizes):
    """Across the borders of segments, too; and what follows the changed token does change."""
    model, idx = make(kind, **sizes), tokens(1, 4 * l)
    before = all_logits(model, idx)
    for t in (0, 1, l - 1, l, 2 * l + 1, 4 * l - 1):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after = all_logits(model, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()

@ALL_KEYS
def test_reach_is_the_unrolled_length_and_ends_where_the_carry_is_detached(keys):
    """Without recurrence it is that of the windows, one behind the other."""
    model = make(**keys)
    windows = {'local': 2 * l - 1, 'none': l - 1}.get(keys['past'], 16 * l)  # beside the token
    windows += model.config.n_local * (l - 1) if keys['local'] == 'sliding' else 0
    for cut in (1, 4, 16):
        found, whole = reach(model, tokens(1, 16 * l), cut * l), min(cut * l, 1 + windows)
        assert (found[:-whole] == 0).all() and (found[-whole:] > 0).all(), cut

def test_reach_of_a_sliding_window_is_a_window_a_layer():
    model = make('gpt', window=l, position='rotary')
    whole = 1 + model.config.n_layer * (l - 1)
    found = reach(model, tokens(1, 16 * l), 16 * l)
    assert (found[:-whole] == 0).all() and (found[-whole:] > 0).all()

@EVERY
def test_rows_never_influence_each_other(kind, sizes):
    model, idx = make(kind, **sizes), tokens(3, 4 * l)
    carry = rowwise(torch.randn_like, blank_carry(model, 3))
    logits, _, last = model(idx, idx, carry)
    for row in (slice(b, b + 1) for b in range(3)):
        alone, _, after = model(idx[row], idx[row], rowwise(lambda x: x[row], carry))
        assert_equal((alone, after), (logits[row], rowwise(lambda x: x[row], last)))

@pytest.mark.parametrize('position', ['learned', 'rotary'])
def test_without_the_carry_it_is_the_baseline_of_the_same_window(position):
    """Dropped by hand or by past='none'; with it, it is not."""
    gpt, idx = small_gpt(position=position), tokens(2, 4 * l)
    fold, none = folded(gpt, 2), folded(gpt, 2, past='none')
    alone, dropped = (torch.cat([all_logits(model, segment) for segment in idx.split(l, dim=1)], 1)
                      for model in (gpt, fold))
    assert_equal(dropped, alone)
    assert_equal(all_logits(none, idx), alone)
    difference = (all_logits(fold, idx) - alone).abs().amax(dim=(0, 2))
    assert difference[:l].max() < 1e-10 and difference[l:].min() > 1e-4

@pytest.mark.parametrize('position, n_local, past', [
    ('learned', 0, 'evolving'), ('rotary', 1, 'frozen'), ('learned', 3, 'local')])
def test_a_fold_with_closed_gates_is_the_baseline_and_with_open_ones_the_fold(
        position, n_local, past):
    gpt, idx = small_gpt(position=position, block_size=4 * l), tokens(2, 4 * l)
    keys = dict(position=position, past=past, n_local=n_local, n_global=4 - n_local)
    fold, usual = make_model('fold', {**SIZES, **keys, 'past_gate': True}).double(), make(**keys)
    for model in (fold, usual):
        load_weights(model, gpt.state_dict())
    logits, loss, _ = fold(idx, idx)
    alone = [all_logits(gpt, segment) for segment in idx.split(l, dim=1)]
    assert_equal(logits, torch.cat(alone, dim=1))
    loss.backward()
    grads = gradients(fold)
    assert all(grads[name].all() for name in fold.state_dict() if 'past_gate' in name)
    for block in fold.transformer.h[n_local:]:
        block.attn.past_gate.data += 1 / 16
    assert_equal(all_logits(fold, idx), all_logits(usual, idx))
    with pytest.raises(SystemExit, match=f'has a .*h.{n_local}.attn.past_gate: .*=True and no lar'):
        load_weights(usual, fold.state_dict())

def test_a_window_of_the_whole_block_is_the_usual_gpt():
    for position in ('learned', 'rotary'):
        gpt, window = (make('gpt', position=position, window=W, block_size=8) for W in (0, 8))
        window.load_state_dict(gpt.state_dict())
        idx = tokens(2, 8)
        assert_equal(all_logits(window, idx), all_logits(gpt, idx))

def test_the_carry_is_the_output_before_the_final_norm_and_mixed_if_gated():
    """Place by place: g * old + (1 - g) * new, g = sigmoid(W [old ; new] + b)."""
    for kind in ('plain', 'gated'):
        model, idx, old = make(carry=kind), tokens(2, 3 * l), None
        for x in model.local(idx)[0].split(l, dim=1):
            new = model.globally(old, x)
            if old is not None and kind == 'gated':
                both = torch.cat((old, new), dim=-1) @ model.carry_gate.weight.mT
                g = 1 / (1 + torch.exp(-both - model.carry_gate.bias))
                new = g * old + (1 - g) * new
            old = new
        logits, _, carry = model(idx, idx)
        assert_equal(carry, old)
        assert_equal(model.lm_head(model.transformer.ln_f(carry)), logits[:, -l:])
        assert hasattr(model, 'carry_gate') == (kind == 'gated')  # else a GPT's parameters

def layer(T, keys):
    """Products of numbers in a layer for T tokens that attend to `keys`, masked ones too."""
    return T * 12 * C * C + 2 * T * keys * C

LAST = layer(l, 2 * l) + 2 * l * C * C  # the last global layer: keys and values of the past half
SLIDING = layer(l, l) + 4 * layer(l, 2 * l - 1)  # five segments, the first alone

@pytest.mark.parametrize('kind, T, sizes, expected', [
    ('gpt', 17, {'block_size': 17}, 4 * layer(17, 17)),
    ('gpt', 96, {'block_size': 96}, 4 * layer(96, 96)), ('fold', l, {}, 4 * layer(l, l)),
    ('fold', 5 * l, {}, 12 * layer(l, l) + 4 * layer(2 * l, 2 * l) + 4 * LAST),
    ('fold', 2 * l, {'carry': 'gated'},
     6 * layer(l, l) + layer(2 * l, 2 * l) + LAST + 2 * l * C * C),
    ('gpt', 5 * l, {'window': l}, 4 * SLIDING), ('fold', 5 * l, {'past': 'none'}, 20 * layer(l, l)),
    ('fold', 5 * l, {'local': 'sliding', 'past': 'frozen'}, 2 * (SLIDING + layer(l, l) + 4 * LAST)),
    ('fold', 5 * l, {'past': 'local'}, 10 * layer(l, l) + 2 * (layer(l, l) + 4 * LAST))])
def test_flops_are_those_of_what_is_read_and_of_no_more(kind, T, sizes, expected):
    """A product costs two operations forward and four backward; no gradient is left behind."""
    model = make(kind, **sizes)
    assert flops_per_token(model, T) * T == 6 * (expected + T * C * V)

    class Looks(type(model)):  # at numbers, which shapes alone have not
        def embed(self, idx, *place):
            return super().embed(idx, *place) if idx.max().item() < V else None
    model.__class__ = Looks
    assert flops_per_token(model, T) * T == 6 * (expected + T * C * V)
    assert not gradients(model)

@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_weights_fold_and_unfold_and_come_from_compiled_parallel_and_old_models(prefix):
    gpt, fold, back = small_gpt(block_size=12), make(), small_gpt()
    saved = {prefix + name: value for name, value in gpt.state_dict().items()}
    saved[prefix + 'transformer.h.0.attn.bias'] = torch.ones(1, 1, 3, 3).tril()
    del saved[prefix + 'lm_head.weight']  # tied
    load_weights(fold, saved)
    load_weights(back, fold.state_dict())
    gpt.transformer.wpe.weight.data = gpt.transformer.wpe.weight.data[:l]
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), gpt.parameters()))

@pytest.mark.parametrize('kind, sizes, message', [
    ('gpt', dict(n_embd=10, n_head=3), 'n_embd=10 must be a multiple of n_head=3'),
    ('gpt', dict(dropout=1.0), r'dropout must lie in'), ('gpt', dict(dropout=math.nan), 'dropout'),
    ('gpt', dict(n_layer=0), 'n_layer must be at least 1, not 0'), ('gpt', dict(n_head=0), 'n_h'),
    ('gpt', dict(vocab_size=-1), 'vocab_size'), ('gpt', dict(block_size=10 ** 14), 'no memory for'),
    ('fold', dict(block_size=100, segment_size=12), 'a multiple of segment_size=12'),
    ('fold', dict(segment_size=0), 'segment_size must be'), ('fold', dict(n_global=0), 'n_global'),
    ('fold', dict(n_local=-1), 'n_local must be at least 0'), ('fold', dict(n_head=5), 'n_head=5'),
    ('fold', dict(carry='half'), "not 'half'"), ('fold', dict(past='l'), 'past must be one of'),
    ('fold', dict(past='none', carry='gated'), 'no carry to mix with'),
    ('fold', dict(past='none', past_gate=True), 'no past half to open to'),
    ('fold', dict(window=3), 'a fold takes window=0'), ('gpt', dict(window=-1), 'window must be'),
    ('gpt', dict(position='r'), 'position must be'), ('fold', dict(local='l'), 'local must be'),
    ('gpt', dict(position='rotary', n_embd=6), 'an even size'),
    ('fond', {}, "must be one of 'gpt', 'fold'.*not 'fond'"), (None, {}, 'not None')])
def test_sizes_that_no_model_can_have(kind, sizes, message):
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        make_model(kind, {**SIZES, **sizes})

def test_calls_that_no_model_can_answer():
    for model, T, carry in ((make(), 0, None), (make(), 3, torch.zeros(1, l, C)),
                            (small_gpt(), 0, None), (small_gpt(), l + 1, None)):
        with pytest.raises(ValueError, match='takes 1 token or more|cannot read . tokens'):
            model(tokens(2, T), carry=carry)
