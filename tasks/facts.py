"""The task 'facts': who is where, told in plain words among a text, and asked for later on.

    ... Adam is in the garden. ... Beth is in the hall. ... Where is Adam? g(arden)

A name of a place is not shown after a question: the token by which it is known, for characters its
first letter, is to be predicted there. With hops=2 a person has a thing, and where the thing is is
asked for. A fact that is told again in other words replaces the one before. As 'track' otherwise.
"""
import os

import torch

from configurator import at_least
from lib.console import require
from lib.memory import RandomSequences
from prepare import Tokenizer
from tasks import track
from tasks.needle import read_known, read_splits

hops = 1                # facts that an answer takes: 1 or 2
every = 4               # lines from a fact to the next, on average
line = 48               # tokens of a line: one question, and at most one fact
dataset = 'shakespeare'  # its training split is the text of training, its validation split of tests
data_dir = 'data'       # folder of the prepared data sets
longest = 8             # lines of a new sequence, less hops, once the curriculum has grown
first = 1               # lines with which the curriculum starts, less hops
grow_at = 0.9           # share of new sequences with no wrong answer at which the curriculum grows
leave = 0.01            # share of the walking sequences that leave at an update, though right
probe_distance = 192    # tokens of text after which answers are evaluated in training

PEOPLE = 'Adam', 'Beth', 'Carl', 'Dora'
PLACES = 'garden', 'kitchen', 'office', 'hall'
THINGS = 'ball', 'coin'
IS, HAS, ASKS = ' {} is in the {}. ', ' {} has the {}. ', ' Where is {}? '

class Sequences(RandomSequences):
    """Lines of a text (N,) with facts and questions. Objects (B, slots) int64: in which place a
    person is, then which person has a thing; -1 where nothing has been told."""

    def __init__(self, s, seed, text, spec):
        super().__init__(seed)
        self.s, self.l, self.text, tokenizer = s, s.line, text, Tokenizer(spec)
        self.vocab_size = tokenizer.vocab_size

        def encode(text):
            return tokenizer.encode(text).tolist()
        told = [[IS.format(who, place) for place in PLACES] for who in PEOPLE]
        names = PEOPLE
        if s.hops == 2:
            told += [[HAS.format(who, thing) for who in PEOPLE] for thing in THINGS]
            names = [f'the {thing}' for thing in THINGS]
        self.told = padded([[*map(encode, some)] for some in told])
        asked = [[encode(ASKS.format(name) + place) for place in PLACES] for name in names]
        known = [len(os.path.commonprefix(some)) for some in asked]  # what all answers share
        self.asked = padded([[some[0][:n]] for some, n in zip(asked, known)])[:, 0]
        self.answers = torch.tensor([[one[n] for one in some] for some, n in zip(asked, known)])
        spare = s.line - self.told.size(2) - self.asked.size(1)
        require(spare >= 0, f'line={s.line} is {-spare} tokens too short for a fact and a question')
        self.middle = self.told.size(2) + spare // 2  # facts end before it, then come questions

    def start(self, B):
        return torch.full((B, len(self.told)), -1)

    def filling(self, B, T):
        at = self.integers(0, len(self.text), B, 1)
        return self.text[(at + torch.arange(T)) % len(self.text)]

    def put(self, x, tokens, low, high):
        """tokens (B, n), -1 where the text is to stay, into x (B, T), in place, somewhere from
        `low` on that ends before `high`. Returns the place after them (B, 1)."""
        n = tokens.size(1)
        at = self.integers(low, high - n + 1, len(x), 1)
        places = at + torch.arange(n)
        x.scatter_(1, places, tokens.where(tokens >= 0, x.gather(1, places)))
        return at + n

    def tell(self, x, objects, slots, high):
        """Tell something new of some rows, slots (B,) or -1 for nothing, in x, before `high`.
        Returns the objects."""
        new, told = self.integers(0, self.told.size(1), len(x)), slots >= 0
        self.put(x, self.told[slots, new].masked_fill(~told[:, None], -1), 0, high)
        objects = objects.clone()
        objects[told, slots[told]] = new[told]
        return objects

    def places(self, objects):
        """Where each of what is asked for is (B, n), -1 where that is not known."""
        places, holders = objects.tensor_split((len(PEOPLE),), dim=1)
        if self.s.hops == 2:  # where the person is that has it
            places = places.gather(1, holders.clamp(min=0)).where(holders >= 0, holders)
        return places

    def ask(self, objects):
        """A question of each row: tokens (B, n), -1 for the text, and the answers (B,), -1 where
        nothing is known."""
        places = self.places(objects)
        # one of those that are known; any if none is
        which = torch.multinomial((places >= 0) + 1e-9, 1, generator=self.generator)
        place, which = places.gather(1, which)[:, 0], which[:, 0]
        answers = self.answers[which, place].masked_fill(place < 0, -1)
        return self.asked[which].masked_fill((place < 0)[:, None], -1), answers

    def further(self, objects, T):
        """The next T tokens, whole lines: tokens (B, T), targets (B, T), -1 where nothing is asked
        for, and the objects after them."""
        B, lines = len(objects), []
        for x in self.filling(B, T).split(self.l, dim=1):
            known = (self.places(objects) >= 0).any(dim=1)
            quiet = (self.uniform(B) > 1 / self.s.every) & known
            slots = self.integers(0, objects.size(1), B).masked_fill(quiet, -1)
            if self.s.hops == 2:  # who has a thing comes first, and then where that person is
                holder = objects[:, len(PEOPLE):].amax(dim=1)
                slots = slots.where(known, holder.where(holder >= 0, len(PEOPLE)))
            objects = self.tell(x, objects, slots, self.middle)
            tokens, answers = self.ask(objects)
            after = self.put(x, tokens, self.middle, self.l)
            y = torch.full_like(x, -1).scatter_(1, after - 1, answers[:, None])
            lines.append((x, y))
        x, y = (torch.cat(some, dim=1) for some in zip(*lines))
        return x, y, objects

    def opening(self, B):
        """All facts, each in a line of its own, in any order, and the objects then."""
        objects, lines = self.start(B), []
        for slots in self.uniform(B, objects.size(1)).argsort(dim=1).T:
            x = self.filling(B, self.l)
            objects = self.tell(x, objects, slots, self.l)
            lines.append(x)
        return torch.cat(lines, dim=1), objects

    def between(self, objects, T):
        return self.filling(len(objects), T), objects

    def question(self, objects):
        tokens, answers = self.ask(objects)
        return tokens.where(tokens >= 0, self.filling(*tokens.shape)), answers

