"""A captured micro-step: the gradients of the plain one, bit for bit, by a stand-in for CUDA."""
import gc
import weakref

import pytest
import torch
from small import KEYS, SEGMENT, gradients, make, tokens
from test_train import equal, load

from lib import graphs, processes
from lib.contract import blank_carry
from lib.device import LONG, choose_compile, compile_blocks, takes_bfloat16
from lib.gradients import backpropagate
from lib.graphs import MOST, Graphs
from lib.records import load_record
from lib.rows import rowwise
from lib.scoring import token_losses

EVERY = pytest.mark.parametrize('kind, sizes', [  # the last one's carry is a tuple
    *(('fold', KEYS[i]) for i in (0, 8, 19)), ('gpt', {}), ('gpt', {'window': SEGMENT}),
    ('lstm', {}), ('recurrent', {}), ('queued_fold', {'queue': 2})])

class Stand:
    """capture() of a CPU: what it returns computes anew, on the inputs and into the gradients and
    results that were there when it was captured, as a CUDA graph does."""

    def __init__(self, model):
        self.model, self.captured, self.replayed = model, 0, 0

    def __call__(self, work):
        work()  # warms up
        grads, kept = [p.grad for p in self.model.parameters()], work()
        self.captured += 1

        def replay():
            self.replayed += 1
            now = [p.grad for p in self.model.parameters()]
            for p, grad in zip(self.model.parameters(), grads):
                p.grad = grad
            loss, last, _ = work()
            kept[0].copy_(loss)
            rowwise(torch.Tensor.copy_, kept[1], last)
            for p, grad in zip(self.model.parameters(), now):
                p.grad = grad
            return kept
        return replay

def updates(model, step, T=4 * SEGMENT, **kwargs):
    """Losses, gradients and carries of three updates of two micro-steps each, carried on."""
    torch.manual_seed(1)
    found, carry = [], rowwise(torch.randn_like, blank_carry(model, 2))
    for _ in range(3):
        for _ in range(2):
            loss, carry = backpropagate(model, tokens(2, T), tokens(2, T), carry, share=0.3,
                                        step=step, **kwargs)
            found.append((loss, carry))
        found.append({name: grad.clone() for name, grad in gradients(model).items()})
    return found

@EVERY
def test_captured_gradients_are_the_plain_ones_bit_for_bit(kind, sizes):
    """With dropout, whose random numbers go on as if nothing had been tried in between."""
    model = make(kind, **{'dropout': 0.2, **sizes}).train()
    stand = Stand(model)
    T = min(4 * SEGMENT, model.config.block_size)
    expected = updates(model, None, T)
    found = updates(model, Graphs(stand), T)
    assert (stand.captured, stand.replayed) == (1, 7)  # one of them to compare
    for a, b in zip(expected, found):
        b = {name: b[name] for name in a} if isinstance(a, dict) else b
        equal(a, b)

def test_each_shape_has_a_graph_up_to_so_many():
    """Chunks: without a carry, with one, and the short last one; then sequences of many lengths."""
    model = make().train()
    stand, T = Stand(model), 5 * SEGMENT
    step = Graphs(stand)
    equal(updates(model, None, T, chunk=2 * SEGMENT), updates(model, step, T, chunk=2 * SEGMENT))
    assert stand.captured == 2
    for T in range(SEGMENT, 4 * SEGMENT, SEGMENT):
        equal(updates(model, None, T), updates(model, step, T))
    assert stand.captured == MOST

def broken(work):
    work()
    return lambda: None  # adds nothing

def failing(work):
    work()
    try:
        raise RuntimeError('operation not permitted\nwhen stream is capturing')
    except RuntimeError:
        raise ValueError('the capture ended') from None  # as the end of a failed one does

@pytest.mark.parametrize('capture, why', [
    (failing, 'RuntimeError: operation not permitted when stream is capturing'),
    (broken, 'ArithmeticError: its gradients are 1 off')])
def test_what_fails_is_told_in_a_line_and_done_without(capsys, capture, why):
    model, step = make(dropout=0.2).train(), Graphs(capture)
    equal(updates(model, None), updates(model, step))
    assert capsys.readouterr().err == (f"compile='graph' does not work here ({why}); going on "
                                       f'without it\n')
    assert not step.works and not step.graphs

def test_a_failure_keeps_no_memory_of_the_trial():
    """Not until Python looks for cycles: the GPU is full now."""
    alive = []

    def capture(work):
        taken = torch.zeros(9)
        alive.append(weakref.ref(taken))
        failing(work)
    gc.disable()
    try:
        updates(make().train(), Graphs(capture))
        assert [found() for found in alive] == [None]
    finally:
        gc.enable()

def test_a_failure_gives_back_the_graphs_before_it():
    model = make().train()
    step = Graphs(Stand(model))
    updates(model, step)
    assert step.graphs
    step.capture = failing
    updates(model, step, 2 * SEGMENT)
    assert not step.works and not step.graphs

