"""The task 'pairs': digits with names are shown, one a segment, and asked for by name.

A sequence has a segment for each pair,  filler MARK 3 NAME filler,  and is asked aside,
ASK NAME 3 ASK NAME 7 ...: a question leaves nothing in the memory. At a NAME that is asked for, its
digit is to be predicted. Where a pair is shown, the digit stands before the name: the place with
the name is the one that a question can find, and has read the digit.
"""
import torch

from configurator import at_least
from lib.console import Progress, require, say
from lib.gradients import to_device
from lib.memory import APART, MemoryTask, RandomSequences, answer
from lib.processes import RANK, WORLD, mean
from lib.records import metric
from lib.rows import Rows, rowwise

names = 32          # different names
symbols = 16        # different filler symbols
matched = True      # start from weights that compare names; False is GPT-2's usual start
place_scale = 8.0   # of a matched start: the position embedding, times so much (docs/memory.md)
pairs = 12          # most pairs of a sequence
together = 3        # pairs of the first lesson, all in one segment: to tell names apart
passed_at = 0.95    # its recall at which pairs one a segment, and sequences that walk on, take over
fresh = 16          # new sequences of a later update; as many of those that walk on leave
segments = 4        # that an update reads
questions = 2       # segments of questions that an update asks of every sequence
often = 0.75        # share of segments with a pair, until a sequence has shown all of its own

DIGITS = 10  # tokens: the filler's from 0 on, then the digits, MARK, ASK and the names

