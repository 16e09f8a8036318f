"""The probe's arithmetic, on sources whose answer is known, and on models that cannot see what they are probed for."""
import json
import math

import pytest
import torch
from torch.nn import functional as F

import probe
from evaluate import per_token
from model import GPT, FoldConfig, FoldGPT, GPTConfig

l, VOCAB, LAG = 6, 7, 33
SETTINGS = dict(histories='0,6,12,18,24,30,36,42,48,72', swaps='0,6,12,18,24,30,36,42,48', bins='12,24,32,34,48', targets=200, words=300, stretches=20,
                draws=400, seed=1)


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


def make_gpt(window):
    return shake(GPT(GPTConfig(block_size=window, vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=8)))


def make_fold():
    return shake(FoldGPT(FoldConfig(block_size=4 * l, segment_size=l, vocab_size=VOCAB, n_head=2, n_embd=8, n_local=1, n_global=2)))


def repeating(N):
    """Every symbol stands again exactly LAG places later; at most LAG different ones, so none stands nearer."""
    return torch.randperm(LAG).repeat(N // LAG + 1)[:N]


def knows_the_lag(rows, n):
    """The best predictor of `repeating`: certain where the symbol LAG places back is in the row, else it knows nothing."""
    places = torch.arange(rows.size(1) - n, rows.size(1))  # of the targets
    return (places < LAG).double().mul(math.log(LAG)).expand(len(rows), n)


def test_the_curve_drops_at_the_lag_and_nowhere_else():
    tokens = repeating(3000)
    result = probe.probe(knows_the_lag, tokens, l, [(i, 1) for i in range(3000)], SETTINGS)
    for row in result['context_curve']:  # the j-th target of a segment has c + j + 1 tokens before it
        blind = sum(row['history'] + j + 1 < LAG for j in range(l))
        assert row['loss']['mean'] == pytest.approx(math.log(LAG) * blind / l)
    assert result['preserved_context'] == 30  # the first targets of a segment still gain from more than 30
    bins = {(row['from'], row['to']): row for row in result['co_occurrence']}
    assert bins[32, 34]['words'] >= 100 and bins[32, 34]['difference']['mean'] == pytest.approx(-math.log(LAG))
    assert [bins[b]['words'] for b in ((12, 24), (24, 32), (34, 48))] == [0, 0, 0]


def test_words_at_other_distances_gain_nothing_from_a_lag():
    tokens = torch.randint(VOCAB, (3000,))
    found = [(place, 1, d) for place in range(200, 2900, 7) for d in (14, 20, 26)]
    for (_, there, absent) in probe.co_occurrence(knows_the_lag, tokens, found, [12, 18, 24, 30], l, 100).values():
        assert len(there) > 50 and torch.equal(there, absent)
    [(_, there, absent)] = probe.co_occurrence(knows_the_lag, tokens, [(500, 2, LAG)], [33, 34], l, 100).values()
    assert there == 0 and absent == pytest.approx(2 * math.log(LAG))  # both tokens of the word


@pytest.mark.parametrize('window', [l, 2 * l])
def test_a_gpt_shows_nothing_beyond_its_window(window):
    tokens, model = torch.randint(VOCAB, (2000,)), make_gpt(window)
    result = probe.probe(lambda rows, n: probe.last_losses(model, rows, n), tokens, l, [(i, 1) for i in range(0, 2000, 6)],
                         {**SETTINGS, 'bins': '24,36,48,72'})
    for row in result['context_curve'][:-1]:
        if row['history'] >= window:
            assert row['gain'] == row['swapped'] == {'mean': 0, 'low': 0, 'high': 0}
        else:
            assert row['gain']['mean'] != 0 and row['swapped']['mean'] != 0
    for row in result['co_occurrence']:
        assert row['words'] > 5 and row['difference'] == {'mean': 0, 'low': 0, 'high': 0}


def test_a_fold_is_not_blind_there():
    tokens, model = torch.randint(VOCAB, (2000,)), make_fold()
    result = probe.probe(lambda rows, n: probe.last_losses(model, rows, n), tokens, l, [], SETTINGS)
    assert all(row['gain']['mean'] != 0 and row['swapped']['mean'] != 0 for row in result['context_curve'][:-1])


@pytest.mark.parametrize('T', [5, 8, 11, 12, 15, 20, 40])
@pytest.mark.parametrize('n', [1, 5])
def test_losses_are_those_of_each_target_with_all_that_the_window_holds(T, n):
    rows, model = torch.randint(VOCAB, (3, T + 1)), make_gpt(window=11)
    expected = torch.stack([per_token(model(rows[:, max(0, t - 11):t])[0], rows[:, t:t + 1])[:, 0]
                            for t in range(T - n + 1, T + 1)], dim=1)
    torch.testing.assert_close(probe.last_losses(model, rows, n), expected.double(), rtol=0, atol=1e-6)
    fold = make_fold()
    logits = fold(rows[:, :-1], all_logits=True)[0][:, -n:]
    expected = F.cross_entropy(logits.transpose(1, 2), rows[:, -n:], reduction='none')
    torch.testing.assert_close(probe.last_losses(fold, rows, n), expected, rtol=0, atol=1e-6)


def test_the_swap_keeps_what_is_near_and_takes_the_rest_from_elsewhere():
    tokens, seen = torch.arange(5000), {}

    def score(rows, n):
        seen[len(seen)] = rows
        return torch.zeros(len(rows), n)
    starts = torch.arange(10, 90) * 5 * l
    probe.swap_curve(score, tokens, starts, [12, 48], 60, l, torch.Generator().manual_seed(0))
    for i, c in enumerate((12, 48)):
        rows = seen[i]
        assert rows.shape == (80, 60 + l + 1)
        assert torch.equal(rows[:, 60 - c:], starts[:, None] + torch.arange(-c, l + 1))
        far = rows[:, :60 - c]
        assert ((far - starts[:, None]).abs() > 60).all() and torch.equal(far[:, 1:], far[:, :-1] + 1)


def test_the_bootstrap_draws_whole_stretches():
    stretch = torch.arange(100) // 10
    spread = torch.randn(10).repeat_interleave(10)  # equal within a stretch
    mean, low, high = probe.bootstrap(spread, stretch, 4000, torch.Generator().manual_seed(0))
    assert mean == pytest.approx(spread.mean().item()) and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * spread[::10].std(correction=0).item() / 10 ** 0.5, rel=0.15)


