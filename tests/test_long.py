"""Training at any length: recomputation, truncation, streams, stops, several processes; each against plain training."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import kill_and_resume
import training
from conftest import ROOT
from flops import flops_per_token
from model import FoldConfig, FoldGPT, GPT, GPTConfig
from test_train import final_weights, records, same
from training import Walk, backpropagate

l, VOCAB = 3, 11
EXACT = dict(rtol=0, atol=1e-10)


def make_fold(segments=8, dropout=0.0, l=l, n_local=2, n_global=2, carry='plain'):
    model = FoldGPT(FoldConfig(block_size=segments * l, segment_size=l, vocab_size=VOCAB, n_head=2, n_embd=8, bias=True,
                               n_local=n_local, n_global=n_global, dropout=dropout, carry=carry)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def batch(T, B=2):
    return torch.randint(VOCAB, (B, T)), torch.randint(VOCAB, (B, T))


def gradients(model):
    """The gradients there are, as copies, taken off the model."""
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=name)


# --- recomputation ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dropout', [0.0, 0.2])
@pytest.mark.parametrize('T', [l, 5 * l, 5 * l + 1])
@pytest.mark.parametrize('carried', [False, True])
@pytest.mark.parametrize('kind', ['plain', 'gated'])
def test_recomputed_gradients_are_the_full_ones(dropout, T, carried, kind):
    """With dropout the full side runs segment by segment too: only so are its masks drawn in the same order."""
    model, (x, y) = make_fold(dropout=dropout, carry=kind), batch(T)
    first = torch.randn(2, l, 8, dtype=torch.float64) if carried else None
    torch.manual_seed(1)
    losses, carry = [], first
    size = l if dropout else T
    for x_s, y_s in zip(x.split(size, dim=1), y.split(size, dim=1)):
        _, loss, carry = model(x_s, y_s, carry)
        losses.append(loss * x_s.size(1) / T)
    sum(losses).backward()
    full, after = gradients(model), torch.rand(1)
    torch.manual_seed(1)
    loss, last = backpropagate(model, x, y, first, recompute=True)
    torch.testing.assert_close(loss, sum(losses).detach(), **EXACT)
    torch.testing.assert_close(last, carry.detach(), **EXACT)
    assert_close(gradients(model), full, **EXACT)
    assert torch.equal(torch.rand(1), after)  # the random numbers go on as if nothing had been computed twice


class Held:
    """A tensor that autograd keeps, counted as long as it does."""
    now = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Held.now += tensor.nbytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self):
        Held.now -= self.tensor.nbytes


def peak_bytes(work, parameters):
    """The most bytes that autograd keeps at a time during work(), without the parameters themselves."""
    storages = {p.untyped_storage().data_ptr() for p in parameters}
    Held.now = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t if t.untyped_storage().data_ptr() in storages else Held(t),
            lambda kept: kept.tensor if isinstance(kept, Held) else kept):
        work()
    return Held.peak


def test_memory_of_recomputation_grows_by_the_carries():
    """By what autograd keeps, and by every byte that the process takes: nodes of a graph are not tensors."""
    B, C, l = 4, 32, 6
    model = FoldGPT(FoldConfig(block_size=l, segment_size=l, vocab_size=VOCAB, n_head=2, n_embd=C, n_local=2, n_global=2))
    few, many = (peak_bytes(lambda: backpropagate(model, *batch(n * l, B), recompute=True), model.parameters())
                 for n in (8, 24))
    assert few == many
    few, many = (peak_bytes(lambda: backpropagate(model, *batch(n * l, B)), model.parameters()) for n in (8, 24))
    assert many > 2.5 * few


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the system does not tell')
def test_a_segment_more_costs_its_carry_and_tokens():
    import bench_training
    settings = dict(vocab_size=65, segment_size=12, batch_size=16, bptt_segments=16, compile='off', device='cpu', threads=1)
    few, many = (bench_training.in_own_process('recomputed', '1+1x128x4', n * 12, settings) for n in (16, 416))
    carry, share = 16 * 12 * 128 * 4, 16 * 12 * (2 * 8 + 65 * 4)
    assert many['training_mb'] - few['training_mb'] <= 400 * 1.3 * (carry + share) / 1e6
    assert many['training_mb'] - few['training_mb'] >= 300 * carry / 1e6  # it was measured at all


# --- truncation -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('k', [1, 2, 3, 8])  # 3: the last chunk is shorter
@pytest.mark.parametrize('recompute', [False, True])
def test_truncated_at_k_is_full_with_the_carry_detached_there(k, recompute):
    model, (x, y) = make_fold(), batch(8 * l)
    loss, last = backpropagate(model, x.to(torch.uint16), y.to(torch.uint16), chunk=k * l, recompute=recompute)
    truncated = gradients(model)

    outputs, carry = [], None
    for s, x_s in enumerate(model.local(x).split(l, dim=1)):  # one graph over all segments, cut before each k-th
        carry = carry.detach() if s and s % k == 0 else carry
        _, carry = model.fold(x_s, carry)
        outputs.append(carry)
    _, expected = model.head(torch.cat(outputs, dim=1), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(last, carry.detach(), **EXACT)
    assert_close(truncated, gradients(model), **EXACT)


@pytest.mark.parametrize('recompute', [False, True])
def test_no_gradient_passes_a_cut_and_within_it_does(recompute):
    """The position embedding's place 0 is read in every segment; each time in a copy of its own, to tell them apart."""
    for k in (1, 2, 4, 8):
        model, (x, y) = make_fold(), batch(8 * l)
        reached = gradient_of_the_last_loss(model, x, y, k, recompute)
        assert len(reached) == 8
        for s, gradient in enumerate(reached):
            assert (gradient > 0) == (s // k == 7 // k), (k, s)


def gradient_of_the_last_loss(model, x, y, k, recompute):
    """How much gradient the loss at the last token sends into each segment's embedding."""
    embed, head, reached = model.embed, model.head, {}

    def noted_embed(segments, first=0):
        out = embed(segments, first)
        if out.requires_grad:
            for s in range(8):
                here = (segments == x[0, s * l:(s + 1) * l]).all(dim=1).nonzero()[:, 0]
                if len(here):
                    out.register_hook(lambda g, s=s, i=here[0]: reached.__setitem__(s, g[i].abs().sum().item()))
        return out

    def last_head(hidden, targets=None, all_logits=False):
        logits, loss = head(hidden, targets, all_logits)
        if targets is not None and not torch.equal(targets[:, -1], y[:, -1]):
            loss = loss * 0
        elif targets is not None:
            loss = logits[:, -1].square().sum()
        return logits, loss
    while len({tuple(row) for row in x[0].view(8, l).tolist()} | {tuple(row) for row in x[1].view(8, l).tolist()}) < 16:
        x.random_(VOCAB)  # all segments different, so that each is known by its tokens
    y.fill_(1)
    y[:, -1] = 2  # the mark of the last token
    model.embed, model.head = noted_embed, last_head
    backpropagate(model, x, y, chunk=k * l, recompute=recompute)
    return [reached[s] for s in range(8)]


def test_truncated_memory_does_not_depend_on_the_block_size():
    model, sizes = make_fold(), set()
    for segments in (4, 8, 64):
        sizes.add(peak_bytes(lambda: backpropagate(model, *batch(segments * l), chunk=4 * l), model.parameters()))
    assert len(sizes) == 2  # the first chunk of a sequence has no past half; from the second on, never more
    assert peak_bytes(lambda: backpropagate(model, *batch(64 * l)), model.parameters()) > 10 * max(sizes)


def test_chunks_are_plain_gradient_accumulation(train, tmp_path):
    """The first update sees the same losses cut or not, the last one other weights."""
    train(out_dir=tmp_path / 'a', bptt_segments=2, dropout=0.0)
    train(out_dir=tmp_path / 'b', bptt_segments=2, recompute=True, dropout=0.0)
    train(out_dir=tmp_path / 'c', dropout=0.0)
    a, b, c = (dict(records(tmp_path / name, 'loss')) for name in 'abc')
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-5)
    assert a[1] == pytest.approx(c[1], abs=1e-6) and a[20] != c[20]


