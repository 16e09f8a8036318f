"""
Pairs: digits with names are shown, one a segment, and asked for by name. How many does the memory hold?

    python pairs.py                                                 # trains, then prints recall against their number
    python pairs.py --n_embd=128 --n_head=4 --out_dir=out/pairs_128
    python pairs.py --init_from=out/pairs --max_iters=0 --wait=100 --out_dir=out/waited

A sequence has a segment for each pair,  filler MARK 3 NAME filler,  and is asked aside,  ASK NAME 3 ASK NAME 7 ...: a
question leaves nothing in the memory. At a NAME that is asked for, its digit is to be predicted. Where a pair is shown,
the digit stands before the name: the place with the name is the one that a question can find, and has read the digit.
"""
import os
import time

from configurator import at_least, configure, show

# run
out_dir = 'out/pairs'       # folder of the checkpoint and of recall.json
init_from = 'scratch'       # 'scratch', or a run or checkpoint of this script to start from
overwrite = False           # start over in an out_dir that holds another run
seed = 1337                 # of the weights and of every sequence
# task
names = 32                  # different names
symbols = 16                # different filler symbols
places = 'turn'             # of pairs in their segments: 'turn' (each a token before the last one's, round and round) or 'any'
# model
segment_size = 12           # l, tokens of a segment
n_local = 1                 # local layers
n_global = 2                # global layers
carry = 'gated'             # 'plain' or 'gated'
n_head = 2                  # attention heads
n_embd = 64                 # channels
matched = True              # start from weights that compare names; False is GPT-2's usual start
place_scale = 8.0           # of a matched start: the position embedding, times so much (README)
# training
pairs = 12                  # most pairs of a sequence
together = 3                # pairs of the first lesson, all in one segment: to tell names apart
passed_at = 0.95            # its recall at which pairs one a segment, and sequences that walk on, take over
fresh = 16                  # new sequences of a later update; as many of those that walk on leave, by chance
batch_size = 64             # sequences of an update of the first lesson; later those that walk on
segments = 4                # that an update reads
questions = 2               # segments of questions that an update asks of every sequence
often = 0.75                # share of the segments with a pair, until a sequence has shown all of its own
max_iters = 2500            # updates
learning_rate = 2e-3        # AdamW's, after warm-up
warmup_iters = 100          # updates of linear warm-up
decay_from = 0.6            # share of the updates after which the learning rate falls, linearly to 0
weight_decay = 0.01         # of matrices and embeddings
beta2 = 0.98                # AdamW's; its beta1 is 0.9
grad_clip = 1.0             # largest norm of the gradient; 0 does not clip
log_interval = 100          # updates between log lines
# evaluation
most = 32                   # recall is measured for 1, 2, ... pairs up to so many
sequences = 200             # fresh sequences for each
wait = 0                    # segments of filler between the last pair and the questions
# machine
device = 'auto'             # 'auto' takes cuda, mps or cpu, the first that is there
threads = 0                 # CPU threads; 0 leaves it to torch
config = configure(globals())

import torch  # noqa: E402

import checkpoint as ckpt  # noqa: E402
import training  # noqa: E402

DIGITS = 10                                # tokens: the filler's from 0 on, then the digits, MARK, ASK and the names
MARK, ASK = symbols + DIGITS, symbols + DIGITS + 1
FIRST_DIGIT, FIRST_NAME = symbols, ASK + 1
draw = torch.Generator().manual_seed(seed)


def uniform(*shape):
    return torch.rand(shape, generator=draw)


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=draw)


