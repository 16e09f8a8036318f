"""The task 'needle': a key is shown once, filler follows, then the key is asked for.

    filler  MARK 3 1 4 1 5  filler ... filler  ASK 3 1 4 1 5

At ASK and at each digit after it the next digit is to be predicted; an answer counts if all of its
digits are right. Sequences that answer right walk on (WalkingTask of lib/memory.py).
"""
import time

import numpy as np
import torch
from torch.nn.functional import pad

from configurator import at_least, one_of
from lib.console import Progress, count, require, say
from lib.gradients import to_device
from lib.memory import (
    APART,
    PER_READ,
    RandomSequences,
    WalkingTask,
    answer,
    measure_distances,
    share,
)
from lib.records import metric
from lib.rows import Rows
from lib.streaming import new_state, read_
from prepare import Tokenizer, read_text
from tasks.text import on_all_machines, open_data

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

class Sequences(RandomSequences):
    """Keys among filler. Tokens: from `filler` on, ten digits, MARK and ASK; the filler has others.

    text (N,) int64: filler is contiguous pieces of it; None: `filler` different random symbols.
    """

    def __init__(self, seed, key_length, filler, text=None, meta=None):
        super().__init__(seed)
        self.meta = meta  # of the text's data set
        self.key_length, self.filler, self.text = key_length, filler, text
        self.mark, self.ask = filler + DIGITS, filler + DIGITS + 1
        self.vocab_size = max(self.ask + 1, meta['vocab_size'] if meta else 0)

    def filling(self, B, T, at=None):
        """Filler (B, T); of a text from places at (B,) on, round and round; None: random ones."""
        if self.text is None:
            return self.integers(0, self.filler, B, T)
        at = self.integers(0, len(self.text), B) if at is None else at
        return self.text[(at[:, None] + torch.arange(T)) % len(self.text)]

    def keys(self, B):
        """Digits of B keys, (B, k)."""
        return self.integers(self.filler, self.filler + DIGITS, B, self.key_length)

    def put(self, x, sign, digits, start):
        """A sign and the digits (B, n) after it into x (B, T), in place, from start (B,) on."""
        tokens = pad(digits, (1, 0), value=sign)
        x.scatter_(1, start[:, None] + torch.arange(tokens.size(1)), tokens)

    def put_question(self, x, keys, start):
        """ASK and all digits but the last into x (B, T), in place, from start (B,) on. Returns the
        targets (B, T): the digit that is to follow, -1 where none is asked for."""
        self.put(x, self.ask, keys[:, :-1], start)
        places = start[:, None] + torch.arange(self.key_length)
        return torch.full_like(x, -1).scatter_(1, places, keys)

    def new(self, B, T, tail):
        """B sequences of T tokens with a key anywhere and its question in the last `tail` tokens:
        tokens (B, T), targets (B, T), keys (B, k), and the place after each key (B,)."""
        x, keys, k = self.filling(B, T), self.keys(B), self.key_length
        asked = self.integers(max(T - tail, k + 1), T - k + 1, B)
        start = (self.uniform(B) * (asked - k)).long()
        self.put(x, self.mark, keys, start)
        return x, self.put_question(x, keys, asked), keys, start + k + 1

    def old(self, keys, T, tail):
        """What rows read later that know their keys (B, k): tokens and targets, (B, T) each."""
        x = self.filling(len(keys), T)
        start = self.integers(T - tail, T - self.key_length + 1, len(keys))
        return x, self.put_question(x, keys, start)

def maker(s):
    """make(seed, split) -> Sequences whose filler, if it is text, is of the 'train' or 'val' split
    of the data set."""
    if s.filler == 'symbols':
        return lambda seed, split: Sequences(seed, s.key_length, s.symbols)
    texts, meta = read_splits(s)
    first = first_digit(meta['tokenizer'])
    return lambda seed, split: Sequences(seed, s.key_length, first, texts[split], meta)

def first_digit(spec):
    """The token of the digit 0 among a text: the first beyond characters; of GPT-2's byte pairs, so
    that its weights fit, the byte 14, as no text has those from there on to 25."""
    return 202 if spec['kind'] == 'gpt2' else Tokenizer(spec).vocab_size

