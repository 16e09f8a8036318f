"""Reading and writing through the state: exact, of constant size, no caller's state changed."""
import math

import pytest
import torch
from small import TOYS, V, all_logits, assert_equal, make, shake, tokens
from torch.utils.flop_counter import FlopCounterMode

from lib.checkpoint import load_state, save_state
from lib.contract import carries, make_model
from lib.rows import rowwise
from lib.streaming import empty_state, generate, new_state, read, read_, sample_token, stream
from model import GPT, FoldConfig, FoldGPT, GPTConfig
from models import MODELS

l = 4  # of the folds' segments
CASES = {'fold': {}, 'gated': dict(kind='fold', carry='gated'), 'no local': dict(
    kind='fold', n_local=0, n_global=1), 'no bias': dict(kind='fold', n_local=1, bias=False),
    'segment of 1': dict(kind='fold', segment_size=1), 'gpt': {}, 'long segment': dict(
    kind='fold', segment_size=36, block_size=36), 'long gpt': dict(kind='gpt', block_size=80),
    **{name: {} for name in [*MODELS, *TOYS] if name.startswith('fold_') or name in TOYS}}
PATHS = [(name, cached) for name in CASES for cached in (True, False)
         if name not in TOYS or not cached]
EVERY = pytest.mark.parametrize('name', CASES)


@pytest.fixture(params=PATHS, ids=str)
def case(request):
    """A model and a function of B that gives the state of so many rows: with and without caches."""
    name, cached = request.param
    model = make_case(name)
    return model, lambda B=1: empty_state(model, B, cached)


def make_case(name):
    return make(**{'kind': name, 'segment_size': l, 'block_size': 4 * l, **CASES[name]})


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


def test_token_by_token_it_is_the_teacher_forced_forward_pass(case):
    (model, state_of), idx = case, tokens(3, 85)
    logits, state = read_in(model, idx, [1] * 85, state_of(3))
    assert_equal(logits, oracle(model, idx))
    assert state.read.tolist() == [85] * 3
    assert_equal(read(model, idx[:, :0], state)[0], logits[:, -1])  # asked again


def test_any_pieces_give_the_forward_pass(case, monkeypatch):
    monkeypatch.setattr('lib.streaming.TOKENS_PER_CALL', 3 * l)
    (model, state_of), idx = case, tokens(3, 95)
    expected, generator = oracle(model, idx), torch.Generator().manual_seed(1)
    for most in (2, l + 2, 5 * l, 5 * l, 95):
        sizes = torch.randint(1, most + 1, (95,), generator=generator)
        ends = [*sizes.cumsum(0)[sizes.cumsum(0) < 95].tolist(), 95]
        sizes = [b - a for a, b in zip([0, *ends], ends)]
        logits, _ = read_in(model, idx, sizes, state_of(3))
        assert_equal(logits, expected[:, [end - 1 for end in ends]])


@pytest.mark.parametrize('T', [0, 1, l - 1, l, l + 1, 5 * l + 3])
@EVERY
def test_greedy_generation_is_that_of_calls_on_the_whole_text(name, T):
    model, idx = make_case(name), tokens(2, T)
    text = generate(model, idx, 60, temperature=0)
    assert torch.equal(text[:, :T], idx) and text.size(1) == T + 60
    first = max(T, 1)  # after nothing, nothing is likelier than anything
    assert torch.equal(text[:, first:], oracle(model, text).argmax(-1)[:, first - 1:-1])
    assert T or (text[:, 0] == 0).all()


def test_a_stream_yields_what_the_state_has_read(case):
    (model, state_of), idx = case, tokens(2, 5)
    state = state_of(2)
    written = [*stream(model, idx, state, 2 * l, generator=torch.Generator().manual_seed(1))]
    text = torch.cat((idx, *written), dim=1)
    assert state.read.tolist() == [5 + 2 * l] * 2 and written[0].shape == (2, 1)
    assert_equal(state.logits, oracle(model, text)[:, -1])


