"""
Train a FoldGPT, or the GPT it is measured against, on a prepared corpus.

    python train.py config/fold_shakespeare.py
    python train.py config/gpt_shakespeare.py --seed=1338 --out_dir=out/another
    torchrun --standalone --nproc_per_node=2 train.py config/fold_shakespeare.py

Ctrl-C or SIGTERM finishes the step and saves; --init_from=resume then goes on as if nothing had happened.
"""
import json
import math
import os
import signal
import time
from contextlib import nullcontext

from configurator import at_least, configure, show

# run
out_dir = 'out/run'         # folder of the checkpoints and the log
init_from = 'scratch'       # 'scratch', 'resume' (goes on with out_dir/last.pt), or the path of a checkpoint
overwrite = False           # start over in an out_dir that holds another run
seed = 1337                 # of the weights, of dropout and of the order of the data
# data
dataset = 'shakespeare'     # folder under data_dir; a built-in corpus is prepared if it is missing
offline_dataset = ''        # used, loudly, where dataset cannot be downloaded; '' stops instead
data_dir = 'data'           # folder of the prepared data sets
batch_size = 16             # sequences of a micro-step, shared out among the processes
gradient_accumulation_steps = 1  # micro-steps of an update
stretch = 0                 # tokens drawn from the corpus in one piece, cut into sequences; 0 is block_size
stream = False              # each row reads the corpus in order, a fold's carry passing from update to update
# model
model_type = 'fold'         # 'fold', 'gpt', or one of ablations.py
block_size = 192            # L, tokens of a training sequence; the window of a GPT
segment_size = 12           # l, tokens of a fold's segment
n_local = 2                 # local layers of a fold
n_global = 2                # global layers of a fold
carry = 'plain'             # of a fold: 'plain', the paper's, or 'gated', mixed with the carry before
n_layer = 4                 # layers of a GPT
n_head = 4                  # attention heads
n_embd = 128                # channels
dropout = 0.0               # share of activations dropped in training
bias = False                # biases in linear layers and layer norms
# back-propagation through a fold
bptt_segments = 0           # segments that gradient flows back through, a chunk at a time; 0 is the whole block_size
recompute = False           # keep only the carries, compute each segment again in backward: less memory, some slower
# optimizer
learning_rate = 1e-3        # AdamW's, after warm-up
max_iters = 2000            # updates, exactly
weight_decay = 0.1          # of matrices and embeddings
beta1 = 0.9                 # AdamW's
beta2 = 0.99                # AdamW's
grad_clip = 1.0             # largest norm of the gradient; 0 does not clip
decay_lr = True             # cosine decay after the warm-up
warmup_iters = 100          # updates of linear warm-up
lr_decay_iters = 0          # updates at which the decay ends; 0 is max_iters
min_lr = 1e-4               # learning rate at the end of the decay
# evaluation and log
eval_interval = 250         # updates between evaluations, each followed by a checkpoint
checkpoint_interval = 0     # updates between checkpoints; 0 is only after evaluations
eval_tokens = 0             # tokens of the validation split that are scored; 0 is all of it
log_interval = 10           # updates between log lines
# machine
device = 'auto'             # 'auto' takes cuda, mps or cpu, the first that is there
dtype = 'auto'              # 'float32' or 'bfloat16'; 'auto' is bfloat16 on CUDA and float32 elsewhere
products = 'auto'           # of float32 on a CPU: 'torch' (MKL's), 'onednn' (on AMD's with AVX-512, faster); 'auto': where it serves
compile = 'auto'            # 'off', 'manual' (backward pass), 'kernels', 'graphs'; 'auto': 'kernels' on CUDA, 'manual' on the CPU
threads = 0                 # CPU threads of each process; 0 leaves it to torch
config = configure(globals())

# torch takes seconds to import, a slip in the configuration is answered before that
import numpy as np  # noqa: E402
import torch  # noqa: E402

import training  # noqa: E402
from checkpoint import (ROOT, find_file, load, load_model, make_model, model_args, open_run,  # noqa: E402
                        pick_device, provenance, save)
