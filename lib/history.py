"""How far back a model uses its text: loss against history, the same tokens under every history."""
import os
import re

import numpy as np
import torch

from configurator import numbers
from lib.console import Progress, require, say
from lib.contract import unit
from lib.records import ROOT, metric
from lib.scoring import last_losses, mean_and_error, token_losses
from prepare import Tokenizer, load_meta, read_text

USEFUL = 0.005  # nats per token that older text must be worth to count as preserved
WORD = r'[^\W\d]\w*'  # where a token is a character; identifiers of a program, too

def probe_text(model, saved, p, device):
    """The loss of a text, its context curve and remote co-occurrence: see tasks/__init__.py."""
    size = unit(model) if unit(model) > 1 else p.segment  # tokens of a target segment
    tokens, found = open_text(saved, p)
    lengths, starts, borders = chosen = plan(len(tokens), size, p)
    far_words = 2 * p.words * sum(borders)
    progress = Progress('loss', len(tokens) + len(starts) * sum(lengths) + far_words)
    losses = token_losses(model, tokens.to(device), progress.at)
    mean, error = mean_and_error(losses)
    require(mean < float('inf'), f'the loss is {mean}: the weights are damaged: train anew')

    def score(rows, n):
        nats = last_losses(model, rows.to(device), n)
        progress.at(progress.done + rows.numel())
        return nats
    curves = measure(score, tokens, size, chosen, found, p)
    progress.close()
    spread = f' +- {error:.4f}' if error else ''
    say(f'loss {mean:.4f}{spread} nats per token, over all of {len(losses):,} tokens')
    for name, curve in curves.items():
        say(f"\n{name}, {curve['y']} by {curve['x']}")
        for point in curve['points']:
            say('{x:>8}{value:>10.4f}  [{low:.4f}, {high:.4f}]'.format(**point))
    kept = {'x': None, 'value': None}
    for point in curves['worth of longer history']['points']:
        kept = point if point['value'] >= USEFUL else kept
    say(f"\npreserved context: {kept['x']}")
    return {'what': 'probe', 'curves': curves, 'notes': [f'segments of {size} tokens'],
            'metrics': {'loss': metric(mean, error, len(losses)),
                        'preserved context': metric(kept['x'], n=len(starts) * size),
                        'worth of longer history': metric(**kept)}}

def open_text(saved, p):
    """The text to score, (N,) int64, and its recurrences."""
    named = p.file or {'dataset', 'sha256'} <= {*(saved.get('data') or ())}
    require(named and saved.get('tokenizer'), 'the checkpoint does not name its data set or its '
            'vocabulary: probe runs of train.py, or gpt2 with --file')
    tokenizer = Tokenizer(saved['tokenizer'])
    if p.file:
        ids = tokenizer.encode(read_text(p.file))
    else:
        folder = os.path.join(ROOT, p.data_dir, str(saved['data']['dataset']))
        meta = load_meta(folder)
        require((meta['sha256'], meta['tokenizer']) == (saved['data']['sha256'], tokenizer.spec),
                f'{folder} has another text or tokenizer than the model: prepare that again')
        ids = np.fromfile(os.path.join(folder, 'val.bin'), dtype=np.uint16)
    tokens = torch.from_numpy(ids.astype(np.int64))
    return tokens, recurrences(tokens, tokenizer)

