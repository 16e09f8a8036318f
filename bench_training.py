"""
Measure training: tokens per second, efficiency, and memory as a function of the length of a sequence.

    python bench_training.py                       # all of it; hours on two CPU cores, most of it for long sequences
    python bench_training.py --parts=speed --sizes=2+2x128x4 --starts=9 --processes=1,2
    python bench_training.py --parts=memory,longest --block_sizes=192,768 --longest_cap=3072
"""
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress

from configurator import at_least, configure, numbers

parts = 'speed,memory,longest'  # what is measured
sizes = '2+2x128x4,6+6x384x6'  # local+global layers x channels x heads, for the speed; memory is measured at the first
segment_size = 12     # l
window = 192          # tokens of a sequence of the fold and of the GPT's window, for the speed
batch_size = 16       # sequences of an update
bptt_segments = 16    # of the truncated fold
vocab_size = 65       # tiny Shakespeare's characters
starts = 5            # times that the sides' processes are started, for the speed, which differs from start to start
rounds = 7            # readings of the clock after each start, the sides alternating
steps = 4             # updates between two readings
block_sizes = '192,384,768,1536,3072,6144,12288,24576,49152'  # of the memory curve
tries = 3             # processes that measure a point of the memory curve, which differ by a tenth; the median counts
memory_limit_gb = 4.0  # points that are going to need more, by the two before them, are left out
budget_gb = 2.0       # of the longest sequence: the whole process on a CPU, the allocator on a GPU
longest_cap = 196608  # tokens; longer sequences are not tried, a mode that reaches it could do more
products = 'auto'     # as in train.py
compile = 'auto'      # as in train.py
device = 'auto'       # 'auto' takes cuda, mps or cpu, the first that is there
threads = 0           # CPU threads of each process; 0 leaves it to torch
processes = 'auto'    # of every side, for the speed: '1,2' is in one, and in two that share the batch; 'auto' is that on a CPU, else '1'
results_dir = 'results'  # folder of training.json and training.png
MODES = ('full', 'truncated', 'recomputed', 'gpt')


def parse(size):
    """'2+2x128x4' -> (2, 2, 128, 4): local and global layers, channels, heads. Raises SystemExit for anything else."""
    try:
        layers, n_embd, n_head = size.split('x')
        n_local, n_global = layers.split('+')
        return int(n_local), int(n_global), int(n_embd), int(n_head)
    except ValueError:
        raise SystemExit(f"error: a size is local+globalxchannelsxheads, such as 2+2x128x4, not {size!r}") from None


def model_settings(size, T, c):
    """The settings of a model of that size for sequences of T tokens."""
    n_local, n_global, n_embd, n_head = parse(size)
    return dict(block_size=T, vocab_size=c['vocab_size'], n_layer=n_local + n_global, n_local=n_local, n_global=n_global,
                n_head=n_head, n_embd=n_embd, segment_size=c['segment_size'], bias=False, dropout=0.0)


def make(mode, size, T, c):
    """One side: its model, its optimizer, and update(x, y), as train.py makes it: one of several processes takes its share
    of the rows. c: the settings, with device found."""
    import torch
    import training
    from checkpoint import make_model
    model = make_model('gpt' if mode == 'gpt' else 'fold', model_settings(size, T, c)).to(c['device'])
    kind = c['device'].split(':')[0]
    if kind == 'cpu':
        training.keep_freed_memory()
        training.choose_products(c['products'])
    autocast = torch.autocast('cuda', torch.bfloat16) if kind == 'cuda' else nullcontext()
    training.compile_model(model, c['batch_size'] // training.WORLD, c['compile'], c['device'], autocast)
    trained = training.parallel(model, c['device'])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), kind)
    how = {'chunk': c['bptt_segments'] * c['segment_size']} if mode == 'truncated' else {}
    how = {'recompute': True} if mode == 'recomputed' else how

    def update(x, y):
        x, y = (tokens.chunk(training.WORLD)[training.RANK] for tokens in (x, y))
        loss, _ = training.backpropagate(trained, x, y, device=c['device'], autocast=autocast, **how)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=c['compile'] != 'graphs')
        return loss
    return model, optimizer, update


