"""The report of a comparison: its record, and the tables and pictures made from that alone.

The parts of a comparison are the records of its runs. Settings: name, ablation, those of train.py.
Metrics: those of training and, if new, of the probe, and text, order, scored, state_bytes,
generated_tokens_per_s. Curves: of both. Notes: what it wrote after each of the prompts.
"""
import hashlib
import os
import statistics
import time

import torch

from lib.checkpoint import load, load_model
from lib.device import pick_device
from lib.docs import fill, merged
from lib.pictures import curves
from lib.records import load_record, make_record, metric
from lib.streaming import new_state, read_, stream

PROMPT, NEW, ROUNDS = 240, 96, 5  # speed of generation: tokens read, tokens written, readings
MAIN = {'parameters': '{metrics/parameters|,.0f}', 'training tokens': '{metrics/tokens|,.0f}',
        'validation loss': '{metrics/loss|.4f} ± {metrics/loss/sd|.4f} || {metrics/loss|.4f}',
        'training tokens/s': '{metrics/tokens_per_s|,.0f}',
        'FLOPs/token': '{metrics/flops_per_token|,.0f}', 'peak MB': '{metrics/peak_mb|,.0f}',
        'state bytes': '{metrics/state_bytes|,.0f}',
        'generated tokens/s': '{metrics/generated_tokens_per_s|,.0f}'}
ABLATIONS = {key: MAIN[key] for key in ('validation loss', 'training tokens/s', 'FLOPs/token')}
PRESERVED = {'preserved context': '{metrics/preserved context}'}
EQUAL = {'parameters': MAIN['parameters'], 'tokens': MAIN['training tokens'],
         'text': '{metrics/text}', 'order': '{metrics/order}', 'scored': '{metrics/scored}'}
INTERVAL = '{@|+.4f} [{@/low|+.4f}, {@/high|+.4f}]'


def make(c, runs, s):
    """The record of a comparison. c: what its file says; runs: compare.Run, one that is not
    complete leaves a note; s: the settings of compare.py."""
    done, device = [run for run in runs if run.complete()], pick_device(s.device)
    parts, models = zip(*map(part, done))
    for record, model, speed in zip(parts, models, generation_speeds(models, device)):
        record['metrics'].update(state_bytes=metric(new_state(model).nbytes),
                                 generated_tokens_per_s=metric(speed, n=ROUNDS))
    settings = {key: c[key] for key in ('tokens', 'ablation_tokens', 'same_window', 'full_window',
                                        'prompts', 'new_tokens')}
    settings.update(comparison=s.comparison, jobs=s.jobs, threads=s.threads)
    notes = [f'{run.name}, seed {run.seed}: {run.error or "not run to its end"}'
             for run in runs if run not in done]
    return make_record('comparison', settings, c['seeds'], differences(parts, c), notes=notes,
                       parts=parts, device=device)


def part(run):
    """The record of a run, from those that its folder holds, and its model."""
    trained, probed = (load_record(run.folder / f'{name}.json') for name in ('record', 'probe'))
    saved = load(run.folder / 'last.pt')
    order = hashlib.sha256(saved['task_state']['generator'].numpy().tobytes()).hexdigest()
    about = {'text': metric(f"{saved['data']['dataset']} {saved['data']['sha256'][:12]}"),
             'order': metric(order[:12]),
             'scored': metric(trained['settings']['eval_tokens'] or 'all')}
    return {**trained, 'what': 'run', 'notes': run.read('samples.json').get('texts', []),
            'metrics': {**probed['metrics'], **trained['metrics'], **about},
            'settings': {'name': run.name, 'ablation': run.ablation, **run.settings},
            'curves': {**trained['curves'], **probed['curves']}}, load_model(saved)


@torch.no_grad()
def generation_speeds(models, device):
    """Tokens per second that each model writes after PROMPT tokens: medians, taking turns."""
    rates = [[] for _ in models]
    for rate, model in [*zip(rates, models)] * ROUNDS:
        prompt = torch.zeros(1, PROMPT, dtype=torch.int64, device=device)
        state = new_state(model.to(device).eval())
        read_(model, prompt, state)
        start = time.perf_counter()
        for _ in stream(model, prompt[:, :0], state, NEW, temperature=0):
            pass
        rate.append(NEW / (time.perf_counter() - start))
    return [statistics.median(rate) for rate in rates]


def differences(parts, c):
    """Metrics: the loss of the first run minus that of same_window and of full_window, and of each
    ablation minus that of the first of them, with their standard errors over the seeds."""
    rows, found = {**rows_of(parts, seeds=False), **rows_of(parts, True, seeds=False)}, {}
    first, short = next(iter(c['runs'])), next(iter(c['ablations']), '')
    pairs = [(first, c['same_window']), (first, c['full_window'])]
    for names in pairs + [(name, short) for name in c['ablations']]:
        if {*names} <= rows.keys() and len({*names}) == 2:
            a, b = (rows[name]['metrics']['loss'] for name in names)
            spread = [m['sd'] ** 2 / m['n'] for m in (a, b) if 'sd' in m]
            error = sum(spread) ** 0.5 if len(spread) == 2 else None
            found[' minus '.join(names)] = metric(a['value'] - b['value'], error)
    return found


