"""The probe's arithmetic on texts whose answer is known, and on models that cannot see so far."""
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import check
from small import V, make
from test_sample import change

from lib import history
from lib.records import load_record
from lib.scoring import last_losses

SIZE, LAG = 6, 33
P = dict(histories='0,6,12,18,24,30,36,42,48,72', words=300,
         bins='12,24,32,34,48', targets=200, stretches=20, resamples=400, seed=1)
WORTH, REMOTE = 'worth of longer history', 'remote co-occurrence'

def measure(score, tokens, **changes):
    """{curve: {x: point}}; every third token is a word."""
    p, last, found = SimpleNamespace(**{**P, **changes}), {}, []
    for place, token in list(enumerate(tokens.tolist()))[::3]:
        found += [(place, 1, place - last[token], -1)] if token in last else []
        last[token] = place
    curves = history.measure(score, tokens, SIZE, history.plan(len(tokens), SIZE, p), found, p)
    return {name: {point['x']: point for point in some['points']} for name, some in curves.items()}

def knows_the_lag(rows, n):
    """The best predictor of a text that repeats every LAG symbols: certain, or it knows nothing."""
    places = torch.arange(rows.size(1) - n, rows.size(1))  # of the targets
    return (places < LAG).double().mul(math.log(LAG)).expand(len(rows), n)

def test_the_curve_drops_at_the_lag_and_nowhere_else():
    curves = measure(knows_the_lag, torch.randperm(LAG).repeat(100)[:3000])
    for c, point in curves['context curve'].items():  # target j has c + j + 1 tokens before it
        loss = math.log(LAG) * sum(c + j + 1 < LAG for j in range(SIZE)) / SIZE
        assert [point[key] for key in ('value', 'low', 'high')] == pytest.approx([loss] * 3)
    assert [c for c, point in curves[WORTH].items() if point['value'] > 0] == [0, 6, 12, 18, 24, 30]
    [(low, words)] = curves[REMOTE].items()  # no word stood at another distance
    assert low == 32 and words['n'] >= 100 and words['value'] == pytest.approx(-math.log(LAG))

def test_preserved_context_asks_for_a_gain_of_some_size(monkeypatch):
    tokens = torch.randperm(LAG).repeat(100)[:3000]
    monkeypatch.setattr(history, 'open_text', lambda saved, p: (tokens, []))
    monkeypatch.setattr(history, 'last_losses', lambda model, *args: 0.004 * knows_the_lag(*args))
    model, p = make(segment_size=SIZE, vocab_size=LAG), SimpleNamespace(**P)
    found = history.probe_text(model, {}, p, 'cpu')['metrics']
    assert found['preserved context'] == {  # of 30 it is a third of 0.004 log(LAG), less than 0.005
        'value': 24, 'error': None, 'n': 200 * SIZE, 'low': 24, 'high': 24}

def test_words_at_other_distances_gain_nothing_from_a_lag():
    tokens, borders = torch.randint(V, (3000,)), [12, 18, 24, 30]
    found = [(place, 1, d, -1) for place in range(200, 2900, 7) for d in (14, 20, 26)]
    gains = history.words_by_distance(knows_the_lag, tokens, found, borders, SIZE, 100)[0]
    for gain in gains.values():
        assert 50 < len(gain) <= 100 and not gain.any()
    found, seen = [(place, 1, 14, -1) for place in range(200, 2900, 7)], []
    history.words_by_distance(lambda rows, n: seen.append(rows) or rows[:, -n:].double(),
                              torch.arange(3000), found, [12, 18], SIZE, 20)
    assert min(rows.min() for rows in seen) < 300 and max(rows.max() for rows in seen) > 2700
    found = [(500, 2, LAG, 9), (504, 1, 6, 9),  # the latter without a cut between: not before 504
             (512, SIZE + 1, LAG, 9)]  # too long to score
    gains, _ = history.words_by_distance(knows_the_lag, tokens, found, [6, 7, LAG, 34], SIZE, 9)
    assert gains[LAG].tolist() == pytest.approx([-2 * math.log(LAG)])  # both tokens of the word
    assert not len(gains[6]) and not len(gains[7])

