"""Reading and writing through the state: exact, of constant size, no caller's state changed."""
import math

import pytest
import torch
from small import ALL_KEYS, SOME_KEYS, TOYS, V, all_logits, assert_equal, make, shake, tokens
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lib.checkpoint import load_state, save_state
from lib.contract import carries
from lib.streaming import (
    check_reading,
    empty_state,
    generate,
    new_state,
    read,
    read_,
    sample_token,
    stream,
)
from model import FoldConfig, GPTConfig
from models import MODELS
from models.cached import GPT, FoldGPT

l = 4  # of the folds' segments
CASES = {
    **{name: dict(kind=name) for name in [*MODELS, *TOYS]},
    **{' '.join(keys.values()): keys for keys in (SOME_KEYS[i] for i in (1, 5, 7, 9))},
    'sliding gpt': dict(kind='gpt', window=l, position='rotary'),
    'sliding gpt, learned': dict(kind='gpt', window=l),
    'no local': dict(n_local=0, n_global=1), 'no bias': dict(n_local=1, bias=False),
    'segment of 1': dict(segment_size=1), 'long segment': dict(segment_size=36, block_size=36),
    'long gpt': dict(kind='gpt', block_size=80)}
FORWARD_ALONE = {*TOYS, *(name for name in MODELS if not getattr(MODELS[name][1], 'extend', None))}
EVERY = pytest.mark.parametrize('name', CASES)
EVERY_PATH = pytest.mark.parametrize('name, cached', [
    (name, cached) for name in CASES for cached in (True, False)[name in FORWARD_ALONE:]])

def make_case(name):
    return make(**{'segment_size': l, 'block_size': 4 * l, **CASES[name]})

def oracle(model, idx):
    """The logits after every token, each from a call on all that the model may see: (B, T, V)."""
    if carries(model):
        return all_logits(model, idx).detach()
    W, T = model.config.block_size, idx.size(1)
    return torch.cat([model(idx[:, max(0, t - W):t])[0] for t in range(1, T + 1)], 1).detach()

def read_in(model, idx, sizes, state):
    """Read idx in pieces of these sizes: the logits after each, and the last state."""
    logits = []
    for part in idx.split(sizes, dim=1):
        after, state = read(model, part, state)
        logits.append(after)
    return torch.stack(logits, dim=1), state

@EVERY_PATH
def test_in_any_pieces_it_is_the_teacher_forced_forward_pass(name, cached, monkeypatch):
    """Token by token, too, and beyond the window."""
    monkeypatch.setattr('lib.streaming.TOKENS_PER_CALL', 3 * l)
    monkeypatch.setattr('model.FUSED_FROM', 65)
    T = 90 if 'long' in name else 38
    model, idx = make_case(name), tokens(3, T)
    expected, generator = oracle(model, idx), torch.Generator().manual_seed(1)
    for most in (1, l + 2, 5 * l, T):
        sizes = torch.randint(1, most + 1, (T,), generator=generator)
        ends = sizes.cumsum(0).clamp(max=T).unique()
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        logits, state = read_in(model, idx, sizes, empty_state(model, 3, cached))
        assert_equal(logits, expected[:, ends - 1])
        assert state.read.tolist() == [T] * 3
        assert_equal(read(model, idx[:, :0], state)[0], logits[:, -1])  # asked again

@ALL_KEYS
def test_token_by_token_and_in_pieces_for_every_combination_of_keys(keys, tmp_path):
    """Through caches and without, and from a file in the middle."""
    model, idx = make(segment_size=l, block_size=4 * l, **keys), tokens(2, 18)
    expected = all_logits(model, idx).detach()
    for cached, sizes in ((True, [1] * 18), (True, [3, 7, 5, 3]), (False, [1, 9, 8])):
        logits, state = read_in(model, idx, sizes, empty_state(model, 2, cached))
        assert_equal(logits, expected[:, torch.tensor(sizes).cumsum(0) - 1])
    _, state = read(model, idx[:, :10])
    save_state(tmp_path / 'state', state, model, torch.Generator())
    logits, _ = read_in(model, idx[:, 10:], [1] * 8, load_state(tmp_path / 'state', model))
    assert_equal(logits, expected[:, 10:])

