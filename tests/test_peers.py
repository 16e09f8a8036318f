"""The peers: their papers' equations, token by token in numpy, and what holds of every carry."""
import math

import numpy as np
import pytest
import torch
from small import HEADS, SEGMENT, C, V, all_logits, assert_equal, gradients, make, tokens

from lib.contract import adamw, blank_carry, count_parameters, make_model, unit
from lib.gradients import backpropagate
from lib.rows import Rows, rowwise
from lib.streaming import empty_state, new_state, read_
from models import MODELS

l, D, LAYERS = SEGMENT, C // HEADS, 4
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

def sigmoid(x):
    return 1 / (1 + np.exp(-x))

def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

class Literal:
    """The equations as they are printed, in loops over segment, layer, token and head; x is the
    list of the token embeddings, and each method gives that of the last layer's outputs."""

    def __init__(self, model):
        self.w = {name: value.numpy() for name, value in model.state_dict().items()}
        self.c, self.kind = model.config, type(model).__name__.lower()

    def logits(self, idx):
        x = [self.w['transformer.wte.weight'][i] for i in idx]
        if self.c.position == 'learned':
            x = [state + self.w['transformer.wpe.weight'][t % l] for t, state in enumerate(x)]
        return torch.from_numpy(np.stack([self.w['lm_head.weight'] @ self.norm(state)
                                          for state in getattr(self, self.kind)(x)]))

    def norm(self, x, name='transformer.ln_f'):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return x * self.w[name + '.weight'] + self.w.get(name + '.bias', 0)

    def project(self, x, name):
        return self.w[name + '.weight'] @ x + self.w.get(name + '.bias', 0)

    def heads(self, layer, x, name='attn.c_attn'):
        """Queries, keys, values (n, H, D) of one token."""
        h = f'transformer.h.{layer}.'
        return self.project(self.norm(x, h + 'ln_1'), h + name).reshape(-1, HEADS, D)

    def finish(self, layer, x, y):
        """The rest of a block, y (H, D) being what the token has gathered."""
        h, erf = f'transformer.h.{layer}.', np.vectorize(math.erf)
        x = x + self.project(np.concatenate(y), h + 'attn.c_proj')
        f = self.project(self.norm(x, h + 'ln_2'), h + 'mlp.c_fc')
        return x + self.project(f * (1 + erf(f / math.sqrt(2))) / 2, h + 'mlp.c_proj')

    def turned(self, x, place):
        speeds = self.c.rotary_base ** (-np.arange(D // 2) / (D // 2))
        turns = place * speeds * (self.c.position == 'rotary')
        return (x[:D // 2] + 1j * x[D // 2:]) * np.exp(1j * turns)

    def attention(self, q, place, seen):
        """Softmax attention of q (H, D) to the (place, k, v) in `seen`: (H, D)."""
        heads = []
        for head in range(HEADS):
            scores = [(self.turned(q[head], place).conj() @ self.turned(k[head], p)).real
                      for p, k, _ in seen]
            a = np.exp(np.array(scores) / math.sqrt(D))
            heads.append(sum(weight * v[head] for weight, (_, _, v) in zip(a / a.sum(), seen)))
        return heads

    def layers(self, x, first):
        """The usual layers: token t sees those from first(t) to itself."""
        for i in range(LAYERS):
            qkv = [(t, *self.heads(i, state)) for t, state in enumerate(x)]
            x = [self.finish(i, state, self.attention(qkv[t][1], t, [
                (p, k, v) for p, _, k, v in qkv[max(0, first(t)):t + 1]]))
                for t, state in enumerate(x)]
        return x

    def gpt(self, x):
        return self.layers(x, lambda t: t - self.c.window + 1)

    def transformerxl(self, x):
        return self.layers(x, lambda t: (t // l - 1) * l)

    def rmt(self, x):
        outputs, memory, m = [], list(self.w['first']), self.c.memory
        for s in range(0, len(x), l):
            window = self.layers([*memory, *x[s:s + l], *memory], lambda t: 0)
            outputs += window[m:-m]
            memory = [self.norm(state) for state in window[-m:]]
        return outputs

    def infini(self, x):
        M, z, outputs = np.zeros((LAYERS, HEADS, D, D)), np.zeros((LAYERS, HEADS, D)), []
        for s in range(0, len(x), l):
            states = x[s:s + l]
            for i in range(LAYERS):
                qkv = [(t, *self.heads(i, state)) for t, state in enumerate(states)]
                g, new = sigmoid(self.w[f'transformer.h.{i}.attn.beta'])[:, None], []
                for t, q, _, _ in qkv:
                    local = self.attention(q, t, [(p, k, v) for p, _, k, v in qkv[:t + 1]])
                    held = [self.retrieved(M[i, j], z[i, j], q[j]) for j in range(HEADS)]
                    y = g * np.array(held) + (1 - g) * np.array(local)
                    new.append(self.finish(i, states[t], y))
                states, old = new, (M[i].copy(), z[i].copy())
                for (_, _, k, v), j in ((token, j) for token in qkv for j in range(HEADS)):
                    held = self.retrieved(old[0][j], old[1][j], k[j])
                    M[i, j] += np.outer(elu1(k[j]), v[j] - held * (self.c.update == 'delta'))
                    z[i, j] += elu1(k[j])
            outputs += states
        return outputs

    def retrieved(self, M, z, q):
        return elu1(q) @ M / (elu1(q) @ z) if z.any() else np.zeros(D)

    def linear(self, x):
        S, Z, outputs = np.zeros((LAYERS, HEADS, D, D)), np.zeros((LAYERS, HEADS, D)), []
        for state in x:
            for i in range(LAYERS):
                q, k, v = self.heads(i, state)
                for j in range(HEADS):
                    S[i, j] += np.outer(elu1(k[j]), v[j])
                    Z[i, j] += elu1(k[j])
                    q[j] = elu1(q[j]) @ S[i, j] / (elu1(q[j]) @ Z[i, j])
                state = self.finish(i, state, q)
            outputs.append(state)
        return outputs

    def deltanet(self, x):
        S, inputs, outputs = np.zeros((LAYERS, HEADS, D, D)), np.zeros((LAYERS, 4, 3 * C)), []
        for state in x:
            for i in range(LAYERS):
                h = f'transformer.h.{i}.'
                normed, y = self.norm(state, h + 'ln_1'), np.zeros((HEADS, D))
                inputs[i] = [*inputs[i, 1:], self.heads(i, state).flatten()]
                mixed = sum(self.w[h + 'attn.conv'][0, :, n] * inputs[i, n] for n in range(4))
                q, k, v = (mixed * sigmoid(mixed)).reshape(3, HEADS, D)
                a, b = self.project(normed, h + 'attn.rates').reshape(2, HEADS)
                alpha = (1 + np.exp(a + self.w[h + 'attn.b'])) ** -np.exp(self.w[h + 'attn.A'])
                beta = sigmoid(b)
                gate = self.project(normed, h + 'attn.gate').reshape(HEADS, D)
                for j in range(HEADS):
                    q_t, k_t = q[j] / np.linalg.norm(q[j]), k[j] / np.linalg.norm(k[j])
                    kept = np.eye(D) - beta[j] * np.outer(k_t, k_t)
                    S[i, j] = alpha[j] * S[i, j] @ kept + beta[j] * np.outer(v[j], k_t)
                    o = S[i, j] @ q_t
                    y[j] = o / np.sqrt((o ** 2).mean() + 1e-5) * gate[j] * sigmoid(gate[j])
                y = y * self.w[h + 'attn.norm.weight']
                state = self.finish(i, state, y)
            outputs.append(state)
        return outputs

    def feedback(self, x):
        tau, outputs, w = self.c.memory, [], np.exp(self.w['w'])
        memory = [np.zeros(C)] * tau
        for state in x:
            states = [state]
            seen = [(p, *self.project(self.norm(m, 'ln_m'), 'c_memory').reshape(2, HEADS, D))
                    for p, m in enumerate(memory[-tau:])]
            for i in range(LAYERS):
                y = self.attention(self.heads(i, states[-1])[0], tau, seen)
                states.append(self.finish(i, states[-1], y))
            memory.append(sum(weight * each for weight, each in zip(w / w.sum(), states)))
            outputs.append(states[-1])
        return outputs

    def lstm(self, x):
        H = self.w['transformer.h.1.weight'].shape[1]
        h, c, outputs = np.zeros((2, H)), np.zeros((2, H)), []
        for state in x:
            for n in range(2):
                W, U, b, d = (self.w[f'transformer.h.0.{part}_l{n}'] for part in (
                    'weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'))
                i, f, g, o = np.split(W @ state + U @ h[n] + b + d, 4)
                c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(g)
                state = h[n] = sigmoid(o) * np.tanh(c[n])
            outputs.append(self.project(state, 'transformer.h.1'))
        return outputs

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

def reached(model, idx, chunk, detach):
    """Whether the loss of the last token has a gradient in the embedding of each token."""
    embedded, embed, carry = [], model.embed, None
    model.embed = lambda *args: embedded.append(embed(*args)) or embedded[-1]
    for part in idx.split(chunk, dim=1):
        logits, _, carry = model(part, carry=rowwise(torch.detach, carry) if detach else carry)
    grads = torch.autograd.grad(logits.logsumexp(-1).sum(), embedded, allow_unused=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g)[0].norm(dim=1) > 0
                      for x, g in zip(embedded, grads)])

@EVERY
def test_gradient_reaches_as_far_as_the_paper_says_and_no_further(case):
    """In one call, and through a carry that is passed on, unless it is detached."""
    T = 7 * l
    for chunk, detach in ((T, False), (2 * l, False), (2 * l, True)):
        model = make_case(case)
        stopped = case.startswith('transformer_xl') and CASES[case].get('stop', True)
        first = next(t for t in range(T) if seen_until(case, t, 0 if stopped else LAYERS) >= T)
        first = max(first, (T - 1) // chunk * chunk) if detach else first
        found = reached(model, tokens(1, T), chunk, detach)
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
