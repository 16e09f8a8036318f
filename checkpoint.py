"""
A run on disk: its checkpoints, the model inside them, and what produced it.

A checkpoint is one dictionary, readable with torch.load(weights_only=True). Keys shared with nanoGPT: model,
optimizer, model_args, config, iter_num, best_val_loss. Further keys: model_type, tokenizer, data, rng, interval,
stream (where a walk through the corpus stands: at, fresh, carry; else None), val_loss, val_error, provenance.
"""
import glob
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, fields

import torch

import ablations
from model import GPT, FoldConfig, FoldGPT, GPTConfig, State

ROOT = os.path.dirname(os.path.abspath(__file__))
KINDS = {'gpt': (GPTConfig, GPT), 'fold': (FoldConfig, FoldGPT), **ablations.KINDS}


def pick_device(device='auto'):
    """'auto' -> 'cuda', 'mps' or 'cpu', the first that is there. Raises SystemExit for a device that is not."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    device = 'cpu' if device == 'cpu:0' else device
    try:
        known = device == 'cpu' or device.split(':')[0] in ('cuda', 'mps')
        if not known or device == 'cuda' and not torch.cuda.is_available():
            raise ValueError
        if device != 'cuda':  # which of several processes is to have is not settled yet
            torch.empty(1, device=device)
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)  # for what takes no device, such as torch.cuda.synchronize()
    except Exception:  # torch raises RuntimeError, AssertionError or its own kinds, by device
        raise SystemExit(f"error: device={device!r} is not available here; --device=auto finds one that is") from None
    return device


def make_model(model_type, sizes):
    """A fresh model: 'gpt', 'fold' or one of ablations.py, from a dictionary that holds at least the keys of its config.

    Raises SystemExit, in one line, for an unknown type or for sizes that no model can have.
    """
    if model_type not in KINDS:
        raise SystemExit(f"error: model_type must be one of {', '.join(map(repr, KINDS))}, not {model_type!r}")
    config_class, model_class = KINDS[model_type]
    try:
        return model_class(config_class(**{f.name: sizes[f.name] for f in fields(config_class) if f.name in sizes}))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def save(path, content, kept='the checkpoint before it is kept'):
    """Write a dictionary atomically: the file at path is the old one, whole, or the new one, whole.

    Raises SystemExit if it cannot be written; an old file is still there then.
    """
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(temporary, 'wb') as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        try:
            os.remove(temporary)
        except OSError:
            pass
        reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
        raise SystemExit(f"error: cannot write {path}: {reason}; {kept}") from None


def open_run(out_dir, anew, keep):
    """Make a run's folder ready: without the checkpoints of another run if it starts anew, its log as trim_log leaves it.

    Raises SystemExit if the folder cannot be written.
    """
    try:
        os.makedirs(out_dir, exist_ok=True)
        for name in ('ckpt.pt', 'last.pt'):
            if anew and os.path.exists(os.path.join(out_dir, name)):
                os.remove(os.path.join(out_dir, name))
        trim_log(os.path.join(out_dir, 'log.jsonl'), keep)
    except OSError as error:
        if os.path.exists(os.path.join(out_dir, 'log.jsonl.tmp')):
            os.remove(os.path.join(out_dir, 'log.jsonl.tmp'))
        where = error.filename or out_dir
        raise SystemExit(f"error: cannot write {where}: {error.strerror}; --out_dir=... goes elsewhere") from None


def trim_log(path, keep):
    """Leave the records of a log that are to be kept, by keep(record), and no line that a kill tore; atomically."""
    lines = []
    if os.path.exists(path):
        with open(path) as f:
            lines = f.readlines()
    with open(path + '.tmp', 'w') as f:
        for line in lines:
            try:
                if keep(json.loads(line)):
                    f.write(line.rstrip('\n') + '\n')
            except (ValueError, TypeError, KeyError):  # torn, or no record
                pass
    os.replace(path + '.tmp', path)


def save_task(folder, model, model_type, config, log, seconds, made_by):
    """Write ckpt.pt of a model trained on a memory task, with the log of its training. Raises SystemExit like save."""
    save(os.path.join(folder, 'ckpt.pt'), {
        'model_type': model_type, 'model_args': model_args(model), 'model': model.state_dict(), 'config': config,
        'iter_num': log[-1]['iter'], 'log': log, 'seconds': seconds, 'provenance': made_by})
    print(f"saved in {folder}")


def refuse_to_replace(folder, name):
    """Raise SystemExit if a folder holds that part of a run."""
    if os.path.exists(os.path.join(folder, name)):
        raise SystemExit(f"error: {folder} holds a run's {name}: --overwrite=True starts over, --out_dir=... goes elsewhere")


def fingerprint(model):
    """A text that names a model by its type, sizes and weights: 16 hexadecimal digits of their SHA-256."""
    digest = hashlib.sha256(f"{type(model).__name__} {model_args(model)}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_state(path, state, model, generator):
    """Write a model's state and that of its random numbers, atomically. Raises SystemExit if it cannot be written."""
    content = {'model': fingerprint(model), 'state': vars(state), 'rng': generator.get_state()}
    save(path, content, 'a state that was there is kept')


