"""Train a model of models/ on a task of tasks/.

    python train.py config/fold_shakespeare.py
    python train.py config/gpt_shakespeare.py --seed=1338 --out_dir=out/another
    python train.py config/fold_needle.py
    torchrun --standalone --nproc_per_node=2 train.py config/fold_shakespeare.py

Ctrl-C or SIGTERM finishes the update and saves; --init_from=resume then goes on as if nothing had
happened.
"""
import lib.start  # noqa: F401 (before torch)
import json
import math
import os
import shlex
import signal
import statistics
import time
from functools import cache
from types import SimpleNamespace

import torch

from configurator import at_least, configure, defaults_of, merge, one_of, show
from lib import checkpoint as ckpt
from lib import device as machine
from lib import processes
from lib.console import count, duration, require, say
from lib.contract import (
    adamw,
    carries,
    check_contract,
    count_parameters,
    find_model,
    flops_per_token,
    make_model,
)
from lib.files import is_temporary, own_folder
from lib.gradients import random_state, set_random_state
from lib.graphs import Graphs
from lib.pictures import curves
from lib.processes import RANK, WORLD, from_all, from_writer
from lib.records import ROOT, make_record, metric, provenance, save_record
from lib.streaming import check_reading
from tasks import find_task

# run
task = 'text'               # 'text', 'needle', 'track' or another of tasks/
out_dir = 'out/run'         # folder of the checkpoints and the log
init_from = 'scratch'       # 'scratch', 'resume' (goes on with out_dir/last.pt), a checkpoint, a
                            # folder of Hugging Face's format, or published weights: 'gpt2',
                            # 'gpt2-medium', 'gpt2-large' or 'gpt2-xl', fetched once, into
                            # ~/.cache/foldgpt or the folder that FOLDGPT_CACHE names
overwrite = False           # start over in an out_dir that holds another run
seed = 1337                 # of the weights, of dropout and of the order of the data
# model
model_type = 'fold'         # 'fold', 'gpt', or another of models/: 'gated_fold', 'rmt', ...
block_size = 192            # L, tokens of a training sequence; the window of a GPT
segment_size = 12           # l, tokens of a fold's segment
n_local = 2                 # local layers of a fold
n_global = 2                # global layers of a fold
local = 'segment'           # local layers see their 'segment', or, 'sliding', the last l tokens
past = 'evolving'           # past half: 'evolving', 'frozen'; without recurrence: 'local', 'none'
carry = 'plain'             # of a fold: 'plain', the paper's, or 'gated', mixed with the one before
n_layer = 4                 # layers of a GPT
window = 0                  # tokens that a layer of a GPT sees, sliding; 0 is the whole block
position = 'learned'        # 'learned', an embedding of each place, 'rotary' or 'none'
rotary_base = 10000.0       # of rotary positions
n_head = 4                  # attention heads
n_embd = 128                # channels
dropout = 0.0               # share of activations dropped in training
bias = False                # biases in linear layers and layer norms
# back-propagation through a carry
bptt_segments = 0           # segments that gradient flows back through; 0 is the whole block_size
recompute = False           # keep only the carries, compute segments again in backward: less memory
# optimizer
batch_size = 16             # sequences of a micro-batch, shared out among the processes
gradient_accumulation_steps = 1  # micro-batches of an update
learning_rate = 1e-3        # AdamW's, after warm-up
max_iters = 2000            # updates, exactly
warmup_iters = 100          # updates of linear warm-up
decay_from = 0.0            # share of the updates after which the rate falls, by a cosine; 1: never
min_lr = 1e-4               # learning rate at the end
weight_decay = 0.1          # of matrices and embeddings
beta1 = 0.9                 # AdamW's
beta2 = 0.99                # AdamW's
grad_clip = 1.0             # largest norm of the gradient; 0 does not clip
# evaluation and log
eval_interval = 250         # updates between evaluations, each followed by a checkpoint
checkpoint_interval = 0     # updates between checkpoints; 0 is only after evaluations
log_interval = 10           # updates between log lines
# machine
device = 'auto'             # 'auto' takes cuda, mps or cpu, the first that is there
dtype = 'auto'              # 'float32' or 'bfloat16'; 'auto' is bfloat16 where a GPU has it
products = 'auto'           # of float32 on a CPU: 'torch', 'onednn' (faster on AMD), 'auto'
compile = 'auto'            # 'off'; 'kernels', torch.compile of the blocks; 'graph', these and, on
                            # CUDA, a micro-step as one graph; 'auto', kernels of a long run there