def test_samples_follow_temperature_top_k_top_p_and_the_generator():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)

    def sample(**kwargs):
        return sample_token(logits, generator=torch.Generator().manual_seed(1), **kwargs).flatten()

    for temperature in (0.5, 2.0):
        share = torch.bincount(sample(temperature=temperature), minlength=4) / 4000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.03)
    p = logits[0].softmax(-1).tolist()  # 0.03, 0.09, 0.24, 0.64
    for kwargs, kept in ((dict(top_k=2), {2, 3}), (dict(top_k=99), {0, 1, 2, 3}),
                         (dict(top_p=0.5), {3}), (dict(top_p=p[3] - 0.01), {3}),
                         (dict(top_p=p[3] + 0.01), {2, 3}), (dict(top_p=0.9), {1, 2, 3}),
                         (dict(top_p=1.0), {0, 1, 2, 3}), (dict(top_k=2, top_p=0.7), {3}),
                         (dict(temperature=0), {3}), (dict(temperature=1e-46), {3}),
                         (dict(top_p=1e-46), {3})):
        assert set(sample(**kwargs).tolist()) == kept, kwargs
    model, idx = make(), tokens(2, 5)
    a, b, c = (generate(model, idx, 50, generator=torch.Generator().manual_seed(seed))
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def assert_same(state, other):
    assert vars(state).keys() == vars(other).keys()
    for name, value in vars(state).items():
        rowwise(torch.testing.assert_close, value, getattr(other, name))


def test_the_state_and_logits_of_the_caller_are_left_alone(case):
    (model, state_of), idx = case, tokens(2, 40)
    logits, state = read(model, idx[:, :17], state_of(2))
    before = state.clone()
    for T in (0, 1, 7, 23):
        read(model, idx[:, 17:17 + T], state)[0].zero_()  # may be written to
        assert_same(state, before)
    read_(model, idx[:, 17:18], state)  # says by its name that it does not
    assert state.read.tolist() == [18, 18] and before.read.tolist() == [17, 17]


def test_rows_are_picked_reset_and_joined(case):
    (model, state_of), idx = case, tokens(3, 70)
    expected = oracle(model, idx)
    _, state = read(model, idx[:, :31], state_of(3))
    rows = [2, 0, 2]
    assert_equal(read(model, idx[rows, 31:50], state.pick(rows))[0], expected[rows, 49])
    assert_same(state.pick([0]).join(state.pick([1, 2])), state)
    state.put([1], state_of(1))  # row 1 begins anew, the others go on
    for start, end in ((0, 1), (1, 5), (5, 14), (14, 39)):
        part = torch.stack([idx[b, at + start:at + end] for b, at in enumerate((31, 0, 31))])
        logits, state = read(model, part, state)
        assert_equal(logits, torch.stack([expected[0, 30 + end], expected[1, end - 1],
                                          expected[2, 30 + end]]))
    assert state.read.tolist() == [70, 39, 70]


@pytest.mark.parametrize('T', [0, 1, l - 1, l, 5 * l + 3])
@EVERY
def test_saved_and_loaded_it_goes_on_alike_and_keeps_its_size(name, T, tmp_path):
    model, idx, generator = make_case(name), tokens(2, T + 20), torch.Generator().manual_seed(3)
    state, sizes = new_state(model, 2), set()
    torch.rand(5, generator=generator)
    for part in (idx[:, :0], idx[:, :T]):
        read_(model, part, state)
        save_state(tmp_path / 'state', state, model, generator)
        sizes.add((state.nbytes, (tmp_path / 'state').stat().st_size))
    loaded, rng = load_state(tmp_path / 'state', model)
    assert torch.equal(rng, generator.get_state()) and len(sizes) == 1
    logits, _ = read_in(model, idx[:, T:], [1] * 20, loaded)
    assert_equal(logits, oracle(model, idx)[:, T:])


def test_the_state_of_the_shakespeare_model_fits_into_a_file_of_100_kb(tmp_path):
    model = make_model('fold', dict(block_size=48, vocab_size=65, n_head=4, n_embd=128, n_local=1,
                                    n_global=3)).eval()
    state = read(model, torch.randint(65, (1, 1000)))[1]
    save_state(tmp_path / 'state', state, model, torch.Generator())
    assert (tmp_path / 'state').stat().st_size < 100_000


def test_the_past_half_is_computed_once_a_segment():
    """Counted: inside a segment a token costs the products of one token, at its start, where the
    window opens, those of the past half as well; the head apart."""
    C, l, costs = 16, 12, []
    model = make(n_embd=C, segment_size=l, block_size=l)
    state = read(model, tokens(1, 2 * l))[1]
    for _ in range(2 * l):
        with FlopCounterMode(display=False) as counter:
            read_(model, tokens(1, 1), state)
        costs.append(counter.get_total_flops() / 2 - C * V)
    token, keys_values = 4 * 12 * C * C, l * 2 * C * C
    for place, cost in enumerate(costs):
        place %= l
        attention = 2 * 2 * C * (place + 1 + l + place + 1)  # which torch counts by its kernel
        past = 0 if place else l * 12 * C * C + 2 * C * l * (l + 1) + keys_values
        assert token + 0.8 * past <= cost <= token + attention + past, place


@pytest.mark.parametrize('t', [3, l, 4 * l + 1])
@pytest.mark.parametrize('sizes', [[6 * l], [1] * 6 * l, [1, 6 * l - 1]])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_state_that_is_not_finite_names_the_token(case, t, sizes, value):
    model, state_of = case
    if carries(model) or model.config.block_size >= 6 * l:
        for name, p in model.named_parameters():
            if name.endswith(('wte.weight', 'embedding.weight')):
                p.data[V - 1, 0] = value
        idx = tokens(2, 6 * l) % (V - 1)
        idx[1, t] = V - 1
        with pytest.raises(FloatingPointError, match=f'not finite at token {t}$'):
            read_in(model, idx, sizes, state_of(2))


def test_reading_refuses_what_it_cannot_answer():
    model = make(dropout=0.1)
    for mode, rows in ((model.eval, 3), (model.train, 1)):
        mode()
        with pytest.raises(ValueError, match='a row of tokens for every row of the state'):
            read(model, tokens(1, 2), empty_state(model, rows, True))


class OtherFold(FoldGPT):
    """What a reader may change in forward alone."""

    def fold(self, x, carry):
        return super().fold(x + 0.01 * x.cumsum(dim=1), carry)


class OtherGPT(GPT):
    def forward(self, idx, targets=None, carry=None):
        logits, loss, carry = super().forward(idx, targets, carry)
        return logits * 1.01, loss, carry


@pytest.mark.parametrize('kind, config', [(OtherFold, FoldConfig), (OtherGPT, GPTConfig)])
@pytest.mark.parametrize('shaken', [True, False])
def test_a_model_whose_extend_is_not_its_forward_is_read_without(kind, config, shaken, capsys):
    sizes = dict(vocab_size=V, n_embd=16, n_head=2, block_size=12)
    model = kind(config(**sizes)).double().eval()
    model, idx = shake(model) if shaken else model, tokens(1, 70)
    state = new_state(model)
    assert state.cache is None and 'through its caches' in capsys.readouterr().err
    assert_equal(read_in(model, idx, [1] * 70, state)[0], oracle(model, idx))
    assert model.training is False and new_state(make()).cache is not None
    assert not capsys.readouterr().err


def change(path, **items):
    content = torch.load(path, weights_only=True)
    content.update(items)
    content['state'].update({name: items[name] for name in content['state'] if name in items})
    torch.save(content, path)


@pytest.mark.parametrize('spoil, message', [
    (lambda path, model: path.unlink(), 'there is no state at'),
    (lambda path, model: path.write_bytes(b'garbage'), 'is not a readable state'),
    (lambda path, model: path.write_bytes(path.read_bytes()[:-2000]), 'is not a readable state'),
    (lambda path, model: torch.save([1], path), 'is not a state: it holds a list'),
    (lambda path, model: torch.save({'model': 1}, path), 'is not a state of this model'),
    (lambda path, model: model.lm_head.weight.data.mul_(2), 'is not a state of this model'),
    (lambda path, model: change(path, rng=None), 'is damaged'),
    (lambda path, model: change(path, rng=torch.zeros(5056)), 'is damaged'),
    (lambda path, model: change(path, carry=None), 'is damaged'),
    (lambda path, model: change(path, carry=torch.zeros(1)), 'is damaged'),
    (lambda path, model: change(path, read=torch.tensor([-1])), 'is damaged'),
    (lambda path, model: change(path, cache=None), 'is damaged'),
    (lambda path, model: change(path, logits=torch.full((1, V), math.nan).double()), 'damaged')])
def test_a_state_of_another_model_or_a_damaged_one_is_refused(tmp_path, spoil, message):
    model, path = make(), tmp_path / 'state'
    save_state(path, read(model, tokens(1, 20))[1], model, torch.Generator())
    load_state(path, model)
    spoil(path, model)
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        load_state(path, model)
