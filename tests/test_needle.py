"""The needle task: what its sequences are, what counts as recall, and that walking sequences keep their memory."""
import json
from types import SimpleNamespace

import pytest
import torch

SMALL = dict(device='cpu', threads=1, n_embd=16, n_head=2, n_local=1, n_global=1, segment_size=12, batch_size=8, longest=2,
             max_iters=4, warmup_iters=1, log_interval=2, distances='0,12,30', sequences=9, probe_distance=12, overwrite=True)


@pytest.fixture
def needle(run, tmp_path, data_dir):
    """needle(**settings): a run of needle.py, seconds long; its globals are in the result."""
    def needle(**settings):
        how = {**SMALL, 'out_dir': tmp_path / 'needle', 'data_dir': data_dir, 'dataset': 'tiny', **settings}
        return run('needle.py', *(f'--{key}={value}' for key, value in how.items()))
    return needle


def swap_model(names, model):
    names['train'].__globals__['model'] = model  # of the script itself: evaluate is wrapped by torch


class Scholar:
    """Reads everything and forgets nothing: answers right if `knows` says so of the distance between key and question."""

    def __init__(self, names, knows):
        self.task, self.knows, self.begun = names['task'], knows, set()

    def new_state(self, B):
        return SimpleNamespace(text=torch.zeros(B, 0, dtype=torch.int64), clone=lambda: None)

    def read_(self, idx, state):
        state.text = torch.cat((state.text, idx), dim=1)
        state.clone = lambda text=state.text: SimpleNamespace(text=text)
        logits = torch.zeros(len(idx), self.task.vocab_size)
        for row, text in enumerate(state.text.tolist()):
            if self.task.ask in text:
                key, asked = text.index(self.task.mark) + 1, text.index(self.task.ask)
                assert text.count(self.task.mark) == text.count(self.task.ask) == 1 and text[key + 5] < self.task.first_digit
                i = len(text) - asked - 1
                assert text[asked + 1:asked + 5] == text[key:key + min(i, 4)]  # the question goes on with the right digits
                if i < 5:  # what follows is filler, read while other rows are still asked
                    logits[row, text[key + i]] = 1 if self.knows(asked - key - 5) else -1
                    self.begun.add((key - 1) % 12)
        return logits


@pytest.mark.parametrize('filler', ['symbols', 'text'])
def test_recall_is_that_of_the_model_at_every_distance(needle, filler):
    names = needle(max_iters=0, filler=filler).globals
    scholar = Scholar(names, lambda d: d in (5, 700))
    swap_model(names, scholar)
    assert names['evaluate']([5, 30, 700, 7000], 12) == {5: 12, 30: 0, 700: 12, 7000: 0}
    assert scholar.begun == set(range(12))  # keys at all places of a segment


@pytest.mark.parametrize('filler', ['symbols', 'text'])
def test_sequences_hold_one_key_and_ask_for_it(needle, filler):
    names = needle(max_iters=0, filler=filler).globals
    task, T = names['task'], 60
    x, y, keys, after = task.new(500, T, 24)
    asked = (x == task.ask).long().argmax(dim=1)
    for row, targets, key, end, question in zip(x.tolist(), y.tolist(), keys.tolist(), after.tolist(), asked.tolist()):
        assert row.count(task.mark) == row.count(task.ask) == 1
        assert row[end - 6:end] == [task.mark, *key] and end <= question
        assert row[question:question + 5] == [task.ask, *key[:4]]
        assert targets[question:question + 5] == key and set(targets[:question] + targets[question + 5:]) <= {-1}
        rest = row[:end - 6] + row[end:question] + row[question + 5:]
        assert max(rest) < task.first_digit <= min(key)
    assert set((asked % 12).tolist()) == set(range(12)) and asked.min() >= T - 24  # any place of a segment
    distance = asked - after
    assert distance.min() == 0 and distance.max() > 40 and (distance < 10).sum() > 30  # easy cases too
    x, y = task.old(keys, T, 24)
    assert (x == task.ask).sum() == 500 and (x == task.mark).sum() == 0 and (y >= 0).sum() == 2500
    assert torch.equal(y[y >= 0].view(500, 5), keys)


def test_text_filler_is_the_text_and_of_the_split(needle):
    names = needle(max_iters=0, filler='text').globals
    train, test = names['make_task']('train', 1), names['make_task']('val', 1)
    x = test.filling(2, 20, torch.tensor([3, len(test.text) - 5]))
    assert torch.equal(x[0], test.text[3:23]) and torch.equal(x[1], torch.cat((test.text[-5:], test.text[:15])))
    assert not torch.equal(train.text[:50], test.text[:50])