from evaluate import mean_and_error, token_losses  # noqa: E402
from prepare import DownloadError, load_meta, prepare  # noqa: E402
from training import RANK, WORLD  # noqa: E402

out_dir, data_dir = os.path.join(ROOT, out_dir), os.path.join(ROOT, data_dir)
best_path, last_path, log_path = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'last.pt', 'log.jsonl'))


def check_config():
    """Refuse what would fail later, or worse, not fail at all."""
    at_least(config, batch_size=1, gradient_accumulation_steps=1, block_size=1, stretch=0, max_iters=0, warmup_iters=0,
             lr_decay_iters=0, eval_interval=1, eval_tokens=0, log_interval=1, threads=0, learning_rate=0.0, min_lr=0.0,
             weight_decay=0.0, grad_clip=0.0, bptt_segments=0, checkpoint_interval=0)
    if eval_tokens == 1:
        raise SystemExit("error: eval_tokens=1 leaves no token to predict: take 2 or more, or 0 for all")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise SystemExit(f"error: beta1={beta1} and beta2={beta2} must lie in [0, 1)")
    if decay_lr and min_lr > learning_rate:
        raise SystemExit(f"error: min_lr={min_lr} is above learning_rate={learning_rate}: lower it as well")
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise SystemExit(f"error: dtype must be 'auto', 'float32' or 'bfloat16', not {dtype!r}")
    if products not in training.PRODUCTS:
        raise SystemExit(f"error: products must be 'auto', 'onednn' or 'torch', not {products!r}")
    if compile not in training.COMPILE:
        raise SystemExit(f"error: compile must be 'auto', 'off', 'manual', 'kernels' or 'graphs', not {compile!r}")
    if stretch and (stretch % block_size or batch_size * block_size % stretch):
        raise SystemExit(f"error: stretch={stretch} must be a multiple of block_size={block_size} and divide "
                         f"batch_size * block_size = {batch_size * block_size}")
    if stretch and stream:
        raise SystemExit("error: stream=True reads the corpus in order and draws no stretch: set stretch=0")
    if batch_size * block_size // (stretch or block_size) % WORLD:
        raise SystemExit(f"error: {WORLD} processes cannot share batch_size={batch_size} sequences equally"
                         f"{f', in stretches of {stretch // block_size}' if stretch else ''}")
    if out_dir.rstrip(os.sep) == ROOT:
        raise SystemExit("error: out_dir must be a folder of its own, not the repository's: --out_dir=out/NAME")
    found = [name for name in (os.listdir(out_dir) if os.path.isdir(out_dir) else [])
             if name != 'log.jsonl' and not name.endswith('.tmp')]
    if found and init_from != 'resume' and not overwrite:
        raise SystemExit(f"error: {out_dir} is not empty ({sorted(found)[0]}): --init_from=resume goes on with its "
                         f"run, --overwrite=True starts over, --out_dir=... goes elsewhere")


def find_data():
    """Name and meta of the data set, prepared now if it is missing; the offline one if it cannot be had."""
    if os.path.exists(os.path.join(data_dir, dataset, 'meta.json')):
        return dataset, load_meta(os.path.join(data_dir, dataset))
    try:
        return dataset, load_meta(prepare(dataset, data_dir=data_dir))
    except DownloadError as error:
        if not offline_dataset:
            raise
        print(f"{error}\n{'!' * 100}\n!!! '{dataset}' cannot be downloaded. TRAINING ON '{offline_dataset}' INSTEAD "
              f"(offline_dataset); do not compare the losses.\n{'!' * 100}")
    if os.path.exists(os.path.join(data_dir, offline_dataset, 'meta.json')):
        return offline_dataset, load_meta(os.path.join(data_dir, offline_dataset))
    return offline_dataset, load_meta(prepare(offline_dataset, data_dir=data_dir))


