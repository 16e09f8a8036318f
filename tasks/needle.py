"""The task 'needle': a key is shown once, filler follows, then the key is asked for.

    filler  MARK 3 1 4 1 5  filler ... filler  ASK 3 1 4 1 5

At ASK and at each digit after it the next digit is to be predicted; an answer counts if all of its
digits are right. Sequences that answer right walk on: their carry is kept, and the next update
reads on from it, so that the depth that is trained grows as the memory gets better, while an update
pays for a few segments alone.
"""
import os
from types import SimpleNamespace

import numpy as np
import torch

from configurator import at_least, numbers, one_of
from lib.console import Progress, require, say
from lib.contract import carries, unit
from lib.gradients import to_device
from lib.memory import MemoryTask, RandomSequences, missed
from lib.processes import RANK, WORLD, from_writer, mean
from lib.records import ROOT, metric
from lib.rows import Rows, rowwise
from lib.streaming import new_state, read_
from prepare import load_meta, prepare

filler = 'symbols'      # 'symbols' (random ones) or 'text' (stretches of a prepared data set)
symbols = 16            # different filler symbols
dataset = 'shakespeare'  # of filler 'text': its training split trains, its validation split tests
data_dir = 'data'       # folder of the prepared data sets
key_length = 5          # digits of a key
longest = 8             # segments before the two of the question, once the curriculum has grown
first = 1               # segments with which the curriculum starts
grow_at = 0.98          # recall of new sequences at which the curriculum grows by a segment
leave = 0.01            # share of the walking sequences that leave at an update, though right
probe_distance = 192    # tokens of filler at which recall is evaluated in training

DIGITS = 10  # different digits of a key
PER_READ = 6144  # tokens of filler that are made and read at a time


class Sequences(RandomSequences):
    """Keys among filler. Tokens: the filler's from 0 on, then ten digits, MARK and ASK.

    text (N,) int64 or None: filler is taken from it, in contiguous pieces; None takes random
    symbols, `filler` different ones.
    """

    def __init__(self, seed, key_length, filler, text=None):
        super().__init__(seed)
        self.key_length, self.filler, self.text = key_length, filler, text
        self.mark, self.ask = filler + DIGITS, filler + DIGITS + 1
        self.vocab_size = self.ask + 1

    def places(self, B):
        """B random places of the text, (B,); None if there is no text."""
        return None if self.text is None else self.integers(0, len(self.text), B)

    def filling(self, B, T, at=None):
        """B rows of T tokens of filler, (B, T); of a text from places at (B,) on, by default random
        ones, round and round."""
        if self.text is None:
            return self.integers(0, self.filler, B, T)
        at = self.places(B) if at is None else at
        return self.text[(at[:, None] + torch.arange(T)) % len(self.text)]

    def keys(self, B):
        """Digits of B keys, (B, k)."""
        return self.integers(self.filler, self.filler + DIGITS, B, self.key_length)

    def put_key(self, x, keys, start):
        """MARK and the digits into x (B, T), in place, from place start (B,) of each row on."""
        needle = torch.cat((torch.full_like(keys[:, :1], self.mark), keys), dim=1)
        x.scatter_(1, start[:, None] + torch.arange(needle.size(1)), needle)

    def put_question(self, x, keys, start):
        """ASK and all digits but the last into x (B, T), in place, from place start (B,) on.

        Returns the targets (B, T): the digit that is to follow, -1 where none is asked for.
        """
        y, places = torch.full_like(x, -1), start[:, None] + torch.arange(self.key_length)
        y.scatter_(1, places, keys)
        ask = torch.full_like(keys[:, :1], self.ask)
        x.scatter_(1, places, torch.cat((ask, keys[:, :-1]), dim=1))
        return y

    def new(self, B, T, tail):
        """B sequences of T tokens with a key anywhere and its question in the last `tail` tokens:
        tokens (B, T), targets (B, T), keys (B, k), and the place after each key (B,)."""
        x, keys, k = self.filling(B, T), self.keys(B), self.key_length
        asked = self.integers(max(T - tail, k + 1), T - k + 1, B)
        start = (self.uniform(B) * (asked - k)).long()
        self.put_key(x, keys, start)
        return x, self.put_question(x, keys, asked), keys, start + k + 1

    def old(self, keys, T, tail):
        """Filler for rows that have read their keys (B, k), with the question in the last `tail`
        tokens: x, y (B, T)."""
        x = self.filling(len(keys), T)
        start = self.integers(T - tail, T - self.key_length + 1, len(keys))
        return x, self.put_question(x, keys, start)


