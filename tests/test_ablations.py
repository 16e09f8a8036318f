"""Each ablation differs from the fold in the one thing that it names, and in nothing else."""
from functools import partial

import pytest
import torch

from lib.contract import count_parameters, make_model
from lib.streaming import new_state, read
from models import MODELS

l, V, T = 4, 11, 22
SIZES = {'block_size': 8 * l, 'segment_size': l, 'vocab_size': V, 'n_head': 2, 'n_embd': 8,
         'n_local': 1, 'n_global': 3, 'n_layer': 4}
IDX = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=1e-10)

def make(kind, **sizes):
    """A model; all made in one test get the same weights where they have the same parameters."""
    torch.manual_seed(1)
    model = make_model(kind, {**SIZES, **sizes})
    for name, p in model.named_parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.double().eval()

def logits(model, idx=IDX, carry=None):
    return model(idx, idx, carry)[0]

@pytest.mark.parametrize('carry', ['plain', 'gated'])
@pytest.mark.parametrize('name', [name for name in MODELS if name.startswith('fold_')])
def test_it_chunks_and_streams_exactly_causally_and_starts_as_the_fold(name, carry):
    model, fold = make(name, carry=carry), make('fold', carry=carry)
    fold.load_state_dict(model.state_dict(), strict=False)
    expected, kept = logits(model), model(IDX[:, :2 * l])[2]
    difference = (expected - logits(fold)).abs().amax(dim=(0, 2))
    assert difference[:l].max() < 1e-10 and difference[l:2 * l].max() > 1e-3
    assert count_parameters(model) == count_parameters(fold)
    assert_equal(logits(model, IDX[:, 2 * l:], kept), expected[:, 2 * l:])
    assert new_state(model).cache is not None
    for n in (1, 3, l + 1, 2 * l + 1):  # tokens read at once
        state = None
        for end in range(n, T + 1, n):
            out, state = read(model, IDX[:, end - n:end], state)
            assert_equal(out, expected[:, end - 1])
    for t in range(T):
        assert_equal(logits(model, IDX.index_fill(1, torch.tensor(t), 0))[:, :t], expected[:, :t])

def test_dropped_is_the_gpt_of_the_same_window():
    expected = torch.cat([logits(make('gpt', block_size=l), x) for x in IDX.split(l, dim=1)], dim=1)
    assert_equal(logits(make('fold_dropped')), expected)

@pytest.mark.parametrize('name, evolve', [
    ('fold', lambda block, past: [last(block, past[:, :i + 1]) for i in range(l)]),
    ('fold_frozen', lambda block, past: [past])])
def test_the_past_half_goes_as_the_name_says(name, evolve):
    """Eq. 17 query by query; one layer on, the past half is evolve(block, past)."""
    model, outputs = make(name), [torch.zeros(2, 0, 8, dtype=torch.float64)]
    for x in model.local(IDX).split(l, dim=1):
        past = outputs[-1]
        for block in model.transformer.h[1:]:
            seen = [torch.cat((past, x[:, :i + 1]), dim=1) for i in range(x.size(1))]
            x = torch.cat([last(block, some) for some in seen], dim=1)
            past = torch.cat(evolve(block, past), dim=1) if past.numel() else past
        outputs.append(x)
    assert_equal(logits(model), model.head(torch.cat(outputs, dim=1), IDX)[0])

def last(block, seen):
    """The last place of a window one layer on, having attended to all of it: (B, 1, C)."""
    return block(seen[:, :-1] if seen.size(1) > 1 else None, seen[:, -1:], frozen=True)[1]