threads = 0                 # CPU threads of each process; 0: as many as there are idle cores

# on resuming: keys that stay as saved, as the model's sizes do; and keys that are this call's own
FIXED = ('task', 'model_type', 'seed', 'dataset', 'set_aside', 'document', 'eval_tokens',
         'segment_size', 'filler', 'symbols', 'key_length', 'names', 'cups', 'every', 'regular',
         'hops', 'line', 'lengths', 'vocabulary')
HERE = ('init_from', 'overwrite', 'out_dir', 'device')

load_to_resume = cache(ckpt.load_to_resume)  # which parts() and the set-up both ask for

def parts(known):
    """The module of the task and the config class of the model, whose settings are keys as well; on
    resuming, the saved run's."""
    task, model_type = known.task, known.model_type
    if known.init_from == 'resume':
        saved = load_to_resume(os.path.join(ROOT, known.out_dir))['config']
        task, model_type = saved['task'], saved['model_type']
        for key in {'task', 'model_type'} & known.given:
            require(getattr(known, key) == saved[key], f'{known.out_dir} holds a run of {key} '
                    f'{saved[key]!r}, not {getattr(known, key)!r}: resume it without that, or go '
                    f'elsewhere with --out_dir')
    return [find_task(task), find_model(model_type)[0]]

def check(s):
    """Refuse settings that would fail later, or worse, not fail at all."""
    at_least(s, seed=0, batch_size=1, gradient_accumulation_steps=1, block_size=1, max_iters=0,
             warmup_iters=0, eval_interval=1, log_interval=1, threads=0, learning_rate=0.0,
             min_lr=0.0, weight_decay=0.0, grad_clip=0.0, bptt_segments=0, checkpoint_interval=0)
    one_of(s, dtype=('auto', 'float32', 'bfloat16'), products=machine.PRODUCTS,
           compile=machine.COMPILE)
    require(0 <= s.beta1 < 1 and 0 <= s.beta2 < 1,
            f'beta1={s.beta1} and beta2={s.beta2} must lie in [0, 1)')
    require(0 <= s.decay_from <= 1, f'decay_from={s.decay_from} must lie in [0, 1]')
    tokens = s.batch_size * s.block_size * s.gradient_accumulation_steps
    require(tokens < 10 ** 9, f'an update of {tokens:,} tokens is too large: lower batch_size, '
            f'block_size or gradient_accumulation_steps')
    require(s.decay_from == 1 or s.min_lr <= s.learning_rate,
            f'min_lr={s.min_lr} is above learning_rate={s.learning_rate}: lower it as well')

def open_folder(s):
    """Keep the run's folder for this process. Raises SystemExit if it holds another run."""
    found = set(os.listdir(out_dir)) if os.path.isdir(out_dir) else set()
    if '.lock' in found:  # if a process is at work here, the error names it
        own_folder(out_dir)
        found = {name for name in found - {'.lock', 'log.jsonl'} if not is_temporary(name)}
    require(s.init_from == 'resume' or s.overwrite or not found,
            f'{out_dir} is not empty ({"".join(sorted(found)[:1])}): --overwrite=True starts over, '
            f'--init_from=resume goes on with its run, --out_dir=... goes elsewhere')
    own_folder(out_dir)
    ckpt.check_run(out_dir, s.init_from == 'resume')

def lr_at(it):
    """Learning rate of update `it`: linear warm-up, constant, then a cosine down to min_lr."""
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    start = max(s.warmup_iters, s.decay_from * s.max_iters)
    progress = max(0.0, it - start) / max(1, s.max_iters - start)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)

def train_step(it):
    """One update; returns its loss, the mean of all processes, still on the device, and tokens."""
    for group in optimizer.param_groups:
        group['lr'] = lr_at(it)
    loss, tokens = job.backward()
    processes.average_gradients(model)
    if s.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, tokens

def stop_unless_finite(value, what):
    require(math.isfinite(value), f'{what} is {value} at iteration {run.done}: stopped; what was '
            f'saved before is kept. A lower learning_rate than {s.learning_rate} usually helps')

def write_log(**record):
    """Append one JSON record to log.jsonl."""
    def write():
        with open(log_path, 'a') as f:
            f.write(json.dumps(record) + '\n')
    from_writer(write)