# --- streams ----------------------------------------------------------------------------------------------------

def test_a_stream_reads_the_corpus_in_order_and_begins_anew_at_its_end(train):
    names = train(max_iters=0, stream=True, batch_size=2, gradient_accumulation_steps=2).globals
    corpus, n = torch.from_numpy(names['train_data'].copy()).long(), len(names['train_data'])
    at, wrapped = [r * (n - 16) // 4 for r in range(4)], []
    for it in range(2 * n // 16):
        for micro in range(2):
            x, y, rows, fresh = names['get_batch'](micro)
            assert rows.tolist() == [2 * micro, 2 * micro + 1]
            for b, r in enumerate(rows.tolist()):
                if at[r] + 17 > n:
                    at[r] = 0
                    wrapped.append(r)
                assert fresh[b] == (it == 0 or at[r] == 0)
                assert torch.equal(x[b].long(), corpus[at[r]:at[r] + 16])
                assert torch.equal(y[b].long(), corpus[at[r] + 1:at[r] + 17])
                at[r] += 16
    assert wrapped[:4] == [3, 2, 1, 0]  # the row that starts furthest on ends first


def long_forward(model, tokens, T):
    """Loss of each sequence of T, and the last carry, of one forward over all tokens."""
    logits, _, carry = model(tokens[None, :-1], all_logits=True)
    losses = torch.nn.functional.cross_entropy(logits[0], tokens[1:], reduction='none')
    return losses.view(-1, T).mean(dim=1), carry[0]


@pytest.mark.parametrize('how', [{}, dict(bptt_segments=9, recompute=True), dict(gradient_accumulation_steps=2, batch_size=2)])
def test_a_streams_carry_is_that_of_one_long_forward(train, tmp_path, how):
    """At a learning rate of 0, over so many updates that one of the four rows begins anew."""
    steps, T, begun = 15, 160, 0
    still = dict(stream=True, block_size=T, learning_rate=0.0, min_lr=0.0, dropout=0.0, max_iters=steps, eval_interval=steps)
    done = train(**still, **how)
    saved = torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['stream']
    model, corpus = done.globals['model'].eval(), torch.from_numpy(done.globals['train_data'].copy()).long()
    expected = torch.zeros(steps)
    with torch.no_grad():
        for r in range(4):
            first, it = r * (len(corpus) - T) // 4, 0
            while it < steps:
                n = min(steps - it, (len(corpus) - 1 - first) // T)
                losses, carry = long_forward(model, corpus[first:first + n * T + 1], T)
                expected[it:it + n] += losses / 4
                end, first, it, begun = first + n * T, 0, it + n, begun + 1
            torch.testing.assert_close(saved['carry'][r], carry, rtol=0, atol=1e-4)
            assert saved['at'][r] == end
    assert begun == 4 + 1
    assert [loss for _, loss in records(tmp_path / 'out', 'loss')] == pytest.approx(expected.tolist(), abs=1e-5)


def test_accumulated_streams_equal_one_large_batch_of_streams(train, tmp_path):
    train(out_dir=tmp_path / 'a', stream=True, batch_size=8, dropout=0.0, max_iters=30)
    train(out_dir=tmp_path / 'b', stream=True, batch_size=2, gradient_accumulation_steps=4, dropout=0.0, max_iters=30)
    a, b = (dict(records(tmp_path / name, 'loss')) for name in 'ab')
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-4)


def test_rows_without_a_carry_are_parted_from_the_others():
    walk = Walk(4, 5, 100)
    rows, carry = torch.arange(4), torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    starts, fresh = walk.advance(rows)
    assert fresh.all() and walk.groups(rows, fresh) == [(slice(None), None)]
    walk.keep(rows, carry)
    (g, kept), (new, none) = walk.groups(rows, torch.tensor([False, True, False, False]))
    assert g.tolist() == [0, 2, 3] and new.tolist() == [1] and none is None
    assert torch.equal(kept, carry[[0, 2, 3]])


def test_a_gpt_reads_streams_too(train, tmp_path):
    done = train('gpt', stream=True, max_iters=40)
    assert done.code == 0 and torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['stream']['carry'] is None


# --- stopping and going on --------------------------------------------------------------------------------------

MODES = [dict(stream=True), dict(bptt_segments=3), dict(recompute=True),
         dict(stream=True, bptt_segments=1, recompute=True, gradient_accumulation_steps=2)]


def at_update(monkeypatch, n, act):
    """Call act() in the n-th update of what follows."""
    step, steps = torch.optim.AdamW.step, []

    def counted(*args, **kwargs):
        steps.append(1)
        if len(steps) == n:
            act()
        return step(*args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', counted)


def out_of_memory():
    raise MemoryError('killed')


def assert_same_runs(a, b):
    assert same(final_weights(a), final_weights(b))
    for key in ('loss', 'val_loss', 'lr'):
        assert records(a, key) == records(b, key), key
    x, y = (torch.load(path / 'last.pt', weights_only=True)['stream'] for path in (a, b))
    assert x is y is None or all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_resumes_bit_for_bit(train, tmp_path, mode, monkeypatch):
    how = dict(max_iters=34, eval_interval=15, checkpoint_interval=4, log_interval=3, batch_size=8, **mode)
    assert train(out_dir=tmp_path / 'whole', **how).code == 0
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        at_update(patch, 24, out_of_memory)
        train(out_dir=tmp_path / 'parts', **how)
    assert torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)['iter_num'] == 20
    assert train(out_dir=tmp_path / 'parts', init_from='resume', **how).code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits(train, tmp_path, monkeypatch, number):
    how = dict(max_iters=20, eval_interval=10, log_interval=4, stream=True)
    train(out_dir=tmp_path / 'whole', **how)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_update(patch, 7, lambda: os.kill(os.getpid(), number))
        stopped = train(out_dir=tmp_path / 'parts', **how)
    assert stopped.code == 0 and f'stopped by {number.name} after iteration 7 of 20, saved' in stopped.out
    assert '--init_from=resume' in stopped.out and 'done in' not in stopped.out
    assert torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)['iter_num'] == 7
    assert signal.getsignal(number) == before
    assert train(out_dir=tmp_path / 'parts', init_from='resume', **how).code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')


def test_a_second_signal_ends_at_once(train, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    at_update(monkeypatch, 7, twice)
    with pytest.raises(KeyboardInterrupt):
        train(eval_interval=5)
    assert torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['iter_num'] == 5


def test_a_torn_log_line_is_dropped(train, tmp_path):
    train(out_dir=tmp_path / 'whole', max_iters=20)
    train(out_dir=tmp_path / 'parts', max_iters=10, lr_decay_iters=20)
    for torn in ('{"iter": 11, "lo', '{"iter": 10, "event": "torn"}'):  # the second lacks nothing but its line's end
        with open(tmp_path / 'parts' / 'log.jsonl', 'a') as f:
            f.write(torn)
        assert train(out_dir=tmp_path / 'parts', max_iters=10, lr_decay_iters=20, init_from='resume').code == 0
    assert train(out_dir=tmp_path / 'parts', max_iters=20, init_from='resume').code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')


def test_a_kill_between_the_two_checkpoints_is_undone(train, tmp_path, monkeypatch):
    train(out_dir=tmp_path / 'whole')
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if os.path.basename(target) == 'ckpt.pt' and torch.load(target, weights_only=True)['iter_num'] == 20:
            raise MemoryError('killed')
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, 'replace', killed)
        train(out_dir=tmp_path / 'parts')
    assert torch.load(tmp_path / 'parts' / 'last.pt', weights_only=True)['iter_num'] == 10
    assert train(out_dir=tmp_path / 'parts', init_from='resume').code == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'parts')
    a, b = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('whole', 'parts'))
    assert same(a['model'], b['model']) and a['iter_num'] == b['iter_num']


