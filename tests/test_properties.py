"""What must hold of every model, and of a fold with every combination of its keys, exactly or to
rounding error in float64. (More of that: test_streaming.py and test_gradients.py.)"""
import math

import torch
from literal import LAYERS, Literal
from small import EVERY_CARRY, EVERY_CASE, V, all_logits, assert_equal, make_case, reach, tokens
from small import SEGMENT as l

from lib.contract import blank_carry
from lib.rows import as_tuple, rowwise

@EVERY_CASE
def test_the_equations(name):
    """With a short last segment."""
    model, idx = make_case(name), tokens(1, 4 * l + 2)
    assert_equal(all_logits(model, idx).detach()[0], Literal(model).logits(idx[0].tolist()))

@EVERY_CARRY
def test_chunks_with_the_carry_passed_equal_one_call(name):
    """And a carry has the same size wherever it is valid, and is no view of all that was read."""
    model, idx = make_case(name), tokens(3, 8 * l)
    whole, _, last = model(idx, idx)
    assert all(c.untyped_storage().nbytes() < 3 * c.nbytes for c in as_tuple(last))
    for sizes in ([l, 7 * l], [2 * l, 3 * l, 3 * l], model.unit):
        parts, carry = [], None
        for chunk in idx.split(sizes, dim=1):
            logits, _, carry = model(chunk, chunk, carry)
            rowwise(lambda c, d: assert_equal(c.shape, d.shape), carry, blank_carry(model, 3))
            parts.append(logits)
        assert_equal((torch.cat(parts, dim=1), carry), (whole, last))

def seen_until(model, t, layers=LAYERS):
    """The end of the tokens that token t can change, through so many layers."""
    c, kind = model.config, type(model).__name__
    if kind == 'TransformerXL':
        return (t // l + 1 + layers) * l
    if kind == 'GPT' and c.window:
        return t + 1 + layers * (l - 1)
    if kind not in ('FoldGPT', 'GatedFold', 'QueuedFold') or c.recurrent:
        return math.inf
    last = t + c.n_local * (l - 1) * (c.local == 'sliding')  # that local layers show it to
    return (last // l + 1 + getattr(c, 'queue', c.past == 'local')) * l

@EVERY_CASE
def test_causality_and_what_is_seen(name):
    """A token changes no logit before it, but its own and all that the equations let see it, across
    the borders of segments too."""
    model, idx = make_case(name), tokens(1, 7 * l)
    before = all_logits(model, idx)
    for t in (0, 1, l - 1, l, 3 * l + 1, 7 * l - 1):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        differs = (all_logits(model, changed) != before).any(dim=-1)[0]
        end = min(7 * l, seen_until(model, t))
        assert not differs[:t].any() and differs[t:end].all() and not differs[end:].any()

@EVERY_CARRY
def test_gradient_reaches_as_far_as_the_equations_say_and_no_further(name):
    """In one call, and through a carry that is passed on, unless it is detached."""
    model, T = make_case(name), 7 * l
    layers = 0 if getattr(model.config, 'stop', False) else LAYERS  # of gradient, for an XL
    for chunk, detach in ((T, False), (2 * l, False), (2 * l, True)):
        first = next(t for t in range(T) if seen_until(model, t, layers) >= T)
        first = max(first, (T - 1) // chunk * chunk) if detach else first
        found = reach(model, tokens(1, T), chunk, detach) > 0
        assert not found[:first].any() and found[first:].all(), (chunk, detach)

@EVERY_CASE
def test_rows_never_influence_each_other(name):
    model, idx = make_case(name), tokens(3, 4 * l)
    carry = rowwise(lambda c: torch.rand_like(c) + 0.1, blank_carry(model, 3))
    logits, _, last = model(idx, idx, carry)
    for row in (slice(b, b + 1) for b in range(3)):
        alone, _, after = model(idx[row], idx[row], rowwise(lambda x: x[row], carry))
        assert_equal((alone, after), (logits[row], rowwise(lambda x: x[row], last)))
