"""What must always hold of the two models (float64, tolerance 1e-10, wherever it is a matter of rounding)."""
import math
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from checkpoint import load_weights
from model import GPT, FoldConfig, FoldGPT, GPTConfig, GlobalBlock, LocalBlock, sample_token

TOLERANCE = dict(rtol=0, atol=1e-10)
VOCAB, HEADS, CHANNELS, L_SEGMENT = 11, 2, 8, 3


def shake(model):
    """Move every parameter, norms and biases too, well away from its initial value; float64, no dropout."""
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def make_fold(n_local=2, n_global=2, bias=True, segments=4, l=L_SEGMENT, **more):
    return shake(FoldGPT(FoldConfig(block_size=segments * l, segment_size=l, vocab_size=VOCAB, n_head=HEADS, n_embd=CHANNELS,
                                    bias=bias, n_local=n_local, n_global=n_global, **more)))


def make_gpt(n_layer=4, block_size=L_SEGMENT, bias=True):
    return shake(GPT(GPTConfig(block_size=block_size, vocab_size=VOCAB, n_layer=n_layer, n_head=HEADS,
                               n_embd=CHANNELS, bias=bias)))


def folded(gpt, n_local):
    """The fold of a GPT's weights, key for key."""
    c = gpt.config
    fold = FoldGPT(FoldConfig(**{**vars(c), 'block_size': 4 * c.block_size}, segment_size=c.block_size, n_local=n_local,
                              n_global=c.n_layer - n_local)).double().eval()
    fold.load_state_dict(gpt.state_dict())
    return fold


def tokens(B, T):
    return torch.randint(VOCAB, (B, T))


# --- the baseline is nanoGPT's ----------------------------------------------------------------------------------

@pytest.fixture(params=['bias', 'nobias'])
def golden(request):
    return torch.load(os.path.join(os.path.dirname(__file__), 'golden', f'nanogpt_{request.param}.pt'), weights_only=True)


def golden_gpt(golden):
    model = GPT(GPTConfig(**golden['config']))
    model.load_state_dict(golden['state_dict'])  # key for key
    return model


def test_golden_logits_loss_and_every_gradient(golden):
    model = golden_gpt(golden)
    logits, loss, carry = model(golden['idx'].long(), golden['targets'].long())
    loss.backward()
    assert carry is None
    torch.testing.assert_close(logits, golden['logits'], rtol=1e-5, atol=2e-6)
    assert abs(loss.item() - golden['loss']) < 2e-6
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert grads.keys() == golden['grads'].keys()
    for name, grad in golden['grads'].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=name)


def test_golden_training_curve(golden):
    model, train = golden_gpt(golden), golden['train']
    optimizer = model.configure_optimizers(train['weight_decay'], train['learning_rate'], tuple(train['betas']), 'cpu')
    losses = []
    for x, y in zip(train['x'].long(), train['y'].long()):
        _, loss, _ = model(x, y)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train['grad_clip'])
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(train['losses'], abs=5e-5)  # 20 steps at a rate of 0.01 amplify rounding


def test_only_matrices_and_embeddings_decay():
    model = make_gpt()
    decayed, kept = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu').param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed['weight_decay'] == 0.1 and kept['weight_decay'] == 0
    assert all(names[id(p)].endswith('bias') or '.ln_' in names[id(p)] for p in kept['params'])
    assert len(decayed['params']) + len(kept['params']) == len(names)
    assert 'transformer.wte.weight' in {names[id(p)] for p in decayed['params']}


def test_initialization():
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=2, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all(), name
        elif '.ln_' in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_windows_short_and_long_attend_alike():
    """The fused kernel that long windows use and the softmax that is spelled out for short ones agree."""
    model, idx = make_gpt(block_size=80), tokens(2, 80)
    long = model(idx, all_logits=True)[0]
    for T in (1, 30, 64, 65):
        torch.testing.assert_close(model(idx[:, :T], all_logits=True)[0], long[:, :T], **TOLERANCE)


