"""Measure speed and memory: of generation after any number of tokens, and of training.

    python bench.py                       # generation, in some minutes
    python bench.py --parts=speed,memory  # training: hours on two CPU cores
    torchrun --standalone --nproc_per_node=2 bench.py --parts=speed  # processes that share a batch
"""
import lib.start  # noqa: F401 (before torch)
import json
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch

from configurator import Settings, at_least, configure, numbers, one_of
from lib import device as machine
from lib import processes
from lib.checkpoint import find_file, load, load_model
from lib.console import Progress, require, say, write
from lib.contract import adamw, flops_per_token, make_model, unit
from lib.files import RECORD, check_place
from lib.gradients import backpropagate
from lib.graphs import Graphs
from lib.records import ROOT, make_record, metric, result_path, save_record
from lib.streaming import new_state, read, read_, sample_token, stream

parts = 'generation'  # what is measured: generation, speed, memory; a record each
rounds = 15           # readings of the clock
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
sides = 'fold,fold truncated,fold recomputed,gpt'  # all are compared with the last; of another
                      # config, such as 'fold past=frozen local=sliding truncated'
sizes = '2+2x128x4,6+6x384x6'  # local+global layers x channels x heads; memory: of the first
segment_size = 12     # tokens of a segment
vocab_size = 65       # tiny Shakespeare's characters
batch_size = 16       # sequences of an update
largest_batch = 0     # speed: also 4, 16, ... times as many, up to this, while tokens/s grow by 5 %
bptt_segments = 16    # segments of a chunk of a truncated side
window = 192          # tokens of a sequence, for the speed
starts = 3            # processes of each side, the sides taking turns
steps = 20            # updates between two readings of the clock; of larger batches fewer, not
                      # fewer than 5
block_sizes = '192,384,768,1536,3072,6144,12288,24576,49152'  # tokens of a sequence, for memory
memory_limit_gb = 4.0  # lengths that are likely to need more are left out: memory grows with length
products = 'auto'     # as in train.py
compile = 'auto'      # as in train.py

def rate(n, device, work, *args):
    """Tokens per second of work(*args), which is about n tokens, by the wall clock."""
    before = time.perf_counter()
    work(*args)
    if device != 'cpu':
        torch.accelerator.synchronize()
    return n / (time.perf_counter() - before)

def alternate(works, turns, what):
    """{name: [what it gives at each turn]} of {name: function}."""
    found, progress = {name: [] for name in works}, Progress(what, turns, 'turns')
    for turn in range(turns):
        for name in works if turn % 2 == 0 else reversed(works):
            found[name].append(works[name]())
        progress.at(turn + 1)
    progress.close()
    return found

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
    require(len(contexts) > 1, f'contexts={s.contexts!r}: name two or more, which are compared')
    checkpoint = load(find_file(s.out_dir))
    model, ours = load_model(checkpoint, device=s.device).eval(), checkpoint['model_type']
    require({'n_layer', 'n_head', 'n_embd'} <= {*vars(model.config)}, f'{ours!r} has not the sizes '
            f'of a GPT, so that none of its size can be measured beside it')
    gpt = make_model('gpt', {**vars(model.config), 'block_size': W, 'window': 0})
    gpt = gpt.to(s.device).eval()
    idx = torch.randint(gpt.config.vocab_size, (1, n + W)).to(s.device)
    nets = {ours: model, f'GPT of window {W}': gpt}
    states = {(name, c): state for name, net in nets.items()
              for c, state in zip(contexts, states_at(name, net, contexts, s.device))}
    works = {'uncached': partial(generate_uncached, gpt, idx[:, :W], n),
             'at once': partial(read, model, idx[:, :n], new_state(model)),
             **{key: lambda net=nets[key[0]], state=state: list(
                 stream(net, idx[:, :0], state.clone(), n, temperature=0))
                for key, state in states.items()}}
    rates = alternate({key: partial(rate, n, s.device, work) for key, work in works.items()},
                      s.rounds + 1, 'generation')
    rates = {key: some[1:] for key, some in rates.items()}  # the first round warms up
    near, far = min(contexts, key=lambda c: abs(c - 1000)), contexts[-1]
    metrics = {'flat ratio': median(rates[ours, far], rates[ours, near]),
               'ratio to the uncached GPT': median(rates[ours, far], rates['uncached']),
               'ratio of reading at once': median(rates['at once'], rates[ours, near]),
               'tokens per second': median(rates[ours, far]),
               'tokens per second, uncached': median(rates['uncached']),
               'tokens per second, at once': median(rates['at once'])}
    measured = {'tokens per second': {key: median(rates[key]) for key in states},
                'bytes of state': {key: metric(state.nbytes) for key, state in states.items()}}
    curves = {f'{what}, {name}': {'x': 'tokens read before', 'y': what, 'points': [
        {'x': c, **found[name, c]} for c in contexts]}
        for what, found in measured.items() for name in nets}
    yield metrics, curves, [f'flat ratio: after {far:,} to after {near:,} tokens',
                            'ratio of reading at once: to generating, which reads one by one']