def make_sequences(s, split, seed):
    """Sequences whose filler, if it is text, is from the 'train' or 'val' split of the data set."""
    if s.filler == 'symbols':
        return Sequences(seed, s.key_length, s.symbols)
    folder = os.path.join(ROOT, s.data_dir, s.dataset)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        from_writer(lambda: prepare(s.dataset, data_dir=os.path.join(ROOT, s.data_dir)))
    meta = load_meta(folder)
    ids = np.fromfile(os.path.join(folder, f'{split}.bin'), dtype=np.uint16)
    text = torch.from_numpy(ids.astype(np.int64))
    return Sequences(seed, s.key_length, meta['vocab_size'], text)


def check(s):
    """Refuse settings that would fail later."""
    at_least(s, symbols=1, key_length=1, longest=1, first=1, probe_distance=0)
    one_of(s, filler=('symbols', 'text'))
    require(s.key_length < s.segment_size, f'key_length={s.key_length}: a key and its question '
            f'must fit into two segments of {s.segment_size}')
    require(s.first <= s.longest, f'first={s.first} is more than the curriculum grows to, '
                                  f'longest={s.longest}')


class Task(MemoryTask):
    """Trains with a curriculum of distances and with sequences that walk on."""

    KEPT = 'stage', 'recall'

    def __init__(self, s):
        check(s)
        super().__init__(s, make_sequences(s, 'train', s.seed + 1_000_003 * RANK))
        self.l, self.stage, self.recall = s.segment_size, s.first, 0.0

    def start(self, model, device, autocast):
        super().start(model, device, autocast)
        self.carries, W, two = carries(model), model.config.block_size, 2 * self.l
        require(self.l % unit(model) == 0, f'segment_size={self.l} must be a multiple of the '
                f"model's recurrence step of {unit(model)} tokens")
        require(self.carries or W % two == 0 or two % W == 0,
                f'block_size={W} must divide two segments, {two} tokens, or be a multiple of them')
        self.window = max(two, W)  # that a model without a carry sees

    def read_and_ask(self, x, y, carry):
        """Read x (B, T) up to its last two segments, then, aside, those, with the question: targets
        y (B, T). Returns the loss, which rows are right (B,), and the carry before the question."""
        x, y, tail = to_device(x, self.device), to_device(y, self.device), 2 * self.l
        with self.autocast:
            if self.carries and x.size(1) > tail:
                carry = self.model(x[:, :-tail], carry=carry)[2]
                x, y = x[:, -tail:], y[:, -tail:]
            W = x.size(1) if self.carries else min(self.model.config.block_size, x.size(1))
            logits, loss, _ = self.model(x.reshape(-1, W), y.reshape(-1, W), carry)
        answers = logits.detach().argmax(dim=-1).view(y.shape)
        return loss, ((answers == y) | (y < 0)).all(dim=1).cpu(), carry

    def backward(self):
        """On new sequences, F segments and the two of the question, and on those that walk."""
        F = self.stage
        if torch.rand((), generator=self.shared) < 0.5:  # half of the updates are the hardest
            F = int(torch.randint(self.stage + 1, (), generator=self.shared))
        T = (F + 2) * self.l if self.carries else self.window
        tail = 2 * self.l if self.carries else T
        x, y, keys, after = self.sequences.new(self.B, T, tail)
        loss, right, carry = self.read_and_ask(x, y, None)
        staying, read = None, self.B * T
        if self.walkers is not None and len(self.walkers):
            x, y = self.sequences.old(self.walkers.keys, T, tail)
            loss_old, right_old, carry_old = self.read_and_ask(x, y, self.walkers.carry)
            loss = loss + loss_old * len(x) / self.B
            stay = self.sequences.uniform(len(x)) >= self.s.leave
            old = Rows(keys=self.walkers.keys, age=self.walkers.age + F * self.l, carry=carry_old)
            staying, read = old.pick(right_old & stay), read + len(x) * T
        loss.backward()
        self.walkers = staying
        if carry is not None and F:  # new sequences take the places of those that left
            fit = (right & (after <= F * self.l)).nonzero()[:, 0]
            fit = fit[:max(0, self.B - (0 if staying is None else len(staying)))]
            new = Rows(keys=keys, age=F * self.l - after, carry=carry).pick(fit)
            self.walkers = new.join(staying)
        if self.walkers is not None:
            self.walkers.carry = rowwise(torch.detach, self.walkers.carry)
        self.grow(F, right)
        return mean(loss.detach()), WORLD * read

    def grow(self, F, right):
        """Follow the recall of the hardest new sequences; let the curriculum grow by it."""
        if F < self.stage:
            return
        self.recall += 0.1 * (mean(right.float().mean()).item() - self.recall)
        if self.recall > self.s.grow_at and self.stage < self.s.longest and self.carries:
            self.stage, self.recall = self.stage + 1, 0.0

    def figures(self):
        age = self.walkers.age if self.walkers is not None else torch.zeros(0)
        return {'segments': self.stage, 'recall': round(self.recall, 4), 'walkers': len(age),
                'mean_age': round(age.float().mean().item()) if len(age) else 0}

    def evaluate(self):
        """The share of keys missed at probe_distance, of 200 fresh sequences."""
        s, n = self.s, 200
        right = from_writer(lambda: recalled(self.model, s, [s.probe_distance], n, self.device))
        return missed(right[s.probe_distance] / n, n)

    def describe(self, figures):
        return (f"{1 - figures['val_loss']:.3f} of the keys recalled after "
                f'{self.s.probe_distance} tokens')