# --- the folded model -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_local, n_global', [(0, 2), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize('bias', [False, True])
def test_one_segment_is_a_gpt(n_local, n_global, bias):
    gpt = make_gpt(n_local + n_global, bias=bias)
    fold = folded(gpt, n_local)
    assert [(k, v.shape) for k, v in fold.state_dict().items()] == [(k, v.shape) for k, v in gpt.state_dict().items()]
    assert [type(b) for b in fold.transformer.h] == [LocalBlock] * n_local + [GlobalBlock] * n_global
    idx, targets = tokens(2, L_SEGMENT), tokens(2, L_SEGMENT)
    (a, loss_a, _), (b, loss_b, _) = gpt(idx, targets), fold(idx, targets)
    torch.testing.assert_close(a, b, **TOLERANCE)
    loss_a.backward(), loss_b.backward()
    for (name, p), q in zip(gpt.named_parameters(), fold.parameters()):
        torch.testing.assert_close(p.grad, q.grad, **TOLERANCE, msg=name)


def literal_logits(weights, idx, l, n_local, n_global):
    """Eq. 16 and 17 as they are printed, for one row of tokens: loops over s, i, token and head; numpy alone."""
    w = {name: value.numpy() for name, value in weights.items()}
    C = w['transformer.wte.weight'].shape[1]
    erf = np.vectorize(math.erf)

    def norm(x, name):
        centered = x - x.mean()
        return centered / np.sqrt((centered ** 2).mean() + 1e-5) * w[name + '.weight'] + w[name + '.bias']

    def linear(x, name):
        return w[name + '.weight'] @ x + w[name + '.bias']

    def evolve(layer, x, seen):
        """Token state x one layer on, attending to the token states in `seen` (x itself is the last of them)."""
        h = f'transformer.h.{layer}.'
        W, b = w[h + 'attn.c_attn.weight'], w[h + 'attn.c_attn.bias']
        seen = [norm(k, h + 'ln_1') for k in seen]
        q = W[:C] @ seen[-1] + b[:C]
        keys = [W[C:2 * C] @ k + b[C:2 * C] for k in seen]
        values = [W[2 * C:] @ k + b[2 * C:] for k in seen]
        heads = []
        for head in np.split(np.arange(C), HEADS):
            a = np.array([math.exp(q[head] @ k[head] / math.sqrt(C // HEADS)) for k in keys])
            heads.append(sum(p * v[head] for p, v in zip(a / a.sum(), values)))
        x = x + linear(np.concatenate(heads), h + 'attn.c_proj')
        f = linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        return x + linear(f * (1 + erf(f / math.sqrt(2))) / 2, h + 'mlp.c_proj')

    X = {}  # X[s, i, j][p]: token p of segment s after i local and j global layers
    logits = []
    for s in range(len(idx) // l):
        X[s, 0, 0] = [w['transformer.wte.weight'][idx[s * l + p]] + w['transformer.wpe.weight'][p] for p in range(l)]
        for i in range(1, n_local + 1):
            before = X[s, i - 1, 0]
            X[s, i, 0] = [evolve(i - 1, before[p], before[:p + 1]) for p in range(l)]  # eq. 16
        for i in range(1, n_global + 1):
            layer = n_local + i - 1
            before = X[s, n_local, i - 1]
            past = X[s - 1, n_local, n_global + i - 1] if s else []
            X[s, n_local, i] = [evolve(layer, before[p], past + before[:p + 1]) for p in range(l)]  # eq. 17
            if s:
                X[s - 1, n_local, n_global + i] = [evolve(layer, past[p], past[:p + 1]) for p in range(l)]  # eq. 13
        for x in X[s, n_local, n_global]:
            logits.append(w['lm_head.weight'] @ norm(x, 'transformer.ln_f'))
    return np.stack(logits)


@pytest.mark.parametrize('n_local, n_global', [(0, 1), (2, 2), (1, 3)])
def test_the_equations(n_local, n_global):
    model, idx = make_fold(n_local, n_global), tokens(2, 4 * L_SEGMENT)
    logits, _, _ = model(idx, all_logits=True)
    for row, expected in zip(logits, idx.tolist()):
        expected = literal_logits(model.state_dict(), expected, L_SEGMENT, n_local, n_global)
        torch.testing.assert_close(row.detach(), torch.from_numpy(expected), **TOLERANCE)


def test_chunks_with_the_carry_passed_equal_one_call():
    model, idx = make_fold(), tokens(3, 8 * L_SEGMENT)
    whole, _, last = model(idx, all_logits=True)
    for sizes in ([1, 7], [2, 3, 3], [1] * 8):
        parts, carry = [], None
        for chunk in idx.split([n * L_SEGMENT for n in sizes], dim=1):
            logits, _, carry = model(chunk, carry=carry, all_logits=True)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **TOLERANCE)
        torch.testing.assert_close(carry, last, **TOLERANCE)


def test_a_short_last_segment_changes_nothing_before_it_and_carries_nothing_on():
    model, idx = make_fold(), tokens(2, 3 * L_SEGMENT)
    whole = model(idx, all_logits=True)[0]
    for T in range(1, 3 * L_SEGMENT):
        logits, _, carry = model(idx[:, :T], all_logits=True)
        torch.testing.assert_close(logits, whole[:, :T], **TOLERANCE)
        if T % L_SEGMENT:
            with pytest.raises(ValueError, match='takes the carry of whole segments'):
                model(idx, carry=carry)


@pytest.mark.parametrize('make', [make_fold, lambda: make_gpt(block_size=12)])
def test_causality(make):
    model, idx = make(), tokens(1, 4 * L_SEGMENT)
    before = model(idx, all_logits=True)[0]
    for t in range(idx.size(1)):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        after = model(changed, all_logits=True)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(dim=-1).all()  # and every later logit does change


def gradient_at_inputs(model, idx, cut=None):
    """|d loss of the last token / d embedding of each token|, (T,); the carry is detached after `cut` segments."""
    seen, embed = [], model.embed
    model.embed = lambda idx: seen.append(embed(idx)) or seen[-1]
    chunks = idx.split(cut * L_SEGMENT, dim=1) if cut else [idx]
    carry = None
    for chunk in chunks:
        logits, _, carry = model(chunk, carry=carry if carry is None else carry.detach())
    del model.embed
    grads = torch.autograd.grad(logits[0, -1].logsumexp(0), seen, allow_unused=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten(0, 1).norm(dim=1) for x, g in zip(seen, grads)])


def test_reach_is_the_whole_unrolled_length():
    reach = gradient_at_inputs(make_fold(segments=16), tokens(1, 16 * L_SEGMENT))
    assert (reach > 0).all()


@pytest.mark.parametrize('cut', [1, 2, 4])
def test_reach_ends_exactly_where_the_carry_is_detached(cut):
    reach = gradient_at_inputs(make_fold(), tokens(1, 8 * L_SEGMENT), cut)
    assert (reach[:(8 - cut) * L_SEGMENT] == 0).all()
    assert (reach[(8 - cut) * L_SEGMENT:] > 0).all()


def test_rows_never_influence_each_other():
    model, idx = make_fold(), tokens(3, 4 * L_SEGMENT)
    carry = torch.randn(3, L_SEGMENT, CHANNELS, dtype=torch.float64)
    together, _, carry_together = model(idx, carry=carry, all_logits=True)
    for b in range(3):
        alone, _, carry_alone = model(idx[b:b + 1], carry=carry[b:b + 1], all_logits=True)
        torch.testing.assert_close(alone[0], together[b], **TOLERANCE)
        torch.testing.assert_close(carry_alone[0], carry_together[b], **TOLERANCE)


def test_without_the_carry_it_is_the_baseline_of_the_same_window():
    gpt = make_gpt()
    fold, idx = folded(gpt, 2), tokens(2, 4 * L_SEGMENT)
    for segment in idx.split(L_SEGMENT, dim=1):
        torch.testing.assert_close(fold(segment, all_logits=True)[0], gpt(segment, all_logits=True)[0], **TOLERANCE)
    # and with it, from the second segment on, it is not
    carried = fold(idx, all_logits=True)[0]
    assert (carried[:, L_SEGMENT:] - gpt(idx[:, -L_SEGMENT:], all_logits=True)[0].repeat(1, 3, 1)).abs().min() > 0


def test_the_last_global_layer_computes_only_what_is_read():
    """Counted, not timed: operations of the last layer on the past half are those of its keys and values."""
    from torch.utils.flop_counter import FlopCounterMode
    block, C, l = make_fold(bias=False).transformer.h[-1], CHANNELS, L_SEGMENT
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 2 * l, C, dtype=torch.float64), n_out=l)
    keys_values, queries, attention, rest = 2 * l * 2 * C * C, l * C * C, 2 * l * 2 * l * C, l * 9 * C * C
    assert counter.get_total_flops() == 2 * (keys_values + queries + attention + rest)


def test_a_gated_carry_is_a_mixture_place_by_place_of_old_and_new():
    model, idx = make_fold(carry='gated'), tokens(2, 3 * L_SEGMENT)
    W, b = model.carry_gate.weight, model.carry_gate.bias
    expected, outputs = None, []
    for x in model.local(idx).split(L_SEGMENT, dim=1):
        new = model.globally(x if expected is None else torch.cat((expected, x), dim=1), n_out=L_SEGMENT)
        if expected is not None:
            g = 1 / (1 + torch.exp(-torch.einsum('btc,dc->btd', torch.cat((expected, new), dim=-1), W) - b))
            new = g * expected + (1 - g) * new
        expected = new
        outputs.append(new)
    logits, _, carry = model(idx, all_logits=True)
    torch.testing.assert_close(carry, expected, **TOLERANCE)
    torch.testing.assert_close(logits, model.head(torch.cat(outputs, dim=1), all_logits=True)[0], **TOLERANCE)
    assert (torch.sigmoid(FoldGPT(FoldConfig(block_size=12, carry='gated', vocab_size=VOCAB)).carry_gate.bias) > 0.7).all()  # it starts by keeping
    assert not hasattr(make_fold(), 'carry_gate')  # a plain fold has a GPT's parameters


def test_carry_is_the_output_before_the_final_norm():
    model, idx = make_fold(), tokens(2, 2 * L_SEGMENT)
    logits, _, carry = model(idx, all_logits=True)
    assert carry.shape == (2, L_SEGMENT, CHANNELS)
    torch.testing.assert_close(model.lm_head(model.transformer.ln_f(carry)), logits[:, -L_SEGMENT:], **TOLERANCE)


# --- loss, logits, generation, weights --------------------------------------------------------------------------

@pytest.mark.parametrize('make', [make_fold, lambda: make_gpt(block_size=12)])
def test_loss_is_the_mean_over_positions_and_skips_targets_of_minus_one(make):
    model, idx, targets = make(), tokens(2, 12), tokens(2, 12)
    targets[0, 3] = targets[1, 7] = -1
    logits, loss, _ = model(idx, targets)
    picked = [-F.log_softmax(logits[b, t], -1)[targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] >= 0]
    torch.testing.assert_close(loss, torch.stack(picked).mean(), **TOLERANCE)
    last, none, _ = model(idx)
    assert none is None
    torch.testing.assert_close(last, logits[:, -1:], **TOLERANCE)
    torch.testing.assert_close(model(idx, all_logits=True)[0], logits, **TOLERANCE)


def test_sampling_follows_temperature_top_k_and_generator():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)

    def draw(**how):
        return sample_token(logits, generator=torch.Generator().manual_seed(1), **how).flatten()

    assert torch.equal(draw(), draw())
    for temperature in (0.5, 2.0):
        share = torch.bincount(draw(temperature=temperature), minlength=4) / 4000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.03)
    assert set(draw(top_k=2).tolist()) == {2, 3}
    assert set(draw(top_k=99).tolist()) == {0, 1, 2, 3}
    shares = logits[0].softmax(-1).tolist()  # 0.03, 0.09, 0.24, 0.64
    for top_p, kept in ((0.5, {3}), (shares[3] - 0.01, {3}), (shares[3] + 0.01, {2, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert set(draw(top_p=top_p).tolist()) == kept
    assert set(draw(top_k=2, top_p=0.7).tolist()) == {3}  # of the two likeliest, 0.73 and 0.27, one suffices
    assert set(draw(temperature=0).tolist()) == set(draw(temperature=1e-46).tolist()) == set(draw(top_p=1e-46).tolist()) == {3}


def test_a_whole_number_is_a_share_too():
    assert GPTConfig(dropout=0, bias=0).dropout == 0  # as configuration files write it
    with pytest.raises(ValueError, match='n_head must be at least 1, not 0'):
        GPTConfig(n_head=0)


def test_weights_fold_and_unfold():
    gpt, fold = make_gpt(n_layer=4, block_size=12), make_fold(1, 3)
    load_weights(fold, gpt.state_dict())
    assert torch.equal(fold.transformer.wpe.weight, gpt.transformer.wpe.weight[:L_SEGMENT])
    back = make_gpt(n_layer=4)
    load_weights(back, fold.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), fold.parameters()))


def test_weights_of_a_compiled_and_of_an_old_nanogpt_load():
    source, model = make_gpt(), make_gpt()
    saved = {'_orig_mod.' + name: value for name, value in source.state_dict().items()}
    saved['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 3, 3).tril()
    load_weights(model, saved)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), source.parameters()))


