"""A run on disk: its folder, its checkpoints and the models inside them, and streaming states.

A checkpoint is one dictionary, readable with torch.load(weights_only=True). Keys shared with
nanoGPT: model, optimizer, model_args, config, iter_num, best_val_loss. Further keys: model_type,
task, task_state (what the task needs to go on), tokenizer, data, rng (of each process), run (where
training stands), provenance.
"""
import glob
import hashlib
import json
import os
import pickle

import torch

from lib.contract import make_model, model_args
from lib.records import ROOT
from lib.rows import Rows, rowwise
from lib.streaming import new_state

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

FILES = 'ckpt.pt', 'last.pt'
TO_RESUME = {'optimizer': dict, 'rng': list, 'run': dict, 'config': dict, 'data': dict, 'task': str,
             'task_state': dict}
TRAIN_FIRST = 'train one first: python train.py config/fold_shakespeare.py'
locks = {}  # path of a folder: an open file in it, whose lock ends with this process


def own_folder(folder):
    """Make a folder and keep it for this process while that lives; a killed one leaves no lock.

    Raises SystemExit if it cannot be written, or if another process has it.
    """
    path = os.path.join(os.path.realpath(folder), '.lock')
    if path in locks:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(path, 'a+')
    except OSError as error:
        raise SystemExit(f'error: cannot write {folder}: {error.strerror}; --out_dir=PATH goes '
                         f'elsewhere') from None
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise SystemExit(f'error: process {lock.read().strip()} is at work in {folder}: wait for '
                         f'it, or take another --out_dir') from None
    lock.truncate(0)
    lock.write(f'{os.getpid()}\n')
    lock.flush()
    locks[path] = lock


def save(path, content, kept='the checkpoint before it is kept'):
    """Write a dictionary atomically: the file at path is the old one, whole, or the new one, whole.

    A link is written through. Raises SystemExit if that cannot be done.
    """
    target = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(target),
                             f'.{os.path.basename(target)}.{os.getpid()}.tmp')
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(temporary, 'wb') as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise SystemExit(f'error: cannot write {path}: {reason}; {kept}') from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def trim_log(path, keep):
    """Leave the records of a log that are to be kept, by keep(record), and no line that a kill
    tore; atomically."""
    lines = []
    if os.path.exists(path):
        with open(path) as f:
            lines = f.readlines()
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'w') as f:
        for line in lines:
            try:
                if keep(json.loads(line)):
                    f.write(line.rstrip('\n') + '\n')
            except (ValueError, TypeError, KeyError):  # torn, or no record
                pass
    os.replace(temporary, path)


def find_file(path):
    """A checkpoint's path as the user gave it: a file or a run's folder, seen from here or from
    the repository."""
    for where in (os.path.abspath(os.path.expanduser(path)), os.path.join(ROOT, path)):
        for file in (where, *(os.path.join(where, name) for name in FILES)):
            if os.path.isfile(file):
                return file
    raise SystemExit(f'error: no checkpoint at {path}; {TRAIN_FIRST}')