def test_walkers_carry_on_from_where_they_were_and_leave_when_wrong(needle):
    names = needle(max_iters=0, leave=0.0, learning_rate=0.0, weight_decay=0.0).globals
    model, walkers, task = names['model'], names['walkers'], names['task']
    keys, carry = task.keys(5), torch.randn(5, 12, 16)
    walkers.refill(keys, carry, torch.tensor([7, 1, 2, 3, 4]), torch.tensor([True, False, True, True, True]))
    assert walkers.there.sum() == 4 and torch.equal(walkers.keys[0], keys[0]) and torch.equal(walkers.carry[1], carry[2])
    seen, ask = [], names['read_and_ask']

    def read_and_ask(x, y, carry):  # the second call is that on the walkers: two of the four answer right
        loss, right, after = ask(x, y, carry)
        if carry is not None:
            seen.append((x, carry, after))
            return loss, torch.tensor([True, False, True, False]), after
        return loss, torch.zeros(8, dtype=torch.bool), after
    names['train_step'].__globals__['read_and_ask'] = read_and_ask
    names['train_step'](2, 0.0)
    [(x, before, after)] = seen
    assert torch.equal(before[1], carry[2])
    assert walkers.there.nonzero()[:, 0].tolist() == [0, 2] and walkers.age[0] == 7 + 24
    torch.testing.assert_close(walkers.carry[2], model(x[2:3, :24], carry=carry[3:4])[2][0].detach())


def test_two_runs_with_one_seed_are_the_same(needle, tmp_path):
    needle(out_dir=tmp_path / 'a', carry='gated')
    needle(out_dir=tmp_path / 'b', carry='gated')
    a, b = (json.load(open(tmp_path / name / 'recall.json')) for name in 'ab')
    assert [r['loss'] for r in a['log']] == [r['loss'] for r in b['log']] and len(a['log']) == 2
    assert a['recall'] == b['recall'] and [row['distance'] for row in a['recall']] == [0, 12, 30]
    needle(out_dir=tmp_path / 'c', carry='gated', seed=2)
    assert json.load(open(tmp_path / 'c' / 'recall.json'))['log'][0]['loss'] != a['log'][0]['loss']


@pytest.mark.parametrize('block_size', [12, 24, 48])
def test_a_gpt_is_trained_and_asked_as_well(needle, tmp_path, block_size):
    done = needle(model_type='gpt', n_layer=1, block_size=block_size)
    assert done.code == 0 and 'chance: 1e-05' in done.out
    again = needle(model_type='gpt', n_layer=1, block_size=block_size, init_from=tmp_path / 'needle', max_iters=0, out_dir=tmp_path / 'again')
    first, second = (json.load(open(tmp_path / name / 'recall.json')) for name in ('needle', 'again'))
    assert len(first['log']) == 2 and (first['log'], first['training_minutes']) == (second['log'], second['training_minutes'])
    assert again.code == 0 and [l for l in again.out.splitlines() if 'tokens: recall' in l] == [
        l for l in done.out.splitlines() if 'tokens: recall' in l]


@pytest.mark.parametrize('settings, words', [
    (dict(filler='noise'), "filler must be 'symbols' or 'text'"), (dict(key_length=12), 'do not fit into two segments'),
    (dict(distances='12,x'), 'distances must be'), (dict(batch_size=0), 'batch_size must be at least 1'),
    (dict(carry='half'), "carry must be 'plain' or 'gated'"), (dict(model_type='gpt', block_size=20), 'must divide two segments'),
    (dict(beta2=1.5), 'beta2=1.5 must lie in'), (dict(learning_rate=-1), 'learning_rate must be at least 0'), (dict(first=3), 'first=3 is more than the curriculum grows to: longest is 2'),
    (dict(filler='text', dataset='nothing'), 'nothing'), (dict(init_from='nowhere'), 'no checkpoint at')])
def test_bad_settings_get_one_line(needle, settings, words):
    refused = needle(**settings)
    assert refused.code == 1 and words in refused.err and len(refused.err.strip().splitlines()) == 1


def test_a_run_is_not_written_over(needle):
    needle()
    refused = needle(overwrite=False)
    assert refused.code == 1 and '--overwrite=True' in refused.err
    refused = needle(overwrite=False, max_iters=0, init_from='out/none')  # nor what was measured
    assert refused.code == 1 and "holds a run's recall.json" in refused.err


def test_a_run_that_diverges_ends_with_a_line(needle, tmp_path):
    done = needle(learning_rate=1e30, max_iters=30)
    assert done.code == 1 and 'error: the loss is' in done.err and 'lower learning_rate' in done.err and not (tmp_path / 'needle').exists()
    names = needle(max_iters=1, grad_clip=0, learning_rate=1e-2, weight_decay=0).globals  # does not clip
    assert not torch.equal(names['model'].lm_head.weight, needle(max_iters=0, out_dir=tmp_path / 'b').globals['model'].lm_head.weight)


def test_runs_are_drawn_into_one_picture(needle, run, tmp_path):
    needle()
    result = json.load(open(tmp_path / 'needle' / 'recall.json'))
    result['recall'][0].update(recall=1.0, high=1 - 1e-16)  # as rounding leaves it
    json.dump(result, open(tmp_path / 'needle' / 'recall.json', 'w'))
    done = run('needle.py', f"--draw={tmp_path / 'needle' / 'recall.json'}")
    assert done.code == 0 and (tmp_path / 'needle' / 'recall.png').stat().st_size > 1000
    refused = run('needle.py', '--draw=nowhere.json')
    assert refused.code == 1 and 'nowhere.json' in refused.err