def keep_of_log(record):
    """Whether a record of the log stays when the run goes on: not those of updates after the
    checkpoint, nor an evaluation that will be repeated."""
    again = (run.pending or run.done >= s.max_iters) and 'val_loss' in record
    return record.get('iter', math.inf) + again <= run.done

def evaluate():
    """Evaluate, log and tell; save, as ckpt.pt too if no evaluation was better."""
    with machine.uncompiled(compile):  # its many shapes are not worth compiling
        if run.done >= s.max_iters:
            check_reading(model)  # once more, with weights that may have been 0 to begin with
        run.val = job.evaluate()
    loss = run.val['val_loss']
    stop_unless_finite(loss, 'the validation loss')
    is_best, run.best = loss <= run.best, min(run.best, loss)
    write_log(iter=run.done, tokens=run.tokens, **run.val)
    standing = 'the best so far' if is_best else 'not the best'
    say(f'iter {run.done}: {job.describe(run.val)} ({standing}){job.note}')
    run.pending = False
    save(is_best)

def save(is_best=False):
    """Write last.pt, and before it ckpt.pt if no evaluation was better: resuming repeats what a
    kill cuts short."""
    largest = torch.stack([p.detach().abs().max() for p in model.parameters()]).max()
    stop_unless_finite(largest.item(), 'a weight')  # NaN if one of them is
    rng = from_all(random_state(device))
    checkpoint = {
        'model_type': s.model_type, 'model_args': vars(model.config), 'model': model.state_dict(),
        'optimizer': optimizer.state_dict(), 'iter_num': run.done, 'best_val_loss': run.best,
        'run': vars(run), 'rng': rng, 'task': s.task, 'task_state': job.state(),
        'config': s.as_dict(), 'tokenizer': job.tokenizer, 'data': job.data,
        'provenance': {**made_by, 'compiled': compiled()}}
    for path in [best_path, last_path] if is_best else [last_path]:
        from_writer(lambda: ckpt.save(path, checkpoint))

def compiled():
    """What is compiled: as chosen, or nothing once capturing has failed."""
    return 'off' if compile == 'graph' and not job.step.works else compile

def log_line(loss):
    """Tell and log the updates since the last line; the next line starts anew."""
    speed, figures = run.interval_tokens / run.interval_seconds, job.figures()
    left = run.seconds / run.done * (s.max_iters - run.done)
    shown = ''.join(f', {key} {value}' for key, value in figures.items())
    say(f'iter {run.done}: loss {loss:.4f}, lr {lr_at(run.done - 1):.2e}{shown}, '
        f'{speed:,.0f} tokens/s, {duration(left)} left{job.note}')
    write_log(iter=run.done, loss=loss, lr=lr_at(run.done - 1), tokens_per_s=round(speed),
              tokens=run.tokens, seconds=round(run.seconds, 1), **figures)
    vars(run).update(new_interval())

def new_interval():
    """Of a line of the log: the sum of the losses, updates, tokens, seconds of training."""
    return {'interval_loss': torch.zeros((), device=device), 'interval_steps': 0,
            'interval_tokens': 0, 'interval_seconds': 0.0}

