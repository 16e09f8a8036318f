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
from prepare import Tokenizer, read_text

USEFUL = 0.005  # nats per token that older text must be worth to count as preserved
WORD = r'[^\W\d]\w*'  # where a token is a character; identifiers of a program, too

def probe_text(model, saved, p, device):
    """The loss of a text, its context curve, co-occurrence and copying: see tasks/__init__.py."""
    size = unit(model) if unit(model) > 1 else p.segment  # tokens of a target segment
    tokens, found = open_text(saved, p)
    lengths, starts, borders = chosen = plan(len(tokens), size, p)
    far_words = 3 * p.words * sum(borders)
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
    points = curves['worth of longer history']['points']
    kept, low, high = found = [
        max((point['x'] for point in points if point[key] >= USEFUL), default=None)
        for key in ('value', 'low', 'high')]
    say('\npreserved context: {} ({} to {})'.format(*('none' if x is None else x for x in found)))
    return {'what': 'probe', 'curves': curves, 'notes': [f'segments of {size} tokens'],
            'metrics': {'loss': metric(mean, error, len(losses)),
                        'preserved context': metric(kept, n=len(starts) * size, low=low,
                                                    high=high)}}

def open_text(saved, p):
    """The text to score, (N,) int64, and its recurrences."""
    named = p.file or {'dataset', 'sha256'} <= saved.get('data', {}).keys()
    require(named and saved.get('tokenizer'), 'the checkpoint does not name its data set or its '
            'vocabulary: probe runs of train.py, or gpt2 with --file')
    tokenizer = Tokenizer(saved['tokenizer'])
    if p.file:
        ids = tokenizer.encode(read_text(p.file))
    else:
        path = os.path.join(ROOT, p.data_dir, str(saved['data']['dataset']), 'val.bin')
        ids = np.fromfile(path, dtype=np.uint16)
    tokens = torch.from_numpy(ids.astype(np.int64))
    return tokens, recurrences(tokens, tokenizer)

