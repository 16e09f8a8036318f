"""Reading and generating through the state: exact, of constant size, and never changed behind the caller's back."""
import math

import pytest
import torch

import ablations
import checkpoint
from model import GPT, FoldConfig, FoldGPT, GPTConfig, sample_token

l, VOCAB, TOLERANCE = 12, 17, dict(rtol=0, atol=1e-10)


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


def make_fold(n_local=2, n_global=2, bias=True, segment_size=l, carry='plain', kind=FoldGPT):
    return shake(kind(FoldConfig(block_size=4 * l, segment_size=segment_size, vocab_size=VOCAB, n_head=2, n_embd=16,
                                 n_local=n_local, n_global=n_global, bias=bias, carry=carry)))


def make_gpt(block_size=24):
    return shake(GPT(GPTConfig(block_size=block_size, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=16)))


def oracle(model, idx):
    """Logits after every token of idx (B, T), each from a call of its own on what the model may see: (B, T, V)."""
    if isinstance(model, FoldGPT):
        return model(idx, all_logits=True)[0].detach()
    W = model.config.block_size
    return torch.cat([model(idx[:, max(0, t - W):t])[0] for t in range(1, idx.size(1) + 1)], dim=1).detach()


def read_in(model, idx, sizes, state=None):
    """Read idx in pieces of these sizes; logits after each piece, and the last state."""
    logits = []
    for piece in idx.split(sizes, dim=1):
        after, state = model.read(piece, state)
        logits.append(after)
    return torch.stack(logits, dim=1), state


MODELS = pytest.mark.parametrize('make', [
    make_fold, lambda: make_fold(0, 1), lambda: make_fold(1, 3, bias=False), lambda: make_fold(segment_size=1),
    lambda: make_fold(carry='gated'), *(lambda kind=kind: make_fold(kind=kind) for _, kind in ablations.KINDS.values()),
    make_gpt])


@MODELS
def test_token_by_token_equals_the_teacher_forced_forward_pass(make):
    model, idx = make(), torch.randint(VOCAB, (3, 11 * l + 5))
    logits, _ = read_in(model, idx, [1] * idx.size(1))
    torch.testing.assert_close(logits, oracle(model, idx), **TOLERANCE)


@MODELS
@pytest.mark.parametrize('seed', range(6))
def test_any_pieces_equal_the_forward_pass(make, seed):
    model, idx = make(), torch.randint(VOCAB, (3, 11 * l + 5))
    expected, draw = oracle(model, idx), torch.Generator().manual_seed(seed)
    sizes, left = [], idx.size(1)
    while left:  # up to five segments, and often none or a few tokens
        most = [5 * l, 5 * l, 2, l + 2][int(torch.randint(4, (1,), generator=draw))]
        sizes.append(min(left, int(torch.randint(1, most + 1, (1,), generator=draw))))
        left -= sizes[-1]
    logits, state = read_in(model, idx, sizes)
    model.read(idx[:, :3])[0][:, 0] = 0  # can be written to
    ends = torch.tensor(sizes).cumsum(0) - 1
    torch.testing.assert_close(logits, expected[:, ends], **TOLERANCE)
    assert state.read.tolist() == [idx.size(1)] * 3
    torch.testing.assert_close(model.read(idx)[0], expected[:, -1], **TOLERANCE)
    torch.testing.assert_close(model.read(idx[:, :0], state)[0], expected[:, -1], **TOLERANCE)  # asked again


@MODELS
@pytest.mark.parametrize('T', [1, l - 1, l, l + 1, 5 * l + 7])
def test_saved_and_loaded_it_goes_on_alike(make, T, tmp_path):
    model, idx, generator = make(), torch.randint(VOCAB, (1, T + 40)), torch.Generator().manual_seed(3)
    _, state = model.read(idx[:, :T])
    torch.rand(5, generator=generator)
    checkpoint.save_state(tmp_path / 'state', state, model, generator)
    loaded, rng = checkpoint.load_state(tmp_path / 'state', model)
    assert torch.equal(rng, generator.get_state())
    logits, _ = read_in(model, idx[:, T:], [1] * 40, loaded)
    torch.testing.assert_close(logits, oracle(model, idx)[:, T:], **TOLERANCE)