def read_splits(s):
    """The ids of the data set, {'train', 'val': (N,)}, and its meta; all processes call this."""
    folder, meta = on_all_machines(lambda: open_data(s, s.dataset))
    return {split: torch.from_numpy(np.fromfile(f'{folder}/{split}.bin', np.uint16)).long()
            for split in ('train', 'val')}, meta

class Task(WalkingTask):
    """Trains with a curriculum of distances and with sequences that walk on."""

    def __init__(self, s):
        at_least(s, symbols=1, key_length=1)
        one_of(s, filler=('symbols', 'text'))
        require(s.key_length < s.segment_size, f'key_length={s.key_length}: a key and its question '
                f'must fit into two segments of {s.segment_size}')
        super().__init__(s, maker(s))
        self.asked = f'the keys recalled after {s.probe_distance} tokens'
        if s.filler == 'text':
            meta = self.sequences.meta
            self.tokenizer = meta['tokenizer']
            self.data = {'dataset': s.dataset, 'sha256': meta['sha256']}

    def start(self, model, device, autocast):
        super().start(model, device, autocast)
        W, two = model.config.block_size, 2 * self.l
        require(self.carries or W % two == 0 or two % W == 0,
                f'block_size={W} must divide two segments, {two} tokens, or be a multiple of them')

    def read_and_ask(self, x, y, carry):
        """Read x (B, T) up to its last two segments, then, aside, those, with the question: targets
        y (B, T). Returns the loss, which rows are right (B,), and the carry before the question."""
        tail = 2 * self.l
        with self.autocast:
            if self.carries and x.size(1) > tail:
                carry = self.model(to_device(x[:, :-tail], self.device), carry=carry)[2]
                x, y = x[:, -tail:], y[:, -tail:]
            W = x.size(1) if self.carries else min(self.model.config.block_size, x.size(1))
            loss, right, _ = answer(self.model, x.reshape(-1, W), y.reshape(-1, W), carry,
                                    self.device)
        return loss, right.view(y.shape).all(dim=1), carry

    def new(self, F):
        """F segments and the two of the question, in any place of them without a carry."""
        T, tail = self.lengths(F)
        x, y, keys, after = self.sequences.new(self.B, T, tail)
        loss, right, carry = self.read_and_ask(x, y, None)
        rows = Rows(keys=keys, age=F * self.l - after, carry=carry)
        return loss, right, self.B * T, after <= F * self.l, rows

    def further(self, rows, F):
        T, tail = self.lengths(F)
        x, y = self.sequences.old(rows.keys, T, tail)
        loss, right, rows.carry = self.read_and_ask(x, y, rows.carry)
        rows.age += F * self.l
        return loss, right, len(rows) * T

    def lengths(self, F):
        """Tokens of a sequence, and those at its end in which the question is."""
        if self.carries:
            return (F + 2) * self.l, 2 * self.l
        return (max(2 * self.l, self.model.config.block_size),) * 2

    def measure(self):
        d, n = self.s.probe_distance, 200
        return recalled(self.model, self.make, self.s, [d], n, self.device)[d] / n, n

def recalled(model, make, s, distances, n, device):
    """{d: sequences answered right with d tokens of filler between key and question}: n fresh ones
    of make(seed, split), each asked, aside, at all distances, which rise. Their keys start at all
    places of a segment, equally often."""
    right, l, k = dict.fromkeys(distances, 0), s.segment_size, s.key_length
    test = make(s.seed + APART * (1 + n), 'val')
    ahead, progress = l - 1 + k, Progress('recall', n * distances[-1])  # until all have been asked
    for rows in torch.arange(n).split(50):
        B, lead = len(rows), rows % l
        keys = test.keys(B)
        at = 0 if test.text is None else test.integers(0, len(test.text), B)
        coming = test.filling(B, l + k + ahead, at)  # to be read next; the keys are in here
        test.put(coming, test.mark, keys, lead)
        state, read = new_state(model, B), 0
        for d in distances:
            while read < d + k + 1:  # what stands before the question of the row with lead 0
                T = min(d + k + 1 - read, PER_READ)
                if (more := T + ahead - coming.size(1)) > 0:
                    filling = test.filling(B, more, at + read + coming.size(1))
                    coming = torch.cat((coming, filling), dim=1)
                read_(model, coming[:, :T].to(device), state)
                coming, read = coming[:, T:], read + T
                progress.at(int(rows[0]) * distances[-1] + B * read)
            aside, x, fine = state.clone(), coming[:, :ahead].clone(), torch.ones(B).bool()
            y = test.put_question(x, keys, lead)
            for token, target in zip(x.split(1, dim=1), y.T):
                given = read_(model, token.to(device), aside).argmax(dim=-1).cpu()
                fine &= (given == target) | (target < 0)
            right[d] += int(fine.sum())
    progress.close()
    return right

