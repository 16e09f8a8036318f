"""The two models: a GPT is nanoGPT's, a fold is a GPT by its segment, and what each key changes."""
import math
import os

import pytest
import torch
from small import KEYS, SEGMENT, SIZES, C, V, all_logits, assert_equal, gradients, make, tokens

from lib.contract import adamw, count_parameters, flops_per_token, make_model
from lib.gradients import backpropagate
from model import GPT, GPTConfig

l = SEGMENT
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

def test_initialization():
    model = make_model('fold', dict(block_size=64, segment_size=64, vocab_size=300, n_layer=8,
                                  n_local=3, n_global=5, n_head=2, n_embd=128, carry='gated'))
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
        if p.dim() == 2 and 'gate' not in name:
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        elif 'gate' not in name:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (model.carry_gate.bias.sigmoid() > 0.7).all()  # it starts by keeping

@pytest.mark.parametrize('T', [l, 140])  # by the fused attention, too
def test_dropout_in_training_alone_of_embeddings_attention_and_both_branches(T, monkeypatch):
    model, rates = make('gpt', dropout=0.5, block_size=T), []
    monkeypatch.setattr('torch.nn.functional.scaled_dot_product_attention',
                        lambda q, k, v, mask, p, **how: rates.append(p) or v)
    monkeypatch.setattr(torch, 'dropout', lambda x, p, on: rates.append(p * on) or x)
    for training in (True, False):
        model.train(training)(tokens(1, T))
    assert rates.count(0.5) == 1 + 3 * model.config.n_layer == sum(map(bool, rates))

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
    idx, targets = tokens(2, l), tokens(2, l)
    assert_equal(all_logits(gpt, idx), all_logits(fold, idx))
    assert_equal(*(backpropagate(model, idx, targets)[0] for model in (gpt, fold)))
    assert_equal(gradients(gpt), gradients(fold))

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

def layer(T, keys):
    """Products of numbers in a layer for T tokens that attend to `keys`, masked ones too."""
    return T * 12 * C * C + 2 * T * keys * C

LAST = layer(l, 2 * l) + 2 * l * C * C  # the last global layer: keys and values of the past half
SLIDING = layer(l, l) + 4 * layer(l, 2 * l - 1)  # five segments, the first alone

@pytest.mark.parametrize('kind, T, sizes, expected', [
    ('gpt', 96, {'block_size': 96}, 4 * layer(96, 96)), ('gpt', 5 * l, {'window': l}, 4 * SLIDING),
    ('fold', 5 * l, {}, 12 * layer(l, l) + 4 * layer(2 * l, 2 * l) + 4 * LAST),
    ('fold', 2 * l, {'carry': 'gated'},
     6 * layer(l, l) + layer(2 * l, 2 * l) + LAST + 2 * l * C * C),
    ('fold', 5 * l, {'local': 'sliding', 'past': 'frozen'}, 2 * (SLIDING + layer(l, l) + 4 * LAST)),
    ('fold', 5 * l, {'past': 'local'}, 10 * layer(l, l) + 2 * (layer(l, l) + 4 * LAST))])
def test_flops_are_those_of_what_is_read_and_of_no_more(kind, T, sizes, expected):
    """A product costs two operations forward and four backward; no gradient is left behind."""
    model = make(kind, **sizes)

    class Looks(type(model)):  # at numbers, which shapes alone have not
        def embed(self, idx, *place):
            return super().embed(idx, *place) if idx.max().item() < V else None
    model.__class__ = Looks if sizes == {} else type(model)
    assert flops_per_token(model, T) * T == 6 * (expected + T * C * V)
    assert not gradients(model)

@pytest.mark.parametrize('kind, sizes, message', [
    ('gpt', dict(n_embd=10, n_head=3), 'n_embd=10 must be a multiple of n_head=3'),
    ('gpt', dict(dropout=math.nan), r'dropout must lie in'), ('gpt', dict(n_head=0), 'n_head must'),
    ('gpt', dict(block_size=10 ** 14), 'no memory for'), ('fold', dict(n_global=0), 'n_global'),
    ('fold', dict(block_size=100, segment_size=12), 'a multiple of segment_size=12'),
    ('fold', dict(n_local=-1), 'n_local must be at'), ('gpt', dict(window=-1), 'window must'),
    ('fold', dict(past='l'), 'past must be'), ('gpt', dict(position='r'), 'position must be'),
    ('fold', dict(past='none', carry='gated'), 'no carry to mix with'),
    ('fold', dict(window=3), 'a fold takes window=0'), (None, {}, "one of 'gpt', 'fold'.*not None"),
    ('gpt', dict(position='rotary', n_embd=6), 'an even size')])
def test_sizes_that_no_model_can_have(kind, sizes, message):
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        make_model(kind, {**SIZES, **sizes})

@pytest.mark.parametrize('before', [1, l - 1, l, l + 1, 2 * l])
def test_a_sliding_layer_goes_on_after_any_number_of_places(before):
    attention = make('gpt', window=l, position='rotary').transformer.h[0].attn
    x = torch.randn(2, before + 3 * l + 1, C, dtype=torch.float64)
    found, _ = attention(x[:, before:], attention.keys_and_values(x[:, :before]))
    assert_equal(found, attention(x)[0][:, before:])

def test_calls_that_no_model_can_answer():
    """Nor with the carry of a segment that is not whole."""
    sliding, window, queued = make(local='sliding'), make('gpt', window=l), make('queued_fold')
    short = [model(tokens(2, l + 2))[2] for model in (sliding, window, queued)]
    past, queue, kept = queued(tokens(2, l))[2]
    for model, T, carry in ((make(), 0, None), (make(), 3, torch.zeros(1, l, C)),
                            (make(), 3, torch.zeros(2, 2, C)), (small_gpt(), 0, None),
                            (small_gpt(), l + 1, None), (sliding, 3, short[0]),
                            (sliding, 3, torch.zeros(2, l, C)), (window, 3, short[1]),
                            (queued, 3, short[2]), (queued, 3, (past, queue[:, 1:], kept)),
                            (queued, 0, None), (queued, 3, (past, queue[:1], kept))):
        with pytest.raises(ValueError, match='takes 1 token or more|cannot read|segment|slide'):
            model(tokens(2, T), carry=carry)
