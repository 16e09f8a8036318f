"""The tasks: their sequences, what goes on from update to update, and what counts as recall."""
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OF_TASK, PANGRAM, SMALL, check
from small import assert_equal
from test_train import equal, load, records
from torch.nn import functional as F

from configurator import configure
from lib.contract import make_model
from lib.memory import RandomSequences, measure_distances
from lib.rows import Rows
from prepare import Tokenizer
from tasks import find_task, mqar, needle, pairs, track

NEEDLE = dict(segment_size=12, key_length=5, symbols=16, probe_distance=30)
TRACK = dict(segment_size=12, block_size=24, symbols=4, cups=3, every=4)
PAIRS = dict(segment_size=12, names=9, symbols=16, pairs=5, batch_size=8, fresh=3)
FIRST_DIGIT, MARK, ASK, FIRST_NAME = 16, 26, 27, 28  # of these

def make_task(name, model_type='', **settings):
    """A Task as train.py makes it, of its defaults and these settings; started, if a type of model
    is named, with a small one in float64."""
    module, run = find_task(name), dict(seed=1, init_from='scratch', gradient_accumulation_steps=1,
                                        bptt_segments=0, recompute=False)
    defaults = configure({}, [], parts=lambda known: [module]).as_dict()
    sizes = {**defaults, **run, **SMALL, **OF_TASK[name], **settings}
    task = module.Task(SimpleNamespace(**sizes))
    if model_type:
        torch.manual_seed(0)
        model = make_model(model_type, {**sizes, 'dropout': 0.0, **task.sizes}).double()
        task.start(model, 'cpu', nullcontext())
    return task

def test_what_is_set_aside_is_scored_and_never_trained_on(data_dir):
    usual, search = (make_task('text', data_dir=data_dir, set_aside=share, eval_tokens=0)
                     for share in (0.0, 0.25))
    kept = len(search.train_data)
    assert kept == int(0.75 * len(usual.train_data))
    both = [*search.train_data.tolist(), *search.val_data.tolist()]
    assert both == usual.train_data.tolist() and search.val_data.tolist() != usual.val_data.tolist()