def batch(T, c):
    """Random tokens and targets, (batch_size, T) of uint16 each, as the corpus holds them."""
    import numpy as np
    import torch
    draw = np.random.default_rng(T)
    tokens = torch.from_numpy(draw.integers(c['vocab_size'], size=(c['batch_size'], T + 1), dtype=np.uint16))
    return tokens[:, :-1], tokens[:, 1:]


def wait(device):
    if device.startswith('cuda'):
        import torch
        torch.cuda.synchronize()


def speed_side(mode, size, c):
    """One process of a side of measure_speed: the side's FLOPs per token, its parameters and the threads of a process, then,
    for every line that comes in, `steps` updates and the side's tokens per second. Each is a line of JSON on standard
    output, of the first process."""
    import torch
    import training
    from flops import flops_per_token
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops measure_speed, which ends this process
    if c['threads']:
        torch.set_num_threads(c['threads'])
    c['device'] = training.join(c['device'])
    torch.manual_seed(1337)
    model, _, update = make(mode, size, c['window'], c)
    x, y = batch(c['window'], c)
    print(json.dumps([float(flops_per_token(model, c['window'])), model.num_params(), torch.get_num_threads()]), flush=True)
    for _ in sys.stdin:
        before = time.perf_counter()
        for _ in range(c['steps']):
            update(x, y)  # ends when all processes have their gradients
        wait(c['device'])
        print(json.dumps(c['steps'] * x.numel() / (time.perf_counter() - before)), flush=True)


def measure_speed(size, c):
    """{name: row} of tokens per second of every mode at one size, in every number of processes, alternating; medians.

    'full' is a mode in one process, 'full, 2 processes' in two. Ratio and efficiency, (tokens/s / tokens/s of the GPT) /
    (FLOPs per token of the GPT / its own), are against the GPT in the number of processes in which that is fastest;
    by_start is the efficiency of the rounds after each start alone.
    """
    starts = [alternate(size, c) for _ in range(c['starts'])]
    counted, rows = starts[0][0], {}
    pooled = {name: [speed for _, speeds in starts for speed in speeds[name]] for name in counted}
    best = max((name for name in counted if name.split(',')[0] == 'gpt'), key=lambda name: statistics.median(pooled[name]))
    for name, (flops, parameters, threads) in counted.items():
        ratios = [[a / b for a, b in zip(speeds[name], speeds[best])] for _, speeds in starts]
        ratio, more = statistics.median(sum(ratios, [])), flops / counted[best][0]
        rows[name] = {'tokens_per_s': statistics.median(pooled[name]), 'all': pooled[name], 'ratio': ratio,
                      'flops_per_token': flops, 'parameters': parameters, 'threads': threads, 'efficiency': ratio * more,
                      'by_start': [statistics.median(some) * more for some in ratios]}
    return rows


