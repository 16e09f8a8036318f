"""Measure speed and memory: of generation after any number of tokens, and of training.

    python bench.py                       # generation, in some minutes
    python bench.py --parts=speed,memory  # training: hours on two CPU cores
"""
import statistics
from contextlib import ExitStack
from itertools import product

import torch

from configurator import at_least, configure, numbers
from lib.bench_sides import at_work, make_side, seconds
from lib.checkpoint import find_file, load, load_model
from lib.console import Progress, say
from lib.contract import flops_per_token, make_model, model_args
from lib.device import COMPILE, PRODUCTS, choose_products, pick_device, set_threads
from lib.pictures import curves as draw
from lib.records import make_record, metric, place, save_record
from lib.streaming import new_state, read, read_, sample_token, stream

parts = 'generation'  # what is measured: generation, speed, memory; a record each
rounds = 15           # readings of the clock, what is compared taking turns
device = 'auto'       # 'auto' takes cuda, mps or cpu, the first that is there
threads = 0           # CPU threads of a process; 0: one for generation, else torch's choice
seed = 1337           # of tokens and fresh weights
label = ''            # added to the names of the records, such as '_gpu'
record = False        # write into results/, which the docs are made from, not into out/

# generation
out_dir = 'out/fold_shakespeare'  # run whose model is measured
gpt_window = 192      # window of the GPT beside it: the same sizes, fresh weights
contexts = '100,1000,10000,100000,1000000'  # tokens read before the clock starts
window_tokens = 240   # tokens generated between two readings of the clock

# training
sides = 'fold,fold truncated,fold recomputed,gpt'  # all are compared with the last
sizes = '2+2x128x4,6+6x384x6'  # local+global layers x channels x heads; memory: of the first
segment_size = 12     # tokens of a segment
vocab_size = 65       # tiny Shakespeare's characters
batch_size = 16       # sequences of an update
bptt_segments = 16    # segments of a chunk of a truncated side
window = 192          # tokens of a sequence, for the speed
processes = '1'       # of a side, for the speed; '1,2': in one, and in two that share the batch
starts = 3            # times that a side's processes are started
steps = 4             # updates between two readings of the clock
block_sizes = '192,384,768,1536,3072,6144,12288,24576,49152'  # tokens of a sequence, for memory
memory_limit_gb = 4.0  # points that would need more, if it grows as the length does, are left out
products = 'auto'     # as in train.py
compile = 'auto'      # as in train.py


def alternate(works, rounds, what):
    """{name: [rate of each round]} of {name: function that gives a rate}; another one warms up."""
    rates, progress = {name: [] for name in works}, Progress(what, rounds + 1, 'rounds')
    for turn in range(rounds + 1):
        for name in list(works)[::-1 if turn % 2 else 1]:
            rates[name].append(works[name]())
        progress.at(turn + 1)
    progress.close()
    return {name: some[1:] for name, some in rates.items()}


def median(values, others=None):
    """A metric: the median and the range of values, or of their ratios to others one by one."""
    found = [a / b for a, b in zip(values, others)] if others else values
    return metric(statistics.median(found), n=len(found), low=min(found), high=max(found))


def states_at(name, model, contexts, device):
    """Yield the states after so many random tokens, rising numbers, read in one go."""
    state, progress = new_state(model), Progress(f'{name} reads', contexts[-1])
    for more in torch.tensor([0, *contexts]).diff().tolist():
        for idx in torch.randint(model.config.vocab_size, (1, more)).split(24_000, dim=1):
            read_(model, idx.to(device), state)
            progress.at(int(state.read[0]))
        yield state.clone()
    progress.close()


@torch.no_grad()
def generate_uncached(model, idx, n):
    """Generate without a state: idx (1, window) is computed anew for every token."""
    for _ in range(n):
        idx = torch.cat((idx[:, 1:], sample_token(model(idx)[0][:, -1], temperature=0)), dim=1)


def measure_generation(s):
    """Generation, greedy, by a run's model and by a GPT of the same sizes, after so many tokens."""
    torch.manual_seed(s.seed)
    contexts, n, W = numbers('contexts', s.contexts, least=1), s.window_tokens, s.gpt_window
    checkpoint = load(find_file(s.out_dir), s.device)
    model, ours = load_model(checkpoint, device=s.device).eval(), checkpoint['model_type']
    gpt = make_model('gpt', {**model_args(model), 'block_size': W}).to(s.device).eval()
    idx, fresh = torch.randint(gpt.config.vocab_size, (1, n + W)).to(s.device), new_state(model)
    works = {'uncached': lambda: generate_uncached(gpt, idx[:, :W], n),
             'at once': lambda: read(model, idx[:, :n], fresh)}
    sizes, curves = {}, {}
    for name, net in ((ours, model), (f'GPT of window {W}', gpt)):
        for c, state in zip(contexts, states_at(name, net, contexts, s.device)):
            sizes[name, c] = state.nbytes
            works[name, c] = lambda net=net, state=state: list(
                stream(net, idx[:, :0], state.clone(), n, temperature=0))
    rates = alternate({key: lambda work=work: n / seconds(work, s.device)
                       for key, work in works.items()}, s.rounds, 'generation')
    near, far = min(contexts, key=lambda c: abs(c - 1000)), contexts[-1]
    metrics = {'flat ratio': median(rates[ours, far], rates[ours, near]),
               'ratio to the uncached GPT': median(rates[ours, far], rates['uncached']),
               'ratio of reading at once': median(rates['at once'], rates[ours, near]),
               **{f'tokens per second, {key}': median(rates[key]) for key in list(works)[:2]}}
    for (name, c), size in sizes.items():
        for what, value in (('tokens per second', median(rates[name, c])),
                            ('bytes of state', metric(size))):
            new = {'x': 'tokens read before', 'y': what, 'points': []}
            curves.setdefault(f'{what}, {name}', new)['points'].append({'x': c, **value})
    yield metrics, curves, [f'flat ratio: after {far:,} to after {near:,} tokens',
                            'ratio of reading at once: to generating, which reads one by one']