@pytest.mark.parametrize('spoil, message', [
    (lambda w: w.pop('transformer.ln_f.weight'), 'Missing key.*ln_f.weight'),
    (lambda w: w.update(extra=torch.ones(1)), 'Unexpected key.*extra'),
    (lambda w: w.update({'transformer.wpe.weight': torch.ones(2, CHANNELS)}), r'wpe.weight.*\[2, 8\]')])
def test_weights_that_do_not_fit_are_named(spoil, message):
    weights = dict(make_gpt().state_dict())
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        load_weights(make_gpt(), weights)


@pytest.mark.parametrize('sizes, message', [
    (dict(n_embd=10, n_head=3), 'n_embd=10 must be a multiple of n_head=3'), (dict(dropout=1.0), 'dropout'),
    (dict(n_layer=0), 'n_layer must be at least 1'), (dict(vocab_size=-1), 'vocab_size')])
def test_sizes_that_no_gpt_can_have(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)


@pytest.mark.parametrize('sizes, message', [
    (dict(block_size=100, segment_size=12), 'block_size=100 must be a multiple of segment_size=12'),
    (dict(segment_size=0), 'segment_size must be at least 1'), (dict(n_global=0), 'n_global must be at least 1'),
    (dict(n_local=-1), 'n_local must be at least 0'), (dict(n_head=5), 'n_head=5'), (dict(carry='half'), "not 'half'")])
def test_sizes_that_no_fold_can_have(sizes, message):
    with pytest.raises(ValueError, match=message):
        FoldConfig(**{'block_size': 96, **sizes})


def test_calls_that_no_model_can_answer():
    fold, gpt = make_fold(), make_gpt()
    with pytest.raises(ValueError, match='at least 1 token, not 0'):
        fold(tokens(1, 0))
    with pytest.raises(ValueError, match='takes the carry of whole segments'):
        fold(tokens(2, 3), carry=torch.zeros(1, L_SEGMENT, CHANNELS))
    for T in (0, L_SEGMENT + 1):
        with pytest.raises(ValueError, match=f'cannot read {T} tokens'):
            gpt(tokens(1, T))