def table(head, rows):
    """Markdown of a table; None is an empty cell."""
    rows = [['' if cell is None else str(cell) for cell in row] for row in rows]
    return '\n'.join(f"| {' | '.join(cells)} |" for cells in (head, ['---'] * len(head), *rows))


def rows_of(parts, ablation=False, seeds=True):
    """{label: part} of the runs or the ablations; without seeds, all of a model merged."""
    found = {}
    for part in parts:
        s = part['settings']
        if s['ablation'] is ablation:
            label = f"{s['name']}, {s['seed']}" if seeds else s['name']
            found.setdefault(label, []).append(part)
    return {label: merged(some) for label, some in found.items()}


def metric_table(rows, columns):
    """A table of {label: record} and {title: template of lib/docs.py}."""
    return table(['', *columns], [[label, *(fill(text, record) for text in columns.values())]
                                  for label, record in rows.items()])


def curve_table(rows, name, template, more=None):
    """A table of a curve's points, @ in the template, and of `more` columns after them."""
    xs = sorted({point['x'] for record in rows.values()
                 for point in record['curves'].get(name, {'points': []})['points']})
    columns = {str(x): template.replace('@', f'curves/{name}/{x}') for x in xs}
    return metric_table(rows, {**columns, **(more or {})})


def main_table(record):
    return metric_table(rows_of(record['parts'], seeds=False), MAIN)


def ablation_table(record):
    return metric_table(rows_of(record['parts'], ablation=True), {**ABLATIONS, **PRESERVED})


def context_table(record, ablation=False):
    return curve_table(rows_of(record['parts'], ablation), 'context curve', '{@|.4f}', PRESERVED)


def difference_table(record):
    """Which of two has the lower loss: 'open' within three standard errors or without one."""
    rows = []
    for name, m in record['metrics'].items():
        verdict = 'ahead' if m['value'] < 0 else 'behind'
        if m['error'] is None or abs(m['value']) <= 3 * m['error']:
            verdict = 'open'
        rows.append([name, f"{m['value']:+.4f}", m['error'] and f"{m['error']:.4f}", verdict])
    return table(['loss', 'difference', 'standard error', 'the first is'], rows)


def samples(record):
    """Every prompt as the models go on with it: a list of sections."""
    sections = []
    for i, prompt in enumerate(record['settings']['prompts']):
        sections.append(f'### {prompt.strip()}')
        for label, run in rows_of(record['parts']).items():
            if run['notes']:
                text = run['notes'][i].rstrip().replace('\n', '\n    ')
                sections.append(f'{label}:\n\n    {text}')
    return sections


def write(record, folder):
    """Write report.md and the pictures that it shows."""
    made_by = '`{command}`, commit {commit}, {date}, {hardware}'.format(**record)
    runs, short = rows_of(record['parts']), rows_of(record['parts'], ablation=True)
    worth, remote = (curve_table(runs, name, INTERVAL)
                     for name in ('worth of longer history', 'remote co-occurrence'))
    sections = [
        '# Side by side', f"{made_by}; {record['settings']['jobs']} runs at a time. Losses are in "
        f'nats per token, ± the standard deviation over the seeds.',
        f"Left out: {'; '.join(record['notes']) or 'none'}.", main_table(record),
        difference_table(record), 'Ahead or behind: by more than three standard errors over the '
        'seeds. Speeds are medians. FLOPs: of matrix products, forward and backward.',
        '![](loss.png)', '## Loss by the tokens of history before a segment',
        context_table(record), '![](context.png)',
        'What still longer history is worth, with 95 % intervals:', worth,
        '## Remote co-occurrence', 'Nats of a word with its last occurrence minus without it, by '
        'the least number of tokens between, with 95 % intervals:', remote,
        '## Ablations', ablation_table(record), context_table(record, ablation=True),
        '## What is equal', metric_table({**runs, **short}, EQUAL), '## Samples',
        *samples(record)]
    with open(os.path.join(folder, 'report.md'), 'w', encoding='utf-8') as f:
        f.write('\n\n'.join(sections) + '\n')
    for file, name in (('loss', 'validation loss'), ('context', 'context curve')):
        title = f"{name}, {fill('{metrics/text}', record['parts'][0])}, first seed"
        models = rows_of(record['parts'], seeds=False)
        shown = {label: model['curves'][name] for label, model in models.items()}
        if shown:
            curves(os.path.join(folder, f'{file}.png'), title, shown, log=file == 'context')
