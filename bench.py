"""
Measure what the README states about speed and memory: ratios, taken in one run, the sides alternating.

    python bench.py                      # generation: a context without end in a state of constant size
    python bench.py --rounds=3 --contexts=100,1000 --out_dir=out/other
    python bench.py --parts=speed,memory,longest  # training; python bench_training.py has more settings
"""
import os
import statistics
import sys
import time

from configurator import at_least, configure, numbers

parts = 'generation'  # and of training: 'speed', 'memory' over the length of a sequence, the 'longest' sequence
out_dir = 'out/fold_shakespeare'  # run whose folded model is measured
gpt_window = 192      # window of the GPT beside it: the same sizes, fresh weights, on which speed does not depend
contexts = '100,1000,10000,100000,1000000'  # tokens read before the clock starts
window_tokens = 240   # tokens generated between two readings of the clock; whole segments weigh all places alike
rounds = 61           # readings of the clock at each context, the contexts and the models alternating
results_dir = 'results'  # folder of the JSON file and the picture
threads = 1           # CPU threads; one token at a time leaves no work for more
device = 'auto'       # 'auto' takes cuda, mps or cpu, the first that is there
seed = 1337           # of the tokens and of the GPT's weights
config = configure(globals())

import bench_training  # noqa: E402

of_training = [part for part in parts.split(',') if part != 'generation']
if unknown := set(parts.split(',')) - {'generation', 'speed', 'memory', 'longest'}:
    raise SystemExit(f"error: parts are generation, speed, memory and longest, not {sorted(unknown)[0]!r}")
settings_of_training = {**bench_training.defaults(), 'parts': ','.join(of_training), 'device': device, 'results_dir': results_dir,
                        **{key: config[key] for key in ('threads', 'rounds') if key in _given}}
if of_training == parts.split(','):
    bench_training.measure(settings_of_training)
    raise SystemExit(0)

import torch  # noqa: E402

import checkpoint as ckpt  # noqa: E402
from model import GPT, FoldGPT, GPTConfig, sample_token  # noqa: E402


def resident_mb():
    """Memory that this process holds now, in MB; None where the system does not tell."""
    try:
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
    except OSError:
        return None


def seconds(work):
    """Wall-clock time of work(), in seconds, the device's own included."""
    before = time.perf_counter()
    work()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter() - before


def random_tokens(T):
    return torch.randint(fold.config.vocab_size, (1, T), generator=draw).to(device)


def generate(model, state, n):
    """Generate n tokens with greedy choice: the speed of the model, not of the draws."""
    for _ in model.stream(random_tokens(0), state, n, 0):
        pass


@torch.no_grad()
def generate_uncached(model, idx, n):
    """The same without any state: a GPT that recomputes its window for every token."""
    for _ in range(n):
        idx = torch.cat((idx, sample_token(model(idx[:, -gpt_window:])[0][:, -1], 0)), dim=1)


def states_at(model, lengths):
    """{c: the state after c tokens}, and {c: MB that the process holds then}, read in one go up to the longest."""
    state, states, memory = model.new_state(), {}, {}
    for c in sorted(lengths):
        while (left := c - int(state.read[0])) > 0:
            model.read_(random_tokens(min(left, 50_000)), state)
        states[c], memory[c] = state.clone(), resident_mb()
        print(f"{type(model).__name__} has read {c:,} tokens", file=sys.stderr)
    return states, memory


