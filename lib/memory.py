"""What the memory tasks share: random sequences, rows that walk on, and the measure of recall."""
import math
from itertools import groupby

import torch

from configurator import at_least, numbers
from lib.console import require, say
from lib.contract import carries, unit
from lib.gradients import to_device
from lib.processes import RANK, WORLD, from_all, from_writer, mean
from lib.records import metric
from lib.rows import Rows, rowwise

APART = 1_000_003  # between the seeds of processes, and of tests: none draw the same numbers
PER_READ = 6144  # tokens that are made and read at a time, where a model is measured

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
    """A task of random sequences, each process with its own. A class of it has measure(), which
    returns the recall of fresh sequences and their number; asked, what they are asked for; and
    KEPT, the names of the numbers that are saved and restored."""

    KEPT = ('recall',)
    tokenizer, data, note, walkers, recall = None, {}, '', None, 0.0
    SEGMENT = 'segment_size'  # the setting that says how many tokens a segment has

    def __init__(self, s, sequences):
        require(s.batch_size % WORLD == 0,
                f'{WORLD} processes cannot share batch_size={s.batch_size}')
        require(s.gradient_accumulation_steps == 1 and not (s.bptt_segments or s.recompute),
                'gradient_accumulation_steps=1, bptt_segments=0 and recompute=False: other values '
                'are for --task=text')
        self.s, self.B, self.sequences = s, s.batch_size // WORLD, sequences
        self.shared = torch.Generator().manual_seed(s.seed)  # the same in all processes
        self.sizes = {'vocab_size': sequences.vocab_size}

    def start(self, model, device, autocast):
        self.model, self.device, self.autocast = model, device, autocast
        self.carries, l = carries(model), getattr(self.s, self.SEGMENT)
        require(l % unit(model) == 0, f'{self.SEGMENT}={l} must be a multiple of the model\'s '
                f'recurrence step of {unit(model)} tokens')

    def follow(self, right, rate):
        """Move the recall of training towards that of new answers; to be read after backward."""
        self.recall += rate * (mean(right.float().mean()).item() - self.recall)

    def evaluate(self):
        """The share of answers that are wrong, and its standard error."""
        self.model.eval()
        right, n = from_writer(self.measure)
        self.model.train()
        return {'val_loss': 1 - right, 'val_error': math.sqrt(right * (1 - right) / n)}

    def figures(self):
        return {'recall': round(self.recall, 4)}

    def describe(self, figures):
        return f"{1 - figures['val_loss']:.3f} of {self.asked}"

    def state(self):
        walkers = None if self.walkers is None else {
            name: rowwise(torch.Tensor.cpu, value) for name, value in vars(self.walkers).items()}
        own = {'generator': self.sequences.generator.get_state(), 'walkers': walkers}
        return {'processes': from_all(own), 'shared': self.shared.get_state(),
                **{key: getattr(self, key) for key in self.KEPT}}

    def load_state(self, state, device):
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

class WalkingTask(MemoryTask):
    """A memory task with a curriculum, in which sequences that answer right walk on: their carry is
    kept, and the next update reads on from it. So the depth that is trained grows as the memory
    gets better, at the cost of a few segments an update. Settings: first, longest, grow_at, leave.

    A class of it has new(F), which reads new sequences of F segments and what is asked: loss, which
    rows are right (B,), on the device, tokens read, which of them may walk on if they are (B,), and
    they themselves, Rows with age (B,), tokens since what is asked for was shown, and carry; and
    further(rows, F), which reads on in place: loss, which are right, tokens read.
    """

    KEPT = 'stage', 'recall'

    def __init__(self, s, make):
        """make(seed, split) -> sequences of 'train' or 'val'."""
        at_least(s, longest=1, first=1, probe_distance=0, leave=0.0)
        require(max(s.grow_at, s.leave) <= 1,
                f'grow_at={s.grow_at} and leave={s.leave} are shares, at most 1')
        require(s.first <= s.longest, f'first={s.first} is more than longest={s.longest}')
        super().__init__(s, make(s.seed + APART * RANK, 'train'))
        self.make, self.l, self.stage = make, getattr(s, self.SEGMENT), s.first

    def backward(self):
        F, old = self.stage, self.walkers
        if torch.rand((), generator=self.shared) < 0.5:  # half of the updates are the hardest
            F = int(torch.randint(self.stage + 1, (), generator=self.shared))
        loss, right, read, may, rows = self.new(F)
        if old:  # rows are false where none are left
            loss_old, right_old, more = self.further(old, F)
            loss, read = loss + loss_old * len(old) / self.B, read + more
            right = torch.cat((right, right_old))
        loss.backward()
        right, right_old = right.cpu().tensor_split((self.B,))  # waits for the device
        if old:
            stays = self.sequences.uniform(len(old)) >= self.s.leave
            old = old.pick(right_old & stays)
        if rows.carry is not None and F:  # new sequences take the places of those that left
            fit = (may & right).nonzero()[:, 0][:max(0, self.B - len(old or ()))]
            old = rows.pick(fit).join(old)
        if old is not None:
            old.carry = rowwise(torch.detach, old.carry)
        self.walkers = old
        self.grow(F, right)
        return mean(loss.detach()), WORLD * read

    def grow(self, F, right):
        """Follow the recall of the hardest new sequences; let the curriculum grow by it."""
        if F < self.stage:
            return
        self.follow(right, 0.1)
        if self.recall > self.s.grow_at and self.stage < self.s.longest and self.carries:
            self.stage, self.recall = self.stage + 1, 0.0

    def figures(self):
        ages = self.walkers.age.tolist() if self.walkers else []
        return {'segments': self.stage, **super().figures(), 'walkers': len(ages),
                'mean_age': round(sum(ages) / max(1, len(ages)))}

def answer(model, x, y, carry, device):
    """Of tokens x and targets y (B, T), -1 where nothing is asked for: the loss, which tokens are
    right or not asked for (B, T), and the carry; on the device, which is not waited for."""
    y = to_device(y, device)
    logits, loss, carry = model(to_device(x, device), y, carry)
    return loss, (logits.detach().argmax(dim=-1) == y) | (y < 0), carry

def share(right, n, z=1.96):
    """right of n, as a metric or a point has it: the share and its 95 % interval (Wilson)."""
    p, center = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * p * (1 - p) + z * z / 4) ** 0.5
    return {'value': p, 'low': max(0.0, center - half), 'high': min(1.0, center + half), 'n': n}

def measure_distances(p, what, chance, x, y, right_of):
    """A probe's result: the share of right answers against distance, by the settings distances,
    sequences, far and far_sequences of p; right_of(distances, n) -> {distance: right of n}. what is
    measured, the share right by chance, and the names of the axes x and y."""
    distances, points = numbers('distances', p.distances), []
    for n, some in groupby(distances, lambda d: p.sequences if d < p.far else p.far_sequences):
        for d, right in right_of([*some], n).items():
            points.append({'x': d, **share(right, n), 'right': right})
            say('{x:>9,} tokens: {value:.3f} [{low:.3f}, {high:.3f}], {right} of {n} right'.format(
                **points[-1]))
    say(f'chance: {chance:g}')
    return {'what': what, 'metrics': {'chance': metric(chance)}, 'notes': [],
            'curves': {'recall': {'x': x, 'y': y, 'points': points}}}
