"""Reading and writing through the state: exact, of constant size, no caller's state changed."""
import math

import pytest
import torch
from small import CASES, MORE, TOYS, V, all_logits, assert_equal, make, make_case, tokens
from small import SEGMENT as l
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

ALL = {**CASES, **MORE}
SOME = ('learned segment evolving plain', 'rotary sliding evolving gated', 'gpt', 'gpt, window',
        'lstm', 'recurrent', 'windowed', 'queued_fold')  # of every kind of state

def paths(names):
    """Through the caches that a model has, and without."""
    alone = {*TOYS, *(kind for kind, (_, model) in MODELS.items() if not hasattr(model, 'extend'))}
    return pytest.mark.parametrize('name, cached', [
        (name, cached) for name in names for cached in (True, False)
        if not cached or ALL[name].get('kind') not in alone])

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

@paths(ALL)
def test_in_any_pieces_it_is_the_teacher_forced_forward_pass(name, cached, monkeypatch):
    """Token by token, too, and beyond the window."""
    monkeypatch.setattr('lib.streaming.TOKENS_PER_CALL', 2 * 3 * l)
    monkeypatch.setattr('model.FUSED_FROM', 33)
    T = 90 if 'long' in name else 8 * l + 2
    model, idx = make_case(name), tokens(2, T)
    expected, generator = oracle(model, idx), torch.Generator().manual_seed(1)
    for most in (1, l + 2, T):
        sizes = torch.randint(1, most + 1, (T,), generator=generator)
        ends = sizes.cumsum(0).clamp(max=T).unique()
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        logits, state = read_in(model, idx, sizes, empty_state(model, 2, cached))
        assert_equal(logits, expected[:, ends - 1])
        assert state.read.tolist() == [T] * 2
        assert_equal(read(model, idx[:, :0], state)[0], logits[:, -1])  # asked again

@pytest.mark.parametrize('name', ALL)
def test_saved_and_loaded_it_goes_on_alike_and_keeps_its_size(name, tmp_path):
    model, idx, other = make_case(name), tokens(2, 5 * l + 3), torch.Generator()
    state, sizes, generator = new_state(model, 2), set(), torch.Generator().manual_seed(3)
    for start, end in ((0, 0), (0, l - 1), (l - 1, 4 * l + 1)):
        read_(model, idx[:, start:end], state)
        save_state(tmp_path / 'state', state, model, generator)
        sizes.add((state.nbytes, (tmp_path / 'state').stat().st_size))
    loaded = load_state(tmp_path / 'state', model, other)
    assert torch.equal(other.get_state(), generator.get_state()) and len(sizes) == 1
    logits, _ = read_in(model, idx[:, end:], [1] * (l + 2), loaded)
    assert_equal(logits, oracle(model, idx)[:, end:])
    next(model.parameters()).data[0] += 1
    with pytest.raises(SystemExit, match='is not a state of this model'):
        load_state(tmp_path / 'state', model, other)

