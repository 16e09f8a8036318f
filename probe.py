"""
How far back does a model use its text? Loss against history, the same targets under every length of it.

    python probe.py --out_dir=out/fold_shakespeare
    python probe.py --out_dir=out/gpt_shakespeare --results_file=results/probe_gpt.json
    python probe.py --out_dir=out/mine --file=book.txt --targets=500

Four measures. The context curve: the mean loss of the tokens of a segment when everything before the c tokens that
stand before the segment is taken away. The preserved context: the largest c at which longer history still lowers the
loss. The swap: history of full length, but what is older than c tokens comes from elsewhere in the text. Remote
co-occurrence: the loss of a word with and without the one place, d tokens back, where it stood last.
"""
import os
import re
import sys
import time

from configurator import at_least, configure, numbers

out_dir = ''        # folder of the run; '' takes the newest under out/
file = ''           # text to score; '' is the validation split that belongs to the run
data_dir = 'data'   # folder of the prepared data sets
histories = '0,12,24,36,48,60,72,96,120,144,168,192,240,288'  # tokens before a segment; the last is the reference
swaps = '12,24,48,96,144'  # of these, where the older text is also swapped for another; '' swaps none
segment = 12        # tokens of a target's segment, for a GPT; a fold has its own
targets = 2000      # segments that are scored under every history, evenly spread over the text
words = 400         # words scored in every bin of remote co-occurrence
bins = '12,24,48,96,150,288'  # borders of these bins, tokens back to where the word stood last
units = 'auto'      # 'word' (run of letters), 'identifier', 'token'; 'auto' goes by the data set and its tokenizer
stretches = 100     # contiguous parts of the text that the bootstrap draws from
draws = 2000        # bootstrap samples
seed = 1337         # of the bootstrap and of the swapped texts
device = 'auto'     # 'auto' takes cuda, mps or cpu, the first that is there
threads = 0         # CPU threads; 0 leaves it to torch
results_file = ''   # JSON file; '' is probe.json in the run's folder. The picture stands beside it
beside = ''         # JSON files of other probes, separated by commas, drawn into the same picture
if __name__ == '__main__':
    config = configure(globals())

import numpy as np  # noqa: E402
import torch  # noqa: E402

import checkpoint as ckpt  # noqa: E402
from evaluate import per_token, tokens_per_call, validation_ids  # noqa: E402
from model import FoldGPT  # noqa: E402
from prepare import Tokenizer  # noqa: E402