def load_state(path, model):
    """What save_state wrote: the state, and that of the random numbers.

    Raises SystemExit if the file is missing or damaged, or if another model wrote it.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        owner, tensors, rng = content['model'], content['state'], content['rng']
        rows = len(tensors['read'])
    except FileNotFoundError:
        raise SystemExit(f"error: there is no state at {path}; --save_state={path} writes one") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        raise SystemExit(f"error: {path} is not a readable state ({type(error).__name__})") from None
    if owner != fingerprint(model):
        raise SystemExit(f"error: {path} is the state of another model ({owner}, this one is {fingerprint(model)}): "
                         f"name its run with --out_dir")
    fresh = vars(model.new_state(rows))
    shapes = {name: (value.dtype, value.shape) for name, value in fresh.items()}
    if {name: (value.dtype, value.shape) for name, value in tensors.items()} != shapes:
        raise SystemExit(f"error: {path} is damaged: its tensors are not those of this model's state")
    if not all(value.isfinite().all() for value in tensors.values()):
        raise SystemExit(f"error: {path} holds values that are not finite")
    return State(**{name: value.to(fresh[name].device) for name, value in tensors.items()}), rng


def find_file(path):
    """A checkpoint's path as the user gave it: a file or a run's folder, seen from here or from the repository."""
    for place in (os.path.abspath(path), os.path.join(ROOT, path)):
        for file in (place, os.path.join(place, 'ckpt.pt'), os.path.join(place, 'last.pt')):
            if os.path.isfile(file):
                return file
    raise SystemExit(f"error: no checkpoint at {path}; train one first: python train.py config/fold_shakespeare.py")


def load(path, device='cpu'):
    """The dictionary in a checkpoint file, of this project or of nanoGPT. Raises SystemExit if it holds none."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint['model'], checkpoint['model_args']
    except FileNotFoundError:
        raise SystemExit(f"error: no checkpoint at {path}; train one first: python train.py config/fold_shakespeare.py"
                         ) from None
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        raise SystemExit(f"error: {path} is not a readable checkpoint ({type(error).__name__})") from None
    checkpoint.setdefault('model_type', 'gpt')
    return checkpoint


def load_weights(model, state_dict):
    """Load the weights of a GPT or FoldGPT of the same sizes into either; a longer wpe is cut to the model's window.

    Takes what nanoGPT saves, too: the prefix of a compiled model, the causal masks of its oldest versions.
    Raises ValueError if parameters are missing, left over, or of another shape.
    """
    weights = {name.removeprefix('_orig_mod.'): value for name, value in state_dict.items()}
    weights = {name: value for name, value in weights.items() if not name.endswith('.attn.bias')}
    wpe = 'transformer.wpe.weight'
    if wpe in weights:
        weights[wpe] = weights[wpe][:model.transformer.wpe.num_embeddings]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = ' '.join(str(error).split('\n', 1)[-1].split())
        raise ValueError(f"weights do not fit the model: {reason[:200]}") from None


def load_model(checkpoint, model_type=None, device='cpu', **sizes):
    """The model of a checkpoint, as the type and with the sizes asked for; by default just as it was saved.

    A GPT's weights make a fold and a fold's a GPT: only the window may shrink. Raises SystemExit if they do not fit.
    """
    model = make_model(model_type or checkpoint['model_type'], {**checkpoint['model_args'], **sizes})
    try:
        load_weights(model, checkpoint['model'])
    except ValueError as error:
        had = ', '.join(f'{key}={value}' for key, value in checkpoint['model_args'].items() if key.startswith('n_') or 'size' in key)
        raise SystemExit(f"error: {error}; the checkpoint has {had}: take as many layers, and no longer window") from None
    return model.to(device)


def model_args(model):
    """The sizes of a model as a plain dictionary."""
    return asdict(model.config)


def newest_run():
    """The folder under out/ whose ckpt.pt is the newest. Raises SystemExit if there is none."""
    found = glob.glob(os.path.join(ROOT, 'out', '*', 'ckpt.pt')) + glob.glob(os.path.join(ROOT, 'out', 'ckpt.pt'))
    if not found:
        raise SystemExit("error: no trained model under out/; train one first: python train.py config/fold_shakespeare.py")
    return os.path.dirname(max(found, key=os.path.getmtime))


def provenance(device='cpu'):
    """What a result is recorded with: command, commit, hardware, versions."""
    try:
        git = ['git', '-C', ROOT]
        commit = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True).stdout.strip()
        code = ['status', '--porcelain', '-uno', '--', '.', ':!results']  # a result that is being written changes no code
        changed = subprocess.run([*git, *code], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = changed = ''
    name = torch.cuda.get_device_name() if device.startswith('cuda') else cpu_name()
    return {'command': ' '.join([os.path.basename(sys.argv[0]), *map(portable_path, sys.argv[1:])]),
            'commit': (commit or 'unknown') + (' (changed)' if changed else ''),
            'hardware': name, 'threads': torch.get_num_threads(),
            'python': platform.python_version(), 'torch': str(torch.__version__)}


def save_result(path, result):
    """Write a result as JSON, atomically, its folder made if there is none. Raises SystemExit if it cannot be written."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(f'{path}.tmp', 'w') as f:  # whoever finds the file at path finds it whole
            json.dump(result, f, indent=1)
            f.write('\n')
        os.replace(f'{path}.tmp', path)
    except OSError as error:
        raise SystemExit(f"error: cannot write {path}: {error.strerror}; the figures are those printed above") from None


def load_result(path):
    """What save_result wrote. Raises SystemExit if there is no such file."""
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path} is no result ({getattr(error, 'strerror', None) or 'not JSON'})") from None


def portable(config):
    """Settings as a result holds them: with paths that say nothing of this machine."""
    return {key: portable_path(value) if isinstance(value, str) else value for key, value in config.items()}


def portable_path(text):
    """PATH or --key=PATH, an absolute one given from the repository's folder on, or by its last part if it lies outside."""
    key, equals, path = text.rpartition('=')
    if not os.path.isabs(path):
        return text
    inside = path.startswith(ROOT + os.sep)
    return key + equals + (os.path.relpath(path, ROOT) if inside else os.path.basename(path))


def cpu_name():
    """The processor's name and number of cores, as far as the system tells."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    return f"{name}, {os.cpu_count()} cores"