def get_batch(micro=0):
    """This process's share of the next inputs and targets of a micro-step, (B, block_size) of uint16 each.

    With stream also the B rows of the walk that they belong to, and which of them have no carry (yet, or any more).
    """
    span, where = stretch or block_size, []
    if stream:
        rows = all_rows[micro * batch_size:(micro + 1) * batch_size]
        starts, fresh = walk.advance(rows)
        where = [my_share(rows), my_share(fresh)]
    else:  # all processes draw all, so that the batch does not depend on their number
        starts = torch.randint(len(train_data) - span, (batch_size * block_size // span,), generator=data_rng)
    tokens = torch.from_numpy(np.stack([train_data[i:i + span + 1] for i in my_share(starts).tolist()]))
    return tokens[:, :-1].reshape(-1, block_size), tokens[:, 1:].reshape(-1, block_size), *where


def my_share(rows):
    """The part of a micro-step's rows that this process computes."""
    return rows.chunk(WORLD)[RANK]


def lr_at(it):
    """Learning rate of update it: linear warm-up, then cosine down to min_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    end = lr_decay_iters or max_iters
    progress = min(1.0, (it - warmup_iters) / max(1, end - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def train_step(it):
    """One update; returns its loss, the mean over all positions of all processes, still on the device."""
    for group in optimizer.param_groups:
        group['lr'] = lr_at(it)
    total, last = torch.zeros((), device=device), gradient_accumulation_steps - 1
    for micro in range(last + 1):
        x, y, *where = get_batch(micro)
        groups = walk.groups(*where) if stream else [(slice(None), None)]
        for g, carry in groups:
            share, sync = len(x[g]) / len(x) / (last + 1), micro == last and g is groups[-1][0]
            loss, carry = training.backpropagate(trained, x[g], y[g], carry, share, sync, autocast=autocast, **how)
            total += loss
            if stream:
                walk.keep(where[0][g], carry)
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=compile != 'graphs')  # a graph's next replay would write where its gradients were
    return training.mean(total)


def stop_unless_finite(value, what, it):
    if not math.isfinite(value):
        raise SystemExit(f"error: {what} is {value} at iteration {it}; stopped without saving, the checkpoints in "
                         f"{out_dir} are from before. A lower learning_rate usually helps (now {learning_rate})")


def write_log(**record):
    """Append one JSON record to log.jsonl; each names the data set, since the offline one may have been taken."""
    def append():
        try:
            with open(log_path, 'a') as f:
                f.write(json.dumps({**record, 'dataset': dataset}) + '\n')
        except OSError as error:
            raise SystemExit(f"error: cannot write {log_path}: {error.strerror}; the checkpoints are kept") from None
    training.from_writer(append)


def evaluate(it):
    """Score the validation split: in one process, the others wait."""
    global best_val_loss, val
    with autocast:
        val = training.from_writer(lambda: mean_and_error(token_losses(model, val_data)))
    stop_unless_finite(val[0], 'the validation loss', it)
    best, best_val_loss = val[0] < best_val_loss, min(best_val_loss, val[0])
    write_log(iter=it, val_loss=val[0], val_error=val[1], tokens=it * tokens_per_update)
    print(f"iter {it}: validation loss {val[0]:.4f} +- {val[1]:.4f} nats per token"
          f"{', the best so far' if best else f' (best {best_val_loss:.4f})'}{data_note}")
    return best


def save_run(it, best=False):
    """Write last.pt, and before it ckpt.pt if there was no better loss: resuming repeats what a kill cuts short."""
    stop_unless_finite(sum(p.detach().abs().max() for p in model.parameters()).item(), 'a weight', it)
    rng, *others = training.from_all(dict(zip(('torch', 'cuda'), training.random_state(device))))
    checkpoint = {
        'model_type': model_type, 'model_args': model_args(model), 'model': model.state_dict(),
        'optimizer': optimizer.state_dict(), 'iter_num': it, 'best_val_loss': best_val_loss, 'val_loss': val[0],
        'val_error': val[1], 'interval': interval, 'rng': {'data': data_rng.get_state(), **rng, 'others': others},
        'stream': walk.state(torch.cat([my_share(rows) for rows in all_rows.split(batch_size)])) if stream else None,
        'config': config, 'tokenizer': meta['tokenizer'],
        'data': {'dataset': dataset, 'wanted': wanted, 'sha256': meta['sha256']}, 'provenance': made_by}
    for path in [best_path] * best + [last_path]:
        training.from_writer(lambda: save(path, checkpoint))


# --- set up -----------------------------------------------------------------------------------------------------
checkpoint = None
if init_from == 'resume':  # a run that was stopped between its first two files has ckpt.pt alone, of the same content
    checkpoint = load(best_path if os.path.exists(best_path) and not os.path.exists(last_path) else last_path)
elif init_from != 'scratch':
    checkpoint = load(find_file(init_from))
if init_from == 'resume':  # goes on as before; the model stays what it is, other settings may be given anew
    kept = {**checkpoint['model_args'], 'model_type': checkpoint['model_type'], 'dataset': checkpoint['data']['dataset']}
    here = {'init_from', 'overwrite', 'out_dir', 'data_dir', 'device', 'threads'} | _given
    before = {'products': 'torch', **checkpoint['config']}  # checkpoints without that key had no choice
    for key, value in ({k: v for k, v in before.items() if k not in here} | kept).items():
        if key in _given and key in config and config[key] != value and RANK == 0:
            print(f"resume: {key} stays {value!r}")
        if key in config:
            config[key] = globals()[key] = value
check_config()
if threads:
    torch.set_num_threads(threads)
device = training.join(pick_device(device))
if device == 'cpu':
    training.keep_freed_memory()
    products = config['products'] = training.choose_products(products)
wanted = checkpoint['data']['wanted'] if init_from == 'resume' else dataset
dataset, meta = training.from_writer(find_data)
config['dataset'] = dataset
data_note = f" [data: {dataset}, in place of {wanted}]" if dataset != wanted else ''
if init_from == 'resume' and checkpoint['data']['sha256'] != meta['sha256']:
    raise SystemExit(f"error: data set '{dataset}' is not the text that the run in {out_dir} was trained on")
if checkpoint and checkpoint.get('tokenizer', meta['tokenizer']) != meta['tokenizer']:
    raise SystemExit(f"error: the checkpoint's vocabulary is not that of data set '{dataset}': prepare the text it was "
                     f"trained on (the checkpoint names {checkpoint['data']['dataset']!r}), or start from scratch")
train_data, val_data = (np.memmap(os.path.join(data_dir, dataset, f'{name}.bin'), dtype=np.uint16, mode='r')
                        for name in ('train', 'val'))
if len(train_data) <= max(block_size, stretch) or len(val_data[:eval_tokens or None]) < 2:
    raise SystemExit(f"error: data set '{dataset}' is too short ({len(train_data)} training and {len(val_data)} validation "
                     f"tokens) for sequences of {max(block_size, stretch)} tokens: lower block_size or take a longer text")
val_data = torch.from_numpy(val_data[:eval_tokens or None].astype(np.int64)).to(device)

torch.manual_seed(seed)
data_rng = torch.Generator().manual_seed(seed)
if init_from == 'scratch':
    model = make_model(model_type, {**config, 'vocab_size': meta['vocab_size']}).to(device)
elif init_from == 'resume':
    model = load_model(checkpoint, device=device)
else:
    own = ('block_size', 'segment_size', 'n_local', 'n_global', 'carry', 'dropout')
    for key, value in checkpoint['model_args'].items():
        if key in _given and key not in own and config.get(key, value) != value:
            print(f"init_from: {key} stays {value!r}")
    model = load_model(checkpoint, model_type, device, **{key: config[key] for key in own})
    if model.config.vocab_size < meta['vocab_size']:
        raise SystemExit(f"error: the checkpoint knows {model.config.vocab_size} tokens, data set '{dataset}' has "
                         f"{meta['vocab_size']}: prepare it with the checkpoint's tokenizer")
if model_type == 'gpt' and (bptt_segments or recompute):
    raise SystemExit("error: a GPT has no segments: bptt_segments must be 0 and recompute False for model_type='gpt'")
config.update({key: value for key, value in model_args(model).items() if key in config})
print(show(config))
how = dict(chunk=bptt_segments * segment_size, recompute=recompute, device=device)
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device.split(':')[0])

half = dtype == 'bfloat16' or dtype == 'auto' and device.startswith('cuda')
autocast = torch.autocast(device.split(':')[0], torch.bfloat16) if half else nullcontext()
training.compile_model(model, batch_size // WORLD, compile, device, autocast)
trained = training.parallel(model, device)
if RANK:
    torch.manual_seed(seed + RANK)  # the weights are the same everywhere, what dropout drops is not

all_rows = torch.arange(batch_size * gradient_accumulation_steps)  # of an update
walk = training.Walk(len(all_rows), block_size, len(train_data))
tokens_per_update = len(all_rows) * block_size
start, best_val_loss, val = 0, math.inf, (math.inf, 0.0)
interval = {'loss': torch.zeros((), device=device), 'steps': 0}  # of the log line under way
if init_from == 'resume':
    optimizer.load_state_dict(checkpoint['optimizer'])
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0)):
        group.update(weight_decay=decay, betas=(beta1, beta2))
    start, best_val_loss, interval = checkpoint['iter_num'], checkpoint['best_val_loss'], checkpoint['interval']
    val = checkpoint['val_loss'], checkpoint['val_error']
    interval['loss'] = interval['loss'].to(device)
    data_rng.set_state(checkpoint['rng']['data'])
    for rng in [checkpoint['rng'], *checkpoint['rng'].get('others', [])][RANK:RANK + 1]:  # none for a process too many
        training.set_random_state((rng['torch'], rng.get('cuda')), device)
    if stream and checkpoint.get('stream'):
        walk.load(checkpoint['stream'], device)
made_by = {**provenance(device), 'processes': WORLD}
# what is written again from here on goes, a finished run's last evaluation too
training.from_writer(lambda: open_run(out_dir, init_from != 'resume', lambda record: start and (
    record['iter'] < start or record['iter'] == start and not (start >= max_iters and 'val_loss' in record))))
write_log(event='start', iter=start, config=config, parameters=model.num_params(), **made_by)
print(f"{model_type} with {model.num_params():,} parameters on {device} ({made_by['hardware']}), "
      f"{f'{WORLD} processes, ' if WORLD > 1 else ''}{'bfloat16' if half else 'float32'}; "
      f"{tokens_per_update:,} tokens per update")

# --- train ------------------------------------------------------------------------------------------------------
model.train()
if start >= max_iters:
    print(f"nothing left to train: iteration {start} of {max_iters}")
    save_run(start, evaluate(start))
stop = training.Stop()
step_time, steps_timed, begun = 0.0, 0, time.perf_counter()
for it in range(start, max_iters):
    before = time.perf_counter()
    interval['loss'] += train_step(it)
    interval['steps'] += 1
    done = it + 1
    stop_now = stop.wanted()
    log_now, evaluate_now = done % log_interval == 0, done % eval_interval == 0 or done == max_iters
    save_now = evaluate_now or stop_now or checkpoint_interval and done % checkpoint_interval == 0
    if log_now or save_now:  # reading the loss waits for the device: the time below is that of finished steps
        loss = interval['loss'].item() / interval['steps']
        stop_unless_finite(loss, 'the training loss', done)
    step_time, steps_timed = step_time + time.perf_counter() - before, steps_timed + 1
    if log_now:
        speed = steps_timed * tokens_per_update / step_time
        left = (time.perf_counter() - begun) / (done - start) * (max_iters - done)
        print(f"iter {done}: loss {loss:.4f}, lr {lr_at(it):.2e}, {speed:,.0f} tokens/s, "
              f"{int(left) // 60}m {int(left) % 60:02d}s left{data_note}")
        write_log(iter=done, loss=loss, lr=lr_at(it), tokens_per_s=round(speed), tokens=done * tokens_per_update)
        interval = {'loss': torch.zeros((), device=device), 'steps': 0}
        step_time, steps_timed = 0.0, 0
    if save_now:
        save_run(done, evaluate(done) if evaluate_now else False)
    if stop_now and done < max_iters:
        print(f"stopped by {signal.Signals(stop_now).name} after iteration {done} of {max_iters}, saved; "
              f"--init_from=resume goes on from there")
        break
else:
    print(f"done in {(time.perf_counter() - begun) / 60:.1f} minutes; "
          f"python sample.py --out_dir={os.path.relpath(out_dir)}")
training.leave(stop)