@pytest.mark.parametrize('T, temperature', [(0, 1), (l, 0), (5 * l + 3, 1)])
@EVERY
def test_what_is_written_is_what_calls_on_the_whole_text_would_write(name, T, temperature):
    """The likeliest tokens, and random ones by the generator's numbers."""
    model, idx = make_case(name), tokens(2, T)
    a, b = (torch.Generator().manual_seed(1) for _ in range(2))
    state, text = new_state(model, 2), idx
    for token in stream(model, idx, state, 18, temperature, generator=a):
        text = torch.cat((text, token), dim=1)
        assert state.read.tolist() == [text.size(1)] * 2  # it has read along
    logits = torch.cat((torch.zeros(2, 1, V), oracle(model, text)), dim=1)  # of nothing: 0
    expected = [sample_token(logits[:, t], temperature, generator=b) for t in range(T, T + 18)]
    assert torch.equal(text[:, T:], torch.cat(expected, dim=1))
    assert_equal(state.logits, logits[:, -1])

def test_samples_follow_temperature_top_k_top_p_and_the_generator():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)

    def sample(**kwargs):
        return sample_token(logits, generator=torch.Generator().manual_seed(1), **kwargs).flatten()

    for temperature in (0.5, 2.0):
        share = torch.bincount(sample(temperature=temperature), minlength=4) / 4000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.03)
    p = logits[0].softmax(-1).tolist()  # 0.03, 0.09, 0.24, 0.64
    for kwargs, least in ((dict(top_k=2), 2), (dict(top_k=99), 0), (dict(top_p=p[3] - 0.01), 3),
                          (dict(top_p=p[3] + 0.01), 2), (dict(top_p=0.9), 1), (dict(top_p=1.0), 0),
                          (dict(top_k=2, top_p=0.7), 3), (dict(temperature=0), 3),
                          (dict(temperature=1e-46), 3), (dict(top_p=1e-46), 3)):
        assert sample(**kwargs).unique().tolist() == [*range(least, 4)], kwargs
    model, idx = make(), tokens(2, 5)
    a, b, c = (generate(model, idx, 50, generator=torch.Generator().manual_seed(seed))
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a != c).any() and torch.equal(a[:, :5], idx)

@EVERY_PATH
def test_the_state_and_logits_of_the_caller_are_left_alone(name, cached):
    model, idx = make_case(name), tokens(2, 40)
    logits, state = read(model, idx[:, :17], empty_state(model, 2, cached))
    before = state.clone()
    for T in (0, 1, 7, 23):
        read(model, idx[:, 17:17 + T], state)[0].zero_()  # may be written to
        assert_equal(vars(state), vars(before))
    read_(model, idx[:, 17:18], state)  # says by its name that it does not
    assert state.read.tolist() == [18, 18] and before.read.tolist() == [17, 17]

@EVERY_PATH
def test_rows_are_picked_reset_and_joined(name, cached):
    model, idx = make_case(name), tokens(3, 39)
    expected = oracle(model, idx)
    _, state = read(model, idx[:, :15], empty_state(model, 3, cached))
    assert_equal(read(model, idx[[2, 0, 2], 15:24], state.pick([2, 0, 2]))[0],
                 expected[[2, 0, 2], 23])
    assert_equal(vars(state.pick([0]).join(state.pick([1, 2]))), vars(state))
    state.put([1], empty_state(model, 1, cached))  # row 1 begins anew, the others go on
    for start, end in ((0, 1), (1, 5), (5, 14), (14, 24)):
        part = torch.stack([idx[b, at + start:at + end] for b, at in enumerate((15, 0, 15))])
        logits, state = read(model, part, state)
        assert_equal(logits, expected[range(3), [14 + end, end - 1, 14 + end]])
    assert state.read.tolist() == [39, 24, 39]

@pytest.mark.parametrize('T', [l - 1, 5 * l])
@EVERY
def test_saved_and_loaded_it_goes_on_alike_and_keeps_its_size(name, T, tmp_path):
    model, idx, generator = make_case(name), tokens(2, T + 6), torch.Generator().manual_seed(3)
    state, sizes = new_state(model, 2), set()
    for part in (idx[:, :0], idx[:, :T]):
        read_(model, part, state)
        save_state(tmp_path / 'state', state, model, generator)
        sizes.add((state.nbytes, (tmp_path / 'state').stat().st_size))
    other = torch.Generator()
    loaded = load_state(tmp_path / 'state', model, other)
    assert torch.equal(other.get_state(), generator.get_state()) and len(sizes) == 1
    logits, _ = read_in(model, idx[:, T:], [1] * 6, loaded)
    assert_equal(logits, oracle(model, idx)[:, T:])

