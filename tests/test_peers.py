"""The peers: their papers' equations, token by token in numpy, and what holds of every carry."""
from pathlib import Path

import pytest
import torch
from literal import LAYERS, Literal
from small import SEGMENT, V, all_logits, assert_equal, gradients, make, reach, tokens

from lib.contract import adamw, blank_carry, count_parameters, make_model, unit
from lib.gradients import backpropagate
from lib.rows import Rows, rowwise
from lib.streaming import empty_state, new_state, read_
from model import GPTConfig
from models import MODELS
from models.deltanet import GatedDeltaRule

l = SEGMENT
TURNED = dict(position='rotary', rotary_base=50.0)
CASES = {
    'gpt': dict(window=l, **TURNED), 'transformer_xl': TURNED,
    'transformer_xl, not stopped': dict(stop=False, **TURNED), 'transformer_xl, learned': {},
    'rmt': dict(memory=1, **TURNED), 'rmt, 4': dict(memory=4, bias=False, **TURNED),
    'rmt, learned': {}, 'infini': TURNED, 'infini, delta': dict(update='delta', **TURNED),
    'infini, learned': dict(update='delta'), 'linear': {}, 'deltanet': {},
    'deltanet, no bias': dict(bias=False), 'feedback': dict(memory=l, **TURNED),
    'feedback, none': dict(memory=1, position='none'), 'lstm': {}}
EVERY = pytest.mark.parametrize('case', CASES)

def make_case(case):
    """A small model in float64, of steps of four tokens where their number is free."""
    model = make(case.split(',')[0], **CASES[case])
    model.at_once = getattr(model, 'at_once', 0) and 4
    return model

@EVERY
def test_the_equations(case):
    model, idx = make_case(case), tokens(2, 4 * l + 2)
    for row, logits in zip(idx, all_logits(model, idx).detach()):
        assert_equal(logits, Literal(model).logits(row.tolist()))

@EVERY
def test_chunks_with_the_carry_passed_equal_one_call(case):
    """And a carry has the same size wherever it is valid."""
    model, idx = make_case(case), tokens(3, 8 * l)
    whole, _, last = model(idx, idx)
    for sizes in ([l, 7 * l], [2 * l, 3 * l, 3 * l], unit(model)):
        parts, carry = [], None
        for chunk in idx.split(sizes, dim=1):
            logits, _, carry = model(chunk, chunk, carry)
            rowwise(lambda c, d: assert_equal(c.shape, d.shape), carry, blank_carry(model, 3))
            parts.append(logits)
        assert_equal((torch.cat(parts, dim=1), carry), (whole, last))

@EVERY
def test_streamed_it_is_the_teacher_forced_forward_pass(case):
    model, idx = make_case(case), tokens(2, 5 * l + 2)
    expected = all_logits(model, idx).detach()
    for state in (new_state(model, 2), empty_state(model, 2, cached=False)):
        for t, token in enumerate(idx.split(1, dim=1)):
            assert_equal(read_(model, token, state), expected[:, t])

@EVERY
def test_causality_and_what_is_seen(case):
    """A token changes no logit before it, but its own and all that the paper lets see it."""
    model, idx = make_case(case), tokens(1, 7 * l)
    before = all_logits(model, idx)
    for t in (0, 1, l - 1, l, 3 * l + 1, 7 * l - 1):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        differs = (all_logits(model, changed) != before).any(dim=-1)[0]
        end = seen_until(case, t)
        assert not differs[:t].any() and differs[t:end].all() and not differs[end:].any()