def test_streams_go_on_in_other_micro_batches(data_dir):
    one, two = (make_task('text', 'fold', data_dir=data_dir, stream=True, batch_size=B,
                          gradient_accumulation_steps=4 // B) for B in (4, 2))
    one.backward()
    before = one.carries[0]
    two.load_state(one.state(), 'cpu')
    one.load_state(two.state(), 'cpu')
    assert [*map(len, two.carries)] == [2, 2] and torch.equal(torch.cat(two.carries), before)
    assert torch.equal(*one.carries, before)

def test_a_stretch_gives_the_gpt_the_data_of_the_fold(data_dir):
    fold = make_task('text', data_dir=data_dir, batch_size=4, block_size=16)
    gpt = make_task('text', data_dir=data_dir, batch_size=16, block_size=4, stretch=16)
    for _ in range(3):
        (x, y), others = fold.random_sequences(), gpt.random_sequences()
        assert x.shape == (4, 16) and torch.equal(x[:, 1:].int(), y[:, :-1].int())
        equal([x, y], [tokens.view(4, 16) for tokens in others])
    fold.train_data = np.arange(100, dtype=np.uint16)  # any place is as good as another
    pieces = torch.cat([torch.cat(fold.random_sequences(), dim=1) for _ in range(400)]).long()
    assert {*pieces[:, 0].tolist()} == {*range(84)} and pieces.max() == 99

def test_a_streams_carry_is_that_of_one_long_forward(train, tmp_path):
    """And what it reads, over so many updates that one of the four rows goes on at the start."""
    steps, T, ends, expected = 15, 160, [], torch.zeros(15)
    done = train(stream=True, block_size=T, segment_size=16, dropout=0.0, max_iters=steps,
                 learning_rate=0.0, min_lr=0.0, bptt_segments=9, recompute=True,
                 gradient_accumulation_steps=2, batch_size=2)
    state, job = load(tmp_path / 'out' / 'last.pt')['task_state'], done.globals['job']
    carries = torch.cat(state['carries'])
    model, corpus = job.model.eval(), torch.from_numpy(job.train_data.astype('int64'))
    for r in range(4):
        first, it, carry = r * (len(corpus) - T) // 4, 0, None
        while it < steps:
            n = min(steps - it, (len(corpus) - 1 - first) // T)
            x, y = (corpus[None, first + i:first + n * T + i] for i in (0, 1))
            with torch.no_grad():
                logits, _, carry = model(x, y, carry)
            expected[it:it + n] += F.cross_entropy(
                logits[0], y[0], reduction='none').view(-1, T).mean(dim=1) / 4
            ends, first, it = [*ends, first + n * T], 0, it + n
        torch.testing.assert_close(carries[r], carry[0], rtol=0, atol=1e-4)
        assert state['at'][r] == ends[-1]
    assert len(ends) == 4 + 1
    assert [loss for _, loss in records(tmp_path / 'out', 'loss')] == pytest.approx(
        expected.tolist(), abs=1e-5)

@pytest.mark.parametrize('filler', ['symbols', 'text'])
def test_needle_sequences_hold_one_key_and_ask_for_it(data_dir, filler):
    s, T = make_task('needle', data_dir=data_dir, filler=filler, **NEEDLE).s, 60
    task = needle.maker(s)(1, 'train')
    x, y, keys, after = task.new(500, T, 24)
    asked = (x == task.ask).long().argmax(dim=1)
    for row, targets, key, end, ask in zip(*(z.tolist() for z in (x, y, keys, after, asked))):
        assert row[end - 6:end] == [task.mark, *key] and end <= ask
        assert row[ask:ask + 5] == [task.ask, *key[:4]] and targets[ask:ask + 5] == key
        assert set(targets[:ask] + targets[ask + 5:]) <= {-1}
        filling = row[:end - 6] + row[end:ask] + row[ask + 5:]
        assert max(filling) < task.filler <= min(key) and max(key) < task.mark
    assert set((asked % 12).tolist()) == set(range(12)) and asked.min() >= T - 24
    distance = asked - after
    assert distance.min() == 0 and distance.max() > 40 and (distance < 10).sum() > 30
    x, y = task.old(keys, T, 24)
    assert (x == task.ask).sum() == 500 and (x == task.mark).sum() == 0
    assert torch.equal(y[y >= 0].view(500, 5), keys) and (y[:, :T - 24] == -1).all()
    if filler == 'text':  # of the split, round and round
        train, test = map(partial(needle.maker(s), 1), ('train', 'val'))
        x, text = test.filling(2, 20, torch.tensor([3, len(test.text) - 5])), test.text
        equal(x, torch.stack((text[3:23], torch.cat((text[-5:], text[:15])))))
        assert not torch.equal(train.text[:50], text[:50])

class Reader(torch.nn.Module):
    """Its carry is what it has read, (B, 999), and how much that is, (B,). It answers seven rows of
    ten right."""

    def __init__(self, task):
        super().__init__()
        self.weight, self.answered = torch.nn.Parameter(torch.ones(())), {}
        self.config = SimpleNamespace(block_size=999, vocab_size=task.sizes['vocab_size'])
        task.start(self, 'cpu', nullcontext())

    def forward(self, idx, targets=None, carry=None):
        B, V = len(idx), self.config.vocab_size
        text, n = carry or torch.zeros(2, B, 999, dtype=torch.int64)
        carry = torch.cat((text, idx), dim=1)[:, -999:], n.view(B, -1)[:, 0] + idx.size(1)
        if targets is None:
            return torch.zeros(B, 1, V), None, carry
        right = torch.rand(B, 1) < 0.7
        for row, fine in zip(targets, right.tolist()):
            self.answered[tuple(row[row >= 0].tolist())] = fine[0]
        logits = self.weight * F.one_hot(torch.where(right, targets, targets + 1) % V, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss, carry

def test_rows_that_walk_on_count_in_the_loss_as_new_ones_do():
    task, w = make_task('needle', batch_size=4), torch.ones((), requires_grad=True)
    fine = torch.ones(4).bool()
    rows = Rows(keys=torch.zeros(4, 1), age=torch.zeros(4), carry=torch.zeros(4, 1))
    task.walkers, task.carries = rows.pick([0, 1]), True
    task.new = lambda F: (3 * w, fine, 10, fine, rows)
    task.further = lambda old, F: (5 * w, fine[:2], 7)
    assert task.backward() == (5.5, 17) and w.grad == 5.5  # 3 + 5 * 2 / 4

def texts_of(walkers):
    """What each of those that walk on has read, by its memory."""
    return [text[len(text) - n:].tolist() for text, n in zip(*walkers.carry)]

@pytest.mark.parametrize('leave', [0.0, 1.0])
def test_walkers_read_on_from_where_they_were_and_leave_when_wrong(leave):
    task = make_task('needle', batch_size=8, key_length=5, segment_size=6, leave=leave, first=3,
                     seed=2)  # which draws no key twice
    reader, before, oldest = Reader(task), set(), 0
    for _ in range(25):
        task.backward()
        walkers = task.walkers or SimpleNamespace(keys=torch.zeros(0), age=[], carry=[[], []])
        now = {tuple(key) for key in walkers.keys.tolist()}
        assert before & now == {key for key in before if reader.answered[key] and not leave}
        assert len(now) == len(walkers.keys) <= 8 and all(reader.answered[key] for key in now)
        for key, age, text in zip(walkers.keys.tolist(), walkers.age, texts_of(walkers)):
            end = text.index(task.sequences.mark) + 6
            assert text[end - 5:end] == key and age == len(text) - end
            oldest = max(oldest, age)
        before = now
    assert oldest > (0 if leave else 30)

def test_the_curriculum_grows_by_the_recall_of_its_hardest_sequences():
    task, found = make_task('needle', 'fold', longest=2, grow_at=0.9), []
    for segments, times in ((0, 50), (1, 21), (1, 1), (2, 50)):
        for _ in range(times):
            task.grow(segments, torch.ones(4).bool())
        found.append((task.stage, task.recall > 0.8))
    assert found == [(1, False), (1, True), (2, False), (2, True)]  # the longest

def test_a_gpt_is_shown_what_its_window_holds():
    for W in (4, 8, 16):
        task = make_task('needle', 'gpt', block_size=W, grow_at=-1.0)
        loss, tokens = task.backward()
        assert loss.isfinite() and tokens == 64 * max(8, W)
        assert task.walkers is None and task.stage == 1 and task.figures()['walkers'] == 0

class Knower(torch.nn.Module):
    """After the whole text of a row it gives the token answer(text), if there is one."""

    def __init__(self, answer, V=99):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(block_size=7296, vocab_size=V)

    def forward(self, idx, targets=None, carry=None):
        if targets is not None:  # as when it is tried out
            return torch.zeros(*idx.shape, self.config.vocab_size), None, None
        logits = torch.zeros(len(idx), 1, self.config.vocab_size)
        for row, text in enumerate(idx.tolist()):
            if (token := self.answer(text)) is not None:
                logits[row, 0, token] = 1
        return logits, None, None

def finder(task, knows, starts):
    """A model that finds the key of a text where knows(distance); starts: where keys start."""
    def answer(text):
        if task.ask in text:
            key, asked = text.index(task.mark) + 1, text.index(task.ask)
            assert text.count(task.mark) == text.count(task.ask) == 1
            assert max(text[:key - 1], default=0) < task.filler > text[key + 5]
            i = len(text) - asked - 1
            assert text[asked + 1:asked + 5] == text[key:key + min(i, 4)]  # of its key
            starts.add((key - 1) % 12)
            if i < 5 and knows(asked - key - 5):  # what follows is read while others are asked
                return text[key + i]
    return Knower(answer)

@pytest.mark.parametrize('filler', ['symbols', 'text'])
def test_recall_is_that_of_the_model_at_every_distance(data_dir, filler, monkeypatch):
    task, starts = make_task('needle', data_dir=data_dir, filler=filler, **NEEDLE), set()
    monkeypatch.setattr('lib.streaming.FUSED_FROM', 3)  # so that it is tried on few tokens
    made, make = [], task.make
    task.make = lambda *how: made.append(how) or make(*how)
    scholar = finder(task.sequences, lambda d: d in (5, 7000), starts)
    found = needle.recalled(scholar, task.make, task.s, [5, 30, 7000], 12, 'cpu')
    assert found == {5: 12, 30: 0, 7000: 12} and starts == set(range(12))
    task.start(scholar, 'cpu', nullcontext())
    assert task.evaluate() == {'val_loss': 1.0, 'val_error': 0.0}
    assert {split for _, split in made} == {'val'} and all(seed != task.s.seed for seed, _ in made)

def test_keys_are_hidden_in_a_file_and_asked_for_at_its_end(
        data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('lib.streaming.FUSED_FROM', 3)
    task = make_task('needle', 'gpt', data_dir=data_dir, filler='text', **NEEDLE, block_size=24)
    known = ''.join(task.tokenizer['chars'])
    (tmp_path / 'book').write_text((known * 99)[:600] + '\u2260' * 7)
    saved = {'config': task.s, 'tokenizer': task.tokenizer}
    p = SimpleNamespace(file=str(tmp_path / 'book'), keys=3, seed=2)
    scholar = finder(task.sequences, lambda d: d > 590, set())
    for model, right in ((scholar, 3), (task.model.eval(), 0)):
        found = needle.probe(model, saved, p, 'cpu')['metrics']
        assert found['recall']['value'] == right / 3 and found['read as spaces']['value'] == 7
        assert '607 characters, 7 of them as spaces' in capsys.readouterr().out
    short = 3 * task.s.segment_size - 1
    for text, words in ((known[0] * 9 + '\u2260' * 9, '18 characters, of which the model knows 9'),
                        (known[0] * short, f'{short} tokens: it takes {short + 1} or more')):
        (tmp_path / 'book').write_text(text)
        with pytest.raises(SystemExit, match=words):
            needle.probe(model, saved, p, 'cpu')

def test_keys_among_byte_pairs_are_of_tokens_that_gpt2_has_and_no_text(monkeypatch):
    meta = {'tokenizer': {'kind': 'gpt2'}, 'vocab_size': 50257}
    monkeypatch.setattr(needle, 'read_splits', lambda s: ({'train': torch.arange(150)}, meta))
    sequences = needle.maker(SimpleNamespace(**NEEDLE, filler='text'))(1, 'train')
    x = sequences.new(50, 24, 24)[0]
    assert sequences.vocab_size == 50257 and {*x[x >= 150].tolist()} == {*range(202, 214)}

def test_a_file_is_for_those_who_know_a_text(train, run, tmp_path):
    assert train(task='track', max_iters=0).code == 0
    check(run('probe.py', tmp_path / 'out', f'--file={__file__}'), 'trained with --filler=text')

def lying(sequences, text):
    """The object under each cup after the tokens of a row, by hand."""
    objects, swaps = [*range(sequences.s.cups)], {4: (0, 1), 5: (0, 2), 6: (1, 2)}
    for token in text:
        if token in swaps and token < sequences.ask:
            a, b = swaps[token]
            objects[a], objects[b] = objects[b], objects[a]
    return objects

@pytest.mark.parametrize('cups, every, regular', [(3, 4, True), (3, 5, True), (2, 2, False)])
def test_each_segment_asks_once_for_what_lies_under_a_cup(cups, every, regular):
    settings = {**TRACK, 'cups': cups, 'every': every, 'regular': regular}
    sequences = make_task('track', **settings).sequences
    ask = 4 + (3 if cups == 3 else 1)
    x, y, objects = sequences.further(sequences.start(300), 36)
    more, targets, objects = sequences.further(objects, 12)
    for row, wanted, at_last in zip(torch.cat((x, more), dim=1).tolist(),
                                    torch.cat((y, targets), dim=1).tolist(), objects.tolist()):
        places = [i for i, token in enumerate(row) if token == ask]
        assert [i // 12 for i in places] == [0, 1, 2, 3] and lying(sequences, row) == at_last
        assert {i: target for i, target in enumerate(wanted) if target >= 0} == {
            i + 1: ask + 1 + cups + lying(sequences, row[:i])[row[i + 1] - ask - 1] for i in places}
    swaps = (x >= 4) & (x < ask)
    counts = swaps[:, :36 // every * every].view(300, -1, every).sum(dim=-1)
    assert counts.max() == (1 if regular else 2)  # more in one segment are another task
    assert abs(swaps.float().mean() * every * 12 / 10 - 1) < 0.05
    assert len({*(y >= 0).nonzero()[:, 1].tolist()}) == 33

def test_tracked_objects_walk_on_with_their_memory():
    task = make_task('track', **TRACK, batch_size=8, leave=0.0, first=2, grow_at=1.0)
    Reader(task)
    for _ in range(12):
        task.backward()
    walkers = task.walkers
    for objects, age, text in zip(walkers.objects.tolist(), walkers.age, texts_of(walkers)):
        assert len(text) == age and lying(task.sequences, text) == objects
    assert len(walkers) == 8 and max(walkers.age) > 60

def test_tracking_is_that_of_the_model_at_every_distance():
    s = make_task('track', **TRACK).s
    known = track.Sequences(s, 1)

    def answer(text):
        if len(text) - 2 in (36, 7200):
            return known.object + lying(known, text)[text[-1] - known.cup]

    def fresh(seed, split):
        assert split == 'val' and seed != s.seed
        return track.Sequences(s, seed)
    right = track.answered(Knower(answer), fresh, s.seed, [30, 48, 7200], 60, 'cpu')
    assert right == {30: 60, 48: 0, 7200: 60}

def where(text):
    """{who or what is asked for: the place of that} after a text, read as words."""
    places = dict(re.findall(r'(\w+) is in the (\w+)[.]', text))
    holders = {f'the {thing}': who for who, thing in re.findall(r'(\w+) has the (\w+)[.]', text)}
    return {**places, **{thing: places.get(who) for thing, who in holders.items()}}

@pytest.mark.parametrize('hops', [1, 2])
def test_facts_are_told_in_words_and_asked_for_where_they_are_known(data_dir, hops):
    task = make_task('facts', data_dir=data_dir, hops=hops, every=2)
    sequences, tokenizer = task.sequences, Tokenizer(task.tokenizer)
    x, y, objects = sequences.further(sequences.start(100), 48)
    more, targets, objects = sequences.further(objects, 96)
    asked, told = [], 0
    for row, wanted in zip(torch.cat((x, more), 1).tolist(), torch.cat((y, targets), 1).tolist()):
        text = tokenizer.decode(row)
        told += len(re.findall(r'is in the|has the', text))
        places = [i for i, target in enumerate(wanted) if target >= 0]
        questions = [*re.finditer(r'Where is ([\w ]+)\? ', text)]
        assert places == [found.end() - 1 for found in questions]
        for i, found in zip(places, questions):
            assert tokenizer.decode([wanted[i]]) == where(text[:i])[found[1]][0]
            asked.append(i // 48)
    # the first lines tell what a question takes, the others a fact every other time
    assert min(asked) == hops - 1 and asked.count(hops - 1) == 100
    assert hops == 2 or len(asked) == 300
    assert abs(told - 50 * (3 + hops)) < 30
    assert {*asked} >= {1, 2}

@pytest.mark.parametrize('hops', [1, 2])
def test_facts_are_measured_after_so_much_of_the_text_alone(data_dir, tmp_path, hops):
    task = make_task('facts', data_dir=data_dir, hops=hops)
    tokenizer, texts = Tokenizer(task.tokenizer), []

    def answer(tokens):
        text = tokenizer.decode(tokens)
        if found := re.search(r'Where is ([\w ]+)\? $', text):
            texts.append(text)
            if len(text) < 1000:
                return int(tokenizer.encode(where(text)[found[1]])[0])
    reader = Knower(answer, tokenizer.vocab_size)
    right = track.answered(reader, task.make, 1, [0, 200, 2000], 20, 'cpu')
    lines = re.findall(r'is in the|has the', texts[-1])
    assert right[0] == right[200] == 20 > right[2000] and len(lines) == (4 if hops == 1 else 6)
    (tmp_path / 'book').write_text('q' * 999)
    saved = {'config': task.s, 'tokenizer': task.tokenizer}
    for file, words in ('', PANGRAM[:9]), (tmp_path / 'book', 'q' * 99):
        p = SimpleNamespace(file=str(file), distances='200', sequences=5, far=999, far_sequences=1)
        found = find_task('facts').probe(reader, saved, p, 'cpu')
        assert found['metrics']['chance']['value'] == 0.25 and words in texts[-1]
        assert found['curves']['recall']['points'][0]['right'] == 5

def shown(row):
    """{name: digit} of the pairs in a row of tokens, and the places where they begin."""
    at = [i for i, token in enumerate(row) if token == MARK]
    return {row[i + 2]: row[i + 1] for i in at}, at

def test_each_pair_is_shown_once_one_a_segment_and_asked_for_by_its_name():
    sequences, found = make_task('pairs', **PAIRS).sequences, set()
    rows = sequences.rows(torch.full((300,), 5))
    text = torch.cat([sequences.further(rows, n, 1.0) for n in (2, 5)], dim=1)
    for row, start in zip(text.tolist(), rows.start.tolist()):
        digits, at = shown(row)
        assert [i // 12 for i in at] == [0, 1, 2, 3, 4] and len(digits) == 5  # then filler alone
        assert min(digits) >= FIRST_NAME and {*digits.values()} <= {*range(FIRST_DIGIT, MARK)}
        assert [i % 12 for i in at] == [(start - n) % 10 for n in range(5)]
        found.add(at[0])
    assert found == set(range(10))
    places, which = [0, 3, 6, 9, 12], torch.rand(300, 5).argsort(dim=1)
    x, y = (tokens.view(300, 24) for tokens in sequences.ask_for(rows, which))  # 4 fit a segment
    for row, asked, targets, order in zip(*(z.tolist() for z in (text, x, y, which))):
        digits, at = shown(row)
        wanted = [(ASK, row[at[n] + 2], digits[row[at[n] + 2]]) for n in order]
        assert [i for i, token in enumerate(asked) if token == ASK] == places
        assert [tuple(asked[i:i + 3]) for i in places] == wanted
        assert {i: target for i, target in enumerate(targets) if target >= 0} == {
            i + 1: digit for i, (_, _, digit) in zip(places, wanted)}

def test_pairs_come_as_often_as_told_and_in_the_first_lesson_side_by_side():
    sequences = make_task('pairs', **PAIRS).sequences
    rows = sequences.rows(torch.arange(1, 6).repeat(400))
    assert (sequences.further(rows, 1, 0.0) == MARK).any(dim=1).all()  # none stays without a pair
    share = (sequences.further(rows, 1, 0.25) == MARK).any(dim=1).view(400, 5).float().mean(dim=0)
    assert share[0] == 0 and ((share[1:] - 0.25).abs() < 0.1).all()
    sequences.further(rows, 60, 0.25)
    assert torch.equal(rows.shown, rows.most)
    for row in sequences.at_once(sequences.rows(torch.full((20,), 3)), 3).tolist():
        digits, at = shown(row)
        assert len(digits) == 3 and at == [0, 3, 6] and len(row) == 12

def test_pairs_walk_on_with_their_memory():
    task = make_task('pairs', **PAIRS, passed_at=-1.0, matched=False)
    Reader(task)
    ask_for = task.sequences.ask_for

    def asked(rows, which):
        assert which.shape == (len(rows), 4) and (which < rows.shown[:, None]).all()
        return ask_for(rows, which)
    task.sequences.ask_for = asked
    for n in range(12):
        assert task.lesson == (1 if n == 0 else 2) and (task.walkers is None) == (n < 2)
        task.backward()
    walkers, texts = task.walkers, texts_of(task.walkers)
    for order, digits, count, text in zip(walkers.names.tolist(), walkers.digits.tolist(),
                                          walkers.shown, texts):
        assert shown(text)[0] == dict(zip(order[:count], digits))
    lengths = [*map(len, texts)]
    assert len(walkers) == 8 and min(lengths) == 24 and max(lengths) > 72  # from long before

@pytest.mark.parametrize('T, count', [(64, 4), (41, 10)])
def test_keys_come_back_once_and_ask_for_their_value(T, count):
    sequences = make_task('mqar', vocabulary=8192).sequences
    x, y = sequences.new(400, T, count)
    places = []
    for row, targets in zip(x.tolist(), y.tolist()):
        pairs = dict(zip(row[:2 * count:2], row[1:2 * count:2]))
        asked = {i: target for i, target in enumerate(targets) if target >= 0}
        assert len(pairs) == len(asked) == count and max(pairs) < 4096 <= min(pairs.values())
        assert {row[i]: target for i, target in asked.items()} == pairs
        places += [i - 2 * count for i in asked]
    assert {*places} == {*range(0, (T - 2 * count) // 2 * 2, 2)}
    assert T == 41 or sum(i < 8 for i in places) > sum(i >= 28 for i in places)  # soon, not late

class Finder(torch.nn.Module):
    """Knows the values of keys in sequences of 64 tokens."""

    def forward(self, x, y, carry):
        T, first = x.size(1), [[row.index(token) for token in row] for row in x.tolist()]
        values = x.gather(1, (torch.tensor(first) + 1).clamp(max=T - 1)) * (T == 64)
        return F.one_hot(values, 8192).float(), torch.zeros(()), None

def test_associative_recall_is_that_of_the_model():
    saved = {'config': make_task('mqar', vocabulary=8192, lengths='64:4,128:8').s}
    found = mqar.probe(Finder(), saved, SimpleNamespace(sequences=60), 'cpu')
    points = found['curves']['recall']['points']
    assert [(p['x'], p['value'], p['n']) for p in points] == [(4, 1.0, 60), (8, 0.0, 60)]

class Keeper(torch.nn.Module):
    """Keeps the last four pairs; of all others the digit is wrong."""

    def forward(self, x, y=None, carry=None):
        if y is None:
            return None, None, x if carry is None else torch.cat((carry, x), dim=1)
        digits = [dict([*shown(text)[0].items()][-4:]) for text in carry.tolist()]
        answers = [[known.get(token, 0) for token in row] for known, row in zip(digits, x.tolist())]
        self.read = carry.size(1) // 12
        return F.one_hot(torch.tensor(answers), 99).float(), torch.zeros(()), None

def test_capacity_is_that_of_the_model():
    p, saved = SimpleNamespace(most=6, sequences=55, wait=3), make_task('pairs', **PAIRS).s
    found = pairs.probe(keeper := Keeper(), {'config': saved}, p, 'cpu')
    assert found['curves']['recall']['points'] == [
        {'x': n, 'value': pytest.approx(min(1, 4 / n)), 'n': 55 * n} for n in range(1, 7)]
    assert found['metrics']['most pairs at 0.9']['value'] == 4 and keeper.read == 6 + 3

def test_pairs_start_from_weights_that_compare_names():
    usual, matched = (make_task('pairs', 'fold', matched=matched, place_scale=3).model.transformer
                      for matched in (False, True))
    for a, b in zip(usual.h, matched.h):
        q, k, v = a.attn.c_attn.weight.split(16)
        assert_equal(b.attn.c_attn.weight, torch.cat((4 * q, 4 * q, 0.5 * v + 0.7 * torch.eye(16))))
        assert_equal(b.attn.c_proj.weight, 0.5 * a.attn.c_proj.weight + 0.7 * torch.eye(16))
    assert_equal(matched.wte.weight, 8 * usual.wte.weight)
    assert_equal(matched.wpe.weight, 3 * usual.wpe.weight)

@pytest.mark.parametrize('name, settings, words', [
    ('text', dict(document='a', recompute=True), 'with document'),
    ('text', dict(document='a', bptt_segments=1), 'with document'),
    ('text', dict(eval_tokens=1), 'eval_tokens=1'), ('text', dict(stretch=24), 'stretch=24'),
    ('text', dict(stretch=16, stream=True), 'stretch'), ('text', dict(block_size=50000), 'short'),
    ('needle', dict(filler='noise'), "'noise'"), ('needle', dict(key_length=4), 'key_length=4'),
    ('needle', dict(first=4), 'first=4'), ('needle', dict(filler='text', dataset='no'), "'no'"),
    ('needle', dict(model_type='gpt', block_size=6), 'block_size=6'),
    ('track', dict(cups=1), 'cups must be at least 2'), ('track', dict(first=4), 'first=4'),
    ('track', dict(recompute=True), 'recompute=False'),
    ('pairs', dict(model_type='lstm'), 'matched'),
    ('pairs', dict(model_type='gpt', window=4), 'segment_size=6 must be a multiple'),
    ('facts', dict(model_type='rmt', segment_size=36, block_size=72), 'line=48 must be a multiple'),
    ('facts', dict(hops=3), 'hops=3'), ('facts', dict(block_size=48, hops=2), 'hops=2 lines'),
    ('facts', dict(line=30), 'too short'),
    ('facts', dict(dataset='tiny'), "'tiny' has no '.', 'A',"),
    ('mqar', dict(lengths='64:20'), "lengths='64:20'"), ('mqar', dict(lengths='64'), "'64'"),
    ('mqar', dict(model_type='gpt', block_size=16), 'block_size=16'),
    ('mqar', dict(lengths='99999999:4'), 'at most'), ('track', dict(leave=-1.0), 'leave must'),
    ('pairs', dict(pairs=10), 'pairs=10'), ('pairs', dict(together=3), 'together=3'),
    ('pairs', dict(fresh=9), 'fresh=9'), ('pairs', dict(model_type='gpt'), 'with a carry')])
def test_bad_settings_get_one_line(data_dir, name, settings, words):
    with pytest.raises(SystemExit, match=f'^error: .*{words}[^\n]*$'):
        make_task(name, data_dir=data_dir, **settings)

@pytest.mark.parametrize('name, chance', [
    ('needle', 0.1), ('track', 0.5), ('facts', 0.25), ('pairs', 0.1), ('mqar', 1 / 6)])
def test_figures_are_of_sequences_that_were_not_trained_on(data_dir, name, chance, monkeypatch):
    task, seeds, init = make_task(name, 'fold', data_dir=data_dir), [], RandomSequences.__init__
    monkeypatch.setattr(RandomSequences, '__init__',
                        lambda self, seed: seeds.append(seed) or init(self, seed))
    task.evaluate()
    p = SimpleNamespace(file='', distances='12', sequences=1, far=99, far_sequences=1, most=1,
                        wait=0)
    saved = {'config': task.s, 'tokenizer': task.tokenizer}
    found = find_task(name).probe(task.model, saved, p, 'cpu')
    assert found['metrics']['chance']['value'] == pytest.approx(chance)
    assert seeds and task.s.seed not in seeds
    task.measure = lambda: (0.75, 48)
    assert task.evaluate() == {'val_loss': 0.25, 'val_error': 0.0625}

def test_recall_has_an_interval_and_far_distances_fewer_sequences():
    p, asked = SimpleNamespace(distances='12,48,96', sequences=10, far=48, far_sequences=5), []
    found = measure_distances(p, 'recall', 0.1, 'x', 'y', lambda some, n: asked.append(
        (some, n)) or dict.fromkeys(some, n * 8 // 10))
    assert asked == [([12], 10), ([48, 96], 5)]
    point = found['curves']['recall']['points'][0]
    assert [point[key] for key in ('value', 'low', 'high')] == pytest.approx(
        [0.8, 0.4902, 0.9433], abs=1e-4)  # Wilson's