def plan(N, size, p):
    """Histories in whole segments, the starts of the target segments, evenly spread over a text of
    N tokens, and the borders of the bins."""
    lengths = sorted({-(-c // size) * size for c in numbers('histories', p.histories)})
    require(N > lengths[-1] + 2 * size, f'the text has {N} tokens, too few for a history of '
                                        f'{lengths[-1]}: shorten histories')
    starts = torch.arange(lengths[-1], N - size, size)
    some = torch.linspace(0, len(starts) - 1, min(p.targets, len(starts))).long()
    return lengths, starts[some], numbers('bins', p.bins)

def measure(score, tokens, size, chosen, found, p):
    """Curves of a record. score: a model's last_losses, chosen: plan's, found: recurrences'."""
    lengths, starts, borders = chosen
    losses = {c: score(tokens[starts[:, None] + torch.arange(-c, size + 1)], size)
              for c in lengths}  # (M, size) each: of the same tokens
    worth = {c: losses[c] - losses[lengths[-1]] for c in lengths[:-1]}
    words = co_occurrence(score, tokens, found, borders, size, p.words)
    generator = torch.Generator().manual_seed(p.seed)

    def curve(x, y, values):
        points = [{'x': key, **bootstrap(nats, p.stretches, p.resamples, generator)}
                  for key, nats in values.items() if len(nats) > 1]
        return {'x': x, 'y': y, 'points': points}
    history, back = 'tokens of history before the segment', 'tokens back to the last occurrence'
    return {'context curve': curve(history, 'nats per token', losses),
            'worth of longer history': curve(history, 'nats per token', worth),
            'remote co-occurrence': curve(back, 'nats per word, with it minus without', words)}

def bootstrap(values, stretches, resamples, generator):
    """Mean of values (M,) or (M, n) in the order of the text, and its 95 % interval, from
    contiguous stretches drawn with replacement."""
    rows = values.double().view(len(values), -1).mean(dim=1)
    means = torch.stack([part.mean() for part in rows.tensor_split(min(stretches, len(rows)))])
    picks = torch.randint(len(means), (resamples, len(means)), generator=generator)
    low, high = np.quantile(means[picks].mean(dim=1), [0.025, 0.975]).tolist()
    return {'value': rows.mean().item(), 'low': low, 'high': high, 'n': values.numel()}

def recurrences(tokens, tokenizer):
    """(place, length, distance) of each word that was there before, `distance` tokens back. A word
    is a token that holds a letter or, where tokens are characters, a WORD."""
    if tokenizer.spec['kind'] == 'char':
        text = tokenizer.decode(tokens.tolist())
        words = [(match.start(), match.group()) for match in re.finditer(WORD, text)]
    else:
        lettered = {i for i in set(tokens.tolist()) if any(map(str.isalpha, tokenizer.decode([i])))}
        words = [(place, (i,)) for place, i in enumerate(tokens.tolist()) if i in lettered]
    last, found = {}, []
    for place, word in words:
        if word in last:
            found.append((place, len(word), place - last[word]))
        last[word] = place
    return found

def co_occurrence(score, tokens, found, borders, size, count):
    """{low: nats (K,)} of words whose last occurrence is low <= d < high tokens back, at most
    `count`: the loss with a history from just before that occurrence on, minus the loss with one
    that begins after it, both in whole segments."""
    place, n, d = torch.tensor(found, dtype=torch.int64).view(-1, 3).T
    there, absent = ((place - d - 1) // size).clamp(min=0), (place - d + n - 1) // size + 1
    fits = (n <= size) & (absent * size < place) & (place + 2 * size < len(tokens))
    bins = {}
    for low, high in zip(borders, borders[1:]):
        k = (fits & (low <= d) & (d < high)).nonzero()[:, 0]
        k = k[::max(1, -(-len(k) // count))]
        known, unknown = (word_losses(score, tokens, place[k], n[k], first[k] * size, size)
                          for first in (there, absent))
        bins[low] = known - unknown
    return bins

def word_losses(score, tokens, place, n, start, size):
    """The loss of words of n (K,) tokens at place (K,), given the text from start (K,) on: (K,)."""
    segment, losses = (place - 1) // size * size, torch.zeros(len(place), dtype=torch.float64)
    for length in (segment - start).unique().tolist():  # words with equally much history
        k = (segment - start == length).nonzero()[:, 0]
        rows = tokens[start[k, None] + torch.arange(length + 2 * size + 1)]
        at = segment[k, None] + torch.arange(1, 2 * size + 1) - place[k, None]
        losses[k] = (score(rows, 2 * size) * ((at >= 0) & (at < n[k, None]))).sum(dim=1)
    return losses