@torch.no_grad()
def recalled(model, s, distances, n, device, progress=None):
    """{d: sequences answered right with d tokens of filler between key and question}: n fresh ones
    of the test split, each asked, aside, at every distance. Their keys start at all places of a
    segment, equally often."""
    was_training, right, l = model.training, {d: 0 for d in distances}, s.segment_size
    model.eval()
    test = make_sequences(s, 'val', s.seed + 1_000_003 * (1 + n))
    for rows in torch.arange(n).split(50):
        B, lead, k = len(rows), rows % l, s.key_length
        keys, at = test.keys(B), test.places(B)
        ahead = l - 1 + k  # tokens until the last row has been asked
        coming = test.filling(B, l + k + ahead, at)  # to be read next; the keys are in here
        test.put_key(coming, keys, lead)
        state, read = new_state(model, B), 0
        for d in sorted(distances):
            while read < d + k + 1:  # what stands before the question of the row with lead 0
                T = min(d + k + 1 - read, PER_READ)
                if coming.size(1) < T + ahead:
                    more = None if at is None else at + read + coming.size(1)
                    filling = test.filling(B, T + ahead - coming.size(1), more)
                    coming = torch.cat((coming, filling), dim=1)
                read_(model, coming[:, :T].to(device), state)
                coming, read = coming[:, T:], read + T
                if progress:
                    progress.at(int(rows[0]) * max(distances) + B * read)
            right[d] += ask_aside(model, test, state.clone(), coming[:, :ahead], keys, lead)
    model.train(was_training)
    return right


def ask_aside(model, test, state, x, keys, lead):
    """How many rows answer right when they are asked for their keys, `lead` (B,) tokens further on:
    x (B, T) is what they read until then."""
    x = x.clone()
    y = test.put_question(x, keys, lead)
    right = torch.ones(len(x), dtype=torch.bool)
    for token, target in zip(x.split(1, dim=1), y.T):
        answer = read_(model, token.to(state.logits.device), state).argmax(dim=-1).cpu()
        right &= (answer == target) | (target < 0)
    return int(right.sum())


def interval(right, n, z=1.96):
    """The 95 % interval of a share, right of n (Wilson)."""
    p, center = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * p * (1 - p) + z * z / 4) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def probe(model, saved, p, device):
    """Recall against distance: the settings distances, sequences, far and far_sequences of p."""
    s = SimpleNamespace(**saved['config'])
    at_least(p, sequences=1, far_sequences=1)
    distances = numbers('distances', p.distances)
    near, points = [d for d in distances if d < p.far], []
    for some, n in ((near, p.sequences), (distances[len(near):], p.far_sequences)):
        if some:
            progress = Progress('recall', n * max(some))
            right = recalled(model, s, some, n, device, progress)
            progress.close()
            for d in some:
                low, high = interval(right[d], n)
                points.append({'x': d, 'value': right[d] / n, 'low': low, 'high': high, 'n': n})
                say(f'{d:>9,} tokens: recall {right[d] / n:.3f} [{low:.3f}, {high:.3f}], '
                    f'{right[d]} of {n} sequences')
    chance = DIGITS ** -s.key_length
    say(f'chance: {chance:g}')
    curve = {'x': 'tokens of filler between key and question', 'y': 'keys recalled',
             'points': points}
    return {'what': 'recall', 'metrics': {'chance': metric(chance)}, 'curves': {'recall': curve},
            'notes': []}
