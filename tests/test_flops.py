"""FLOPs are those that torch counts."""
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flops import flops_per_token
from folds import VOCAB, batch, make_fold
from model import GPT, GPTConfig


@pytest.mark.parametrize('make, T', [
    (lambda: make_fold(l=4), 4), (lambda: make_fold(l=4), 32), (lambda: make_fold(l=4), 31), (lambda: make_fold(l=4, n_local=0), 16),
    (lambda: make_fold(l=5, n_local=1, n_global=3), 35), (lambda: make_fold(l=4, carry='gated'), 31),
    (lambda: GPT(GPTConfig(block_size=64, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=8)), 64),
    (lambda: GPT(GPTConfig(block_size=64, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=8)), 17),
    (lambda: GPT(GPTConfig(block_size=96, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=8)), 96)])
def test_flops_are_those_that_torch_counts(make, T):
    """Without fused kernels, which it does not see on a CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        check_flops(make, T)


def check_flops(make, T):
    model, (x, y) = make(), batch(T, B=3)
    with FlopCounterMode(display=False) as forward:
        _, loss, carry = model(x, y)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert flops_per_token(model, T, backward=False) * 3 * T == forward.get_total_flops()
    assert flops_per_token(model, T) * 3 * T == forward.get_total_flops() + backward.get_total_flops()
    if carry is not None and T % model.config.segment_size == 0:
        with FlopCounterMode(display=False) as counter:
            model(x, y, carry)
        assert flops_per_token(model, T, backward=False, carried=True) * 3 * T == counter.get_total_flops()