def probe(model, saved, p, device):
    """Recall against distance, by the settings distances, sequences, far and far_sequences of p; or
    in a file, by file, keys and seed."""
    if p.file:
        return find_in_file(model, saved, p, device)
    s = saved['config']
    make = maker(s)
    return measure_distances(p, 'recall', DIGITS ** -s.key_length,
                             'tokens of filler between key and question', 'keys recalled',
                             lambda some, n: recalled(model, make, s, some, n, device))

def read_known(path, spec):
    """The ids of a text file (N,), its characters, and how many of them are not in the vocabulary
    and are read as spaces. Raises SystemExit if they are half of it or more."""
    text = read_text(path)
    unknown = {*text} - {*spec.get('chars', text)}
    replaced = sum(map(text.count, unknown))
    require(2 * replaced < len(text), f'{path} has {len(text):,} characters, of which the model '
            f"knows {len(text) - replaced:,}: it takes a text mostly of its own characters")
    ids = Tokenizer(spec).encode(text.translate(dict.fromkeys(map(ord, unknown), ' ')))
    return torch.from_numpy(ids.astype('int64')), len(text), replaced

def find_in_file(model, saved, p, device):
    """Hide keys near the start of a text, one in each of so many copies, and ask for them at its
    end."""
    ids, characters, replaced = read_known(p.file, saved['tokenizer'])
    k, l = saved['config'].key_length, saved['config'].segment_size
    require(len(ids) >= 3 * l, f'{p.file} has {len(ids):,} tokens: it takes {3 * l} or more, so '
            'that the key leaves the window')
    sequences = Sequences(p.seed, k, first_digit(saved['tokenizer']))
    keys, lead = sequences.keys(p.keys), int(sequences.integers(0, l))
    state, begin = new_state(model, p.keys), time.perf_counter()
    crosses = Rows(carry=state.carry).nbytes // p.keys
    key = pad(keys, (1, 0), value=sequences.mark)
    progress = Progress(f'reading {p.file}', len(ids) + k + 1)
    for part in (*ids[None, :lead].split(PER_READ, dim=1), key,
                 *ids[None, lead:].split(PER_READ, dim=1)):
        read_(model, part.expand(p.keys, -1).to(device), state)
        progress.at(int(state.read[0]))
    progress.close()
    speed = p.keys * (len(ids) + k + 1) / (time.perf_counter() - begin)
    token, answers = torch.full((p.keys, 1), sequences.ask), []
    for _ in range(k):
        token = read_(model, token.to(device), state).argmax(dim=-1, keepdim=True)
        answers.append(token.cpu())
    answers = torch.cat(answers, dim=1)
    right = int((answers == keys).all(dim=1).sum())
    digits = [' '.join(str(token - sequences.filler) for token in row.tolist())
              for row in (keys[0], answers[0])]
    say(f'hidden after {count(lead, "token")}: {digits[0]}\n'
        f'read: {characters:,} characters, {replaced:,} of them as spaces, {speed:,.0f} tokens/s\n'
        f'state: {state.nbytes // p.keys:,} bytes, {crosses:,} of them carried across segments\n'
        f'answer: {digits[1]}, {right} of {p.keys} right')
    return {'what': 'recall in a file', 'curves': {}, 'notes': [], 'metrics': {
        'recall': metric(**share(right, p.keys)),
        'characters': metric(characters), 'read as spaces': metric(replaced),
        'tokens per second': metric(speed), 'state_bytes': metric(state.nbytes // p.keys),
        'border_bytes': metric(crosses)}}