class Sequences(RandomSequences):
    """Sequences of pairs, one a segment, each a token before the last one's, in turn. Rows of them,
    as far as they are read: names and digits (B, names) in the order in which they come, most (B,)
    pairs in all, shown (B,) so far, start (B,) the place of the first, carry the memory."""

    def __init__(self, s, seed):
        super().__init__(seed)
        self.s, self.l = s, s.segment_size
        self.mark, self.ask = s.symbols + DIGITS, s.symbols + DIGITS + 1
        self.vocab_size = self.ask + 1 + s.names

    def rows(self, most):
        """New rows, of which nothing has been shown: most (B,)."""
        B, first_digit = len(most), self.s.symbols
        return Rows(names=self.ask + 1 + self.uniform(B, self.s.names).argsort(dim=1),
                    digits=self.integers(first_digit, first_digit + DIGITS, B, self.s.names),
                    most=most, shown=torch.zeros_like(most),
                    start=self.integers(0, self.l - 2, B), carry=None)

    def show(self, rows, x, some, at):
        """The next pair of some rows into x (B, T), in place, from `at` on."""
        which = rows.shown[some]
        x[some, at] = self.mark
        x[some, at + 1] = rows.digits[some, which]
        x[some, at + 2] = rows.names[some, which]
        rows.shown[some] += 1

    def at_once(self, rows, n):
        """One segment with n pairs in it, side by side, (B, l)."""
        x, everyone = self.integers(0, self.s.symbols, len(rows), self.l), torch.arange(len(rows))
        for pair in range(n):
            self.show(rows, x, everyone, 3 * pair)
        return x

    def further(self, rows, n, often):
        """The next n segments, (B, n * l): the first of all shows a pair, later ones as `often`."""
        x = self.integers(0, self.s.symbols, len(rows), n * self.l)
        for segment in range(n):
            shows = (self.uniform(len(rows)) < often) | (rows.shown == 0)
            some = (shows & (rows.shown < rows.most)).nonzero()[:, 0]
            at = (rows.start[some] - rows.shown[some]) % (self.l - 2)
            self.show(rows, x, some, segment * self.l + at)
        return x

    def ask_for(self, rows, which):
        """Questions for the pairs which (B, Q), in the order in which they came, as many in a
        segment as fit: tokens and targets (B * ceil(Q / (l // 3)), l), -1 where none is asked."""
        (B, Q), fit = which.shape, self.l // 3
        x = self.integers(0, self.s.symbols, B, -(-Q // fit), self.l)
        y, everyone = torch.full_like(x, -1), torch.arange(B)
        for q, pair in enumerate(which.T):
            segment, at = q // fit, q % fit * 3
            x[:, segment, at] = self.ask
            x[:, segment, at + 1] = rows.names[everyone, pair]
            x[:, segment, at + 2] = y[:, segment, at + 1] = rows.digits[everyone, pair]
        return x.view(-1, self.l), y.view(-1, self.l)

def read(model, rows, x, device):
    """Read x (B, T) into the memory of rows, in place."""
    rows.carry = model(to_device(x, device), carry=rows.carry)[2]

def ask(model, sequences, rows, which, device):
    """Ask for the pairs which (B, Q), aside: the loss, and answered(): which answers are right, all
    in one row, for which the device is waited for."""
    x, y = sequences.ask_for(rows, which)
    each = len(x) // len(which)
    carry = rowwise(lambda c: c.repeat_interleave(each, dim=0), rows.carry)
    loss, right, _ = answer(model, x, y, carry, device)
    return loss, lambda: right.cpu()[y >= 0]

class Task(MemoryTask):
    """Trains in two lessons: all pairs in one segment, then pairs one a segment, walking on."""

    KEPT = 'lesson', 'recall'

    def __init__(self, s):
        at_least(s, names=1, symbols=1, segment_size=3, pairs=1, together=1, fresh=1, segments=1,
                 questions=1)
        require(max(s.pairs, s.together) <= s.names, f'pairs={s.pairs} and together={s.together} '
                f'need as many names, not {s.names}')
        require(s.together <= s.segment_size // 3, f'together={s.together} pairs of three tokens '
                f'do not fit into a segment of {s.segment_size}')
        require(s.fresh <= s.batch_size and s.fresh % WORLD == 0, f'fresh={s.fresh} must be at '
                f'most batch_size={s.batch_size}, and shared equally by {WORLD} processes')
        super().__init__(s, Sequences(s, s.seed + APART * RANK))
        self.fresh, self.asked = s.fresh // WORLD, f'{s.pairs} pairs recalled'
        self.lesson = 1 if s.init_from in ('scratch', 'resume') else 2

    def start(self, model, device, autocast):
        super().start(model, device, autocast)
        require(self.carries, "the task 'pairs' takes a model with a carry: --model_type=fold")
        if self.s.matched and self.s.init_from == 'scratch':
            match_names(model, self.s.place_scale)

    def backward(self):
        rows, x = self.next_rows()
        Q = self.s.questions * (self.s.segment_size // 3)
        with self.autocast:
            read(self.model, rows, x, self.device)
            if self.walkers is not None:
                further = self.sequences.further(self.walkers, self.s.segments, self.s.often)
                read(self.model, self.walkers, further, self.device)
                rows = rows.join(self.walkers)
            which = self.sequences.uniform(len(rows), Q) * rows.shown[:, None]  # any that was shown
            loss, answered = ask(self.model, self.sequences, rows, which.long(), self.device)
        loss.backward()
        rows.carry = rowwise(torch.detach, rows.carry)
        if self.lesson == 2:
            old = self.sequences.uniform(len(rows) - self.fresh).argsort()[:self.B - self.fresh]
            self.walkers = rows.pick(torch.cat((torch.arange(self.fresh), self.fresh + old)))
        self.follow(answered(), 0.05)
        if self.lesson == 1 and self.recall >= self.s.passed_at:
            self.lesson, self.recall = 2, 0.0
        return mean(loss.detach()), WORLD * len(rows) * x.size(1)

    def next_rows(self):
        """New sequences, and the tokens that they start with."""
        s, sequences = self.s, self.sequences
        if self.lesson == 1:
            rows = sequences.rows(torch.full((self.B,), s.together))
            return rows, sequences.at_once(rows, s.together)
        fewer = sequences.integers(1, s.pairs + 1, self.fresh)
        rows = sequences.rows(torch.where(sequences.uniform(self.fresh) < 0.5, s.pairs, fewer))
        return rows, sequences.further(rows, s.segments, s.often)

    def figures(self):
        load = self.walkers.shown.float().mean().item() if self.walkers else self.s.together
        return {'lesson': self.lesson, **super().figures(), 'pairs_shown': round(load, 2)}

    def measure(self):
        n = self.s.pairs
        return recall_of(self.model, self.s, n, 100, 0, self.device), 100

def match_names(model, place_scale):
    """Start attention where it compares and copies, in place: keys equal to queries, and larger,
    values and outputs near the identity, tokens larger than places (mimetic initialization,
    Trockman and Kolter 2023). Finding a pair by its name does not set in from GPT-2's start."""
    layers, C = [m for m in model.modules() if hasattr(m, 'c_attn')], model.config.n_embd
    require(layers and all(len(attn.c_attn.weight) == 3 * C for attn in layers),
            "matched=True takes a GPT's attention: --matched=False")
    with torch.no_grad():
        model.transformer.wte.weight *= 8
        if model.config.position == 'learned':
            model.transformer.wpe.weight *= place_scale
        for attn in layers:
            q, k, v = attn.c_attn.weight.split(C)
            q *= 4
            k.copy_(q)
            for weight in (v, attn.c_proj.weight):
                weight.copy_(0.5 * weight + 0.7 * torch.eye(C, device=weight.device))

@torch.no_grad()
def recall_of(model, s, n, count, wait, device):
    """Recall of n pairs in fresh sequences, `wait` segments after the last: the share of right
    answers."""
    right, sequences = 0, Sequences(s, s.seed + APART + n)
    for some in torch.arange(count).split(50):
        rows = sequences.rows(torch.full_like(some, n))
        read(model, rows, sequences.further(rows, n, 1.0), device)
        for _ in range(wait):
            read(model, rows, sequences.further(rows, 1, 1.0), device)
        which = sequences.uniform(len(some), n).argsort(dim=1)
        right += int(ask(model, sequences, rows, which, device)[1]().sum())
    return right / (count * n)

def probe(model, saved, p, device):
    """Capacity, recall against the number of pairs: the settings most, sequences and wait of p."""
    s = saved['config']
    require(p.most <= s.names, f'most={p.most} pairs need as many names, the run has {s.names}')
    progress, points = Progress('recall', p.most, 'numbers of pairs'), []
    for n in range(1, p.most + 1):
        recall = recall_of(model, s, n, p.sequences, p.wait, device)
        points.append({'x': n, 'value': recall, 'n': n * p.sequences})
        say(f'{n:>3} pairs: recall {recall:.3f}, {n * p.sequences} answers')
        progress.at(n)
    progress.close()
    held = next((point['x'] - 1 for point in points if point['value'] < 0.9), len(points))
    curve = {'x': 'pairs shown', 'y': 'pairs recalled', 'points': points}
    metrics = {'most pairs at 0.9': metric(held), 'chance': metric(1 / DIGITS)}
    return {'what': 'capacity', 'metrics': metrics, 'curves': {'recall': curve}, 'notes': []}