def alternate(size, c):
    """{side: [FLOPs per token, parameters, threads]} and {side: its tokens per second in each of c['rounds'] rounds}.

    Each side has processes of its own, as in training, so that none finds its memory in pieces that another left.
    Raises SystemExit if one of them ends before its time.
    """
    kinds = [(mode, n) for n in numbers('processes', c['processes']) for mode in MODES]
    names = [mode + f', {n} processes' * (n > 1) for mode, n in kinds]
    sides = {name: [] for name in names}

    def answer(name):
        while True:
            for rank, process in enumerate(sides[name]):  # the first would wait for one that has ended
                if process.poll() is not None:
                    raise SystemExit(f"error: process {rank} of {name} at {size} ended with code {process.returncode}")
            if select.select([sides[name][0].stdout], [], [], 1)[0]:
                line = sides[name][0].stdout.readline()
                if line[:1].isdigit() or line[:1] == b'[':  # and not a remark, such as compile_model's
                    return json.loads(line)

    def ask(name):
        for process in sides[name]:
            with suppress(OSError):  # it has ended: answer tells
                process.stdin.write(b'\n')
        return answer(name)
    try:
        for name, (mode, n), port in zip(names, kinds, free_ports(len(kinds))):
            launch(sides[name], mode, size, n, port, c)
        counted, speeds = {name: answer(name) for name in names}, {name: [] for name in names}
        for r in range(c['rounds'] + 1):  # the first one warms up
            for name in names if r % 2 else names[::-1]:
                speeds[name].append(ask(name))
    finally:
        for process in sum(sides.values(), []):
            process.kill()
            process.wait()  # the next start finds the machine free
    return counted, {name: speeds[name][1:] for name in names}


def launch(side, mode, size, n, port, c):
    """Add to a side its n processes, which meet as those of torchrun do."""
    command = [sys.executable, os.path.abspath(__file__), 'speed', json.dumps([mode, size, c])]
    shared = {'OMP_NUM_THREADS': '1', **os.environ, 'WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    for rank in range(n):
        own = {**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} if n > 1 else None
        side.append(subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0))