def test_the_past_half_is_computed_once_a_segment():
    """Counted: inside a segment a token costs the products of one token, at its start, where the
    window opens, those of the past half as well, in the last layer its keys and values alone."""
    C, l = 16, 12
    model = make(n_embd=C, segment_size=l, block_size=l)
    state = read(model, tokens(1, 2 * l))[1]
    for place in [*range(l)] * 2:
        with FlopCounterMode(display=False) as counter:
            read_(model, tokens(1, 1), state)
        token = C * V + 4 * 12 * C * C
        attention = 4 * C * (l + 2 * place + 2)  # which torch counts by its kernel
        past = 0 if place else l * 12 * C * C + 2 * C * l * (l + 1) + l * 2 * C * C
        assert token + 0.8 * past <= counter.get_total_flops() / 2 <= token + attention + past

@pytest.mark.parametrize('t', [l, 4 * l + 1])
@pytest.mark.parametrize('sizes', [[6 * l], [1] * 6 * l, [4 * l, 3, 2 * l - 3]])
@pytest.mark.parametrize('name, cached', [
    ('fold', True), ('fold', False), ('learned segment evolving gated', True),
    ('rotary sliding evolving gated', True), ('long gpt', True), ('recurrent', False)])
def test_a_state_that_is_not_finite_names_the_token(name, cached, sizes, t):
    model, idx = make_case(name), tokens(2, 6 * l) % (V - 1)
    names = 'wte', 'embedding', 'lm_head', 'output'
    embedding, output = [m for name, m in model.named_modules() if name.endswith(names)]
    output.weight = torch.nn.Parameter(output.weight.clone())  # not tied
    idx[1, t] = V - 1
    embedding.weight.data[V - 1, 0] = math.nan
    with pytest.raises(FloatingPointError, match=f'not finite at token {t}$'):
        read_in(model, idx, sizes, empty_state(model, 2, cached))
    assert torch.backends.mkldnn.enabled  # which reading few tokens goes without

def test_reading_refuses_what_it_cannot_answer():
    model = make(dropout=0.1)
    for mode, rows in ((model.eval, 3), (model.train, 1)):
        mode()
        with pytest.raises(ValueError, match='a row of tokens for every row of the state'):
            read(model, tokens(1, 2), empty_state(model, rows, True))
    model.eval().lm_head.weight.data.fill_(math.inf)
    state = new_state(model)  # whoever reads into it is told
    with pytest.raises(FloatingPointError, match='at token 0'):
        read(model, tokens(1, 2), state)

class OtherFold(FoldGPT):  # what a reader may change in forward alone
    def fold(self, x, carry):
        return super().fold(x.sin(), carry)

class OtherGPT(GPT):
    def forward(self, idx, targets=None, carry=None):
        logits, loss, carry = super().forward(idx, targets, carry)
        return logits * 1.0001, loss, carry

@pytest.mark.parametrize('kind, config', [(OtherFold, FoldConfig), (OtherGPT, GPTConfig)])
@pytest.mark.parametrize('shaken', [True, False])
def test_a_model_whose_extend_is_not_its_forward_is_read_without(kind, config, shaken, capsys):
    sizes = dict(vocab_size=V, n_embd=16, n_head=2, block_size=12)
    model, idx = kind(config(**sizes)).double().eval(), tokens(1, 40)
    state = new_state(shake(model) if shaken else model)
    assert state.cache is None and 'through extend()' in capsys.readouterr().err
    assert_equal(read_in(model, idx, [1] * 40, state)[0], oracle(model, idx))
    assert model.training is False and new_state(make()).cache is not None
    assert not capsys.readouterr().err

class Future(FoldGPT):  # what a reader may get wrong
    def fold(self, x, carry):
        return super().fold(x + 0.1 * x.roll(-1, dims=1), carry)

class LongMemory(FoldGPT):
    def fold(self, x, carry):
        x, carry = super().fold(x, carry)
        return x + 0.1 * F.pad(x, (0, 0, 3 * 12, 0))[:, :x.size(1)], carry

class ByLength(FoldGPT):  # in an open segment a place is another than in a whole one
    def globally(self, past, current, caches=None):
        x = super().globally(past, current, caches)
        return x if past is None else x + torch.linspace(0, 1, x.size(1))[:, None] * x.roll(1, 2)

@pytest.mark.parametrize('kind', [Future, LongMemory, ByLength])
@pytest.mark.parametrize('shaken', [True, False])
def test_a_model_that_cannot_be_read_piece_by_piece_is_refused(kind, shaken):
    model = kind(FoldConfig(vocab_size=V, n_embd=16, n_head=2, block_size=12)).eval()
    for use in (new_state, check_reading):
        with pytest.raises(SystemExit, match=f'^error: {kind.__name__} gives other logits for a'):
            use(shake(model) if shaken else model)