class Rows:
    """Sequences, as far as they have been read.

    names and digits (B, names) are in the order in which they come, most (B,) is how many pairs are shown in all, shown
    (B,) how many were so far, start (B,) the place of the first, carry (B, l, C) the memory, None before anything is read.
    """

    def __init__(self, most):
        B, self.most, self.carry = len(most), most, None
        self.names = FIRST_NAME + uniform(B, names).argsort(dim=1)
        self.digits = integers(FIRST_DIGIT, FIRST_DIGIT + DIGITS, B, names)
        self.shown, self.start = torch.zeros_like(most), integers(0, segment_size - 2, B)

    def show(self, x, rows, at):
        """The next pair of some rows into x (B, T), in place, from `at` on."""
        which = self.shown[rows]
        x[rows, at], x[rows, at + 1], x[rows, at + 2] = MARK, self.digits[rows, which], self.names[rows, which]
        self.shown[rows] += 1

    def at_once(self, n):
        """One segment with n pairs in it, side by side, (B, l)."""
        B = len(self.most)
        x = integers(0, symbols, B, segment_size)
        for pair in range(n):
            self.show(x, torch.arange(B), torch.full((B,), 3 * pair))
        return x

    def further(self, n, often):
        """The next n segments, (B, n * l): the first of all shows a pair, later ones as often as told, while there are any."""
        B, l = len(self.most), segment_size
        x = integers(0, symbols, B, n * l)
        for s in range(n):
            shows = ((uniform(B) < often) | (self.shown == 0)) & (self.shown < self.most)
            rows = shows.nonzero()[:, 0]
            turn = (self.start[rows] - self.shown[rows]) % (l - 2)
            self.show(x, rows, s * l + (turn if places == 'turn' else integers(0, l - 2, len(rows))))
        return x

    def questions(self, which):
        """Questions for the pairs which (B, Q), counted in the order in which they came, as many in a segment as fit.

        Returns tokens and targets, (B * ceil(Q / (l // 3)), l) each: -1 where nothing is asked for.
        """
        (B, Q), per_segment = which.shape, segment_size // 3
        x = integers(0, symbols, B, -(-Q // per_segment), segment_size)
        y = torch.full_like(x, -1)
        for q, pair in enumerate(which.T):
            s, at = q // per_segment, q % per_segment * 3
            name, digit = self.names[torch.arange(B), pair], self.digits[torch.arange(B), pair]
            x[:, s, at], x[:, s, at + 1], x[:, s, at + 2], y[:, s, at + 1] = ASK, name, digit, digit
        return x.view(-1, segment_size), y.view(-1, segment_size)

    def pick(self, rows):
        """Keep the rows at the indices (R,), in place."""
        vars(self).update({key: value[rows] for key, value in vars(self).items()})

    def join(self, other):
        """Add the rows of another, in place."""
        vars(self).update({key: torch.cat((value, getattr(other, key))) for key, value in vars(self).items()})


def ask(rows, which):
    """Ask for the pairs which (B, Q), aside. Returns the loss and which answers are right (B, Q)."""
    x, y = rows.questions(which)
    carry = rows.carry.repeat_interleave(len(x) // len(which), dim=0)
    logits, loss, _ = model(x.to(device), y.to(device), carry)
    return loss, (logits.detach().argmax(dim=-1).cpu() == y)[y >= 0].view(which.shape)


def first_lesson(lr):
    """An update on new sequences with all pairs in one segment. Returns the loss and the share of right answers."""
    rows = Rows(torch.full((batch_size,), together))
    rows.carry = model(rows.at_once(together).to(device))[2]
    return learn(rows, lr)


def further_lesson(walking, lr):
    """An update on new sequences and on those that walk on. Returns the loss, the share right, and those that walk on now."""
    most = torch.where(uniform(fresh) < 0.5, pairs, integers(1, pairs + 1, fresh))
    rows = Rows(most)
    rows.carry = model(rows.further(segments, often).to(device))[2]
    if walking is not None:
        walking.carry = model(walking.further(segments, often).to(device), carry=walking.carry)[2]
        rows.join(walking)
    loss, right = learn(rows, lr)
    rows.carry = rows.carry.detach()
    rows.pick(torch.cat((torch.arange(fresh), fresh + uniform(len(rows.most) - fresh).argsort()[:batch_size - fresh])))
    return loss, right, rows


def learn(rows, lr):
    """Ask for pairs that have been shown, any of them and any number of times, and update the model."""
    Q = questions * (segment_size // 3)
    loss, right = ask(rows, (uniform(len(rows.shown), Q) * rows.shown[:, None]).long())
    training.update(model, optimizer, loss, lr, grad_clip)
    return loss.item(), right.float().mean().item()


def train():
    """All updates. Returns the log: a record every log_interval updates and at the end of the first lesson."""
    walking, recall, lesson, log, begun = None, 0.0, 1 if init_from == 'scratch' else 2, [], time.perf_counter()
    model.train()
    for it in range(max_iters):
        lr = training.linear_lr(it, max_iters, learning_rate, warmup_iters, decay_from)
        if lesson == 1:
            loss, right = first_lesson(lr)
        else:
            loss, right, walking = further_lesson(walking, lr)
        recall += 0.05 * (right - recall)
        passed, last = lesson == 1 and recall >= passed_at, it + 1 == max_iters or stop.wanted()
        if passed or last or (it + 1) % log_interval == 0:
            load = walking.shown.float().mean().item() if walking else together
            log.append({'iter': it + 1, 'seconds': time.perf_counter() - begun, 'lesson': lesson, 'loss': loss,
                        'recall': recall, 'load': load})
            print(f"iter {it + 1}: loss {loss:.4f}, recall {recall:.3f} at {load:.1f} pairs{' in one segment' * (lesson == 1)}, "
                  f"{log[-1]['seconds']:.0f} s", flush=True)
        if passed:
            lesson, recall = 2, 0.0
        if stop.wanted():
            break
    return log


@torch.no_grad()
def recall_of(n):
    """Recall of n pairs in fresh sequences, `wait` segments after the last: the share of right answers (n,), in the order
    in which the pairs were shown."""
    right = torch.zeros(n)
    for some in torch.arange(sequences).split(50):
        rows = Rows(torch.full_like(some, n))
        rows.carry = model(rows.further(n, 1.0).to(device))[2]
        for _ in range(wait):
            rows.carry = model(rows.further(1, 1.0).to(device), carry=rows.carry)[2]
        which = uniform(len(some), n).argsort(dim=1)
        right.index_add_(0, which.flatten(), ask(rows, which)[1].flatten().float())
    return right / sequences


def recall_table():
    """Recall of 1, 2, ... pairs: a list of records. Sequences of a seed of their own."""
    table = []
    draw.manual_seed(seed + 1_000_003)
    for n in range(1, most + 1):
        each = recall_of(n).tolist()
        table.append({'pairs': n, 'recall': sum(each) / n, 'answers': n * sequences, 'in_order': each})
        print(f"{n:>3} pairs: recall {table[-1]['recall']:.3f}, {n * sequences} answers", flush=True)
    return table


def held(table, share=0.9):
    """The largest number of pairs up to which every one is recalled at `share` or better."""
    return next((row['pairs'] - 1 for row in table if row['recall'] < share), len(table))


def match_names(model):
    """Start attention where it compares and copies, in place: keys equal to queries, and larger, values and outputs near
    the identity, tokens larger than places (mimetic initialization, Trockman and Kolter 2023). GPT-2's usual start has
    every place attend to all others alike, and finding a pair by its name does not set in."""
    C = model.config.n_embd
    with torch.no_grad():
        model.transformer.wte.weight *= 8
        model.transformer.wpe.weight *= place_scale
        for block in model.transformer.h:
            q, k, v = block.attn.c_attn.weight.split(C)
            q *= 4
            k.copy_(q)
            for weight in (v, block.attn.c_proj.weight):
                weight.copy_(0.5 * weight + 0.7 * torch.eye(C))


def check_config():
    """Refuse what would fail later."""
    at_least(config, names=1, symbols=1, segment_size=3, pairs=1, together=1, fresh=1, batch_size=1, segments=1, questions=1,
             max_iters=0, warmup_iters=1, log_interval=1, most=1, sequences=1, wait=0, threads=0, learning_rate=0.0,
             weight_decay=0.0, grad_clip=0.0)
    if places not in ('turn', 'any'):
        raise SystemExit(f"error: places must be 'turn' or 'any', not {places!r}")
    for key in ('pairs', 'together', 'most'):
        if config[key] > names:
            raise SystemExit(f"error: {key}={config[key]} needs as many names, not {names}")
    if together > segment_size // 3:
        raise SystemExit(f"error: together={together} pairs of three tokens do not fit into a segment of {segment_size}")
    if fresh > batch_size:
        raise SystemExit(f"error: fresh={fresh} is more than batch_size={batch_size}")
    if not 0 <= beta2 < 1:
        raise SystemExit(f"error: beta2={beta2} must lie in [0, 1)")
    if not overwrite:
        ckpt.refuse_to_replace(target, 'ckpt.pt' if max_iters else 'recall.json')


target = os.path.join(ckpt.ROOT, out_dir)
device = ckpt.pick_device(device)
if threads:
    torch.set_num_threads(threads)
torch.manual_seed(seed)
if init_from == 'scratch':
    check_config()
    model = ckpt.make_model('fold', {**config, 'vocab_size': FIRST_NAME + names, 'bias': False, 'dropout': 0.0,
                                     'block_size': segment_size})
    if matched:
        match_names(model)
    model.to(device)
else:
    saved = ckpt.load(ckpt.find_file(init_from), device)
    model = ckpt.load_model(saved, device=device)
    config.update({key: value for key, value in saved['model_args'].items() if key in config})
    segment_size = config['segment_size']
    check_config()
    task = [saved.get('config', {}).get(key, config[key]) for key in ('symbols', 'names')]
    if saved['model_type'] != 'fold' or model.config.vocab_size != FIRST_NAME + names or task != [symbols, names]:
        raise SystemExit(f"error: {init_from} is a {saved['model_type']} that knows {model.config.vocab_size} tokens "
                         f"({task[0]} symbols, {task[1]} names), this task needs a fold that "
                         f"knows {FIRST_NAME + names} ({symbols}, {names}): give the names and symbols it was trained with")
optimizer = model.configure_optimizers(weight_decay, learning_rate, (0.9, beta2), device.split(':')[0])
if device == 'cpu':
    training.keep_freed_memory()
stop = training.Stop()
made_by = ckpt.provenance(device)
print(show(config))
print(f"fold with {model.num_params():,} parameters on {device} ({made_by['hardware']})")
begun = time.perf_counter()
log = train()
trained = time.perf_counter() - begun
if max_iters:
    print(f"trained in {trained / 60:.1f} minutes")
    ckpt.save_task(target, model, 'fold', config, log, trained, made_by)
    if stop.wanted():
        print(f"stopped after update {log[-1]['iter']} of {max_iters}; recall is not measured: --init_from={target} "
              f"--max_iters=0 does that")
        raise SystemExit(0)
elif init_from != 'scratch':  # what is measured now has been trained then
    log, trained = saved.get('log', []), saved.get('seconds', 0.0)
stop.done()
model.eval()
try:
    table = recall_table()
except KeyboardInterrupt:
    raise SystemExit(f"stopped while recall was measured; --init_from={target} --max_iters=0 begins that again") from None
print(f"most pairs recalled at 0.9: {held(table)}; chance: {1 / DIGITS:g}")
result = {'parameters': model.num_params(), 'sizes': ckpt.model_args(model), 'held_at_0.9': held(table), 'recall': table,
          'chance': 1 / DIGITS, 'training_minutes': trained / 60, 'minutes': (time.perf_counter() - begun) / 60, 'log': log,
          'config': ckpt.portable(config), 'provenance': made_by}
ckpt.save_result(os.path.join(target, 'recall.json'), result)
print(f"{result['minutes']:.1f} minutes in all; written to {os.path.join(target, 'recall.json')}")