def free_ports(n):
    """n ports of this machine that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


def peak_mb(device):
    """The most memory there was: of the CUDA allocator, else of this process; in MB."""
    if device.startswith('cuda'):
        import torch
        return torch.cuda.max_memory_allocated() / 1e6
    if os.path.exists('/proc/self/status'):  # ru_maxrss would go on from the peak of the process that started this one
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith('VmHWM'))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e6


def memory_point(mode, size, T, c):
    """Peak memory of updates on sequences of T tokens, in this process, which should have done nothing before.

    Of short sequences it takes several: what gradients and the heap's gaps take comes with the second backward pass.
    """
    import torch
    if c['threads']:
        torch.set_num_threads(c['threads'])
    model, optimizer, update = make(mode, size, T, c)
    for p in model.parameters():  # the optimizer's memory is there before the measurement
        p.grad = torch.zeros_like(p)
    optimizer.step()
    x, y = batch(T, c)
    if c['device'].startswith('cuda'):
        torch.cuda.reset_peak_memory_stats()  # what is compiled was tried out
    before = peak_mb(c['device'])
    updates, start = max(1, 1536 // T), time.perf_counter()
    for _ in range(updates):
        update(x, y)
    wait(c['device'])
    return {'mode': mode, 'block_size': T, 'peak_mb': peak_mb(c['device']), 'before_mb': before,
            'training_mb': peak_mb(c['device']) - before, 'seconds': (time.perf_counter() - start) / updates}


def in_own_process(mode, size, T, c):
    """memory_point in a process of its own; None if it does not end well, for want of memory above all."""
    done = subprocess.run([sys.executable, os.path.abspath(__file__), 'point', json.dumps([mode, size, T, c])],
                          capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [''])[-1][:100]
        print(f"  {mode:<10} {T:>7}: failed with code {done.returncode} {reason}", flush=True)
        return None
    point = json.loads(lines[-1])
    print(f"  {mode:<10} {T:>7}: {point['training_mb']:9.1f} MB for training, {point['peak_mb']:9.1f} MB in all, "
          f"{point['seconds']:.1f} s", flush=True)
    return point


def slope(points):
    """MB that a token more costs, by the last two points."""
    a, b = points[-2:]
    return max(0.0, (b['peak_mb'] - a['peak_mb']) / (b['block_size'] - a['block_size']))


def memory_curve(mode, size, c):
    """Points at all block sizes, up to the memory limit."""
    points = []
    for T in numbers('block_sizes', c['block_sizes']):
        need = points[-1]['peak_mb'] + slope(points) * (T - points[-1]['block_size']) if len(points) > 1 else 0
        if need > 1000 * c['memory_limit_gb']:
            print(f"  {mode:<10} {T:>7}: left out, needs more than {c['memory_limit_gb']} GB", flush=True)
            break
        found = []
        while len(found) < c['tries'] and None not in found:
            found.append(in_own_process(mode, size, T, c))
        if None in found:
            break
        points.append(sorted(found, key=lambda point: point['peak_mb'])[len(found) // 2])
    return points


def longest(mode, size, c):
    """The longest single sequence that is trained within the budget: found by its slope, then tried out."""
    budget, c, points, l = 1000 * c['budget_gb'], {**c, 'batch_size': 1}, [], c['segment_size']
    cap = c['longest_cap'] // l * l

    def attempt(T):
        point = in_own_process(mode, size, T, c)
        if point is None or point['peak_mb'] > budget:
            return False
        points.append(point)
        return True
    T = min(c['bptt_segments'] * l, cap)
    while not attempt(T):
        if T == l:
            return {'block_size': 0, 'capped': False}
        T = max(l, T // 2 // l * l)
    while T < cap and points[-1]['training_mb'] < (budget - points[-1]['before_mb']) / 4 and attempt(min(2 * T, cap)):
        T = points[-1]['block_size']
    if len(points) == 1 and T > l and attempt(max(l, T // 2 // l * l)):
        points.reverse()  # a slope needs two, rising
    if len(points) > 1 and T < cap:
        room = (budget - points[-1]['peak_mb']) / max(slope(points), 1e-9)
        more = min(cap, int(T + room)) // l * l
        while more > T and not attempt(more):
            more = int(0.97 * more) // l * l
        T = max(T, more)
    while T < cap and attempt(min(cap, max(T + l, int(1.03 * T) // l * l))):  # one that fails is a segment or 3 % longer
        T = points[-1]['block_size']
    best = max(points, key=lambda point: point['block_size'])
    return {**best, 'capped': best['block_size'] >= cap, 'mb_per_token': slope(points) if len(points) > 1 else None}


def draw(results, path):
    """Memory over block size, one line a mode."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for mode, points in results['memory'].items():
        axes.loglog([p['block_size'] for p in points], [max(p['training_mb'], 1) for p in points], marker='o',
                    label='GPT, full window' if mode == 'gpt' else f'fold, {mode}')
    axes.set(xlabel='tokens of a sequence (block_size)', ylabel='peak memory of training, MB')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def table(results):
    """The results as Markdown."""
    lines = []
    for size, rows in results.get('speed', {}).items():
        lines += [f"\n{size}: training, tokens per second (medians, alternating)\n",
                  "| | tokens/s | of the GPT's | MFLOPs per token | efficiency |", "|---|---|---|---|---|"]
        lines += [f"| {mode} | {r['tokens_per_s']:,.0f} | {r['ratio']:.3f} | {r['flops_per_token'] / 1e6:.2f} | "
                  f"{r['efficiency']:.3f} |" for mode, r in rows.items()]
    if 'memory' in results:
        found = {mode: {point['block_size']: point['training_mb'] for point in points}
                 for mode, points in results['memory'].items()}
        lines += ["\nPeak memory of training, MB\n", f"| block_size | {' | '.join(found)} |", '|---' * (len(found) + 1) + '|']
        for T in sorted(set().union(*found.values())):
            cells = [f"{found[mode][T]:,.0f}" if T in found[mode] else '-' for mode in found]
            lines.append(f"| {T:,} | {' | '.join(cells)} |")
    if 'longest' in results:
        lines += [f"\nLongest sequence (batch of 1) in {results['made']['longest']['settings']['budget_gb']:g} GB\n",
                  "| | tokens | MB |", "|---|---|---|"]
        lines += [f"| {mode} | {'at least ' if r['capped'] else ''}{r['block_size']:,} | {r.get('peak_mb', 0):,.0f} |"
                  for mode, r in results['longest'].items()]
    return '\n'.join(lines)


