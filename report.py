"""
The report of compare.py: report.json with every figure, report.md and pictures for a person who would rather look.
"""
import hashlib
import os
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint as ckpt
import probe

PROMPT, NEW, ROUNDS = 240, 96, 5  # of the speed of generation: tokens read before, tokens written, readings of the clock


def gather(run, before):
    """All that a complete run left behind, as a dictionary; of one that is not complete (its folder may be gone), what the
    report before says of the same settings (`before`: its runs), marked as kept; else what failed."""
    what, wrong = {'name': run.name, 'seed': run.seed, 'ablation': run.ablation}, run.error or run.another()
    if wrong or not run.complete():
        same = [row for row in before if {**what, 'settings': run.settings}.items() <= row.items()]
        if same and not wrong:
            return {**same[0], 'kept': True}
        return {**what, 'failed': wrong or 'not run to its end'}
    log, saved = run.log(), ckpt.load(os.path.join(run.folder, 'last.pt'))
    steps = [record for record in log if 'loss' in record]
    scored = {record['iter']: record for record in log if 'val_loss' in record}
    last = scored[run.settings['max_iters']]
    start = [record for record in log if record.get('event') == 'start'][-1]
    training, update = (ckpt.load_result(os.path.join(run.folder, 'training.json')) if run.has('training.json') else {},
                        last['tokens'] // last['iter'])
    return {
        **what, 'parameters': start['parameters'],
        'tokens': last['tokens'], 'loss': last['val_loss'], 'error': last['val_error'],
        'curve': [[record['iter'] * update, record['val_loss']] for record in scored.values()],
        'training_curve': [[record['tokens'], record['loss']] for record in steps[::max(1, len(steps) // 50)]],
        'tokens_per_s': statistics.median(record['tokens_per_s'] for record in steps),
        'peak_mb': training.get('peak_mb'), 'resumed': training.get('resumed'),
        'optimizer': {key: saved['config'][key] for key in ('learning_rate', 'min_lr', 'warmup_iters', 'weight_decay', 'beta1',
                                                            'beta2', 'grad_clip', 'dropout')},
        'order': f"{run.settings.get('stretch') or run.settings['block_size']} tokens a draw, "
                 f"{hashlib.sha256(saved['rng']['data'].numpy().tobytes()).hexdigest()[:12]}",
        'data': saved['data'], 'eval_tokens': start['config']['eval_tokens'],
        'probe': {key: value for key, value in ckpt.load_result(os.path.join(run.folder, 'probe.json')).items()
                  if key not in ('settings', 'trained', 'sizes')},
        'samples': ckpt.load_result(os.path.join(run.folder, 'samples.json')) if run.sampled else None, 'settings': run.settings,
        'provenance': {**saved['provenance'], 'command': 'compare.py'}}


def load(run):
    return ckpt.load_model(ckpt.load(os.path.join(run.folder, 'last.pt')))


def flops_per_token(model):
    """Matrix products of a training step on one sequence, over its tokens; counted by torch, for any kind of model."""
    T = model.config.block_size
    idx = torch.zeros(1, T, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # a fused kernel counts nothing on a CPU
        model(idx, idx)[1].backward()
    return counter.get_total_flops() / T


@torch.no_grad()
def generation_speed(models, device):
    """{name: tokens per second that it writes after PROMPT tokens}: medians, the models alternating."""
    rates = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            model.to(device).eval()
            prompt = torch.zeros(1, PROMPT, dtype=torch.int64, device=device)
            state = model.new_state()
            model.read_(prompt, state)
            begun = time.perf_counter()
            for _ in model.stream(prompt[:, :0], state, NEW, 0):
                pass
            rates[name].append(NEW / (time.perf_counter() - begun))
            model.cpu()
    return {name: statistics.median(values) for name, values in rates.items()}


def at(curve, x):
    """A curve [(x, y), ...], rising in x, read at x; straight between its points, None before the first."""
    before = [point for point in curve if point[0] <= x]
    after = [point for point in curve if point[0] > x]
    if not before or not after:
        return before[-1][1] if before else None
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def summary(rows):
    """Rows of one name, a seed each, as one: means, and the standard deviation of the loss over the seeds."""
    losses = [row['loss'] for row in rows]
    return {'name': rows[0]['name'], 'seeds': len(rows), 'loss': statistics.mean(losses),
            'sd': statistics.stdev(losses) if len(losses) > 1 else None, 'error': statistics.mean(row['error'] for row in rows),
            'parameters': rows[0]['parameters'], 'tokens': rows[0]['tokens'], 'kept': any('kept' in row for row in rows),
            'tokens_per_s': statistics.median(row['tokens_per_s'] for row in rows),
            'peak_mb': max((row['peak_mb'] for row in rows if row['peak_mb']), default=None),
            'curve': [[x[0][0], statistics.mean(y for _, y in x)] for x in zip(*(row['curve'] for row in rows))],
            'preserved_context': [row['probe']['preserved_context'] for row in rows]}


def standing(a, b):
    """Where model a stands against b, summaries with FLOPs: losses at equal tokens, equal FLOPs and, unless one is kept from
    an earlier report, equal time.

    The one that has more to spend is read from its curve on the way, where its learning rate has not come down yet.
    """
    result = {}
    costs = {'tokens': lambda m: 1, 'FLOPs': lambda m: m['flops_per_token'], 'time': lambda m: 1 / m['tokens_per_s']}
    for what, cost in costs.items():
        if what == 'time' and (a['kept'] or b['kept']):
            continue
        spent = min(a['tokens'] * cost(a), b['tokens'] * cost(b))
        result[what] = {m['name']: at(m['curve'], min(m['tokens'], round(spent / cost(m)))) for m in (a, b)}
    return result


def gap(a, b):
    """By how much the loss of a lies below that of b, and that in standard deviations of the seeds, the larger of the two."""
    sd = max(a['sd'] or 0, b['sd'] or 0)
    return {'below': b['loss'] - a['loss'], 'sd': sd or None, 'in_sd': (b['loss'] - a['loss']) / sd if sd else None}


# --- writing ----------------------------------------------------------------------------------------------------

def table(head, rows):
    lines = ['| ' + ' | '.join(map(str, cells)) + ' |' for cells in (head, ['---'] * len(head), *rows)]
    return '\n'.join(lines)


def number(value, form):
    return '' if value is None else format(value, form)


def main_table(names):
    return table(['model', 'parameters', 'training tokens', 'validation loss', 'training tokens/s', 'FLOPs/token', 'peak MB',
                  'state bytes', 'generated tokens/s'],
                 [[m['name'] + ' (kept)' * m['kept'], f"{m['parameters']:,}", f"{m['tokens']:,}",
                   f"{m['loss']:.4f}" + (f" ± {m['sd']:.4f}" if m['sd'] else ''),
                   f"{m['tokens_per_s']:,.0f}", f"{m['flops_per_token']:,.0f}", number(m['peak_mb'], '.0f'), f"{m['state_bytes']:,}",
                   f"{m['generated_per_s']:,.0f}"] for m in names])


def ablation_table(names):
    first = names[0]
    return table(['ablation', 'validation loss', 'against the first', 'training tokens/s', 'FLOPs/token', 'preserved context'],
                 [[m['name'], f"{m['loss']:.4f}", f"{m['loss'] - first['loss']:+.4f}", f"{m['tokens_per_s']:,.0f}",
                   f"{m['flops_per_token']:,.0f}", m['preserved_context'][0]] for m in names])


def context_table(rows, cell):
    """What cell makes of the losses under every history, one model and seed a line."""
    histories, lines = sorted({row['history'] for r in rows for row in r['probe']['context_curve']}), []
    for r in rows:
        cells, kept = {row['history']: cell(row) for row in r['probe']['context_curve']}, r['probe']['preserved_context']
        lines.append([f"{r['name']}, {r['seed']}", *(cells.get(h, '') for h in histories), '' if kept is None else kept])
    return table(['model, seed', *histories, 'preserved context'], lines)


def loss_cell(row):
    return f"{row['loss']['mean']:.4f}"


def worth_cell(row):
    return f"{row['gain']['mean']:.4f} [{row['gain']['low']:.4f}, {row['gain']['high']:.4f}]" if 'gain' in row else 'reference'


def remote_table(rows):
    found = [{(row['from'], row['to']): row.get('difference') for row in r['probe']['co_occurrence']} for r in rows]
    bins = sorted(set().union(*found))  # runs kept from an earlier report may have had others

    def cell(d):
        return f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else ''
    return table(['model, seed', *(f'{low} to {high - 1}' for low, high in bins)],
                 [[f"{r['name']}, {r['seed']}", *(cell(of.get(two)) for two in bins)] for r, of in zip(rows, found)])


def equality_table(rows):
    return table(['model, seed', 'parameters', 'tokens', 'order of the text', 'text', 'scored tokens'],
                 [[f"{r['name']}, {r['seed']}", f"{r['parameters']:,}", f"{r['tokens']:,}", r['order'],
                   f"{r['data']['dataset']} {r['data']['sha256'][:12]}", r['eval_tokens'] or 'the whole split'] for r in rows])


def loss_picture(path, names):
    """Validation loss against tokens and against time."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for m in names:
        tokens, losses = zip(*m['curve'])
        axes[0].plot([t / 1e6 for t in tokens], losses, 'o-', ms=3, label=m['name'])
        if not m['kept']:  # timed in another session
            axes[1].plot([t / m['tokens_per_s'] / 60 for t in tokens], losses, 'o-', ms=3, color=axes[0].lines[-1].get_color())
    axes[0].set(xlabel='million tokens', ylabel='validation loss, nats per token')
    axes[1].set(xlabel='minutes of training')
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def quote(text):
    return '\n'.join('    ' + line for line in text.rstrip('\n').split('\n'))


def sentences(result, c):
    """What the figures say about the first run and the two that it is set against, one line each."""
    lines, names = [], {m['name']: m for m in result['models']}
    first = next(iter(c['runs']))
    if first in names and c['same_window'] in names:
        g = result['same_window']
        lines.append(f"- {first} against {c['same_window']}: loss {abs(g['below']):.4f} {'below' if g['below'] > 0 else 'above'}"
                     + (f", {abs(g['in_sd']):.1f} times the larger standard deviation over the seeds ({g['sd']:.4f})." if g['sd'] else '.'))
    for what, losses in result.get('full_window', {}).items():
        lines.append(f"- At equal {what}: " + ', '.join(f"{name} {number(loss, '.4f') or 'not measured so early'}"
                                                      for name, loss in losses.items()) + '.')
    return lines


def write_report(runs, c, folder, device):
    """Write report.json, report.md, loss.png and context.png from what the runs left in their folders.

    Returns what gather says of each."""
    path = os.path.join(folder, 'report.json')
    before = ckpt.load_result(path) if os.path.exists(path) else {'runs': [], 'models': [], 'ablations': []}
    gathered = [gather(run, before['runs']) for run in runs]
    rows, by_run = [r for r in gathered if 'failed' not in r], {(run.name, run.seed, run.ablation): run for run in runs}
    groups, models = {}, {}
    for row in rows:
        key = row['ablation'], row['name']
        groups.setdefault(key, []).append(row)
        if 'kept' not in row and key not in models:
            models[key] = load(by_run[row['name'], row['seed'], row['ablation']])
    speed = generation_speed(models, ckpt.pick_device(device))
    known = {(ablation, m['name']): m for ablation, of in ((False, 'models'), (True, 'ablations')) for m in before[of]}
    known.update({key: {'flops_per_token': flops_per_token(model), 'generated_per_s': speed[key],
                        'state_bytes': sum(value.nbytes for value in vars(model.new_state()).values())}
                  for key, model in models.items()})
    names = {key: {**summary(some), **{what: known[key][what] for what in ('flops_per_token', 'state_bytes', 'generated_per_s')}}
             for key, some in groups.items()}
    main, short = ([m for (ablation, _), m in names.items() if ablation is kind] for kind in (False, True))
    result = {'models': main, 'ablations': short, 'runs': gathered, 'provenance': ckpt.provenance()}
    first = names.get((False, next(iter(c['runs']))))
    others = {key: names.get((False, c[key])) for key in ('same_window', 'full_window')}
    if first and others['same_window']:
        result['same_window'] = gap(first, others['same_window'])
    if first and others['full_window']:
        result['full_window'] = standing(first, others['full_window'])
    ckpt.save_result(path, result)
    text = markdown(result, c, [r for r in rows if not r['ablation']], [r for r in rows if r['ablation']], gathered)
    with open(os.path.join(folder, 'report.md'), 'w', encoding='utf-8') as f:
        f.write(text)
    if main:
        loss_picture(os.path.join(folder, 'loss.png'), main)
        one_seed = {some[0]['name']: some[0]['probe'] for (ablation, _), some in groups.items() if not ablation}
        probe.picture(one_seed, os.path.join(folder, 'context.png'))
    return gathered


def markdown(result, c, rows, short, gathered):
    """The report as text."""
    made = result['provenance']
    parts = ['# Side by side', f"`{made['command']}`, commit {made['commit']}, {made['hardware']}, torch {made['torch']}; "
             f"seeds {', '.join(map(str, c['seeds']))}. Losses are in nats per token, ± the standard deviation over the seeds."]
    failed = [r for r in gathered if 'failed' in r]
    if failed:
        parts += ['## Failed', table(['run', 'seed', 'why'], [[r['name'], r['seed'], r['failed']] for r in failed])]
    kept = [f"{r['name']}, {r['seed']} (commit {r['provenance']['commit']}, {r['provenance']['hardware']})" for r in gathered if 'kept' in r]
    if kept:
        parts += ["Kept from an earlier report, with the speeds of that time: " + '; '.join(kept) + '.']
    if rows:
        parts += ['## Results', main_table(result['models']), '\n'.join(sentences(result, c)), '![loss](loss.png)',
                  'Training tokens/s: the median over the log lines, with whatever ran beside it. Peak MB: the whole process, '
                  'evaluation included. FLOPs: matrix products of forward and backward, counted by torch.',
                  '## Loss against history', 'Tokens of history before a segment of 12, the same targets in every column.',
                  context_table(rows, loss_cell), '![context](context.png)',
                  'By how much still longer history lowers the loss; 95 % intervals, drawn over contiguous stretches. The '
                  'preserved context is the last column with an interval above 0.', context_table(rows, worth_cell), '## Remote co-occurrence',
                  'Nats of a word with its last occurrence, minus without it, by the tokens between; 95 % intervals.', remote_table(rows)]
    if short:
        parts += ['## Ablations', f"{short[0]['tokens']:,} tokens each, seed {short[0]['seed']}.", ablation_table(result['ablations']),
                  context_table(short, loss_cell)]
    if rows or short:
        parts += ['## What is equal', equality_table([*rows, *short]), '## The same prompt, continued']
    for i, prompt in enumerate(c['prompts']):
        parts += [f'### {prompt.strip()}'] + [f"{r['name']}:\n\n{quote(r['samples'][i])}" for r in rows if r['samples'] and i < len(r['samples'])]
    return '\n\n'.join(parts) + '\n'
