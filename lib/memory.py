"""What the memory tasks share: random sequences, and rows that walk on from update to update."""
import math

import torch

from lib.processes import RANK, WORLD, from_all
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
    """A task of random sequences, each process with its own; KEPT: what goes on, as numbers."""

    tokenizer, data, note, walkers, KEPT = None, {}, '', None, ()

    def __init__(self, s, sequences):
        if s.batch_size % WORLD:
            raise SystemExit(f'error: {WORLD} processes cannot share batch_size={s.batch_size}')
        self.s, self.B, self.sequences = s, s.batch_size // WORLD, sequences
        self.shared = torch.Generator().manual_seed(s.seed)  # the same in all processes
        self.sizes = {'vocab_size': sequences.vocab_size}

    def start(self, model, device, autocast):
        self.model, self.device, self.autocast = model, device, autocast

    def state(self):
        own = {'generator': self.sequences.generator.get_state(),
               'walkers': None if self.walkers is None else vars(self.walkers.to('cpu'))}
        return {'processes': from_all(own), 'shared': self.shared.get_state(),
                **{key: getattr(self, key) for key in self.KEPT}}

    def load_state(self, state, device):
        """Raises SystemExit in another number of processes."""
        if len(state['processes']) != WORLD:
            raise SystemExit(f"error: the run is one of {len(state['processes'])} processes, each "
                             f'with sequences of its own: resume it with as many')
        for key in self.KEPT:
            setattr(self, key, state[key])
        own = state['processes'][RANK]
        self.shared.set_state(state['shared'])
        self.sequences.generator.set_state(own['generator'])
        if own['walkers'] is not None:
            self.walkers = Rows(**own['walkers'])
            self.walkers.carry = rowwise(lambda c: c.to(device), self.walkers.carry)


def missed(share, n):
    """Evaluated figures of a share of right answers, of n: what is missed, and its error."""
    return {'val_loss': 1 - share, 'val_error': math.sqrt(share * (1 - share) / n)}