def test_words_and_where_they_stood_last():
    class Letters:
        vocab_size = 128

        def decode(self, ids):
            return ''.join(map(chr, ids))
    tokens = torch.tensor(list(b'the cat, the dog2 x_1 the'))
    words = probe.find_words(tokens, Letters(), 'word')
    assert words == [(0, 3), (4, 3), (9, 3), (13, 3), (18, 1), (22, 3)]
    assert probe.find_words(tokens, Letters(), 'identifier')[3:5] == [(13, 4), (18, 3)]
    assert probe.recurrences(tokens, words) == [(9, 3, 9), (22, 3, 13)]


def test_the_script_writes_a_table_a_file_and_a_picture(train, run, tmp_path, data_dir):
    train(max_iters=3)
    small = ['--histories=0,4,8,16', '--swaps=4,8', '--bins=8,16,32', '--targets=20', '--draws=50', f'--data_dir={data_dir}']
    done = run('probe.py', f"--out_dir={tmp_path / 'out'}", *small)
    assert done.code == 0 and 'preserved context' in done.out and 'history 16' in done.err
    result = json.load(open(tmp_path / 'out' / 'probe.json'))
    assert [row['history'] for row in result['context_curve']] == [0, 4, 8, 16] and result['tokens_scored'] == 80
    assert (tmp_path / 'out' / 'probe.png').stat().st_size > 1000
    for bad, words in ((['--histories=0,6'], 'multiples of 4'), (['--histories=0,4,4000'], 'too few for a history'),
                       (['--histories=0,4,100'], 'too few to swap a history of 100'), (['--bins=9,x'], 'bins must be'),
                       (['--file=nowhere.txt'], 'cannot read'), (['--units=words'], "not 'words'"), (['--targets=0'], 'targets must'),
                       (['--stretches=1'], 'stretches must be at least 2'), (['--draws=1'], 'draws must be at least 20')):
        refused = run('probe.py', f"--out_dir={tmp_path / 'out'}", *small, *bad)
        assert refused.code == 1 and words in refused.err and len(refused.err.strip().splitlines()) == 1, (bad, refused.out)
    text = (data_dir / 'tiny.txt').read_text()[-400:]
    (tmp_path / 'bom.txt').write_bytes(('\ufeff' + text).encode())  # read as prepare.py does
    done = run('probe.py', f"--out_dir={tmp_path / 'out'}", *small, f"--file={tmp_path / 'bom.txt'}")
    assert done.code == 0, done.err


@pytest.mark.parametrize('script', ['evaluate.py', 'probe.py'])
@pytest.mark.parametrize('change, problem', [
    (lambda saved: saved['tokenizer'].update(chars=saved['tokenizer']['chars'].replace('.', '/')), 'another text or tokenizer'),
    (lambda saved: saved['data'].update(sha256='0' * 64), 'another text or tokenizer'),
    (lambda saved: saved.pop('data'), 'does not name its data set'),
    (lambda saved: saved['model']['transformer.ln_f.weight'].fill_(math.nan), 'give')])
def test_what_is_scored_is_what_was_trained_on_and_gives_numbers(train, run, tmp_path, data_dir, script, change, problem):
    train(max_iters=1)
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / 'out' / 'ckpt.pt')
    small = ['--histories=0,4', '--swaps=', '--targets=5', '--draws=20'] if script == 'probe.py' else []
    refused = run(script, f"--out_dir={tmp_path / 'out'}", f'--data_dir={data_dir}', '--device=cpu', *small)
    last = refused.err.strip().splitlines()[-1]
    assert refused.code == 1 and last.startswith('error: ') and problem in last and 'Traceback' not in refused.err