def plan(N, size, p):
    """Histories in whole segments, the starts of the target segments, evenly spread over a text of
    N tokens, and the borders of the bins."""
    lengths = sorted({-(-c // size) * size for c in numbers('histories', p.histories)})
    require(N > lengths[-1] + 2 * size, f'the text has {N} tokens, too few for a history of '
                                        f'{lengths[-1]}: shorten histories')
    starts, borders = torch.arange(lengths[-1], N - size, size), numbers('bins', p.bins)
    require(len(lengths) > 1 and len(borders) > 1, 'histories and bins take two numbers or more, '
            f'in segments of {size} tokens: --histories=0,{size} --bins=24,48')
    some = torch.linspace(0, len(starts) - 1, min(p.targets, len(starts))).long()
    return lengths, starts[some], borders

def measure(score, tokens, size, chosen, found, p):
    """Curves of a record. score: a model's last_losses, chosen: plan's, found: recurrences'."""
    lengths, starts, borders = chosen
    losses = {c: score(tokens[starts[:, None] + torch.arange(-c, size + 1)], size)
              for c in lengths}  # (M, size) each: of the same tokens
    worth = {c: losses[c] - losses[lengths[-1]] for c in lengths[:-1]}
    words, copies = words_by_distance(score, tokens, found, borders, size, p.words)
    generator = torch.Generator().manual_seed(p.seed)

    def curve(x, y, values):
        points = [{'x': key, **bootstrap(nats, p.stretches, p.resamples, generator)}
                  for key, nats in values.items() if len(nats) > 1]
        return {'x': x, 'y': y, 'points': points}
    history, back = 'tokens of history before the segment', 'tokens back to the last occurrence'
    return {'context curve': curve(history, 'nats per token', losses),
            'worth of longer history': curve(history, 'nats per token', worth),
            'remote co-occurrence': curve(back, 'nats per word, with it minus without', words),
            'copying': curve(back, 'nats of a word but its first character, with it minus with '
                             'another word in its place', copies)}

def bootstrap(values, stretches, resamples, generator):
    """Mean of values (M,) or (M, n) in the order of the text, and its 95 % interval, from
    contiguous stretches drawn with replacement."""
    rows = values.double().view(len(values), -1).mean(dim=1)
    means = torch.stack([part.mean() for part in rows.tensor_split(min(stretches, len(rows)))])
    picks = torch.randint(len(means), (resamples, len(means)), generator=generator)
    low, high = np.quantile(means[picks].mean(dim=1), [0.025, 0.975]).tolist()
    return {'value': rows.mean().item(), 'low': low, 'high': high, 'n': values.numel()}

def recurrences(tokens, tokenizer):
    """(place, length, distance, other) of each word that was there before, `distance` tokens back;
    other is the place of the word of its length that was there last, or -1. A word is a token that
    holds a letter or, where tokens are characters, a WORD."""
    if tokenizer.spec['kind'] == 'char':
        text = tokenizer.decode(tokens.tolist())
        words = [(match.start(), match.group()) for match in re.finditer(WORD, text)]
    else:
        lettered = {i for i in set(tokens.tolist()) if any(map(str.isalpha, tokenizer.decode([i])))}
        words = [(place, (i,)) for place, i in enumerate(tokens.tolist()) if i in lettered]
    seen, found = {}, []  # seen: {length: {word: place}}, the last one last
    for place, word in words:
        alike = seen.setdefault(len(word), {})
        if word in alike:
            other = next((alike[some] for some in reversed(alike) if some != word), -1)
            found.append((place, len(word), place - alike.pop(word), other))
        alike[word] = place
    return found

def words_by_distance(score, tokens, found, borders, size, count):
    """Of words whose last occurrence is low <= d < high tokens back, at most `count`, {low: nats
    (K,)} twice. Remote co-occurrence: the loss with a history from just before that occurrence on,
    minus the loss with one that begins after it, both in whole segments. Copying: the loss of all
    but the first token, minus that with another word of as many tokens written over it."""
    place, n, d, other = torch.tensor(found, dtype=torch.int64).view(-1, 4).T
    there, absent = ((place - d - 1) // size).clamp(min=0), (place - d + n - 1) // size + 1
    fits = (n <= size) & (absent * size < place) & (place + 2 * size < len(tokens))
    bins, copies = {}, {}
    for low, high in zip(borders, borders[1:]):
        k = (fits & (low <= d) & (d < high)).nonzero()[:, 0]
        k = k[::max(1, -(-len(k) // count))]
        known, unknown = (word_losses(score, tokens, place[k], n[k], first[k] * size, size)
                          for first in (there, absent))
        bins[low] = (known - unknown).sum(dim=1)
        k, known = (some[(n[k] > 1) & (other[k] >= 0)] for some in (k, known))
        written = word_losses(score, tokens, place[k], n[k], there[k] * size, size,
                              (place - d)[k], other[k])
        copies[low] = (known - written)[:, 1:].sum(dim=1)
    return bins, copies

def word_losses(score, tokens, place, n, start, size, over=None, other=None):
    """The losses of words of n (K,) tokens at place (K,), given the text from start (K,) on, (K,
    size), 0 beyond n; the word at over (K,) being overwritten by the one at other (K,)."""
    segment, losses = (place - 1) // size * size, torch.zeros(len(place), size).double()
    for length in (segment - start).unique().tolist():  # words with equally much history
        k = (segment - start == length).nonzero()[:, 0]
        at = start[k, None] + torch.arange(length + 2 * size + 1)
        if over is not None:
            inside = at - over[k, None]
            own = (inside >= 0) & (inside < n[k, None])
            at = torch.where(own, other[k, None] + inside, at)
        nats = score(tokens[at], 2 * size)  # of the targets from segment + 1 on
        first = (place - segment - 1)[k, None] + torch.arange(size)
        losses[k] = nats.gather(1, first) * (torch.arange(size) < n[k, None])
    return losses
