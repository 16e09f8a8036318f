"""Streams: rows that walk through the corpus, their carry passing from update to update."""
import pytest
import torch

from test_train import records
from training import Walk


def test_a_stream_reads_the_corpus_in_order_and_begins_anew_at_its_end(train):
    names = train(max_iters=0, stream=True, batch_size=2, gradient_accumulation_steps=2).globals
    corpus, n = torch.from_numpy(names['train_data'].copy()).long(), len(names['train_data'])
    at, wrapped = [r * (n - 16) // 4 for r in range(4)], []
    for it in range(2 * n // 16):
        for micro in range(2):
            x, y, rows, fresh = names['get_batch'](micro)
            assert rows.tolist() == [2 * micro, 2 * micro + 1]
            for b, r in enumerate(rows.tolist()):
                if at[r] + 17 > n:
                    at[r] = 0
                    wrapped.append(r)
                assert fresh[b] == (it == 0 or at[r] == 0)
                assert torch.equal(x[b].long(), corpus[at[r]:at[r] + 16])
                assert torch.equal(y[b].long(), corpus[at[r] + 1:at[r] + 17])
                at[r] += 16
    assert wrapped[:4] == [3, 2, 1, 0]  # the row that starts furthest on ends first


def long_forward(model, tokens, T):
    """Loss of each sequence of T, and the last carry, of one forward over all tokens."""
    logits, _, carry = model(tokens[None, :-1], all_logits=True)
    losses = torch.nn.functional.cross_entropy(logits[0], tokens[1:], reduction='none')
    return losses.view(-1, T).mean(dim=1), carry[0]


@pytest.mark.parametrize('how', [{}, dict(bptt_segments=9, recompute=True), dict(gradient_accumulation_steps=2, batch_size=2)])
def test_a_streams_carry_is_that_of_one_long_forward(train, tmp_path, how):
    """At a learning rate of 0, over so many updates that one of the four rows begins anew."""
    steps, T, begun = 15, 160, 0
    still = dict(stream=True, block_size=T, learning_rate=0.0, min_lr=0.0, dropout=0.0, max_iters=steps, eval_interval=steps)
    done = train(**still, **how)
    saved = torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['stream']
    model, corpus = done.globals['model'].eval(), torch.from_numpy(done.globals['train_data'].copy()).long()
    expected = torch.zeros(steps)
    with torch.no_grad():
        for r in range(4):
            first, it = r * (len(corpus) - T) // 4, 0
            while it < steps:
                n = min(steps - it, (len(corpus) - 1 - first) // T)
                losses, carry = long_forward(model, corpus[first:first + n * T + 1], T)
                expected[it:it + n] += losses / 4
                end, first, it, begun = first + n * T, 0, it + n, begun + 1
            torch.testing.assert_close(saved['carry'][r], carry, rtol=0, atol=1e-4)
            assert saved['at'][r] == end
    assert begun == 4 + 1
    assert [loss for _, loss in records(tmp_path / 'out', 'loss')] == pytest.approx(expected.tolist(), abs=1e-5)


def test_accumulated_streams_equal_one_large_batch_of_streams(train, tmp_path):
    train(out_dir=tmp_path / 'a', stream=True, batch_size=8, dropout=0.0, max_iters=30)
    train(out_dir=tmp_path / 'b', stream=True, batch_size=2, gradient_accumulation_steps=4, dropout=0.0, max_iters=30)
    a, b = (dict(records(tmp_path / name, 'loss')) for name in 'ab')
    assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-4)


def test_rows_without_a_carry_are_parted_from_the_others():
    walk = Walk(4, 5, 100)
    rows, carry = torch.arange(4), torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    starts, fresh = walk.advance(rows)
    assert fresh.all() and walk.groups(rows, fresh) == [(slice(None), None)]
    walk.keep(rows, carry)
    (g, kept), (new, none) = walk.groups(rows, torch.tensor([False, True, False, False]))
    assert g.tolist() == [0, 2, 3] and new.tolist() == [1] and none is None
    assert torch.equal(kept, carry[[0, 2, 3]])


def test_a_gpt_reads_streams_too(train, tmp_path):
    done = train('gpt', stream=True, max_iters=40)
    assert done.code == 0 and torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['stream']['carry'] is None