@pytest.mark.parametrize('name', SOME)
def test_what_is_written_is_what_calls_on_the_whole_text_would_write(name):
    """After nothing, a segment and more: the likeliest tokens, and random ones by the generator."""
    model = make_case(name)
    for T, temperature in ((0, 1), (l, 0), (5 * l + 1, 1)):
        a, b = (torch.Generator().manual_seed(1) for _ in range(2))
        state, text = new_state(model, 2), tokens(2, T)
        for token in stream(model, text, state, 8, temperature, generator=a):
            text = torch.cat((text, token), dim=1)
            assert state.read.tolist() == [text.size(1)] * 2  # it has read along
        logits = torch.cat((torch.zeros(2, 1, V), oracle(model, text)), dim=1)  # of nothing: 0
        expected = [sample_token(logits[:, t], temperature, generator=b) for t in range(T, T + 8)]
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
    a, b = (generate(model, idx, 20, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    assert (a != b).any() and torch.equal(a[:, :5], idx)

@paths(SOME)
def test_the_state_and_logits_of_the_caller_are_left_alone(name, cached):
    model, idx = make_case(name), tokens(2, 40)
    logits, state = read(model, idx[:, :17], empty_state(model, 2, cached))
    before = state.clone()
    for T in (0, 1, 7, 23):
        read(model, idx[:, 17:17 + T], state)[0].zero_()  # may be written to
        assert_equal(vars(state), vars(before))
    read_(model, idx[:, 17:18], state)  # says by its name that it does not
    assert state.read.tolist() == [18, 18] and before.read.tolist() == [17, 17]

@paths(SOME)
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

def test_the_past_half_is_computed_once_a_segment():
    """Counted: inside a segment a token costs the products of one token, at its start, where the
    window opens, those of the past half as well, in the last layer its keys and values alone."""
    C, l = 16, 6
    model = make(n_embd=C, segment_size=l, block_size=l)
    state = read(model, tokens(1, 2 * l))[1]
    for place in [*range(l), 0]:
        with FlopCounterMode(display=False) as counter:
            read_(model, tokens(1, 1), state)
        token = C * V + 4 * 12 * C * C
        attention = 4 * C * (l + 2 * place + 2)  # which torch counts by its kernel
        past = 0 if place else l * 12 * C * C + 2 * C * l * (l + 1) + l * 2 * C * C
        assert token + 0.8 * past <= counter.get_total_flops() / 2 <= token + attention + past

@paths([*SOME[:2], 'long gpt', 'recurrent', 'queued_fold'])
def test_a_state_that_is_not_finite_names_the_token(name, cached):
    model = make_case(name)
    names = 'wte', 'embedding', 'lm_head', 'output'
    embedding, output = [m for name, m in model.named_modules() if name.endswith(names)]
    output.weight = torch.nn.Parameter(output.weight.clone())  # not tied
    embedding.weight.data[V - 1, 0] = math.nan
    for t in (l, 4 * l + 1):
        for sizes in ([6 * l], [1] * 6 * l, [4 * l, 2, 2 * l - 2]):
            idx = tokens(2, 6 * l) % (V - 1)
            idx[1, t] = V - 1
            with pytest.raises(FloatingPointError, match=f'not finite at token {t}$'):
                read_in(model, idx, sizes, empty_state(model, 2, cached))
    assert torch.backends.mkldnn.enabled  # which reading few tokens goes without

def test_a_long_text_is_read_in_whole_segments_at_once():
    model, calls = make(), []
    state, forward = new_state(model), model.forward
    model.forward = lambda idx, **more: calls.append(idx.size(1)) or forward(idx, **more)
    read_(model, tokens(1, 9 * l + 2), state)
    assert calls == [9 * l]  # what is open goes through the caches

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

UNTRAINED = dict(vocab_size=V, n_embd=16, n_head=2, block_size=12)  # what differs, differs least

@pytest.mark.parametrize('kind, config', [(OtherFold, FoldConfig), (OtherGPT, GPTConfig)])
def test_a_model_whose_extend_is_not_its_forward_is_read_without(kind, config, capsys):
    model, idx = kind(config(**UNTRAINED)).double().eval(), tokens(1, 40)
    state = new_state(model)
    assert state.cache is None and 'through extend()' in capsys.readouterr().err
    assert_equal(read_in(model, idx, [1] * 40, state)[0], oracle(model, idx))
    assert model.training is False and new_state(make()).cache is not None
    assert not capsys.readouterr().err

class Odd(FoldGPT):  # what a reader may get wrong
    def forward(self, idx, targets=None, carry=None):
        logits, loss, carry = super().forward(idx, idx, carry)
        return self.change(logits), loss, carry

@pytest.mark.parametrize('change', [
    lambda x: x + 0.1 * x.roll(-1, dims=1),  # sees the future
    lambda x: x + 0.1 * F.pad(x, (0, 0, 3 * 12, 0))[:, :x.size(1)],  # or more than the carry
    lambda x: x * (1 + x.size(1) % 12)])  # in an open segment a place is another
def test_a_model_that_cannot_be_read_piece_by_piece_is_refused(change):
    model = Odd(FoldConfig(**UNTRAINED)).eval()
    model.change = change
    for use in (new_state, check_reading):
        with pytest.raises(SystemExit, match='^error: Odd gives other logits for a'):
            use(model)