def measure_generation():
    """Tokens per second at each context, alternating; {(model, c): [tokens/s of each round]}."""
    speed = {}
    for turn in range(rounds + 1):  # the first one warms up
        for name, model, states in (('fold', fold, fold_states), ('gpt', gpt, gpt_states)):
            order = sorted(states)
            for c in order[turn % len(order):] + order[:turn % len(order)]:  # no context always comes first
                copy = states[c].clone()
                n = window_tokens if name == 'fold' or c + window_tokens <= gpt_window else max(1, window_tokens // 4)
                rate = n / seconds(lambda: generate(model, copy, n))
                if turn:
                    speed.setdefault((name, c), []).append(rate)
        prompt = random_tokens(gpt_window)
        n = max(1, window_tokens // 4)
        rate = n / seconds(lambda: generate_uncached(gpt, prompt, n))
        if turn:
            speed.setdefault(('gpt uncached', gpt_window), []).append(rate)
        print(f"round {turn} of {rounds}", file=sys.stderr)
    return speed


def measure_reading():
    """Tokens per second of reading 100 segments and a tail, at once and token by token, alternating."""
    T, speed = 100 * fold.config.segment_size + 5, {'read': [], 'step': []}
    idx = random_tokens(T)

    def step():
        state = fold.new_state()
        for t in range(T):
            fold.read_(idx[:, t:t + 1], state)
    for _ in range(max(3, rounds // 3)):
        speed['read'].append(T / seconds(lambda: fold.read_(idx, fold.new_state())))
        speed['step'].append(T / seconds(step))
    return speed


def size(state):
    return sum(value.nbytes for value in vars(state).values())


def picture(path, table):
    """Speed and size of the state against the context, fold and GPT."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, label in (('fold', f'fold, window {fold.config.segment_size}'), ('gpt', f'GPT, window {gpt_window}')):
        rows = [row for row in table if row['model'] == name]
        for ax, key in zip(axes, ('tokens_per_s', 'state_bytes')):
            ax.plot([row['context'] for row in rows], [row[key] for row in rows], 'o-', label=label)
    for ax, title in zip(axes, ('tokens generated per second', 'bytes of state')):
        ax.set(xscale='log', xlabel='tokens read before', title=title)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)


if of_training:
    bench_training.check(settings_of_training)
at_least(config, gpt_window=1, window_tokens=1, rounds=1, threads=1)
lengths = numbers('contexts', contexts, least=1)
device = ckpt.pick_device(device)
torch.set_num_threads(threads)
torch.manual_seed(seed)
draw = torch.Generator().manual_seed(seed)
fold = ckpt.load_model(ckpt.load(ckpt.find_file(os.path.join(ckpt.ROOT, out_dir)), device), device=device).eval()
if not isinstance(fold, FoldGPT):
    raise SystemExit(f"error: {out_dir} holds a GPT; bench.py measures a folded model: name its run with --out_dir")
sizes = {key: getattr(fold.config, key) for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')}
gpt = GPT(GPTConfig(block_size=gpt_window, **sizes)).to(device).eval()

fold_states, fold_memory = states_at(fold, lengths)
gpt_states, _ = states_at(gpt, [min(c, 10 * gpt_window) for c in lengths])  # beyond its window nothing changes any more
rates = measure_generation()
speed = {key: statistics.median(values) for key, values in rates.items()}
reading = {key: statistics.median(rates) for key, rates in measure_reading().items()}

table = [{'model': name, 'context': c, 'tokens_per_s': speed[name, min(c, max(states))],
          'state_bytes': size(states[min(c, max(states))])}
         for name, states in (('fold', fold_states), ('gpt', gpt_states)) for c in lengths]
first, last = (min(lengths, key=lambda c: abs(c - near)) for near in (1000, 1_000_000))
uncached = 'gpt uncached', gpt_window


def ratio(a, b):
    """The median over the rounds of the ratio of two rates: what slows the machine down for a while slows both."""
    return statistics.median(x / y for x, y in zip(rates[a], rates[b]))


pairs = {f'fold at {last:,} tokens / at {first:,}': (('fold', last), ('fold', first)),
         f'fold at {last:,} tokens / GPT uncached, window {gpt_window}': (('fold', last), uncached)}
ratios = {name: ratio(*pair) for name, pair in pairs.items()}
ratios['fold reading at once / token by token'] = reading['read'] / reading['step']
of_medians = {name: speed[a] / speed[b] for name, (a, b) in pairs.items()}  # beside them, as a check
print(f"{'model':<6}{'context':>12}{'tokens/s':>12}{'state bytes':>14}")
for row in table:
    print(f"{row['model']:<6}{row['context']:>12,}{row['tokens_per_s']:>12,.0f}{row['state_bytes']:>14,}")
print(f"GPT uncached, window {gpt_window}: {speed[uncached]:,.0f} tokens/s")
print(f"fold reads {reading['read']:,.0f} tokens/s at once, {reading['step']:,.0f} token by token")
for name, value in ratios.items():
    print(f"{name}: {value:.3f}{f' (ratio of the medians {of_medians[name]:.3f})' if name in of_medians else ''}")
print("MB held after reading: " + ', '.join(f"{c:,}: {mb:.1f}" for c, mb in fold_memory.items() if mb))
results_dir = os.path.join(ckpt.ROOT, results_dir)
ckpt.save_result(os.path.join(results_dir, 'generation.json'), {
    'provenance': ckpt.provenance(device), 'config': ckpt.portable(config), 'table': table, 'ratios': ratios,
    'ratios_of_medians': of_medians, 'gpt_uncached_tokens_per_s': speed[uncached], 'reading_tokens_per_s': reading,
    'resident_mb': fold_memory})
picture(os.path.join(results_dir, 'generation.png'), table)
print(f"written to {results_dir}: generation.json, generation.png")
if of_training:
    bench_training.measure(settings_of_training)