def read_file(path, kind, device='cpu'):
    """The dictionary in a file of torch's. Raises SystemExit, in one line, for one of no use."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise SystemExit(f'error: cannot read {path}: {error.strerror or "not there"}') from None
    except pickle.UnpicklingError:  # a damaged pickle says so otherwise
        raise SystemExit(f'error: {path} is not a readable {kind}: it holds objects of another '
                         f'program, or is no file of torch') from None
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        raise SystemExit(f'error: {path} is not a readable {kind}: it is damaged '
                         f'({type(error).__name__})') from None
    if not isinstance(content, dict):
        raise SystemExit(f'error: {path} is not a {kind}: it holds a {type(content).__name__}')
    return content


def load(path, device='cpu'):
    """The dictionary in a checkpoint file, of this project or of nanoGPT. Raises SystemExit if it
    holds none."""
    checkpoint = read_file(path, 'checkpoint', device)
    weights, sizes = checkpoint.get('model'), checkpoint.get('model_args')
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise SystemExit(f'error: {path} is not a checkpoint: it has no weights under "model"')
    if not isinstance(sizes, dict) or type(sizes.get('vocab_size')) is not int:
        raise SystemExit(f'error: {path} is not a checkpoint: it has no sizes under "model_args"')
    checkpoint.setdefault('model_type', 'gpt')
    checkpoint.setdefault('task', 'text')
    return checkpoint


def load_to_resume(folder):
    """last.pt of a run, or ckpt.pt of one that was stopped between its first two files. Raises
    SystemExit, with the way on, if it is damaged or not from train.py."""
    best, last = (os.path.join(folder, name) for name in FILES)
    path = last if os.path.exists(last) or not os.path.exists(best) else best
    if not os.path.exists(path):
        raise SystemExit(f'error: no run to resume in {folder}; {TRAIN_FIRST}')
    try:
        checkpoint = load(path)
    except SystemExit as error:
        if path == last and os.path.exists(best):
            raise SystemExit(f'{error}; {best} is there still: rename it to last.pt to resume '
                             f'from it, or start with --init_from={best}') from None
        raise
    for key, kind in TO_RESUME.items():
        if not isinstance(checkpoint.get(key), kind):
            raise SystemExit(f'error: {path} cannot be resumed: {key!r} is missing, as if another '
                             f'program wrote it; --init_from={path} starts from its weights')
    return checkpoint


def load_weights(model, state_dict):
    """Load weights of the same sizes; a longer position embedding is cut to the model's window.

    Takes what nanoGPT saves, too: the prefixes of compiled and of parallel models, the causal masks
    of its oldest versions, a tied output matrix left out. Raises ValueError if they do not fit.
    """
    weights = {name.removeprefix('module.').removeprefix('_orig_mod.'): value
               for name, value in state_dict.items() if not name.endswith('.attn.bias')}
    own = model.state_dict()
    wpe, wte, head = 'transformer.wpe.weight', 'transformer.wte.weight', 'lm_head.weight'
    if wpe in weights and wpe in own:
        weights[wpe] = weights[wpe][:len(own[wpe])]
    if head in own and wte in weights:
        weights.setdefault(head, weights[wte])
    for name in sorted(own.keys() ^ weights.keys()):
        side = 'has no' if name in own else 'has a'
        remedy = 'take as many layers and the same model_type'
        if name.startswith('carry_gate'):
            remedy = f"take --carry={'plain' if name in own else 'gated'}"
        raise ValueError(f'the checkpoint {side} {name}: {remedy}')
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise ValueError(f'{name} is {tuple(value.shape)} in the checkpoint and '
                             f'{tuple(own[name].shape)} here: take the same sizes, and no longer '
                             f'window or segment')
    model.load_state_dict(weights)


def load_model(checkpoint, model_type=None, device='cpu', **sizes):
    """The model of a checkpoint, as the type and with the sizes asked for; by default just as it
    was saved. Raises SystemExit if they do not fit."""
    model_type = model_type or checkpoint['model_type']
    model = make_model(model_type, {**checkpoint['model_args'], **sizes})
    try:
        load_weights(model, checkpoint['model'])
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    return model.to(device)


def newest_run(task=None):
    """The newest run under out/, of that task if one is named, that can be used; why another is
    not, a line says. Raises SystemExit if there is none."""
    found = []
    for folder in [os.path.join(ROOT, 'out'), *glob.glob(os.path.join(ROOT, 'out', '*', ''))]:
        paths = [os.path.join(folder, name) for name in FILES]
        found += [(os.path.getmtime(path), path) for path in paths if os.path.exists(path)][:1]
    for _, path in sorted(found, reverse=True):
        folder = os.path.relpath(os.path.dirname(path), ROOT)
        try:
            other = load(path)['task']
        except SystemExit as error:
            print(f'{folder} is left out: {str(error).removeprefix("error: ")}')
            continue
        if task in (None, other):
            return os.path.dirname(path)
        print(f'{folder} is left out: its task is {other!r}')
    kind = f' on the task {task!r}' if task else ''
    raise SystemExit(f'error: no trained model{kind} under out/; {TRAIN_FIRST}')


def fingerprint(model):
    """A text that names a model by its type, sizes and weights: 16 hexadecimal digits."""
    digest = hashlib.sha256(f'{type(model).__name__} {model_args(model)}'.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_state(path, state, model, generator):
    """Write a streaming state and that of its random numbers, atomically. Raises SystemExit if it
    cannot be written, or if another kind of file is there."""
    refuse_to_replace(path)
    content = {'model': fingerprint(model), 'state': vars(state), 'rng': generator.get_state()}
    save(path, content, 'a state that was there is kept')


def refuse_to_replace(path):
    """Raise SystemExit if there is a file at path that is no streaming state."""
    if os.path.lexists(path):
        if not {'model', 'state', 'rng'} <= read_file(path, 'state').keys():
            raise SystemExit(f'error: {path} is no state, and is not replaced: name another file')


def load_state(path, model):
    """What save_state wrote: the state, and that of the random numbers. Raises SystemExit if the
    file is missing or damaged, or if another model wrote it."""
    if not os.path.exists(path):
        raise SystemExit(f'error: there is no state at {path}; --save_state={path} writes one')
    content = read_file(path, 'state')
    if content.get('model') != fingerprint(model):
        raise SystemExit(f'error: {path} is not a state of this model: name its run with --out_dir')
    try:
        state, rng = Rows(**content['state']), content['rng']
        fresh, device = new_state(model, len(state)), next(model.parameters()).device
        for name, value in vars(fresh).items():
            rowwise(match, value, getattr(state, name))
            setattr(state, name, rowwise(lambda x: x.to(device), getattr(state, name)))
        state.read = state.read.cpu()
        if (state.read < 0).any() or rng.dtype != torch.uint8:
            raise ValueError
    except Exception:  # whatever a file can hold in place of these tensors
        raise SystemExit(f"error: {path} is damaged: its tensors are not those of this model's "
                         f'state, or not finite') from None
    return state, rng


def match(expected, value):
    """Raise ValueError unless a tensor has the shape and kind of another, and finite values."""
    if (value.shape, value.dtype) != (expected.shape, expected.dtype) or not value.isfinite().all():
        raise ValueError


def open_run(folder, anew, keep):
    """Make a run's folder ready: without the files of another run if it starts anew, its log as
    trim_log leaves it. Raises SystemExit if the folder cannot be written."""
    try:
        for name in (*FILES, 'record.json', 'loss.png', 'probe.json', 'probe.png'):
            if anew and os.path.exists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
        trim_log(os.path.join(folder, 'log.jsonl'), keep)
    except OSError as error:
        raise SystemExit(f'error: cannot write {error.filename or folder}: {error.strerror}; '
                         f'--out_dir=... goes elsewhere') from None
