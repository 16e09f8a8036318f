"""The report of a comparison: its record, and the tables and pictures made from that alone.

The parts of a comparison are the records of its runs. Settings: name, budget, those of train.py.
Metrics: those of training and, if new, of the probe, and text, state_bytes. Curves: of both. Notes:
what it wrote after each of the prompts.
"""
import os
from textwrap import indent

from lib.checkpoint import load, load_model
from lib.console import require
from lib.device import pick_device
from lib.docs import fill, markdown, merged
from lib.files import write_file
from lib.pictures import curves
from lib.records import load_record, make_record, metric
from lib.rows import Rows
from lib.streaming import new_state

MAIN = {'parameters': '{metrics/parameters|,.0f}', 'training tokens': '{metrics/tokens|,.0f}',
        'text': '{metrics/text}',
        'validation loss': '{metrics/loss|.4f} ± {metrics/loss/sd|.4f} || {metrics/loss|.4f}',
        'training tokens/s': '{metrics/tokens_per_s|,.0f}', 'minutes': '{metrics/minutes|.1f}',
        'compiled': '{settings/compile}',
        'FLOPs/token': '{metrics/flops_per_token|,.0f}', 'peak MB': '{metrics/peak_mb|,.0f}',
        'state bytes at a border': '{metrics/border_bytes|,.0f}',
        'state bytes': '{metrics/state_bytes|,.0f}'}
TASK = 'task', 'dataset', 'cups', 'every', 'hops'  # what tells one from another
INTERVAL = '{@|+.4f} [{@/low|+.4f}, {@/high|+.4f}]'
DIFFERENCE = '{value|+.4f} ± {error|.4f}, {verdict} || {value|+.4f}, {verdict}'

def make(c, runs, s):
    """The record of a comparison. c: what its file says; runs: compare.Run, one that is not
    complete leaves a note; s: the settings of compare.py."""
    parts = []
    for run in runs:
        try:
            if run.complete():
                parts.append(part(run))
        except SystemExit as damaged:
            run.error = str(damaged)
    require(parts, 'no run is complete: nothing to report')
    settings = {key: c[key] for key in c if key != 'seeds' and type(c[key]) is not dict}
    settings.update(comparison=s.comparison, jobs=s.jobs, threads=s.threads)
    notes = [f'{run.name}, equal {run.budget}, seed {run.seed}: {run.error or "not run to its end"}'
             for run in runs if not run.complete()]
    record = make_record('comparison', settings, c['seeds'], differences(parts), notes=notes,
                         device=pick_device(s.device))
    return {**record, 'parts': parts}

def part(run):
    """The record of a run, from those that its folder holds."""
    trained = load_record(run.folder / 'record.json')
    probed = {'metrics': {}, 'curves': {}}
    if 'probe.json' in run.results:
        probed = load_record(run.folder / 'probe.json')
    saved = load(run.folder / 'last.pt')
    state = new_state(load_model(saved))
    data = saved['data'] or {'dataset': saved['task'], 'sha256': ''}
    text = f"{data['dataset']} {data['sha256'][:12]}".strip()
    return {**trained, 'what': 'run', 'notes': run.read('samples.json').get('texts', []),
            'metrics': {**probed['metrics'], **trained['metrics'], 'text': metric(text),
                        'state_bytes': metric(state.nbytes),
                        'border_bytes': metric(Rows(carry=state.carry).nbytes)},
            'settings': {'name': run.name, 'budget': run.budget, **run.settings,
                         'compile': trained['settings'].get('compile')},  # as it was in fact
            'curves': {name: curve for name, curve in (trained['curves'] | probed['curves']).items()
                       if name != 'training loss'}}  # which is long, and in the run's own record

def differences(parts):
    """Metrics: at each budget the loss of each run, the mean over the seeds with its standard
    deviation, sd; and the loss of the first run minus that of each other, with its standard error
    over the seeds, and whether the first is ahead, behind or, within three of these errors or
    without one, open."""
    found = {}
    for budget, rows in by_budget(parts).items():
        found |= {f'{name}, equal {budget}': run['metrics']['loss'] for name, run in rows.items()}
        (first, one), *others = rows.items()
        a = one['metrics']['loss']
        for name, other in others:
            b = other['metrics']['loss']
            value = a['value'] - b['value']
            spread = [m['sd'] ** 2 / m['n'] for m in (a, b) if 'sd' in m]
            error = sum(spread) ** 0.5 if len(spread) == 2 else None
            known = error is not None and abs(value) > 3 * error
            verdict = ('ahead' if value < 0 else 'behind') if known else 'open'
            found[f'{first} minus {name}, equal {budget}'] = metric(value, error, verdict=verdict)
    return found

