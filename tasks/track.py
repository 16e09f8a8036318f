"""The task 'track': objects lie under cups, cups are swapped, and what lies under one is asked for.

    filler  SWAP 0 2  filler  SWAP 1 2  filler ... ASK 1 filler ...    (a swap of two is one token)

To begin with object i lies under cup i. After ASK and a cup the object under it is to be predicted,
and is not shown. So a state must be carried on that changes all the time. With two cups it is one
bit, flipped by one token: parity. From five cups on it is beyond what a linear recurrence or a
fixed number of attention layers can compose (Merrill et al. 2024, arXiv 2404.08819).
"""
from itertools import combinations

import torch

from configurator import at_least
from lib.console import Progress, require
from lib.memory import (
    APART,
    PER_READ,
    RandomSequences,
    WalkingTask,
    answer,
    measure_distances,
)
from lib.rows import Rows
from lib.streaming import new_state, read_

cups = 3                # and as many objects
every = 12              # tokens to a swap, on average
regular = True          # a swap in each `every` tokens, at any place; False: any number, by chance
symbols = 16            # different filler symbols
longest = 8             # segments of a new sequence, less one, once the curriculum has grown
first = 1               # segments with which the curriculum starts, less one
grow_at = 0.98          # share of new sequences with no wrong answer at which the curriculum grows
leave = 0.01            # share of the walking sequences that leave at an update, though right
probe_distance = 192    # tokens after which answers are evaluated in training

class Sequences(RandomSequences):
    """Tokens: the filler's from 0 on, a swap for each two cups, ASK, the cups, the objects. A
    segment asks once. What lies under the cups of some rows is `objects` (B, k)."""

    def __init__(self, s, seed):
        super().__init__(seed)
        self.s, self.l, swaps = s, s.segment_size, [*combinations(range(s.cups), 2)]
        self.ask = s.symbols + len(swaps)
        self.cup, self.object = self.ask + 1, self.ask + 1 + s.cups
        self.vocab_size = self.object + s.cups
        self.order = torch.arange(s.cups).repeat(self.vocab_size, 1)  # of the cups after a token
        for token, (a, b) in enumerate(swaps, s.symbols):
            self.order[token, [a, b]] = torch.tensor([b, a])

    def start(self, B):
        return torch.arange(self.s.cups).repeat(B, 1)

    def opening(self, B):
        """What is read first where a model is measured, tokens (B, any), and the objects then."""
        return torch.empty(B, 0, dtype=torch.int64), self.start(B)

    def between(self, objects, T):
        """What is read before the question: tokens (B, T), and the objects after them."""
        x, _, objects = self.further(objects, T)
        return x, objects

    def question(self, objects):
        """Tokens (B, n) that ask for something, and the token that is to follow (B,)."""
        which = self.integers(0, self.s.cups, len(objects), 1)
        tokens = torch.cat((torch.full_like(which, self.ask), self.cup + which), dim=1)
        return tokens, self.object + objects.gather(1, which)[:, 0]

    def further(self, objects, T):
        """The next T tokens, whole segments: tokens (B, T), targets (B, T), -1 where nothing is
        asked for, and the objects after them."""
        s, B, l = self.s, len(objects), self.l
        if s.regular:
            starts = torch.arange(0, T, s.every)
            places = (starts + self.integers(0, s.every, B, len(starts))).clamp(max=T)
            swaps = torch.zeros(B, T + 1, dtype=torch.bool).scatter_(1, places, True)[:, :T]
        else:
            swaps = self.uniform(B, T) < 1 / s.every
        x = torch.where(swaps, self.integers(s.symbols, self.ask, B, T),
                        self.integers(0, s.symbols, B, T))
        at = torch.arange(0, T, l) + self.integers(0, l - 1, B, T // l)
        which = self.integers(0, s.cups, B, T // l)
        x.scatter_(1, at, self.ask).scatter_(1, at + 1, self.cup + which)
        lying = []
        for token in x.T:
            objects = objects.gather(1, self.order[token])
            lying.append(objects)
        asked = torch.stack(lying, dim=1)[torch.arange(B)[:, None], at + 1, which]  # (B, T / l)
        return x, torch.full_like(x, -1).scatter_(1, at + 1, self.object + asked), objects

class Task(WalkingTask):
    """Trains with a curriculum of lengths and with sequences that walk on."""

    def __init__(self, s, make=None):
        """make(seed, split) -> sequences as above, of 'train' or 'val'."""
        if make is None:
            at_least(s, cups=2, every=1, symbols=1, segment_size=2)
        super().__init__(s, make or (lambda seed, split: Sequences(s, seed)))
        self.asked = f'the answers after {s.probe_distance} tokens'

    def start(self, model, device, autocast):
        super().start(model, device, autocast)
        W = model.config.block_size
        require(self.carries or W % self.l == 0,
                f'block_size={W} must be a multiple of {self.SEGMENT}={self.l}')

    def read(self, objects, F, carry):
        """The next F + 1 segments, a model without a carry as many as its window holds. Returns the
        loss, which rows are right (B,), the tokens of a row, the objects, and the carry."""
        T = (F + 1) * self.l if self.carries else self.model.config.block_size
        x, y, objects = self.sequences.further(objects, T)
        with self.autocast:
            loss, right, carry = answer(self.model, x, y, carry, self.device)
        return loss, right.all(dim=1), T, objects, carry

    def new(self, F):
        loss, right, T, objects, carry = self.read(self.sequences.start(self.B), F, None)
        rows = Rows(objects=objects, age=torch.full((self.B,), T), carry=carry)
        return loss, right, self.B * T, torch.ones(self.B, dtype=torch.bool), rows

    def further(self, rows, F):
        loss, right, T, rows.objects, rows.carry = self.read(rows.objects, F, rows.carry)
        rows.age += T
        return loss, right, len(rows) * T

    def measure(self):
        d, n = self.s.probe_distance, 200
        return answered(self.model, self.make, self.s.seed, [d], n, self.device)[d] / n, n

def answered(model, make, seed, distances, n, device):
    """{d: right answers after d tokens}: n fresh sequences of make(seed, split), each asked one
    question, aside, at all distances, which rise; rounded up to whole segments."""
    right, test = dict.fromkeys(distances, 0), make(seed + APART * (1 + n), 'val')
    progress = Progress('answers', n * distances[-1])
    for rows in torch.arange(n).split(50):
        opening, objects = test.opening(len(rows))
        state, read = new_state(model, len(rows)), 0
        read_(model, opening.to(device), state)
        for d in distances:
            while read < d:
                T = min(-(-(d - read) // test.l), max(1, PER_READ // test.l)) * test.l
                x, objects = test.between(objects, T)
                read_(model, x.to(device), state)
                read += T
                progress.at(int(rows[0]) * distances[-1] + len(rows) * read)
            question, wanted = test.question(objects)
            given = read_(model, question.to(device), state.clone()).argmax(dim=-1).cpu()
            right[d] += int((given == wanted).sum())
    progress.close()
    return right

def probe(model, saved, p, device):
    """Right answers against distance: the settings distances, sequences, far and far_sequences of
    p."""
    s = saved['config']
    return found(model, lambda seed, split: Sequences(s, seed), s.seed, 1 / s.cups, p, device)

def found(model, make, seed, chance, p, device):
    return measure_distances(p, 'tracking', chance, 'tokens read', 'right answers', lambda some, n:
                             answered(model, make, seed, some, n, device))