@MODELS
@pytest.mark.parametrize('T', [0, 1, l - 1, l, l + 1, 5 * l + 7])
def test_greedy_generation_equals_the_uncached_one(make, T):
    model, idx = make(), torch.randint(VOCAB, (2, T))
    cached = model.generate(idx, 500, temperature=0)
    assert torch.equal(cached[:, :T], idx) and cached.size(1) == T + 500
    if isinstance(model, FoldGPT):  # every token is the likeliest one after all before it
        expected = model(cached, all_logits=True)[0].argmax(-1)[:, max(T, 1) - 1:-1]
    else:
        expected = oracle(model, cached).argmax(-1)[:, max(T, 1) - 1:-1]
    assert torch.equal(cached[:, max(T, 1):], expected)
    assert T or (cached[:, 0] == 0).all()  # after nothing, nothing is likelier than anything


def test_generation_token_by_token_equals_calls_on_the_whole_text():
    model, idx = make_fold(), torch.randint(VOCAB, (1, l - 2))
    text = idx
    for _ in range(3 * l):
        text = torch.cat((text, sample_token(model(text)[0][:, -1], 0)), dim=1)
    assert torch.equal(model.generate(idx, 3 * l, temperature=0), text)


def test_draws_follow_the_generator():
    model, idx = make_fold(), torch.randint(VOCAB, (2, 5))
    a, b, c = (model.generate(idx, 50, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@MODELS
def test_reading_leaves_the_state_of_the_caller_alone(make):
    model, idx = make(), torch.randint(VOCAB, (2, 40))
    _, state = model.read(idx[:, :17])
    before = state.clone()
    for T in (0, 1, 7, 23):
        model.read(idx[:, 17:17 + T], state)
    model.step(idx[:, 17], state)
    assert all(torch.equal(value, getattr(before, name)) for name, value in vars(state).items())
    model.read_(idx[:, 17:18], state)  # says by its name that it does not
    assert state.read.tolist() == [18, 18] and before.read.tolist() == [17, 17]


@MODELS
def test_rows_can_be_picked_copied_and_reset(make):
    model, idx = make(), torch.randint(VOCAB, (3, 90))
    expected = oracle(model, idx)
    _, state = model.read(idx[:, :31])
    assert all(torch.equal(value, vars(state)[name][[2, 0]]) for name, value in vars(state.pick(torch.tensor([2, 0]))).items())
    picked = state.pick([2, 0, 2])
    logits, _ = model.read(idx[[2, 0, 2], 31:50], picked)
    torch.testing.assert_close(logits, expected[[2, 0, 2], 49], **TOLERANCE)
    state.put([1], model.new_state(1))  # row 1 begins anew, the others go on
    starts = [31, 0, 31]
    for t in range(55):
        token = torch.stack([idx[b, starts[b] + t] for b in range(3)])
        logits, state = model.step(token, state)
        for b in range(3):
            torch.testing.assert_close(logits[b], expected[b, starts[b] + t], **TOLERANCE)
    assert state.read.tolist() == [86, 55, 86]


def test_the_state_of_several_rows_is_saved_too(tmp_path):
    model, idx = make_fold(), torch.randint(VOCAB, (3, 50))
    _, state = model.read(idx[:, :29])
    checkpoint.save_state(tmp_path / 'state', state, model, torch.Generator())
    loaded, _ = checkpoint.load_state(tmp_path / 'state', model)
    torch.testing.assert_close(model.read(idx[:, 29:], loaded)[0], oracle(model, idx)[:, -1], **TOLERANCE)


def test_reading_refuses_what_it_cannot_answer():
    model = FoldGPT(FoldConfig(block_size=l, vocab_size=VOCAB, n_head=2, n_embd=16, n_local=1, n_global=1, dropout=0.1))
    state, idx = model.new_state(3), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match='for every row'):
        model.eval().read(idx, state)
    with pytest.raises(ValueError, match='model.eval()'):
        model.train().read(idx)  # dropout would make two readings differ


def test_the_state_of_the_shakespeare_model_fits_into_a_file_of_100_kb(tmp_path):
    model = FoldGPT(FoldConfig(block_size=4 * l, vocab_size=65, n_head=4, n_embd=128, n_local=1, n_global=3)).eval()
    state = model.read(torch.randint(65, (1, 1000)))[1]
    checkpoint.save_state(tmp_path / 'state', state, model, torch.Generator())
    assert (tmp_path / 'state').stat().st_size < 100_000


def test_the_size_of_the_state_does_not_depend_on_what_was_read(tmp_path):
    model, sizes, files = make_fold(), set(), set()
    state = model.new_state()
    for T in (0, 1, 5, l, 100, 5000):
        model.read_(torch.randint(VOCAB, (1, T)), state)
        sizes.add(sum(value.nbytes for value in vars(state).values()))
        checkpoint.save_state(tmp_path / 'state', state, model, torch.Generator())
        files.add((tmp_path / 'state').stat().st_size)
    assert len(sizes) == len(files) == 1


def test_the_past_half_is_computed_once_a_segment():
    """Counted, not timed: a token inside a segment costs the projections of one token."""
    from torch.utils.flop_counter import FlopCounterMode
    model = make_fold()
    _, state = model.read(torch.randint(VOCAB, (1, 2 * l)))
    flops = []
    for _ in range(2 * l):
        with FlopCounterMode(display=False) as counter:
            model.read_(torch.randint(VOCAB, (1, 1)), state)
        flops.append(counter.get_total_flops())
    C, V = 16, VOCAB
    past = 2 * (l * 12 * C * C + l * l * 2 * C + l * 2 * C * C) + 2 * l * 2 * C  # a layer of it; the last one's keys, values
    for p, cost in enumerate(flops):
        projections = 2 * (4 * 12 * C * C + V * C)
        attention = 2 * (2 * (p % l + 1) * 2 * C + 2 * (l + p % l + 1) * 2 * C)  # which torch counts or not, by its kernel
        assert projections <= cost <= projections + attention + (2 * past if p % l == 0 else 0), p
        assert (cost > 2 * projections) == (p % l == 0)


@pytest.mark.parametrize('t', [3, l, 4 * l + 5])
@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('make', [make_fold, lambda: make_gpt(block_size=6 * l)])
def test_a_state_that_is_not_finite_names_the_token(make, t, whole, value):
    model = make()
    with torch.no_grad():
        model.transformer.wte.weight[VOCAB - 1, 0] = value
    idx = torch.randint(VOCAB - 1, (2, 6 * l))
    idx[1, t] = VOCAB - 1
    with pytest.raises(FloatingPointError, match=f'not finite at token {t}$'):
        read_in(model, idx, [6 * l] if whole else [1] * 6 * l)


@pytest.mark.parametrize('spoil, message', [
    (lambda path, model: path.unlink(), 'there is no state at'),
    (lambda path, model: path.write_bytes(b'garbage'), 'is not a readable state'),
    (lambda path, model: path.write_bytes(path.read_bytes()[:-2000]), 'is not a readable state'),
    (lambda path, model: torch.save({'model': 1}, path), 'is not a readable state'),
    (lambda path, model: model.lm_head.weight.data.mul_(2), 'is the state of another model'),
    (lambda path, model: change(path, lambda c: c['state'].pop('carry')), 'is damaged'),
    (lambda path, model: change(path, lambda c: c['state'].update(carry=torch.zeros(1))), 'is damaged'),
    (lambda path, model: change(path, lambda c: c['state']['carry'].fill_(math.nan)), 'not finite')])
def test_a_state_of_another_model_or_a_damaged_one_is_refused(tmp_path, spoil, message):
    model, path = make_fold(), tmp_path / 'state'
    checkpoint.save_state(path, model.read(torch.zeros(1, 20, dtype=torch.int64))[1], model, torch.Generator())
    spoil(path, model)
    with pytest.raises(SystemExit, match=message):
        checkpoint.load_state(path, model)


def change(path, how):
    content = torch.load(path, weights_only=True)
    how(content)
    torch.save(content, path)