def write_record():
    """record.json and loss.png of a run that has ended, from its log."""
    with open(log_path) as f:
        log = [json.loads(line) for line in f]
    steps, scored = ([line for line in log if key in line] for key in ('loss', 'val_loss'))

    def curve(lines, key):
        return {'x': 'tokens', 'y': 'loss', 'points': [
            {'x': line['tokens'], 'value': line[key]} for line in lines]}
    shown = {'validation loss': curve(scored, 'val_loss'),
             'training loss': curve(steps[::len(steps) // 200 + 1], 'loss')}
    speed = statistics.median([line['tokens_per_s'] for line in steps] or [math.nan])
    metrics = {'loss': metric(run.val['val_loss'], run.val['val_error']),
               'tokens': metric(run.tokens), 'parameters': metric(count_parameters(model)),
               'flops_per_token': metric(flops_per_token(model, s.block_size)),
               'tokens_per_s': metric(speed), 'minutes': metric(run.seconds / 60),
               'peak_mb': metric(machine.peak_mb(device))}
    notes = [job.note.strip()] if job.note else []
    settings = {**s.as_dict(), 'compile': compiled()}
    save_record(os.path.join(out_dir, 'record.json'), make_record(
        'training', settings, [s.seed], metrics, shown, notes, device=device))
    title = f"{s.model_type}, {job.data.get('dataset', s.task)}"
    curves(os.path.join(out_dir, 'loss.png'), title, shown, log=False)

# --- set up ---------------------------------------------------------------------------------------
s, notes, checkpoint = configure(globals(), parts=parts), [], None
out_dir = os.path.join(ROOT, s.out_dir)
if s.init_from == 'resume':
    checkpoint = load_to_resume(out_dir)
    s, notes = merge(checkpoint['config'], s, {*FIXED, *checkpoint['model_args']}, HERE)
elif s.init_from != 'scratch':
    checkpoint = ckpt.load(ckpt.find_file(s.init_from))
best_path, last_path, log_path = (os.path.join(out_dir, name)
                                  for name in ('ckpt.pt', 'last.pt', 'log.jsonl'))
check(s)
machine.set_threads(s.threads)
device = processes.join(machine.pick_device(s.device))
use_bfloat16 = machine.takes_bfloat16(s.dtype, device)
autocast = torch.autocast(device.split(':')[0], torch.bfloat16, use_bfloat16)
steady = s.task == 'text' and not s.document  # else each update may have shapes of its own
compile = machine.choose_compile(s.compile, device, s.max_iters if steady else 0)
stop = processes.Stop() if WORLD > 1 else None  # one may be told before the others are ready
shared = {**s.as_dict(), 'data_dir': '', 'out_dir': '', 'at': (checkpoint or {}).get('iter_num')}
require(all(other == shared for other in from_all(shared)), 'the processes have '
        'different settings or checkpoints: give all the same command, every machine the same file')
from_writer(lambda: open_folder(s))
if device == 'cpu':  # what was chosen is kept: a resumed run computes as before
    s = s.replace(products=machine.choose_products(s.products), threads=torch.get_num_threads())
job = find_task(s.task).Task(s)
if job.data:
    s = s.replace(dataset=job.data['dataset'])
corpus = job.data.get('dataset', f'task {s.task}')
require(not checkpoint or checkpoint.get('tokenizer') in (None, job.tokenizer),
        f"the checkpoint's vocabulary is not that of '{corpus}': prepare the text that it was "
        f"trained on, for GPT-2's own weights any with --tokenizer=gpt2, or start from scratch")
if s.init_from == 'resume':
    require(checkpoint['data'].get('sha256') == job.data.get('sha256'),
            f"'{corpus}' is not the text that the run in {out_dir} was trained on")
    job.data.update(checkpoint['data'])  # which text it stands in for, too

torch.manual_seed(s.seed)
if s.init_from == 'scratch':
    copies = 4 if device == 'cpu' else 1  # weights, gradients, two averages of AdamW
    model = make_model(s.model_type, {**s.as_dict(), **job.sizes}, copies)
elif s.init_from == 'resume':
    model = ckpt.load_model(checkpoint)
else:
    others = [key for key in ('filler', 'symbols', 'names', 'cups') if key in s.as_dict()
              and checkpoint.get('config', {}).get(key, getattr(s, key)) != getattr(s, key)]
    require(not others, f'the checkpoint was trained with another {", ".join(others)}: take the '
            'same')
    own = ('block_size', 'segment_size', 'n_local', 'n_global', 'local', 'past', 'carry',
           'window', 'dropout')
    after, before = (defaults_of(find_model(kind)[0])
                     for kind in (s.model_type, checkpoint['model_type']))
    sizes = {key: getattr(s, key) for key in {*own, *after.keys() - before.keys()}}
    sizes['border'] = job.sizes.get('border', -1)
    model = ckpt.load_model(checkpoint, s.model_type, **sizes)
    notes += [f'init_from: {key} stays {value!r}' for key, value in vars(model.config).items()
              if key in s.given and key not in own and getattr(s, key) != value]
known, needed = model.config.vocab_size, job.sizes['vocab_size']
require(known >= needed, f"the checkpoint knows {known} tokens, the data has {needed}: prepare it "
                         f"with the checkpoint's tokenizer")
model.to(device)
check_contract(model)
check_reading(model, s.block_size)
require(not (s.bptt_segments or s.recompute) or carries(model), f'model_type={s.model_type!r} has '
        f'no segments: bptt_segments must be 0 and recompute False')
s = s.replace(**{key: value for key, value in vars(model.config).items() if key in s.as_dict()})
say('\n'.join([show(s), *notes]))
optimizer = adamw(model, s.weight_decay, s.learning_rate, (s.beta1, s.beta2), device)
if compile == 'graph' and getattr(job, 'step', None) is None:
    say("compile='graph' takes a text in pieces of one size, without recompute or document: the "
        'blocks are compiled, nothing is captured')
    compile = 'kernels'
with autocast:
    compile = machine.compile_blocks(model, compile, device, s.batch_size // WORLD)
job.start(model, device, autocast)
if compile == 'graph':
    job.step = Graphs()
if RANK:
    torch.manual_seed(s.seed + RANK)  # the weights are the same, what dropout drops is not

run = SimpleNamespace(done=0, tokens=0, seconds=0.0, best=math.inf, pending=False,
                      val={'val_loss': math.inf, 'val_error': None}, **new_interval())
if s.init_from == 'resume':
    try:
        groups = optimizer.state_dict()['param_groups']  # with this call's settings
        for group, before in zip(groups, checkpoint['optimizer']['param_groups']):
            group['lr'] = before['lr']
        optimizer.load_state_dict({**checkpoint['optimizer'], 'param_groups': groups})
        vars(run).update(checkpoint['run'])
        run.interval_loss = run.interval_loss.to(device).reshape(())
        job.load_state(checkpoint['task_state'], device)
        if RANK < len(checkpoint['rng']):  # a further process has none
            set_random_state(checkpoint['rng'][RANK], device)
    except Exception as error:  # whatever a file can hold in place of these
        raise SystemExit(f'error: {last_path} cannot be resumed: it is damaged ({error!r:.60}); '
                         f'{ckpt.WAY_ON.format(last_path)}') from None
checkpoint = None  # its weights need not stay in memory
load_to_resume.cache_clear()
made_by = {**provenance(device), 'processes': WORLD, 'compiled': compile}
start = {'event': 'start', 'iter': run.done, 'config': s.as_dict(),
         'parameters': count_parameters(model), **job.data, **made_by}
if not run.done:
    save()  # a run that is killed before its first evaluation can be resumed, too
from_writer(lambda: ckpt.open_run(out_dir, s.init_from == 'resume' and keep_of_log, start))
say(f"{s.model_type} with {count_parameters(model):,} parameters on {device} "
    f"({made_by['hardware']}), {f'{WORLD} processes, ' if WORLD > 1 else ''}"
    f"{count(torch.get_num_threads(), 'thread')}, compiled: {compile}, "
    f"{'bfloat16' if use_bfloat16 else 'float32'}")

# --- train ----------------------------------------------------------------------------------------
model.train()
stop = stop or processes.Stop()
folder = shlex.quote(f'--out_dir={os.path.relpath(out_dir)}')
finished = run.done >= s.max_iters
if run.pending or finished:
    evaluate()
first = run.done
while run.done < s.max_iters:
    start_time = time.perf_counter()
    loss, tokens = train_step(run.done)
    run.interval_loss += loss
    run.interval_steps += 1
    run.interval_tokens += tokens
    run.tokens += tokens
    run.done += 1
    stop_now = stop.wanted()
    log_now = run.done % s.log_interval == 0
    run.pending = run.done % s.eval_interval == 0 or run.done == s.max_iters
    save_now = stop_now or s.checkpoint_interval and run.done % s.checkpoint_interval == 0
    second = run.done == first + 2  # the first update warms up
    if log_now or run.pending or save_now or second:  # reading the loss waits for the device
        mean_loss = run.interval_loss.item() / run.interval_steps
        stop_unless_finite(mean_loss, 'the training loss')
    seconds = time.perf_counter() - start_time
    if second:
        say(f'about {duration(seconds * (s.max_iters - run.done))} to go, by the second update')
    run.seconds += seconds
    run.interval_seconds += seconds
    if log_now:
        log_line(mean_loss)
    if run.pending or save_now:
        save()
    if stop_now and run.done < s.max_iters:
        break
    if run.pending:
        evaluate()
if run.done < s.max_iters:
    say(f'stopped by {signal.Signals(stop_now).name} after iteration {run.done} of {s.max_iters}, '
        f'saved; python train.py --init_from=resume {folder} goes on from there')
else:
    from_writer(write_record)
    script = 'sample.py' if s.task == 'text' else 'probe.py'
    word = 'nothing left to train, evaluated again' if finished else 'done'
    say(f'{word}, {duration(run.seconds)} of training; python {script} {folder}')
stop.done()
processes.leave()
