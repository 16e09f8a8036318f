"""Each ablation differs from the fold in the one thing that it names, and in nothing else."""
import pytest
import torch

from ablations import KINDS
from model import GPT, FoldConfig, FoldGPT, GPTConfig, attend

l, VOCAB, EXACT = 4, 11, dict(rtol=0, atol=1e-10)


def make(kind, **sizes):
    """A fold or an ablation; all made in one test get the same weights, as far as they have the same parameters."""
    torch.manual_seed(1)
    sizes = {**dict(block_size=8 * l, segment_size=l, vocab_size=VOCAB, n_head=2, n_embd=8, n_local=1, n_global=2), **sizes}
    model = kind(FoldConfig(**sizes)).double().eval()
    for name, p in sorted(model.named_parameters()):
        p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def logits(model, idx):
    return model(idx, all_logits=True)[0]


IDX = torch.randint(VOCAB, (2, 5 * l + 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', KINDS)
def test_the_first_segment_is_the_folds(name):
    model, fold = make(KINDS[name][1]), make(FoldGPT)
    if name == 'fold_placed':
        fold.load_state_dict({key: value for key, value in model.state_dict().items() if key != 'window_wpe.weight'})
        model.window_wpe.weight.data.zero_()
    else:
        fold.load_state_dict(model.state_dict())
    a, b = logits(model, IDX), logits(fold, IDX)
    torch.testing.assert_close(a[:, :l], b[:, :l], **EXACT)
    assert (a[:, l:2 * l] - b[:, l:2 * l]).abs().max() > 1e-3 or name == 'fold_placed'
    assert model.num_params() == fold.num_params()


def test_dropped_is_the_gpt_of_the_same_window():
    model = make(KINDS['fold_dropped'][1])
    gpt = GPT(GPTConfig(block_size=l, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=8)).double().eval()
    gpt.load_state_dict(model.state_dict())
    expected = torch.cat([logits(gpt, x) for x in IDX.split(l, dim=1)], dim=1)
    torch.testing.assert_close(logits(model, IDX), expected, **EXACT)
    _, _, carry = model(IDX[:, :2 * l])
    torch.testing.assert_close(model(IDX[:, 2 * l:], carry=carry, all_logits=True)[0], expected[:, 2 * l:], **EXACT)


def by_hand(model, idx, past_half):
    """Logits of a fold whose past half goes through the global layers as past_half(block, past) says, layer by layer."""
    outputs, carry = [], None
    for x in model.local(idx).split(l, dim=1):
        past = carry
        for block in model.transformer.h[model.config.n_local:]:
            seen = x if past is None else torch.cat((past, x), dim=1)
            x = torch.cat([block(seen[:, :seen.size(1) - x.size(1) + i + 1], 1) for i in range(x.size(1))], dim=1)
            past = None if past is None else past_half(block, past)
        outputs.append(x)
        carry = x
    return model.head(torch.cat(outputs, dim=1), all_logits=True)[0]


def seeing_all(block, past):
    """The past half one layer on, every place attending to all of it."""
    rows = []
    for i in range(l):  # the place asked about comes last, where the causal mask hides nothing
        order = [j for j in range(l) if j != i] + [i]
        rows.append(block(past[:, order], 1))
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize('name, past_half', [
    ('fold', lambda block, past: block(past)), ('fold_frozen', lambda block, past: past), ('fold_open', seeing_all)])
def test_the_past_half_goes_as_the_name_says(name, past_half):
    model = make(FoldGPT if name == 'fold' else KINDS[name][1], n_global=3)
    torch.testing.assert_close(logits(model, IDX), by_hand(model, IDX, past_half), **EXACT)


def test_places_of_the_window_reach_both_halves():
    model = make(KINDS['fold_placed'][1])
    before = logits(model, IDX)
    for place in range(2 * l):
        step = torch.randn(8, dtype=torch.float64)
        model.window_wpe.weight.data[place] += step
        changed = (logits(model, IDX) - before).abs().amax(dim=(0, 2)) > 1e-9
        first = place - l if place >= l else l  # a past half is first there in the second segment
        assert not changed[:first].any() and changed[first:first + l].any()
        model.window_wpe.weight.data[place] -= step


def test_an_open_past_half_leaves_no_token_see_what_comes_after_it():
    model = make(KINDS['fold_open'][1])
    for t in range(IDX.size(1)):
        other = IDX.clone()
        other[:, t] = (other[:, t] + 1) % VOCAB
        torch.testing.assert_close(logits(model, other)[:, :t], logits(model, IDX)[:, :t], **EXACT)


def test_attend_is_causal():  # what by_hand rests on: the last place sees all before it
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v)[:, :, 2:3], attend(q[:, :, 2:3], k[:, :, :3], v[:, :, :3]), **EXACT)