def defaults():
    """The settings at the top of this file."""
    return {key: value for key, value in globals().items() if not key.startswith('_') and type(value) in (bool, int, float, str)}


def check(c):
    """Settings with device and processes found. Raises SystemExit for any that would fail later."""
    import torch
    from checkpoint import make_model, pick_device
    from training import COMPILE, PRODUCTS
    unknown = set(c['parts'].split(',')) - {'speed', 'memory', 'longest'}
    if unknown:
        raise SystemExit(f"error: parts are speed, memory and longest, not {sorted(unknown)[0]!r}")
    at_least(c, segment_size=1, window=1, batch_size=1, bptt_segments=1, vocab_size=1, starts=1, rounds=1, steps=1, tries=1,
             threads=0, longest_cap=c['segment_size'], memory_limit_gb=0.1, budget_gb=0.1)
    if c['products'] not in PRODUCTS:
        raise SystemExit(f"error: products must be 'auto', 'onednn' or 'torch', not {c['products']!r}")
    if c['compile'] not in COMPILE:
        raise SystemExit(f"error: compile must be one of {', '.join(COMPILE)}, not {c['compile']!r}")
    c = {**c, 'device': pick_device(c['device'])}
    if c['processes'] == 'auto':
        c['processes'] = '1,2' if c['device'] == 'cpu' and (os.cpu_count() or 1) > 1 and c['batch_size'] % 2 == 0 else '1'
    for n in numbers('processes', c['processes'], least=1):
        if c['batch_size'] % n:
            raise SystemExit(f"error: {n} processes cannot share batch_size={c['batch_size']} sequences equally")
        if n > 1 and c['device'] != 'cpu' and n > torch.cuda.device_count():
            raise SystemExit(f"error: {n} processes find no device each on {c['device']!r}: take --processes=1 or --device=cpu")
    for size in c['sizes'].split(','):
        make_model('fold', model_settings(size, c['window'], c))
    numbers('block_sizes', c['block_sizes'], least=1, multiple=c['segment_size'])
    return c


def measure(c):
    """All parts asked for; c: the settings. Prints a table and writes training.json and training.png.

    Raises SystemExit for settings that cannot be, and if it is interrupted.
    """
    try:
        measure_parts(check(c))
    except KeyboardInterrupt:
        raise SystemExit("stopped; what was measured to its end is kept") from None


def measure_parts(c):
    """measure, of settings that check has returned."""
    import torch
    import training
    from checkpoint import ROOT, load_result, portable, provenance, save_result
    if c['device'] == 'cpu':
        c['products'] = training.choose_products(c['products'])  # what 'auto' is here, for the record too
    if c['threads']:
        torch.set_num_threads(c['threads'])  # for the record: what is measured runs in other processes
    path = os.path.join(ROOT, c['results_dir'], 'training.json')
    results = load_result(path) if os.path.exists(path) else {}  # parts and sizes not measured now stay as they were
    made, how = results.setdefault('made', {}), {'settings': portable(c), 'provenance': provenance(c['device'])}
    if 'speed' in c['parts']:
        for size in c['sizes'].split(','):
            results.setdefault('speed', {})[size], made[f'speed {size}'] = measure_speed(size, c), how
            save_result(path, results)  # each as soon as it is there: they take long
    for part, work in (('memory', memory_curve), ('longest', longest)):
        if part in c['parts']:
            print(f"{part}:")
            results[part], made[part] = {}, how
            for mode in MODES:
                results[part][mode] = work(mode, c['sizes'].split(',')[0], c)
                save_result(path, results)
    print(table(results))
    if 'memory' in results:
        draw(results, path.removesuffix('.json') + '.png')


if __name__ == '__main__':
    if sys.argv[1:2] == ['point']:
        print(json.dumps(memory_point(*json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ['speed']:
        speed_side(*json.loads(sys.argv[2]))
    else:
        measure(configure(globals()))