def make_side(side, size, T, s):
    """A model for sequences of T tokens, and the side's way. Raises SystemExit for bad names."""
    require(side.split(), 'sides: one of them is empty')
    model_type, *words = side.split()
    own = dict(word.split('=', 1) for word in words if '=' in word)
    way = ' '.join(word for word in words if '=' not in word)
    found = re.fullmatch(r'(\d+)\+(\d+)x(\d+)x(\d+)', size)
    require(found and way in ('', 'truncated', 'recomputed')
            and {*own} <= {'past', 'local', 'carry', 'position'},
            f"{side!r} of size {size!r}: a side is a model_type, or one and past=..., local=..., "
            "carry=..., position=..., 'truncated' or 'recomputed'; a size is such as 2+2x128x4")
    n_local, n_global, n_embd, n_head = map(int, found.groups())
    return make_model(model_type, dict(
        n_layer=n_local + n_global, n_local=n_local, n_global=n_global, n_embd=n_embd,
        n_head=n_head, bias=False, block_size=T, segment_size=s.segment_size,
        vocab_size=s.vocab_size, **own)), way

def make_updates(side, size, T, s):
    """updates(n), which trains a side for n updates, and compiled(), what is compiled by then."""
    torch.manual_seed(s.seed)
    model, way = make_side(side, size, T, s)
    use_bfloat16 = machine.takes_bfloat16('auto', s.device)
    compile = machine.choose_compile(s.compile, s.device, machine.LONG)
    with torch.autocast(s.device.split(':')[0], torch.bfloat16, use_bfloat16) as autocast:
        compile = machine.compile_blocks(model.to(s.device), compile, s.device,
                                         s.batch_size // processes.WORLD)
    graphs = Graphs() if compile == 'graph' else None
    optimizer = adamw(model, 0.1, 1e-3, (0.9, 0.99), s.device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its memory is there before the measurement
    tokens = torch.randint(s.vocab_size, (s.batch_size, T + 1), dtype=torch.int32)
    tokens = processes.my_share(tokens)
    kwargs = {'chunk': s.bptt_segments * unit(model) if way == 'truncated' else 0,
              'recompute': way == 'recomputed', 'device': s.device, 'step': graphs,
              'autocast': autocast}

    def updates(n):
        for _ in range(n):
            backpropagate(model, tokens[:, :-1], tokens[:, 1:], **kwargs)
            processes.average_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return updates, lambda: 'off' if graphs and not graphs.graphs else compile

def speeds(side, size, T, s, turn=nullcontext):
    """Yield of a side, batch by batch: the batch, its tokens per second, the median of the rounds,
    seconds until these begin, peak MB, and what is compiled. The rounds are within turn(). A batch
    beyond the first for which there is no memory ends them."""
    B, best, begin = s.batch_size, 0.0, time.perf_counter()
    while True:
        n = max(min(5, s.steps), s.steps * s.batch_size // B)
        try:
            updates, compiled = make_updates(side, size, T, s.replace(batch_size=B))
            rate(1, s.device, updates, n)  # warms up
            ready = time.perf_counter() - begin
            with turn():
                speed = statistics.median(rate(n * B * T, s.device, updates, n)
                                          for _ in range(s.rounds))
        except torch.OutOfMemoryError:
            if not best:
                raise
            return
        found = {'batch': B, 'rate': speed, 'ready': ready, 'mb': machine.peak_mb(s.device),
                 'compiled': compiled()}
        updates = compiled = None
        torch.cuda.empty_cache()  # others may need the memory while this one waits
        if s.device.startswith('cuda'):
            torch.cuda.reset_peak_memory_stats()
        yield found
        if 4 * B > s.largest_batch or speed < 1.05 * best:
            return
        B, best, begin = 4 * B, speed, time.perf_counter()
        torch.compiler.reset()

def train_side(what, side, size, T, settings):
    """The 'speed' of a side, as speeds() has it, at its fastest batch. Or the peaks of its 'memory'
    in MB, before and after updates: several of short ones, as the second takes more."""
    s = Settings(settings)
    machine.set_up(s.device, s.threads, s.products)
    if what == 'speed':
        return max(speeds(side, size, T, s), key=lambda found: found['rate'])
    updates, _ = make_updates(side, size, T, s)
    before = machine.peak_mb(s.device)
    updates(max(1, 1536 // T))
    return float(before), float(machine.peak_mb(s.device))

def in_process(*job):
    """train_side() in a new process. Raises SystemExit, in one line, if that fails or is killed."""
    run = 'import bench, json, sys; print(json.dumps(bench.train_side(*json.loads(sys.argv[1]))))'
    done = subprocess.run([sys.executable, '-c', run, json.dumps(job)], cwd=ROOT, text=True,
                          capture_output=True, start_new_session=True)  # without Ctrl-C
    *_, reason = ['', *done.stderr.splitlines()] if done.returncode > 0 else ['killed']
    require(done.returncode == 0, f'{job[1]} at {job[2]}, {job[3]:,} tokens, ended: {reason}')
    write(sys.stderr, done.stderr)  # such as that nothing is compiled
    return json.loads(done.stdout.splitlines()[-1])

def measure_speed(s):
    """Training of every side, size after size; efficiency: FLOPs/s over those of the last side."""
    metrics, sides, T, notes = {}, s.sides.split(','), s.window, []
    run = train_side if processes.WORLD > 1 else in_process  # that are there already
    for size in s.sizes.split(','):
        works = {side: partial(run, 'speed', side, size, T, s.as_dict()) for side in sides}
        found = alternate(works, s.starts, size)
        rates = {side: [start['rate'] for start in found[side]] for side in sides}
        flops = {side: flops_per_token(make_side(side, size, T, s)[0], T) for side in sides}
        done = {side: [flops[side] * speed for speed in rates[side]] for side in sides}
        for side in sides:
            metrics[f'{size} {side}, tokens per second'] = median(rates[side])
            metrics[f'{size} {side}, efficiency'] = median(done[side], done[sides[-1]])
            metrics[f'{size} {side}, FLOPs per token'] = metric(flops[side])
            for key, title in (('batch', 'batch'), ('ready', 'seconds to start'),
                               ('mb', 'peak MB')):
                if found[side][0][key] is not None:  # not every system tells its memory
                    values = [start[key] for start in found[side]]
                    metrics[f'{size} {side}, {title}'] = median(values)
            compiled = {start['compiled'] for start in found[side]}
            notes.append(f"{size} {side}: compiled: {', '.join(sorted(compiled))}")
        yield metrics, {}, ['medians of the starts, whose rates are medians of rounds', *notes]

def measure_memory(s):
    """Peak memory of training against the length of a sequence; yields after each side."""
    metrics, curves, notes, size = {}, {}, [], s.sizes.split(',')[0]
    for side in s.sides.split(','):
        points, peak, before = [], 0, 1
        for T in numbers('block_sizes', s.block_sizes):
            try:
                require(peak * T / before <= 1000 * s.memory_limit_gb,
                        f'{side}: {T:,} tokens may need more than the limit')
                found = [in_process('memory', side, size, T, s.as_dict()) for _ in range(s.starts)]
            except SystemExit as ended:
                notes.append(str(ended))
                break
            peak, before = max(after for _, after in found), T
            points.append({'x': T, **median([after - start for start, after in found])})
            metrics[f'{side}, MB before training'] = median([start for start, _ in found])
        curves[side] = {'x': 'tokens of a sequence', 'y': 'peak MB of training', 'points': points}
        yield metrics, curves, notes

PARTS = {'generation': measure_generation, 'speed': measure_speed, 'memory': measure_memory}

def main(s):
    """Measure what is asked for; write a record, as far as it is measured."""
    processes.end_on_signals()  # and the process of a side ends, too
    require({*s.parts.split(',')} <= {*PARTS}, f"parts must be of {', '.join(PARTS)}: {s.parts!r}")
    require(processes.WORLD == 1 or s.parts == 'speed' and s.batch_size % processes.WORLD == 0
            and not s.largest_batch,
            'several processes measure --parts=speed, of one batch_size that they can share')
    one_of(s, products=machine.PRODUCTS, compile=machine.COMPILE)
    at_least(s, memory_limit_gb=0.0, threads=0, window_tokens=1, rounds=1, batch_size=1,
             bptt_segments=1, starts=1, steps=1, largest_batch=0)
    lengths = {s.window, *numbers('block_sizes', s.block_sizes, least=1)}
    with torch.device('meta'):  # models without memory
        for job in product(s.sides.split(','), s.sizes.split(','), lengths):
            make_side(*job, s)
    paths = {part: result_path(f'{part}{s.label}.json', s.record) for part in s.parts.split(',')}
    for path in paths.values():
        check_place(path, RECORD)
    device, cores = processes.join(machine.pick_device(s.device)), torch.get_num_threads()
    s = s.replace(device=device)
    machine.choose_compile(s.compile, s.device, machine.LONG)  # refuses what cannot be
    for part, path in paths.items():
        if part != 'generation' and s.device == 'cpu':
            s = s.replace(products=machine.choose_products(s.products))
        threads = s.threads or (1 if part == 'generation' else cores)
        machine.set_threads(threads)
        for metrics, curves, notes in PARTS[part](s.replace(threads=threads)):
            result = make_record(part, {**s.as_dict(), 'processes': processes.WORLD}, [s.seed],
                                 metrics, curves, notes, device=s.device)
            processes.from_writer(lambda: save_record(path, result))
        lines = [f'{name:<60}{found["value"]:>16,.3f}' for name, found in metrics.items()]
        lines += [f'{name}: ' + ', '.join(f'{p["value"]:,.0f} ({p["x"]:,})' for p in c['points'])
                  for name, c in curves.items()]
        say('\n'.join([*lines, *notes, f'written to {path}']))
    processes.leave()

if __name__ == '__main__':
    main(configure(globals()))