def test_checkpoints_more_often_than_evaluations_change_nothing(train, tmp_path):
    train(out_dir=tmp_path / 'a', stream=True)
    train(out_dir=tmp_path / 'b', stream=True, checkpoint_interval=1)
    assert_same_runs(tmp_path / 'a', tmp_path / 'b')


def test_streams_of_another_number_of_rows_are_refused(train):
    train(stream=True)
    refused = train(stream=True, init_from='resume', batch_size=2, max_iters=30)
    assert refused.code == 1 and 'streams are 4 rows' in refused.err and len(refused.err.splitlines()) == 1
    assert train(stream=False, init_from='resume', batch_size=2, max_iters=30).code == 0


def test_killed_with_sigkill_and_resumed():
    kill_and_resume.main(2)


# --- several processes ------------------------------------------------------------------------------------------

def in_processes(n, data_dir, out_dir, **settings):
    """A run of train.py in n gloo processes, that of conftest's settings."""
    how = dict(data_dir=data_dir, dataset='tiny', out_dir=out_dir, device='cpu', n_embd=16, n_head=2, n_local=1, n_global=1,
               segment_size=4, batch_size=4, log_interval=1, warmup_iters=2, threads=1, **settings)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    done = subprocess.run([*command, os.path.join(ROOT, 'train.py'), *(f'--{key}={value}' for key, value in how.items())],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize('mode', [
    dict(block_size=16), dict(stream=True, block_size=32, bptt_segments=3, gradient_accumulation_steps=2, recompute=True)])
def test_two_processes_learn_like_one(train, data_dir, tmp_path, mode):
    """Of streams, too, of which rows begin anew on the way; the second half of it resumed by one process."""
    how = dict(eval_interval=25, lr_decay_iters=50, **mode)
    train(out_dir=tmp_path / 'one', max_iters=50, dropout=0.0, **how)
    first = 35 if 'stream' in mode else 50
    printed = in_processes(2, data_dir, tmp_path / 'two', max_iters=first, **how)
    assert printed.count(f'iter {first}: loss') == 1 and '2 processes' in printed
    if first < 50:
        assert train(out_dir=tmp_path / 'two', max_iters=50, init_from='resume', dropout=0.0, **how).code == 0
    for key in ('loss', 'val_loss'):
        one, two = ([pair for pair in records(tmp_path / name, key) if pair[0] != 35 or key == 'loss'] for name in ('one', 'two'))
        assert [it for it, _ in one] == [it for it, _ in two] and len(one) == (50 if key == 'loss' else 2)
        assert [x for _, x in two] == pytest.approx([x for _, x in one], abs=1e-5)


# --- compiling --------------------------------------------------------------------------------------------------

def test_the_compiled_step_is_used_and_gives_the_same(monkeypatch):
    """The wiring, with a back-end that needs no compiler."""
    real, calls = torch.compile, []

    def without_a_compiler(function, **how):
        compiled = real(function, backend='aot_eager', fullgraph=True, dynamic=how['dynamic'])
        return lambda *args: calls.append(1) or compiled(*args)
    monkeypatch.setattr(torch, 'compile', without_a_compiler)
    model, (x, y) = make_fold().float(), batch(5 * l)
    backpropagate(model, x, y)
    expected = gradients(model)
    assert training.compile_model(model, 2, 'kernels', 'cpu') and len(calls) == 3  # tried out
    for recompute in (False, True):
        backpropagate(model, x, y, recompute=recompute)
        assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 3 + 4 + 3 + 4  # all segments but the first; once more in backward, but for the last
    model(x[:1], y[:1])
    assert len(calls) == 14  # of another batch, or short, a segment is not compiled
    gpt, (x, y) = GPT(GPTConfig(block_size=12, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=8)), batch(12)
    backpropagate(gpt, x, y)
    expected = gradients(gpt)
    assert training.compile_model(gpt, 2, 'kernels', 'cpu') and len(calls) == 15
    backpropagate(gpt, x, y)
    assert_close(gradients(gpt), expected, rtol=1e-4, atol=1e-5)
    gpt(x[:, :5])
    assert len(calls) == 16
    torch.testing.assert_close(gpt.eval().read(x)[0], gpt(x)[0][:, -1])  # through the cache, and compiled


def test_a_compiler_that_fails_is_left_out_with_a_line(train, monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError('no compiler\nhere')
    monkeypatch.setattr(torch, 'compile', lambda function, **how: broken)
    train(out_dir=tmp_path / 'a')
    done = train(out_dir=tmp_path / 'b', compile='kernels')
    assert done.code == 0 and 'torch.compile does not work here (RuntimeError: no compiler here)' in done.out
    assert_same_runs(tmp_path / 'a', tmp_path / 'b')


# --- FLOPs ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make, T', [
    (lambda: make_fold(l=4), 4), (lambda: make_fold(l=4), 32), (lambda: make_fold(l=4), 31), (lambda: make_fold(l=4, n_local=0), 16),
    (lambda: make_fold(l=5, n_local=1, n_global=3), 35), (lambda: make_fold(l=4, carry='gated'), 31),
    (lambda: GPT(GPTConfig(block_size=64, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=8)), 64),
    (lambda: GPT(GPTConfig(block_size=64, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=8)), 17)])
def test_flops_are_those_that_torch_counts(make, T):
    from torch.utils.flop_counter import FlopCounterMode
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