def by_budget(parts):
    """{budget, and of several tasks which: {name: the runs of that name, merged}}."""
    found = {}
    tasks = [' '.join(str(part['settings'][key]) for key in TASK if key in part['settings'])
             for part in parts]
    for part, task in zip(parts, tasks):
        for budget in part['settings']['budget'].split(', '):
            found.setdefault(f'{budget}, {task}' if len({*tasks}) > 1 else budget, []).append(part)
    return {budget: rows_of(some, '{name}') for budget, some in found.items()}

def rows_of(parts, label='{name}, {seed}'):
    """{label: part} of the runs, those of a label merged."""
    found = {}
    for part in parts:
        found.setdefault(label.format(**part['settings']), []).append(part)
    return {label: merged(some) for label, some in found.items()}

def table(rows, columns):
    """A table of {label: record} and {title: template of lib/docs.py}."""
    return markdown(['', *columns], [[label, *(fill(text, record) for text in columns.values())]
                                     for label, record in rows.items()])

def columns_of(name, rows, template):
    """Columns for the points of a curve, {x: template} with @ filled in."""
    xs = {point['x'] for record in rows.values() for point in record['curves'][name]['points']}
    return {str(x): template.replace('@', f'curves/{name}/{x}') for x in sorted(xs)}

def difference_table(record):
    """The first run minus each other: a row for each, a column for each budget."""
    budgets = by_budget(record['parts'])
    pairs = [f'{first} minus {name}' for first, *others in budgets.values() for name in others]
    cells = [[pair, *(fill(DIFFERENCE, record['metrics'].get(f'{pair}, equal {budget}', {}))
                      for budget in budgets)] for pair in dict.fromkeys(pairs)]
    return markdown(['', *(f'equal {budget}' for budget in budgets)], cells)

def write(record, folder):
    """Write report.md and the pictures that it shows."""
    parts, source = record['parts'], '`{command}`, commit {commit}, {date}, {hardware}'
    runs, asked = (rows_of([part for part in parts if name in part['curves']])
                   for name in ('context curve', 'recall'))
    sections = [
        '# Side by side', f"{source.format(**record)}; {record['settings']['jobs']} runs at a "
        'time. Losses: nats per token, or shares of wrong answers, ± the standard deviation over '
        'the seeds.',
        f"Left out: {'; '.join(record['notes']) or 'none'}.", difference_table(record),
        'Difference in loss ± its standard error over the seeds; ahead or behind: by more than '
        'three of these. Models with a carry are scored as streams, others with a stride of half '
        'their window.']
    for budget, models in by_budget(parts).items():
        sections += [f'## Equal {budget}', table(models, MAIN)]
    sections += ['The speed is a median. FLOPs: of matrix products, forward and backward.',
                 '![](loss.png)']
    if runs:
        sections += [
            '## Loss by the tokens of history before a segment',
            table(runs, {**columns_of('context curve', runs, '{@|.4f}'),
                         'preserved context': '{metrics/preserved context}'}), '![](context.png)',
            'What still longer history is worth, with 95 % intervals:',
            table(runs, columns_of('worth of longer history', runs, INTERVAL)),
            '## Remote co-occurrence', 'Nats of a word with its last occurrence minus without it, '
            'by the least number of tokens between, with 95 % intervals:',
            table(runs, columns_of('remote co-occurrence', runs, INTERVAL)),
            '## Copying', 'Nats of a word but its first character, with its last occurrence minus '
            'with another word of its length in that place, as above:',
            table(runs, columns_of('copying', runs, INTERVAL))]
    if asked:
        sections += ['## Right answers', table(asked, columns_of('recall', asked, '{@|.3f}')),
                     '![](recall.png)']
    for i, prompt in enumerate(record['settings']['prompts']):
        sections.append(f'## After {prompt.strip()}')
        sections += [f"{label}:\n\n{indent(run['notes'][i].rstrip(), ' ' * 4)}"
                     for label, run in rows_of(parts).items() if run['notes']]
    text = '\n\n'.join(sections) + '\n'
    write_file(os.path.join(folder, 'report.md'), lambda f: f.write(text.encode(errors='replace')))
    base = next(iter(by_budget(parts))).split(',')[0]  # other budgets have points at other x
    equal = [part for part in parts if part['settings']['budget'].startswith(base)]
    for file, name in (('loss', 'validation loss'), ('context', 'context curve'),
                       ('recall', 'recall')):
        title = f"{name}, {parts[0]['metrics']['text']['value']}, means over the seeds"
        shown = {label: model['curves'][name] for label, model in rows_of(equal, '{name}').items()
                 if name in model['curves']}
        if shown:
            curves(os.path.join(folder, f'{file}.png'), title, shown, log=file != 'loss')
