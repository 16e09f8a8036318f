"""A micro-step, forward and backward, as a CUDA graph: thousands of kernels at one launch."""
import sys
from contextlib import suppress

import torch

from lib.console import brief, write
from lib.gradients import piece, random_state, set_random_state, to_device
from lib.rows import rowwise

MOST = 4  # graphs of a run, each of which keeps the memory of a micro-step
NEAR = 0.05  # relative distance of gradients that rounding in bfloat16 explains

def capture(work):
    """Run work(), of CUDA kernels alone, and capture it: a function that runs it once more, on the
    same memory, and returns the same tensors, filled anew."""
    own = torch.cuda.current_stream()
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    kept, aside, graph = random.clone_state(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    try:
        aside.wait_stream(own)
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is compiled, tuned or allocated at first is not for a graph
                work()
        own.wait_stream(aside)
        with torch.cuda.graph(graph, pool=pool):
            found = work()
    except Exception:  # a capture that failed leaves its stream, memory, and random numbers
        with suppress(Exception):  # what was begun may still write
            torch.cuda.synchronize()
        torch.cuda.set_stream(own)
        random.graphsafe_set_state(kept)
        with suppress(Exception):  # nothing was allocated yet, or another version of torch
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        raise

    def replay():
        graph.replay()
        return found
    return replay

class Graphs:
    """Does what piece() does, for lib.gradients.backpropagate. Inputs of new shapes are captured
    when they first come, and compared with piece(), uncompiled unless the model drops activations:
    compiled, it drops others. If that fails, a line says so, and piece() serves from then on."""

    def __init__(self, capture=capture):
        self.capture, self.graphs, self.grads, self.works = capture, {}, [], True

    def __call__(self, model, x, y, carry, share, device, autocast):
        inputs = to_device(x, device), to_device(y, device), rowwise(torch.detach, carry)
        key = x.shape, share, rowwise(lambda c: (c.shape, c.dtype), carry)
        self.attach(model)
        if self.works and len(self.graphs) < MOST and key not in self.graphs:
            self.add(key, model, inputs, share, device, autocast)
        if key not in self.graphs:
            return piece(model, *inputs, share, device, autocast)
        static, replay = self.graphs[key]
        for mine, new in zip(static, inputs):
            rowwise(torch.Tensor.copy_, mine, new)
        loss, last, _ = replay()
        return loss, rowwise(torch.clone, last), None

    def attach(self, model):
        """Gradients stay where graphs add to them; where they were taken off, they are zeros."""
        parameters = [*model.parameters()]
        self.grads = self.grads or [torch.zeros_like(p) if p.grad is None else p.grad
                                    for p in parameters]
        gone = [(p, grad) for p, grad in zip(parameters, self.grads) if p.grad is None]
        if gone:
            torch._foreach_zero_([grad for _, grad in gone])
        for p, grad in gone:
            p.grad = grad

    def add(self, key, model, inputs, share, device, autocast):
        """Capture piece() of copies of the inputs; gradients and random numbers stay."""
        static = [rowwise(torch.clone, part) for part in inputs]
        before, random = [grad.clone() for grad in self.grads], random_state(device)

        def work():
            return piece(model, *static, share, device, autocast)

        def gradients(way):
            set_random_state(random, device)  # so that dropout drops the same
            torch._foreach_zero_(self.grads)
            way()
            return torch.cat([grad.flatten() for grad in self.grads])
        try:
            drops = getattr(model.config, 'dropout', 0)
            with torch.compiler.set_stance('default' if drops else 'force_eager'):
                expected = gradients(work)  # first: its memory is free before that of the graph
            with torch.compiler.set_stance('default'):
                replay = self.capture(work)
                found = gradients(replay)
            apart = float((found - expected).norm() / expected.norm())
            if not apart < NEAR:
                raise ArithmeticError(f'its gradients are {apart:.3g} off')
            self.graphs[key] = static, replay
        except Exception as error:  # a compiler and a driver can fail in any way
            self.works = False
            self.graphs.clear()  # their memory is of use again
            why = brief(error.__context__ or error)  # capturing ends with an error of its own
            write(sys.stderr, f"compile='graph' does not work here ({why}); going on without it\n")
        finally:
            torch._foreach_copy_(self.grads, before)
            set_random_state(random, device)
