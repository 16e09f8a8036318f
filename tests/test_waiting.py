"""Nothing in an update waits for the device before all of its work is handed over: what reads a
tensor would. Tried on torch's meta device, whose tensors cannot be read, and by counting."""
from contextlib import nullcontext

import pytest
import torch
from conftest import OF_TASK, SMALL
from small import SEGMENT, make, tokens
from test_tasks import make_task
from test_train import watch

from lib.contract import make_model
from lib.streaming import new_state, stream

READERS = 'item', 'cpu', 'tolist', '__bool__', '__float__'

@pytest.mark.parametrize('task, settings', [
    ('text', {}), ('text', dict(stream=True, bptt_segments=2, gradient_accumulation_steps=2)),
    ('text', dict(recompute=True)), ('needle', {}), ('track', {}), ('pairs', {}), ('mqar', {}),
    ('facts', {})])
def test_an_update_reads_nothing_before_its_backward_pass(task, settings, data_dir, monkeypatch):
    job, events = make_task(task, data_dir=data_dir, **settings), []
    sizes = {**SMALL, **OF_TASK[task], **job.sizes, 'dropout': 0.0}
    job.start(make_model('fold', sizes).to('meta'), 'meta', nullcontext())
    backward, cpu, to = torch.autograd.backward, torch.Tensor.cpu, torch.Tensor.to

    def read(tensor):
        if tensor.device.type == 'cpu':
            return cpu(tensor)
        events.append('read')
        return torch.ones(tensor.shape, dtype=tensor.dtype)  # every answer is right

    def send(tensor, target, **kwargs):
        if tensor.device.type == 'cpu' and str(target) == 'meta':
            pinned = tensor.dtype == torch.int64  # tokens, by to_device(), and indices of rows
            events.append('tokens' if pinned else 'upload')
        return to(tensor, target, **kwargs)
    monkeypatch.setattr(torch.Tensor, 'cpu', read)
    monkeypatch.setattr(torch.Tensor, 'to', send)
    monkeypatch.setattr(torch.autograd, 'backward', lambda *args, **kwargs: (
        events.append('backward'), backward(*args, **kwargs)))
    for _ in range(4):
        events.append('update')
        loss, _ = job.backward()
        assert loss.is_meta
    text = ' '.join(events)
    assert 'backward' in text and 'update read' not in text and 'read backward' not in text
    parts = text.split('update')[1:]
    reads = [part.count('read') for part in parts]
    assert max(reads) == (task != 'text')
    assert 'upload' not in ''.join(parts[1:])  # but tables, once
    assert task not in ('needle', 'track', 'pairs', 'facts') or len(job.walkers)

@pytest.fixture
def reads(monkeypatch):
    """Which readers of floating-point numbers have been called."""
    reads = []

    def counted(reader):
        def count(tensor, *args):
            reads.append(reader) if tensor.is_floating_point() else None
            return real[reader](tensor, *args)
        return count
    real = {reader: getattr(torch.Tensor, reader) for reader in READERS}
    for reader in READERS:
        monkeypatch.setattr(torch.Tensor, reader, counted(reader))
    return reads

def test_a_generated_token_is_waited_for_once():
    model, idx = make(), tokens(1, SEGMENT)
    state = new_state(model)
    with torch.profiler.profile() as profile:  # which sees what C++ reads, too
        assert len([*stream(model, idx, state, 9, top_k=3, top_p=0.9)]) == 9
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts['aten::_local_scalar_dense'] == 10

def test_between_lines_of_the_log_no_loss_is_read(train, reads, monkeypatch):
    counts = []
    watch(monkeypatch, lambda optimizer, step: counts.append(len(reads)))
    assert train(max_iters=12, log_interval=6, eval_interval=12, compile='off').code == 0
    between = [b - a for a, b in zip(counts, counts[1:])]
    assert between[2:5] + between[6:10] == [0] * 7
    assert between[5] > 0  # the line after six updates