def seen_until(case, t, layers=LAYERS):
    """The end of the tokens that token t can change: of a window or segment a layer, or of all."""
    ends = {'gpt': t + 1 + layers * (l - 1), 'transformer_xl': (t // l + 1 + layers) * l}
    return ends.get(case.split(',')[0], 10 ** 6)

@EVERY
def test_gradient_reaches_as_far_as_the_paper_says_and_no_further(case):
    """In one call, and through a carry that is passed on, unless it is detached."""
    T = 7 * l
    for chunk, detach in ((T, False), (2 * l, False), (2 * l, True)):
        model = make_case(case)
        stopped = case.startswith('transformer_xl') and CASES[case].get('stop', True)
        first = next(t for t in range(T) if seen_until(case, t, 0 if stopped else LAYERS) >= T)
        first = max(first, (T - 1) // chunk * chunk) if detach else first
        found = reach(model, tokens(1, T), chunk, detach) > 0
        assert not found[:first].any() and found[first:].all(), (chunk, detach)

@EVERY
def test_segments_computed_anew_give_the_same_gradient(case):
    model, x, y = make_case(case), tokens(2, 5 * l), tokens(2, 5 * l)
    assert_equal(*((backpropagate(model, x, y, recompute=anew), gradients(model))
                   for anew in (False, True)))

@EVERY
def test_rows_never_influence_each_other(case):
    model, idx = make_case(case), tokens(3, 4 * l)
    carry = rowwise(lambda c: torch.rand_like(c) + 0.1, blank_carry(model, 3))
    logits, _, last = model(idx, idx, carry)
    for row in (slice(b, b + 1) for b in range(3)):
        alone, _, after = model(idx[row], idx[row], rowwise(lambda x: x[row], carry))
        assert_equal((alone, after), (logits[row], rowwise(lambda x: x[row], last)))

def test_gated_delta_rule_of_another_library():
    """A layer of transformers 5.24.0, Qwen3-Next's, in float32, with an eps D times as small, as
    it divides queries by sqrt(D) before the norm."""
    golden = torch.load(Path(__file__).parent / 'golden' / 'deltanet_transformers.pt')
    w, H, C = golden['weights'], golden['heads'], golden['x'].size(-1)
    qkvz, ba = w['in_proj_qkvz.weight'].view(H, 4, -1, C), w['in_proj_ba.weight'].view(H, 2, C)
    rule = GatedDeltaRule(GPTConfig(n_embd=C, n_head=H, bias=False, position='none'))
    rule.load_state_dict({
        'c_attn.weight': qkvz[:, :3].transpose(0, 1).reshape(3 * C, C),
        'gate.weight': qkvz[:, 3].reshape(C, C), 'norm.weight': w['norm.weight'],
        'rates.weight': ba.flip(1).transpose(0, 1).reshape(2 * H, C), 'A': w['A_log'],
        'b': w['dt_bias'], 'conv': w['conv1d.weight'].view(1, 3 * C, 4),
        'c_proj.weight': w['out_proj.weight']})
    y, memory = rule(golden['x'][:, :40])
    y = torch.cat((y, rule(golden['x'][:, 40:], memory)[0]), dim=1)
    torch.testing.assert_close(y, golden['y'], rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('kind, keys, nbytes', [
    ('gpt', dict(window=12), 49_152), ('transformer_xl', {}, 24_576), ('rmt', {}, 2_048),
    ('rmt', dict(memory=12), 6_144), ('infini', dict(update='delta'), 67_584),
    ('linear', {}, 67_584), ('deltanet', {}, 83_968), ('feedback', {}, 6_144),
    ('lstm', {}, 3_680)])
def test_parameters_state_and_what_decays(kind, keys, nbytes):
    model = make_model(kind, dict(block_size=96, vocab_size=65, n_embd=128, n_layer=4, n_head=4,
                                  bias=False, position='learned', **keys))
    assert count_parameters(model) == pytest.approx(800_000, rel=0.01)
    assert Rows(carry=blank_carry(model)).nbytes == nbytes
    assert kind != 'lstm' or model.transformer.h[0].weight_hh_l0.std() > 0.03  # torch's own
    decayed, kept = adamw(model, 0.1, 1e-3, (0.9, 0.99), 'cpu').param_groups
    assert {p.dim() for p in kept['params']} == {1} and decayed['weight_decay'] == 0.1

@pytest.mark.parametrize('kind, keys, message', [
    *((kind, dict(window=l), 'takes window=0') for kind in MODELS if kind not in ('gpt', 'fold')),
    *((kind, dict(position='rotary'), 'means nothing') for kind in ('linear', 'deltanet', 'lstm')),
    *((kind, dict(segment_size=5), 'multiple of') for kind in ('transformer_xl', 'rmt', 'infini')),
    ('infini', dict(update='no'), 'update must be one of'), ('rmt', dict(memory=0), 'memory must')])
def test_keys_that_mean_nothing_are_refused(kind, keys, message):
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        make(kind, **keys)
