"""The equations of all models as they are printed: loops, one row, numpy, places counted from the
start of the text."""
import math

import numpy as np
import torch
from small import HEADS, C

D, LAYERS = C // HEADS, 4

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
        self.l = getattr(self.c, 'segment_size', 0) or self.c.window or self.c.block_size

    def logits(self, idx):
        x = [self.w['transformer.wte.weight'][i] for i in idx]
        if self.c.position == 'learned':
            x = [state + self.w['transformer.wpe.weight'][t % self.l] for t, state in enumerate(x)]
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

    def foldgpt(self, x):
        """Eq. 13, 16 and 17 (`new`), and the other values of the keys, of {place: state}; and the
        queue before the past half."""
        c, l, x, outputs, zeros = self.c, self.l, dict(enumerate(x)), [], np.zeros(C)
        queue = l * getattr(c, 'queue', 0)
        carry = dict.fromkeys(range(-l, 0), zeros) if queue else {}

        def all_of(layer, states, seen_by, start=-math.inf):
            """Token states, each one layer on, having seen those that it may, itself last; those
            before `start` through a gate, if there is one."""
            new, g = {}, self.w.get(f'transformer.h.{layer}.attn.past_gate', np.ones(C) / 16)
            for t, state in states.items():
                seen = [(p, *self.heads(layer, other)[1:]) for p, other in seen_by(t)]
                y, alone = (np.array(self.attention(self.heads(layer, state)[0], t, some))
                            for some in (seen, [one for one in seen if one[0] >= start]))
                new[t] = self.finish(layer, state, alone + 16 * g.reshape(HEADS, D) * (y - alone))
            return new

        def up_to(t, states, first=-math.inf):
            return [(place, state) for place, state in states.items() if first <= place <= t]
        for i in range(c.n_local):  # eq. 16, or of the last l tokens
            x = all_of(i, x, lambda t: up_to(t, x, t - l + 1 if c.local == 'sliding'
                                             else t // l * l))
        narrow = {t: self.project(self.project(x[t], 'down'), 'up') for t in x if queue}
        for s in range(0, len(x), l):
            current = {t: x[t] for t in range(s, min(s + l, len(x)))}
            past = carry if c.past != 'none' else {}
            far = [(t - len(past), narrow.get(t, zeros)) for t in range(s - queue, s)]
            for i in range(c.n_local, c.n_local + c.n_global):
                new = all_of(i, current, lambda t: [*far, *past.items(), *up_to(t, current)], s)
                if c.past == 'evolving':
                    past = all_of(i, past, lambda t: up_to(t, past))  # eq. 13
                current = new
            if c.carry == 'gated' and carry:
                for t, new in current.items():
                    g = sigmoid(self.project(np.concatenate((carry[t - l], new)), 'carry_gate'))
                    current[t] = g * carry[t - l] + (1 - g) * new
            outputs += current.values()
            carry = {t: x[t] for t in current} if c.past == 'local' else current
        return outputs

    gatedfold = queuedfold = foldgpt

    def gpt(self, x):
        return self.layers(x, lambda t: t - self.l + 1)

    def transformerxl(self, x):
        return self.layers(x, lambda t: (t // self.l - 1) * self.l)

    def rmt(self, x):
        outputs, memory, m = [], list(self.w['first']), self.c.memory
        for s in range(0, len(x), self.l):
            window = self.layers([*memory, *x[s:s + self.l], *memory], lambda t: 0)
            outputs += window[m:-m]
            memory = [self.norm(state) for state in window[-m:]]
        return outputs

    def infini(self, x):
        M, z, outputs = np.zeros((LAYERS, HEADS, D, D)), np.zeros((LAYERS, HEADS, D)), []
        for s in range(0, len(x), self.l):
            states = x[s:s + self.l]
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
            state = (state - state.mean()) / np.sqrt(state.var() + 1e-5)
            for n in range(2):
                W, U, b, d = (self.w[f'transformer.h.0.{part}_l{n}'] for part in (
                    'weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'))
                i, f, g, o = np.split(W @ state + U @ h[n] + b + d, 4)
                c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(g)
                state = h[n] = sigmoid(o) * np.tanh(c[n])
            outputs.append(self.project(state, 'transformer.h.1'))
        return outputs
