"""
The needle: a key is shown once, filler follows, then the key is asked for. How far does a model remember it?

    python needle.py config/fold_needle.py       # trains, then prints recall against distance
    python needle.py config/gpt_needle.py        # the same for a GPT of a window of two segments
    python needle.py config/fold_needle.py --filler=text --out_dir=out/fold_needle_text
    python needle.py config/fold_needle.py --init_from=out/fold_needle --max_iters=0 --distances=12,48 --out_dir=out/again
    python needle.py --draw=out/fold_needle/recall.json,out/gpt_needle/recall.json  # both in one picture

A row of tokens:  filler  MARK 3 1 4 1 5  filler ... filler  ASK 3 1 4 1 5
The answer counts if all of its digits are right. pairs.py is the same for several needles, each with a name.
"""
import os
import sys
import time

from configurator import at_least, configure, numbers, show

# run
out_dir = 'out/needle'      # folder of the checkpoint, the log and recall.json
init_from = 'scratch'       # 'scratch', or a run or checkpoint of this script to start from
overwrite = False           # start over in an out_dir that holds another run
draw = ''                   # nothing but a picture, recall.png beside the first of these files, separated by commas
seed = 1337                 # of the weights and of every sequence
# task
filler = 'symbols'          # 'symbols' (random ones) or 'text' (stretches of a prepared data set)
symbols = 16                # different filler symbols
dataset = 'shakespeare'     # of filler 'text': its training split trains, its validation split tests
data_dir = 'data'           # folder of the prepared data sets
key_length = 5              # digits of a key
# model
model_type = 'fold'         # 'fold' or 'gpt'
segment_size = 12           # l, tokens of a fold's segment
n_local = 1                 # local layers of a fold
n_global = 2                # global layers of a fold
carry = 'plain'             # a fold's: 'plain' or 'gated'
block_size = 24             # window of a GPT
n_layer = 3                 # layers of a GPT
n_head = 2                  # attention heads
n_embd = 64                 # channels
# training
batch_size = 64             # new sequences of an update, and at most as many that walk on
longest = 8                 # segments before the two of the question, once the curriculum has grown
first = 1                   # segments with which the curriculum begins
grow_at = 0.98              # recall of new sequences at which the curriculum grows by a segment
leave = 0.01                # share of the walking sequences that leave at each update, though they remember
max_iters = 3000            # updates
learning_rate = 2e-3        # AdamW's, after warm-up
warmup_iters = 100          # updates of linear warm-up
decay_from = 0.6            # share of the updates after which the learning rate falls, linearly to 0
weight_decay = 0.01         # of matrices and embeddings
beta2 = 0.98                # AdamW's; its beta1 is 0.9
grad_clip = 1.0             # largest norm of the gradient; 0 does not clip
log_interval = 100          # updates between log lines, each with the recall at probe_distance
probe_distance = 192        # tokens of filler; the update at which recall there first reaches 0.99 is noted
# evaluation
distances = '12,48,192,768,3072,12288,49152,1000000'  # tokens of filler between key and question
sequences = 200             # fresh sequences at each distance
far = 100000                # from this distance on there are far_sequences
far_sequences = 100         # fresh sequences at far distances
# machine
device = 'auto'             # 'auto' takes cuda, mps or cpu, the first that is there
threads = 0                 # CPU threads; 0 leaves it to torch
config = configure(globals())

import numpy as np  # noqa: E402
import torch  # noqa: E402

import checkpoint as ckpt  # noqa: E402
import training  # noqa: E402
from model import FoldGPT  # noqa: E402
from needle_task import DIGITS, NeedleTask  # noqa: E402
from prepare import load_meta, prepare  # noqa: E402