def copies_at_the_lag(rows, n):
    """The best predictor of a text whose tokens come back LAG later, if it sees so far."""
    losses, seen = torch.full((len(rows), n), math.log(V)).double(), min(n, rows.size(1) - LAG)
    if seen > 0:
        same = rows[:, -seen:] == rows[:, -seen - LAG:rows.size(1) - LAG]
        losses[:, -seen:] = torch.where(same, 0.0, 9.0)
    return losses

@pytest.mark.parametrize('score, worth', [(copies_at_the_lag, 2 * 9.0),
                                          (lambda rows, n: rows[:, -n:].double(), 0.0)])
def test_copying_is_there_at_the_lag_and_nowhere_else(score, worth):
    """Words of three tokens, LAG back and at other distances; another is written over them."""
    tokens = torch.randperm(LAG).repeat(100)[:3000]
    found = [(place, 3, d, place - 100) for place in range(200, 2900, 7) for d in (14, 20, LAG, 45)]
    copies = history.words_by_distance(score, tokens, found, [12, 18, 24, LAG, 34, 48], SIZE, 50)[1]
    for low, gain in copies.items():
        assert (len(gain) > 30) == (low != 24)
        assert gain.tolist() == pytest.approx([-worth * (low == LAG)] * len(gain))
    none = [(500, 1, LAG, 9), (507, 3, LAG, -1)]  # no second token; no word that could be written
    assert not len(history.words_by_distance(score, tokens, none, [LAG, 34], SIZE, 9)[1][LAG])

def test_a_gpt_shows_nothing_beyond_its_window():
    model = make('gpt', block_size=2 * SIZE)
    curves = measure(partial(last_losses, model), torch.randint(V, (2000,)), bins='24,36,48,72',
                     targets=60)
    for c, point in curves[WORTH].items():
        assert (point['low'] == point['high'] == 0) == (c >= 2 * SIZE)
    assert len(curves[REMOTE]) == 3 and all(point['n'] > 5 and point['value'] == point['low'] == 0
                                            for point in curves[REMOTE].values())

def test_every_history_is_that_of_the_same_segments():
    tokens, seen = torch.arange(5000), []

    def score(rows, n):
        seen.append(rows)
        return torch.full((len(rows), n), rows.size(1)).double()
    p = SimpleNamespace(**{**P, 'histories': '12,45,60'})
    lengths, starts, _ = chosen = history.plan(5000, SIZE, p)
    assert (lengths, len(starts)) == ([12, 48, 60], 200)  # in whole segments
    assert (starts[0], starts[-1]) == (60, 4992) and not (starts % SIZE).any()
    worth = history.measure(score, tokens, SIZE, chosen, [], p)[WORTH]['points']
    assert [(point['x'], point['value']) for point in worth] == [(12, -48), (48, -12)]
    for c, rows in zip((12, 48, 60), seen):
        assert torch.equal(rows, starts[:, None] + torch.arange(-c, SIZE + 1))

def test_the_bootstrap_draws_whole_stretches():
    means, generator = torch.randn(10), torch.Generator().manual_seed(0)
    point = history.bootstrap(means.repeat_interleave(10), 10, 4000, generator)
    assert point['value'] == pytest.approx(means.mean().item()) and point['n'] == 100
    error = means.std(correction=0).item() / 10 ** 0.5
    assert point['high'] - point['low'] == pytest.approx(2 * 1.96 * error, rel=0.15)

def test_words_and_where_they_stood_last():
    letters = SimpleNamespace(spec={'kind': 'char'}, decode=lambda ids: ''.join(map(chr, ids)))
    tokens = torch.tensor(list(b'the cat, the dog2 x_1 the x_1 7 7'))
    assert history.recurrences(tokens, letters) == [(9, 3, 9, 4), (22, 3, 13, 18), (26, 3, 8, 22)]
    pieces = SimpleNamespace(spec={'kind': 'gpt2'}, decode=lambda ids: ['the', ', ', 'cat'][ids[0]])
    assert history.recurrences(torch.tensor([0, 2, 1, 0, 1]), pieces) == [(3, 1, 3, 1)]

SMALL = '--histories=0,4,7,16 --bins=8,200 --targets=20 --resamples=50'.split()