def padded(texts):
    """Token ids, lists of lists of lists, as one tensor, filled up with -1 in front."""
    longest = max(len(ids) for some in texts for ids in some)
    return torch.tensor([[[-1] * (longest - len(ids)) + ids for ids in some] for some in texts])

class Task(track.Task):
    """Trains with a curriculum of lines and with sequences that walk on."""
    SEGMENT = 'line'

    def __init__(self, s):
        at_least(s, hops=1, every=1, line=1)
        require(s.hops <= 2, f'hops={s.hops}: 1 or 2 facts')
        require(s.block_size >= s.hops * s.line, f'block_size={s.block_size} must be at least '
                f'hops={s.hops} lines of line={s.line} tokens')
        texts, meta = read_splits(s)
        spec = self.tokenizer = meta['tokenizer']
        words = {*''.join((*PEOPLE, *PLACES, *THINGS, IS, HAS, ASKS))} - {*'{}'}
        unknown = sorted(words - {*spec.get('chars', words)})
        require(not unknown, f'data set {s.dataset!r} has no {str(unknown)[1:-1]}: facts take a '
                             f'text that has all these letters')
        super().__init__(s, lambda seed, name: Sequences(s, seed, texts[name], spec))
        self.data = {'dataset': s.dataset, 'sha256': meta['sha256']}

    def new(self, F):
        return super().new(F + self.s.hops - 1)  # so that something can be asked

def probe(model, saved, p, device):
    """Right answers against tokens of text since all was told, the validation split or p.file: the
    settings distances, sequences, far and far_sequences of p."""
    s, spec = saved['config'], saved['tokenizer']
    text = read_known(p.file, spec)[0] if p.file else read_splits(s)[0]['val']
    return track.found(model, lambda seed, split: Sequences(s, seed, text, spec), s.seed,
                       1 / len(PLACES), p, device)
