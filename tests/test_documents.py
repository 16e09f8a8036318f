"""At a border, in the middle of a segment too, what was before is forgotten."""
import pytest
import torch
from small import SOME_KEYS, V, all_logits, assert_equal, gradients, make, tokens
from test_train import lines
from torch.nn import functional as F

from lib.gradients import backpropagate
from lib.scoring import documents, last_losses, token_losses
from lib.streaming import empty_state, read_
from prepare import prepare
from tasks.text import split_documents

B = V - 1  # the border
EVERY = pytest.mark.parametrize('kind, sizes', [
    ('gpt', {'block_size': 60}), ('gpt', {'window': 3}), ('lstm', {}), ('deltanet', {}),
    ('queued_fold', {'queue': 2}), ('queued_fold', {'queue': 1, 'past': 'local'}),
    *(('fold', keys) for keys in SOME_KEYS)])

def text(rows, T, borders):
    """Random tokens (rows, T) without a border but at the places (row, t)."""
    idx = tokens(rows, T) % B
    for row, t in borders:
        idx[row, t] = B
    return idx

@EVERY
@pytest.mark.parametrize('cached', [True, False])
def test_a_state_is_read_as_if_the_document_were_alone(kind, sizes, cached):
    """In any pieces, each row with borders of its own."""
    model = make(kind, border=B, **sizes)
    idx = text(3, 24, [(0, 0), (0, 8), (1, 8), (1, 9), (2, 22)])
    expected = [torch.cat([all_logits(model, document[None, :-1])[0] for document in documents(
        torch.cat((row, row.new_zeros(1))), B)]) for row in idx]
    for pieces in ([1] * 24, [7, 10, 7], [24]):
        state, at = empty_state(model, 3, cached and hasattr(model, 'extend')), 0
        for part in idx.split(pieces, dim=1):
            at += part.size(1)
            assert_equal(read_(model, part, state), torch.stack(expected)[:, at - 1])
    assert state.read.tolist() == [16, 15, 2]

@EVERY
def test_each_document_is_scored_and_trained_on_alone(kind, sizes):
    model = make(kind, border=B, **sizes)
    idx, expected, total = text(2, 25, [(0, 5), (0, 24), (1, 12), (1, 13)]), [], 0.0
    for row in idx:
        pieces = documents(row, B)
        assert_equal(torch.cat([piece[:-1] for piece in pieces]), row[:-1])
        for piece in pieces:
            loss = model(piece[None, :-1], piece[None, 1:])[1] * (len(piece) - 1) / 48
            loss.backward()
            total += loss.detach()
            logits = all_logits(model, piece[None, :-1])[0].detach()
            expected.append(F.cross_entropy(logits, piece[1:], reduction='none'))
    scored = torch.cat([token_losses(model, row) for row in idx])
    torch.testing.assert_close(scored.double(), torch.cat(expected), rtol=0, atol=1e-5)
    last = last_losses(model, idx, 10).flatten()
    of_rows = torch.cat(expected).view(2, -1)[:, -10:].flatten()
    torch.testing.assert_close(last, of_rows, rtol=0, atol=1e-5)
    alone = gradients(model)
    x, y = split_documents(idx[:, :-1].to(torch.uint16), idx[:, 1:].to(torch.uint16), B)
    assert_equal(backpropagate(model, x, y)[0], total)
    assert_equal(gradients(model), alone)

def test_training_on_documents(run, train, tmp_path):
    (tmp_path / 'a.txt').write_text('|'.join(f'{i} and {i * i}\n' for i in range(300)))
    prepare('docs', file=str(tmp_path / 'a.txt'), data_dir=str(tmp_path))
    own = dict(data_dir=tmp_path, dataset='docs', document='|')
    done = train(**own)
    assert done.code == 0, done.err
    log = lines(tmp_path / 'out')
    assert log[-1]['val_loss'] < log[1]['loss']
    model, job = (done.globals[name] for name in ('model', 'job'))
    assert model.config.border == job.border >= 0
    x, _ = job.random_sequences()
    assert (x[:, 0] == job.border).any() and not (x[:, 1:] == job.border).any()
    assert run('sample.py', f"--out_dir={tmp_path / 'out'}", '--start=1 and|7').code == 0
    for wrong, words in ((dict(document='||'), 'be one token'), (dict(stream=True), 'in order')):
        assert words in train(**{**own, **wrong, 'overwrite': True}).err