def measure_speed(s):
    """Training of every side at every size; yields after each size. Efficiency is FLOPs per second
    over those of the last side, in the number of processes in which that is fastest."""
    metrics, sides, T = {}, s.sides.split(','), s.window
    for size in s.sizes.split(','):
        flops = {side: flops_per_token(make_side(side, size, T, s)[0], T) for side in sides}
        keys, starts = [*product(sides, numbers('processes', s.processes))], []
        for start in range(s.starts):
            with ExitStack() as stack:
                asks = {(side, n): stack.enter_context(at_work(
                    ['speed', side, size, T, s.as_dict()], n)) for side, n in keys}
                starts.append(alternate(asks, s.rounds, f'{size}, start {start + 1} of {s.starts}'))
        rates = {key: median([median(start[key])['value'] for start in starts]) for key in keys}
        _, best = max((rates[key]['value'], key) for key in keys if key[0] == sides[-1])
        for side, n in keys:
            name = f'{size} {side}' + f', {n} processes' * (n > 1)
            ratios = [median(start[side, n], start[best])['value'] * flops[side] / flops[best[0]]
                      for start in starts]
            metrics[f'{name}, tokens per second'] = rates[side, n]
            metrics[f'{name}, efficiency'] = median(ratios)
            metrics[f'{name}, FLOPs per token'] = metric(flops[side])
        yield metrics, {}, ['medians of the starts, whose rates are medians of their rounds']


def measure_memory(s):
    """Peak memory of training against the length of a sequence; yields after each side."""
    metrics, curves, notes, size = {}, {}, [], s.sizes.split(',')[0]
    for side in s.sides.split(','):
        points, peak, before = [], 0, 1
        for T in numbers('block_sizes', s.block_sizes):
            found = []
            try:
                if peak * T / before > 1000 * s.memory_limit_gb:
                    raise SystemExit(f'{side}: {T:,} tokens may need more than the limit')
                for _ in range(s.starts):
                    with at_work(['memory', side, size, T, s.as_dict()]) as ask:
                        found.append(ask())
            except SystemExit as ended:
                notes.append(str(ended))
                break
            peak, before = max(after for _, after in found), T
            points.append({'x': T, **median([after - start for start, after in found])})
            metrics[f'{side}, MB before training'] = median([start for start, _ in found])
        curves[side] = {'x': 'tokens of a sequence', 'y': 'peak MB of training', 'points': points}
        yield metrics, curves, notes


PARTS = {'generation': measure_generation, 'speed': measure_speed, 'memory': measure_memory}


def check(s):
    """Raise SystemExit for settings that would fail later."""
    for key, known in (('parts', PARTS), ('products', PRODUCTS), ('compile', COMPILE)):
        for value in getattr(s, key).split(','):
            if value not in known:
                raise SystemExit(f'error: {key}: {value!r} is none of {", ".join(known)}')
    at_least(s, threads=0, window_tokens=1, rounds=1, bptt_segments=1, starts=1, steps=1)
    for n in numbers('processes', s.processes, least=1):
        numbers('batch_size', str(s.batch_size), least=n, multiple=n)  # they share it equally
    lengths = {s.window, *numbers('block_sizes', s.block_sizes, least=1)}
    with torch.device('meta'):  # models without memory
        for side, size, T in product(s.sides.split(','), s.sizes.split(','), lengths):
            make_side(side, size, T, s)


def main(s):
    """Measure what is asked for; write a record, as far as it is measured, and a picture."""
    check(s)
    s, cores = s.replace(device=pick_device(s.device)), torch.get_num_threads()
    for part in [part for part in PARTS if part in s.parts]:
        if part != 'generation' and s.device == 'cpu':
            s = s.replace(products=choose_products(s.products))
        set_threads(s.threads or (1 if part == 'generation' else cores))
        path = place(part + s.label, s.record)
        for metrics, curves, notes in PARTS[part](s):
            made = make_record(part, s.as_dict(), [s.seed], metrics, curves, notes, device=s.device)
            save_record(f'{path}.json', made)
        lines = [f'{name:<60}{found["value"]:>16,.3f}' for name, found in metrics.items()]
        lines += [f'{name}: ' + ', '.join(f'{p["value"]:,.0f} ({p["x"]:,})' for p in c['points'])
                  for name, c in curves.items()]
        say('\n'.join([*lines, *notes, f'written to {path}.json']))
        drawn = {name: c for name, c in curves.items() if c['y'] != 'bytes of state'}
        if drawn:
            draw(f'{path}.png', f'{part.capitalize()}, {made["hardware"]}', drawn, log_y=True)


if __name__ == '__main__':
    main(configure(globals()))