@torch.no_grad()
def last_losses(model, rows, n):
    """The loss of the last n tokens of each row, given nothing but what stands before them in the row.

    Args:
        model: GPT, which sees as much of its window as there is before each token, or FoldGPT, for which the rows
            start with a segment and n is at most what the last segments hold.
        rows (M, T + 1) int64: T tokens that are read, each but the first also a target.
    Returns:
        (M, n) float64 nats on the CPU.
    """
    T, W, losses = rows.size(1) - 1, model.config.block_size, []
    slides = not isinstance(model, FoldGPT) and T > W
    size = max(1, tokens_per_call(model) // (n * W if slides else T))  # rows of a call
    for some in rows.split(size):
        x, y = some[:, :-1], some[:, -n:]
        if isinstance(model, FoldGPT):
            out = model.fold(model.local(x), None)[0]
        elif not slides:
            out = model.hidden(x)
        else:  # first what lies in the window at the start of the row, then a window of its own for every place
            first = max(0, W - (T - n))
            own = x[:, T - (n - first) - (W - 1):].unfold(1, W, 1)  # (M, n - first, W)
            out = model.hidden(own.reshape(-1, W))[:, -1].view(len(x), n - first, -1)
            if first:
                out = torch.cat((model.hidden(x[:, :W])[:, -first:], out), dim=1)
        losses.append(per_token(model.head(out[:, -n:], all_logits=True)[0], y))
    return torch.cat(losses).double()


def context_curve(score, tokens, starts, lengths, l, progress=None):
    """The loss of the l tokens from each start on, under every history.

    Args:
        score(rows, n): as last_losses of a model.
        tokens (N,) int64; starts (M,): first places of the target segments, each with the longest history before it.
        lengths: tokens of history before the segment. The token at the start itself is read, the l after it are scored.
    Returns:
        (len(lengths), M, l) nats.
    """
    curve = []
    for c in lengths:
        curve.append(score(gather(tokens, starts - c, c + l + 1), l))
        if progress:
            progress(f"history {c}: {curve[-1].mean():.4f}")
    return torch.stack(curve)


def swap_curve(score, tokens, starts, lengths, longest, l, draw, progress=None):
    """As context_curve with the longest history for all, but what is older than c tokens taken from another place."""
    curve = []
    elsewhere = torch.randint(len(tokens) - longest, (len(starts),), generator=draw)
    near = (elsewhere - starts).abs() < 2 * longest  # not from its own surroundings
    elsewhere = torch.where(near, (elsewhere + len(tokens) // 2) % (len(tokens) - longest), elsewhere)
    for c in lengths:
        far = gather(tokens, elsewhere, longest - c)
        curve.append(score(torch.cat((far, gather(tokens, starts - c, c + l + 1)), dim=1), l))
        if progress:
            progress(f"swapped beyond {c}: {curve[-1].mean():.4f}")
    return curve


def gather(tokens, starts, n):
    """Rows of n tokens from each start on: (M, n)."""
    return tokens[starts[:, None] + torch.arange(n, device=tokens.device)]


def bootstrap(values, stretch, draws, generator):
    """Mean of values (M,) and the 95 % interval of it, drawing whole stretches (M,) of the text with replacement."""
    count = int(stretch.max()) + 1
    sums, sizes = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    sums.index_add_(0, stretch, values.double())
    sizes.index_add_(0, stretch, torch.ones_like(values, dtype=torch.float64))
    picks = torch.randint(count, (draws, count), generator=generator)
    means = sums[picks].sum(dim=1) / sizes[picks].sum(dim=1).clamp(min=1e-9)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.double().mean().item(), low, high


def find_words(tokens, tokenizer, unit):
    """(first place, number of tokens) of every word of a text: single tokens that hold a letter, or, where a token is a
    character, runs of characters."""
    if unit == 'token':
        has_letter = [any(c.isalpha() for c in tokenizer.decode([i])) for i in range(tokenizer.vocab_size)]
        return [(i, 1) for i, t in enumerate(tokens.tolist()) if has_letter[t]]
    text = tokenizer.decode(tokens.tolist())
    pattern = r'[^\W\d_]+' if unit == 'word' else r'[A-Za-z_]\w*'
    return [(m.start(), len(m.group())) for m in re.finditer(pattern, text)]


def recurrences(tokens, places):
    """(place, length, distance) of each word that stood there before, distance back to where it began the last time."""
    last, found, values = {}, [], tokens.tolist()
    for place, n in places:
        word = tuple(values[place:place + n])
        if word in last:
            found.append((place, n, place - last[word]))
        last[word] = place
    return found


def co_occurrence(score, tokens, found, borders, l, count, progress=None):
    """For words whose last occurrence lies d tokens back: nats of the word with it and without it.

    With it, history begins with the segment of the token before the word's last occurrence; without it, with the
    segment after the one in which that ended. Words that stood in the very segment before them have no such pair.
    Returns {(low, high): (places (K,), with (K,), without (K,))} for the bins low <= d < high, at most count words each.
    """
    result = {}
    for low, high in zip(borders, borders[1:]):
        pairs = []  # place, length, first segments with and without, segment in which the word is predicted
        for place, n, d in found:
            begins = max(0, (place - d - 1) // l), (place - d + n - 1) // l + 1
            target = (place - 1) // l  # its first token; the others there or in the next one
            if low <= d < high and n <= l and begins[1] <= target and place + 2 * l < len(tokens):
                pairs.append((place, n, begins, target))
        pairs = pairs[::max(1, -(-len(pairs) // count))]
        losses = [word_losses(score, tokens, [(p, n, begins[i], target) for p, n, begins, target in pairs], l) for i in (0, 1)]
        result[low, high] = torch.tensor([p for p, *_ in pairs]), *losses
        if progress:
            progress(f"{len(pairs)} words {low} to {high} tokens back")
    return result


def word_losses(score, tokens, jobs, l):
    """Nats of words (place, length, first segment of their history, segment of their first token): (K,)."""
    sums, together = torch.zeros(len(jobs), dtype=torch.float64), {}
    for k, (_, _, begin, target) in enumerate(jobs):
        together.setdefault(target - begin, []).append(k)
    for before, group in together.items():  # words with equally much history
        starts = torch.tensor([jobs[k][2] * l for k in group])
        losses = score(gather(tokens, starts, (before + 2) * l + 1), 2 * l)  # of two segments
        for k, row in zip(group, losses):
            place, n, _, target = jobs[k]
            at = place - 1 - target * l
            sums[k] = row[at:at + n].sum()
    return sums


def probe(score, tokens, l, places, c):
    """All measures of one model on one text; c: the settings. Returns a dictionary that JSON can hold."""
    lengths, borders = numbers('histories', c['histories'], multiple=l), numbers('bins', c['bins'])
    swaps = [history for history in (numbers('swaps', c['swaps']) if c['swaps'] else []) if history in lengths[:-1]]
    N, longest = len(tokens), lengths[-1]
    first, last = -(-longest // l), (N - 1) // l - 1  # target segments with all of the history before them
    if last < first:
        raise SystemExit(f"error: the text has {N} tokens, too few for a history of {longest}: shorten histories")
    if swaps and N < 10 * longest:  # too likely from the target's own surroundings
        raise SystemExit(f"error: the text has {N} tokens, too few to swap a history of {longest} for another: --swaps= swaps none")
    starts = torch.linspace(first, last, min(c['targets'], last - first + 1)).long() * l
    stretch = torch.arange(len(starts)) * min(c['stretches'], len(starts)) // len(starts)
    generator = torch.Generator().manual_seed(c['seed'])
    begun = time.perf_counter()

    def progress(line):
        print(f"{line} ({time.perf_counter() - begun:.0f} s)", file=sys.stderr, flush=True)

    def interval(values, parts):
        return dict(zip(('mean', 'low', 'high'), bootstrap(values, parts, c['draws'], generator)))
    curve = context_curve(score, tokens, starts, lengths, l, progress)    # (histories, M, l)
    if not curve.isfinite().all():
        raise SystemExit("error: losses are not finite: the model's weights give no number")
    swapped = dict(zip(swaps, swap_curve(score, tokens, starts, swaps, longest, l, generator, progress)))
    table = []
    for i, history in enumerate(lengths):
        row = {'history': history, 'loss': interval(curve[i].mean(dim=1), stretch)}
        if history < longest:
            row['gain'] = interval((curve[i] - curve[-1]).mean(dim=1), stretch)  # what longer history is worth
        if history in swapped:
            row['swapped'] = interval((swapped[history] - curve[-1]).mean(dim=1), stretch)
        table.append(row)
    remote = []
    for (low, high), (where, there, absent) in co_occurrence(score, tokens, recurrences(tokens, places), borders, l,
                                                             c['words'], progress).items():
        row = {'from': low, 'to': high, 'words': len(where)}
        if len(where) > 1:
            row['difference'] = interval(there - absent, torch.arange(len(where)) * min(100, len(where)) // len(where))
        remote.append(row)
    kept = [row['history'] for row in table[:-1] if row['gain']['low'] > 0]
    return {'segment': l, 'tokens_scored': len(starts) * l, 'preserved_context': max(kept, default=None),
            'context_curve': table, 'co_occurrence': remote}


def show(result):
    """The result as a table of text."""
    lines = [f"{'history':>8}{'loss':>9}{'worth of longer history':>28}{'the same, older text swapped':>34}"]
    for row in result['context_curve']:
        cells = [f"{row[key]['mean']:.4f} [{row[key]['low']:.4f}, {row[key]['high']:.4f}]" if key in row else ''
                 for key in ('gain', 'swapped')]
        lines.append(f"{row['history']:>8}{row['loss']['mean']:>9.4f}{cells[0] or 'reference':>28}{cells[1]:>34}".rstrip())
    kept, longest = result['preserved_context'], result['context_curve'][-1]['history']
    lines.append(f"{result['tokens_scored']:,} tokens scored; 95 % intervals over contiguous stretches")
    lines.append(f"preserved context: history longer than {kept} tokens still lowers the loss (longest: {longest})"
                 if kept is not None else "preserved context: none; no history before the segment lowers the loss")
    lines.append("\nwords by distance of their last occurrence: nats of the word with it, minus without it")
    for row in result['co_occurrence']:
        d = row.get('difference')
        lines.append(f"{row['from']:>6} to {row['to'] - 1:<6}{row['words']:>6} words  "
                     + (f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else 'too few'))
    return '\n'.join(lines)


def picture(results, path):
    """Context curves and remote co-occurrence of several probes, {label: result}."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for label, result in results.items():
        rows = result['context_curve']
        axes[0].plot([row['history'] for row in rows], [row['loss']['mean'] for row in rows], 'o-', ms=3, label=label)
        bars = [row for row in result['co_occurrence'] if 'difference' in row]
        means = [row['difference']['mean'] for row in bars]
        errors = [[m - row['difference']['low'] for m, row in zip(means, bars)],
                  [row['difference']['high'] - m for m, row in zip(means, bars)]]
        axes[1].errorbar([(row['from'] * row['to']) ** 0.5 for row in bars], means, errors, fmt='o-', ms=3, capsize=2, label=label)
    axes[0].set(xscale='symlog', xlabel='tokens of history before the segment', ylabel='nats per token', title='context curve')
    axes[0].set_xscale('symlog', linthresh=12)
    axes[1].set(xscale='log', xlabel='tokens back to where the word stood last', ylabel='nats per word',
                title='remote co-occurrence: with it minus without it')
    axes[1].axhline(0, color='gray', lw=0.8)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    """Probe a run's checkpoint."""
    at_least(config, segment=1, targets=2, words=2, stretches=2, draws=20, threads=0)
    if units not in ('auto', 'word', 'identifier', 'token'):
        raise SystemExit(f"error: units must be 'auto', 'word', 'identifier' or 'token', not {units!r}")
    where = ckpt.pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    path = ckpt.find_file(os.path.join(ckpt.ROOT, out_dir) if out_dir else ckpt.newest_run())
    others = {os.path.basename(name).removesuffix('.json'): ckpt.load_result(name) for name in filter(None, beside.split(','))}
    if any('context_curve' not in other for other in others.values()):
        raise SystemExit(f"error: beside={beside!r} names a file that is no probe's")
    saved = ckpt.load(path, where)
    if 'data' not in saved:
        raise SystemExit(f"error: {path} does not name its data set: probe runs of train.py")
    model, tokenizer = ckpt.load_model(saved, device=where).eval(), Tokenizer(saved['tokenizer'])
    if file:
        try:
            with open(file, encoding='utf-8-sig', newline='') as f:  # as prepare.py reads texts
                ids = tokenizer.encode_array(f.read())
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"error: cannot read {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    else:
        ids = validation_ids(saved, path, data_dir)
    tokens = torch.from_numpy(ids.astype(np.int64))
    l = model.config.segment_size if isinstance(model, FoldGPT) else segment
    unit = units
    if unit == 'auto':
        unit = 'token' if saved['tokenizer']['kind'] != 'char' else 'identifier' if saved['data']['dataset'] == 'python' else 'word'
    if unit != 'token' and saved['tokenizer']['kind'] != 'char':
        raise SystemExit(f"error: units={unit!r} are runs of characters, a token of this model is several: take units='token'")
    places = find_words(tokens, tokenizer, unit)
    result = probe(lambda rows, n: last_losses(model, rows.to(where), n), tokens, l, places, config)
    result = {'model': saved['model_type'], 'sizes': saved['model_args'], 'data': saved['data']['dataset'], 'unit': unit,
              **result, 'iterations': saved['iter_num'], 'settings': ckpt.portable(config), 'trained': saved.get('provenance'),
              'provenance': ckpt.provenance(where)}
    print(show(result))
    target = results_file or os.path.join(os.path.dirname(path), 'probe.json')
    ckpt.save_result(target, result)
    picture({os.path.basename(os.path.dirname(path)): result, **others}, target.removesuffix('.json') + '.png')
    print(f"written to {target} and {target.removesuffix('.json')}.png")


if __name__ == '__main__':
    main()
