"""What the memory tasks share: random sequences, rows that walk on, and the measure of recall."""
import math

import torch

from lib.checkpoint import can_be
from lib.console import require
from lib.contract import carries
from lib.processes import RANK, WORLD, from_all, from_writer, mean
from lib.rows import Rows, rowwise

class RandomSequences:
    """Random numbers of a seed of their own."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def integers(self, low, high, *shape):
        """Random integers, low <= i < high."""
        return torch.randint(low, high, shape, generator=self.generator)

class MemoryTask:
    """A task of random sequences, each process with its own. A class of it has KEPT, the names of
    its numbers that go on when a run is resumed; measure(), which returns the recall of fresh
    sequences and the number of answers; asked, what they are asked for."""

    tokenizer, data, note, walkers, recall = None, {}, '', None, 0.0

    def __init__(self, s, sequences):
        require(s.batch_size % WORLD == 0,
                f'{WORLD} processes cannot share batch_size={s.batch_size}')
        self.s, self.B, self.sequences = s, s.batch_size // WORLD, sequences
        self.shared = torch.Generator().manual_seed(s.seed)  # the same in all processes
        self.sizes = {'vocab_size': sequences.vocab_size}

    def start(self, model, device, autocast):
        self.model, self.device, self.autocast = model, device, autocast
        self.carries = carries(model)

    def follow(self, right, rate):
        """Move the recall of training towards that of new answers."""
        self.recall += rate * (mean(right.float().mean()).item() - self.recall)

    def evaluate(self):
        """The share of answers that are wrong, and its standard error."""
        self.model.eval()
        share, n = from_writer(self.measure)
        self.model.train()
        return {'val_loss': 1 - share, 'val_error': math.sqrt(share * (1 - share) / n)}

    def describe(self, figures):
        return f"{1 - figures['val_loss']:.3f} of {self.asked}"

    def state(self):
        own = {'generator': self.sequences.generator.get_state(),
               'walkers': None if self.walkers is None else vars(self.walkers.to('cpu'))}
        return {'processes': from_all(own), 'shared': self.shared.get_state(),
                **{key: getattr(self, key) for key in self.KEPT}}

    def load_state(self, state, device):
        if not can_be(state):
            raise ValueError('task_state')
        require(len(state['processes']) == WORLD, f"the run is one of {len(state['processes'])} "
                f'processes, each with sequences of its own: resume it with as many')
        for key in self.KEPT:
            setattr(self, key, type(getattr(self, key))(state[key]))
        own = state['processes'][RANK]
        self.shared.set_state(state['shared'])
        self.sequences.generator.set_state(own['generator'])
        if own['walkers'] is not None:
            self.walkers = Rows(**own['walkers'])
            self.walkers.carry = rowwise(lambda c: c.to(device), self.walkers.carry)