def test_a_run_whose_capture_fails_says_that_nothing_is_compiled(train, tmp_path, monkeypatch):
    monkeypatch.setattr('lib.device.choose_compile', lambda *args: 'graph')
    monkeypatch.setattr('lib.device.compile_blocks', lambda model, compile, *args: compile)
    monkeypatch.setattr(graphs, 'Graphs', lambda: Graphs(failing))
    assert train(max_iters=2).code == 0
    made = load_record(tmp_path / 'out' / 'record.json')
    assert made['settings']['compile'] == 'off'
    assert load(tmp_path / 'out' / 'last.pt')['provenance']['compiled'] == 'off'

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('factor', [1.0, 1.2])
def test_blocks_are_compiled_for_a_graph_alone_and_rightly(compiler, factor):
    calls = []

    def backend(graph, inputs):
        return lambda *x: calls.append(1) or [y * factor for y in graph(*x)]
    compiler(backend)
    model = make().float()
    assert compile_blocks(model, 'graph', 'cpu') == 'graph'
    updates(model, None)
    assert not calls
    step = Graphs(Stand(model))
    updates(model, step)
    assert calls and step.works == (factor == 1.0)

@pytest.mark.filterwarnings('ignore')
def test_of_a_compiled_run_the_evaluation_is_not(train, monkeypatch, compiler):
    calls, scored = [], []

    def backend(graph, inputs):
        return lambda *x: calls.append(1) or graph(*x)

    def score(*args):
        before = len(calls)
        losses = token_losses(*args)
        scored.append(len(calls) - before)
        return losses
    compiler(backend)
    monkeypatch.setattr('tasks.text.token_losses', score)
    assert train(compile='kernels', max_iters=2, eval_interval=1).code == 0
    assert calls and scored == [0, 0]

def test_a_run_with_captured_updates_has_the_weights_of_one_without(train, tmp_path, monkeypatch):
    stands = []
    settings = dict(stream=True, bptt_segments=2, gradient_accumulation_steps=2, max_iters=8)

    class Captured(Graphs):
        def __call__(self, model, *args):
            if not stands:
                stands.append(Stand(model))
                self.capture = stands[0]
            return super().__call__(model, *args)
    assert train(out_dir=tmp_path / 'plain', **settings).code == 0
    monkeypatch.setattr('lib.device.choose_compile', lambda *args: 'graph')
    monkeypatch.setattr('lib.device.compile_blocks', lambda model, compile, *args: compile)
    monkeypatch.setattr(graphs, 'Graphs', Captured)
    done = train(**settings)
    assert done.code == 0 and 'compiled: graph' in done.out and stands[0].replayed > 20, done.err
    equal(*(load(tmp_path / name / 'last.pt')['model'] for name in ('plain', 'out')))
    made = load_record(tmp_path / 'out' / 'record.json')
    assert made['settings']['compile'] == 'graph'

@pytest.mark.parametrize('settings', [dict(recompute=True), dict(task='needle'),
                                      dict(document='\n')])
def test_what_is_not_captured_says_so_and_compiles_the_blocks(train, monkeypatch, settings):
    asked, lengths = [], []
    monkeypatch.setattr('lib.device.choose_compile',
                        lambda compile, device, updates: lengths.append(updates) or 'graph')
    monkeypatch.setattr('lib.device.compile_blocks',
                        lambda model, compile, *args: asked.append(compile) or 'off')
    done = train(max_iters=1, **settings)
    assert done.code == 0 and asked == ['kernels'] and 'nothing is captured' in done.out, done.err
    assert lengths == [int('recompute' in settings)]  # 'auto' compiles no shapes that change

def test_what_is_chosen(monkeypatch):
    assert choose_compile('auto', 'cuda', LONG) == 'kernels'
    assert choose_compile('auto', 'cuda', LONG - 1) == choose_compile('auto', 'cpu', LONG) == 'off'
    assert choose_compile('graph', 'cuda:1', 1) == 'graph'
    with pytest.raises(SystemExit, match="^error: compile='graph' takes CUDA, not cpu"):
        choose_compile('graph', 'cpu', LONG)
    for native in (True, False):  # but emulated
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                            lambda including_emulation=True: native or including_emulation)
        assert takes_bfloat16('auto', 'cuda') == native
    assert takes_bfloat16('bfloat16', 'cpu') and not takes_bfloat16('auto', 'cpu')
    with pytest.raises(SystemExit, match='^error: this GPU has no bfloat16'):
        takes_bfloat16('bfloat16', 'cuda')

def test_gradients_are_averaged_where_they_are(monkeypatch):
    monkeypatch.setattr(processes, 'WORLD', 2)
    monkeypatch.setattr(processes, 'mean', lambda value: value / 2)
    model = make()
    backpropagate(model, tokens(2, SEGMENT), tokens(2, SEGMENT))
    before = [p.grad for p in model.parameters()]
    copies, places = [g.clone() for g in before], [g.data_ptr() for g in before]
    processes.average_gradients(model)
    equal([p.grad for p in model.parameters()], [g / 2 for g in copies])
    assert [p.grad.data_ptr() for p in model.parameters()] == places