def picture(files):
    """Recall against distance of several runs, from their recall.json. Raises SystemExit if one is missing or no such file."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name in files:
        result = ckpt.load_result(name)
        if any('distance' not in row for row in result.get('recall', [{}])):
            raise SystemExit(f"error: {name} is no recall.json of a needle at a distance")
        c = result['config']
        points = [(row['distance'], row['recall'], max(0, row['recall'] - row['low']), max(0, row['high'] - row['recall']))
                  for row in result['recall']]
        kind = f"fold, window {c['segment_size']}, {c['carry']}" if result['model'] == 'fold' else f"GPT, window {c['block_size']}"
        x, y, low, high = zip(*points)
        axes.errorbar(x, y, (low, high), fmt='o-', ms=3, capsize=2, label=f"{kind}, {c['filler']}, seed {c['seed']}")
    axes.axhline(result['chance'], color='black', lw=0.8, ls=':', label='chance')
    axes.set_xscale('symlog', linthresh=6)  # a distance may be 0
    axes.set(xlabel='tokens of filler between key and question', ylabel='keys recalled', xlim=0, ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path = os.path.join(os.path.dirname(files[0]), 'recall.png')
    figure.savefig(path, dpi=110)
    print(f"written to {path}")


def make_task(split, seed):
    """The task whose filler comes from the training ('train') or the validation split ('val'), if it is text."""
    if filler == 'symbols':
        return NeedleTask(seed, key_length, symbols)
    folder = os.path.join(ckpt.ROOT, data_dir, dataset)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        prepare(dataset, data_dir=data_dir)
    meta = load_meta(folder)
    text = torch.from_numpy(np.fromfile(os.path.join(folder, f'{split}.bin'), dtype=np.uint16).astype(np.int64))
    return NeedleTask(seed, key_length, meta['vocab_size'], text)


def answered(logits, targets):
    """Which rows have the likeliest token right at all of their targets (B, T), -1 left out: (B,)."""
    return ((logits.argmax(dim=-1) == targets) | (targets < 0)).all(dim=1)


class Walkers:
    """Sequences that go on from update to update for as long as they remember: roll-outs of any depth, of which an
    update pays for the last segments alone. It reads filler into each and asks it, aside, for its key; a row that
    answers wrong leaves, as do some by chance, and new sequences take their places."""

    def __init__(self, R, l, C):
        self.keys = torch.zeros(R, key_length, dtype=torch.int64)
        self.carry = torch.zeros(R, l, C, device=device)
        self.age = torch.zeros(R, dtype=torch.int64)  # tokens since the key
        self.there = torch.zeros(R, dtype=torch.bool)

    def refill(self, keys, carry, age, fit):
        """Put new sequences, those of the B that are fit (B,), into places that are empty."""
        places, rows = (~self.there).nonzero()[:, 0], fit.nonzero()[:, 0]
        n = min(len(places), len(rows))
        places, rows = places[:n], rows[:n]
        self.keys[places], self.age[places], self.there[places] = keys[rows], age[rows], True
        self.carry[places] = carry[rows]

    def mean_age(self):
        return self.age[self.there].float().mean().item() if self.there.any() else 0.0


def read_and_ask(x, y, carry):
    """Read x (B, T) up to its last two segments, and then, aside, those, with the question: targets y (B, T).

    Returns the loss, which rows are right (B,), and the carry before the question (None for a GPT, or if T = 2l).
    """
    x, l = x.to(device), segment_size
    if isinstance(model, FoldGPT) and x.size(1) > 2 * l:
        carry = model(x[:, :-2 * l], carry=carry)[2]
        x, y = x[:, -2 * l:], y[:, -2 * l:]
    W = min(model.config.block_size, x.size(1))  # a GPT reads its windows side by side
    logits, loss, _ = model(x.reshape(-1, W), y.reshape(-1, W).to(device), carry)
    return loss, answered(logits.detach().cpu().view(*y.shape, -1), y), carry


def train_step(F, lr):
    """One update on new sequences, F segments and the two of the question, and on the walkers. Returns loss, recall."""
    l = segment_size
    T = (F + 2) * l if isinstance(model, FoldGPT) else max(2 * l, block_size)
    x, y, keys, after = task.new(batch_size, T, 2 * l if isinstance(model, FoldGPT) else T)
    loss, right, carry = read_and_ask(x, y, None)
    rows = walkers.there.nonzero()[:, 0]
    if len(rows):
        x, y = task.old(walkers.keys[rows], T, 2 * l)
        loss_old, right_old, carry_old = read_and_ask(x, y, walkers.carry[rows])
        loss = loss + loss_old * len(rows) / batch_size
    training.update(model, optimizer, loss, lr, grad_clip)
    if len(rows):
        walkers.carry[rows], walkers.age[rows] = carry_old.detach(), walkers.age[rows] + F * l
        walkers.there[rows] = right_old & (torch.rand(len(rows), generator=task.draw) >= leave)
    if F and carry is not None:
        walkers.refill(keys, carry.detach(), F * l - after, right & (after <= F * l))
    return loss.item(), right.float().mean().item()


def train():
    """All updates. Returns the log: a record every log_interval updates, and one whenever the curriculum grows."""
    stage, recall, log, begun = first, 0.0, [], time.perf_counter()
    model.train()
    for it in range(max_iters):
        hardest = torch.rand((), generator=task.draw) < 0.5
        F = stage if hardest else int(task.integers(0, stage + 1, 1))
        loss, right = train_step(F, training.linear_lr(it, max_iters, learning_rate, warmup_iters, decay_from))
        recall += 0.1 * (right - recall) * (F == stage)
        grows = recall > grow_at and stage < longest and isinstance(model, FoldGPT)
        last = it + 1 == max_iters or stop.wanted()
        if grows or last or (it + 1) % log_interval == 0:
            seconds = time.perf_counter() - begun
            model.eval()
            far = evaluate([probe_distance], 200)[probe_distance] / 200
            model.train()
            begun += time.perf_counter() - begun - seconds  # evaluating is not training
            log.append({'iter': it + 1, 'seconds': seconds, 'loss': loss, 'segments': stage, 'recall': recall,
                        'recall_at_probe_distance': far, 'walkers': int(walkers.there.sum()), 'age': walkers.mean_age()})
            print(f"iter {it + 1}: loss {loss:.4f}, recall {recall:.3f} at {stage} segments and {far:.3f} at {probe_distance} "
                  f"tokens, {log[-1]['walkers']} walkers of {log[-1]['age']:,.0f} tokens, {seconds:.0f} s", flush=True)
        if grows:
            stage, recall = stage + 1, 0.0
        if stop.wanted():
            break
    return log


@torch.no_grad()
def evaluate(lengths, n, progress=False):
    """{d: sequences answered right with d tokens of filler between key and question}: n fresh ones of the test split,
    each asked, aside, at every distance. Their keys begin at all places of a segment, equally often."""
    right, begun, k = {d: 0 for d in lengths}, time.perf_counter(), key_length
    test = make_task('val', seed + 1_000_003 * (1 + n))
    for rows in torch.arange(n).split(50):
        B, lead, keys, at = len(rows), rows % segment_size, test.keys(len(rows)), test.places(len(rows))
        ahead = segment_size - 1 + k  # tokens until the last row has been asked
        coming = test.filling(B, segment_size + k + ahead, at)  # read next, (B, ...): the keys are in the first of them
        test.put_key(coming, keys, lead)
        state, read = model.new_state(B), 0
        for d in sorted(lengths):
            while read < d + k + 1:  # what stands before the question of a row whose key began at once
                T = min(d + k + 1 - read, 6144)
                if coming.size(1) < T + ahead:
                    more = T + ahead - coming.size(1)
                    coming = torch.cat((coming, test.filling(B, more, None if at is None else at + read + coming.size(1))), dim=1)
                model.read_(coming[:, :T].to(device), state)
                coming, read = coming[:, T:], read + T
                if progress and T == 6144 and read % (6144 * 16) == 0:
                    done = (int(rows[0]) + B * read / max(lengths)) / n
                    print(f"{done:.0%} of the way to {max(lengths):,} tokens, "
                          f"{(time.perf_counter() - begun) * (1 / done - 1):.0f} s left", file=sys.stderr, flush=True)
            x, good, aside = coming[:, :ahead].clone(), torch.ones(B, dtype=torch.bool), state.clone()
            y = test.put_question(x, keys, lead)
            for token, target in zip(x.split(1, dim=1), y.T):
                good &= (model.read_(token.to(device), aside).argmax(dim=-1).cpu() == target) | (target < 0)
            right[d] += int(good.sum())
    return right


def interval(right, n, z=1.96):
    """The 95 % interval of a share, right of n (Wilson)."""
    p, center = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * p * (1 - p) + z * z / 4) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def recall_table(lengths):
    """Recall at every distance: a list of records."""
    table = []
    for some, n in (([d for d in lengths if d < far], sequences), ([d for d in lengths if d >= far], far_sequences)):
        for d, right in (evaluate(some, n, progress=True) if some else {}).items():
            low, high = interval(right, n)
            table.append({'distance': d, 'right': right, 'sequences': n, 'recall': right / n, 'low': low, 'high': high})
            print(f"{d:>9,} tokens: recall {right / n:.3f} [{low:.3f}, {high:.3f}], {right} of {n} sequences", flush=True)
    print(f"chance: {DIGITS ** -key_length:g}")
    return table


def check_config():
    """Refuse what would fail later."""
    at_least(config, symbols=1, key_length=1, batch_size=1, longest=1, first=1, max_iters=0, warmup_iters=1, log_interval=1,
             sequences=1, far_sequences=1, threads=0, probe_distance=0, learning_rate=0.0, weight_decay=0.0, grad_clip=0.0)
    if filler not in ('symbols', 'text'):
        raise SystemExit(f"error: filler must be 'symbols' or 'text', not {filler!r}")
    if 2 * key_length + 2 > 2 * segment_size:
        raise SystemExit(f"error: a key of {key_length} digits and its question do not fit into two segments of {segment_size}")
    if first > longest:
        raise SystemExit(f"error: first={first} is more than the curriculum grows to: longest is {longest}")
    if model_type == 'gpt' and block_size % (2 * segment_size) and 2 * segment_size % block_size:
        raise SystemExit(f"error: block_size={block_size} must divide two segments, {2 * segment_size} tokens, or be a multiple")
    if not 0 <= beta2 < 1:
        raise SystemExit(f"error: beta2={beta2} must lie in [0, 1)")
    if not overwrite:
        ckpt.refuse_to_replace(target, 'ckpt.pt' if max_iters else 'recall.json')


if draw:
    picture(draw.split(','))
    raise SystemExit(0)
target = os.path.join(ckpt.ROOT, out_dir)
lengths = numbers('distances', distances)
check_config()
device = ckpt.pick_device(device)
if threads:
    torch.set_num_threads(threads)
torch.manual_seed(seed)
task = make_task('train', seed)
if init_from == 'scratch':
    window = block_size if model_type == 'gpt' else segment_size * (longest + 2)
    model = ckpt.make_model(model_type, {**config, 'vocab_size': task.vocab_size, 'bias': False, 'dropout': 0.0,
                                         'block_size': window}).to(device)
else:
    saved = ckpt.load(ckpt.find_file(init_from), device)
    model, model_type = ckpt.load_model(saved, device=device), saved['model_type']
    config.update({key: value for key, value in {**saved['model_args'], 'model_type': model_type}.items() if key in config})
    if model.config.vocab_size != task.vocab_size:
        raise SystemExit(f"error: {init_from} knows {model.config.vocab_size} tokens, this task has {task.vocab_size}: "
                         f"give the filler and symbols it was trained with")
    segment_size = getattr(model.config, 'segment_size', segment_size)
optimizer = model.configure_optimizers(weight_decay, learning_rate, (0.9, beta2), device.split(':')[0])
walkers = Walkers(batch_size, segment_size, model.config.n_embd)
stop = training.Stop()
made_by = ckpt.provenance(device)
print(show(config))
print(f"{model_type} with {model.num_params():,} parameters on {device} ({made_by['hardware']})")
begun = time.perf_counter()
log = train()
trained = time.perf_counter() - begun
if max_iters:
    print(f"trained in {trained / 60:.1f} minutes")
    ckpt.save_task(target, model, model_type, config, log, trained, made_by)
    if stop.wanted():
        print(f"stopped after update {log[-1]['iter']} of {max_iters}; recall is not measured: --init_from={target} "
              f"--max_iters=0 does that")
        raise SystemExit(0)
elif init_from != 'scratch':  # what is measured now has been trained then
    log, trained = saved.get('log', []), saved.get('seconds', 0.0)
stop.done()
model.eval()
try:
    table = recall_table(lengths)
except KeyboardInterrupt:
    raise SystemExit(f"stopped while recall was measured; --init_from={target} --max_iters=0 begins that again") from None
reached = next((record for record in log if record['recall_at_probe_distance'] >= 0.99), None)
result = {'parameters': model.num_params(), 'sizes': ckpt.model_args(model), 'model': model_type, 'recall': table,
          'chance': DIGITS ** -key_length, 'training_minutes': trained / 60,
          'minutes': (time.perf_counter() - begun) / 60, 'first_0.99_at_probe_distance': reached, 'log': log,
          'config': ckpt.portable(config), 'provenance': made_by}
ckpt.save_result(os.path.join(target, 'recall.json'), result)
print(f"{result['minutes']:.1f} minutes in all; written to {os.path.join(target, 'recall.json')}")
