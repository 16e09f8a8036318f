"""The peers: what tests/test_properties.py does not say of them."""
from pathlib import Path

import pytest
import torch
from small import SEGMENT, make
from torch.nn import functional as F

from lib.contract import adamw, blank_carry, count_parameters, make_model
from lib.rows import Rows
from model import GPTConfig
from models import MODELS
from models.deltanet import GatedDeltaRule

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

def test_what_is_forgotten_at_once_leaves_gradients_finite():
    rule = GatedDeltaRule(GPTConfig(n_embd=8, n_head=2, position='none'))
    rule.A.data.fill_(5)
    rule(torch.randn(1, 32, 8))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in rule.parameters())

@pytest.mark.parametrize('kind', ['linear', 'infini'])
def test_features_that_vanish_leave_a_number(kind):
    model = make(kind, bias=True).float()
    for block in model.transformer.h:
        block.attn.c_attn.bias.data.fill_(-30)
    idx = torch.arange(3 * SEGMENT)[None] % model.config.vocab_size
    assert model(idx, idx)[1].isfinite()

@pytest.mark.parametrize('kind, keys, nbytes', [
    ('gpt', dict(window=12), 49_152), ('fold', dict(n_local=2, n_global=2), 6_144),
    ('transformer_xl', {}, 24_576), ('rmt', {}, 2_048), ('rmt', dict(memory=12), 6_144),
    ('infini', {}, 67_584), ('linear', {}, 67_584), ('deltanet', {}, 83_968),
    ('feedback', {}, 6_144), ('lstm', {}, 3_680),
    ('queued_fold', dict(n_local=3, n_global=1), 67_584)])
def test_parameters_state_and_what_decays(kind, keys, nbytes):
    model = make_model(kind, dict(block_size=96, vocab_size=65, n_embd=128, n_layer=4, n_head=4,
                                  bias=False, position='learned', **keys))
    assert count_parameters(model) == pytest.approx(800_000, rel=0.01)
    assert Rows(carry=blank_carry(model)).nbytes == nbytes
    assert kind != 'lstm' or model.transformer.h[0].weight_hh_l0.std() > 0.03  # torch's own
    if kind == 'deltanet':  # uniform within 0.5; what a step forgets, as in Mamba2
        rule = model.transformer.h[0].attn
        kept = (-rule.A.exp() * F.softplus(rule.b)).exp()
        assert 0.25 < rule.conv.std() < 0.33 and 0.1 < kept.min() and 0.9 < kept.max() < 1
    decayed, kept = adamw(model, 0.1, 1e-3, (0.9, 0.99), 'cpu').param_groups
    assert {p.dim() for p in kept['params']} == {1} and kept['weight_decay'] == 0
    assert len(kept['params'] + decayed['params']) == len([*model.parameters()])
    assert decayed['weight_decay'] == 0.1

def test_a_fold_with_a_queue_has_local_layers_that_slide_and_a_frozen_past():
    config = make('queued_fold', local='segment', past='evolving').config
    assert (config.local, config.past) == ('sliding', 'frozen')

@pytest.mark.parametrize('kind, keys, message', [
    *((kind, dict(window=SEGMENT), 'takes window=0') for kind in [*MODELS][2:]),
    *((kind, dict(position='rotary'), 'means nothing') for kind in ('linear', 'deltanet', 'lstm')),
    ('infini', dict(update='no'), 'update must be one of'), ('rmt', dict(memory=0), 'memory must'),
    *(('queued_fold', keys, 'n_local of 1') for keys in (dict(n_local=0), dict(past='none')))])
def test_keys_that_mean_nothing_are_refused(kind, keys, message):
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        make(kind, **keys)