def test_the_script(train, run, tmp_path, data_dir, monkeypatch):
    train(max_iters=3, eval_interval=3)
    out, text = tmp_path / 'out', (data_dir / 'tiny.txt').read_bytes()[-400:]
    small = [*SMALL, f'--data_dir={data_dir}', f'--out_dir={out}', '--seed=5']
    done = run('probe.py', *small)
    assert done.code == 0 and done.out.splitlines()[0].endswith('measured on tiny')
    record, trained = load_record(str(out / 'probe.json')), load_record(str(out / 'record.json'))
    assert [point['x'] for point in record['curves']['context curve']['points']] == [0, 4, 8, 16]
    assert record['metrics']['preserved context']['n'] == 80
    loss = trained['metrics']['loss']['value']
    assert record['metrics']['loss']['value'] == pytest.approx(loss, abs=1e-4)
    assert len(list(out.glob('probe*.png'))) == 3 and f'loss {loss:.4f} +- ' in done.out
    monkeypatch.setattr('lib.records.ROOT', str(tmp_path))
    for bad, words in (('--histories=0,4,4000', 'too few for a history of 4000'),
                       ('--bins=9,x', 'bins must be'), ('--file=nowhere.txt', 'is not there'),
                       ('--histories=3', 'take two numbers'), ('--bins=8', 'take two numbers'),
                       ('--resamples=1000001', 'at most'), ('--targets=0', 'targets must'),
                       ('--keys=0', 'keys must')):
        check(run('probe.py', *small, bad), words)
    assert not (out / 'probe_out_nowhere').exists()
    (out / 'bom.txt').write_bytes(b'\xef\xbb\xbf' + text)
    done = run('probe.py', *small, f"--file={out / 'bom.txt'}")  # read as prepare.py does
    assert done.code == 0 and 'over all of 399 tokens' in done.out, done.err
    assert load_record(out / 'probe.json') == record  # the run's own
    assert run('probe.py', *small, '--record=True').code == 0
    assert (tmp_path / 'results' / 'probe' / 'out.json').exists()
    other = load_record(out / 'probe_out_bom' / 'probe.json')['settings']
    assert (other['data'], other['seed'], other['probe_seed']) == ('bom.txt', 1337, 5)

def test_a_task_without_a_probe_or_without_a_task_is_told(train, run, model_dir,
                                                          tmp_path, monkeypatch):
    for part in ('probe', 'Task'):
        monkeypatch.delattr(f'tasks.text.{part}')
    for done, part in ((run('probe.py', f'--out_dir={model_dir}'), 'probe'),
                       (train(out_dir=tmp_path / 'new'), 'Task')):
        check(done, f'tasks/text.py has no {part}: write one, as tasks/__init__.py says')

def test_a_text_is_where_the_probe_is_told(train, run, data_dir, tmp_path):
    assert train(task='facts', max_iters=0).code == 0
    change(tmp_path / 'out' / 'ckpt.pt', config=lambda config: {**config, 'data_dir': 'nowhere'})
    done = run('probe.py', f"--out_dir={tmp_path / 'out'}", f'--data_dir={data_dir}',
               '--distances=12', '--sequences=4', '--device=cpu')
    assert done.code == 0, done.err

@pytest.mark.parametrize('spoil, problem', [
    (dict(tokenizer=lambda old: {**old, 'chars': 'xyz'}), 'another text or tokenizer'),
    (dict(data=lambda old: {**old, 'sha256': '0' * 64}), 'another text or tokenizer'),
    (dict(data=lambda old: {**old, 'dataset': 3}), 'prepare it again with: python prepare.py 3'),
    (dict(config=lambda old: {**old, 'segment_size': 'x'}), "segment_size='x': expected an int"),
    (dict(data={}), 'does not name its data set'),
    (dict(model=lambda old: {**old, 'transformer.ln_f.weight': 3e38 + torch.zeros(16)}),
     'train anew')])
def test_only_what_was_trained_on_is_scored(run, model_dir, data_dir, spoil, problem):
    change(model_dir / 'ckpt.pt', **spoil)
    check(run('probe.py', *SMALL, f'--out_dir={model_dir}', f'--data_dir={data_dir}'), problem)
