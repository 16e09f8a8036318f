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
import re
import sys
import zipfile

import torch

from lib import pretrained
from lib.console import require, write
from lib.contract import make_model
from lib.files import PICTURE, RECORD, check_kind, is_temporary, write_file
from lib.records import ROOT
from lib.rows import Rows, rowwise
from lib.streaming import new_state

FILES = 'ckpt.pt', 'last.pt'
KINDS = {'model': dict, 'model_args': dict, 'model_type': str, 'task': str, 'config': dict,
         'data': dict, 'iter_num': int}  # of what a checkpoint holds
TO_RESUME = {'optimizer': dict, 'rng': list, 'run': dict, 'config': dict, 'data': dict, 'task': str,
             'task_state': dict}
START = b'{"event": "start"'  # of a log
# names that pickle writes near the start of a streaming state and of a checkpoint of train.py
STATE, CHECKPOINT = b'X\4\0\0\0read', b'X\n\0\0\0model_type'
RUN_FILES = {**dict.fromkeys(FILES, CHECKPOINT), 'record.json': RECORD, 'loss.png': PICTURE,
             'probe.json': RECORD, 'probe.png': PICTURE}
WAY_ON = '--init_from={} --out_dir=... starts from its weights, with the same sizes'
TRAIN_FIRST = 'train one first: python train.py config/fold_shakespeare.py'

def save(path, content, kept='the checkpoint before it is kept'):
    """Write a dictionary atomically. Raises SystemExit if that cannot be done."""
    write_file(path, lambda f: torch.save(content, f), kept)

def find_file(path):
    """A checkpoint's path as the user gave it: a file, the folder of a run or of Hugging Face's
    format, seen from here or from the repository; or the name of published weights."""
    names = '', *FILES, *pretrained.FILES
    for where in (os.path.abspath(os.path.expanduser(path)), os.path.join(ROOT, path)):
        for file in (os.path.join(where, name) if name else where for name in names):
            if os.path.isfile(file):
                return file
    if path in pretrained.PUBLISHED:
        return pretrained.fetch_published(path)
    raise SystemExit(f'error: no checkpoint at {path}, which is none of '
                     f'{", ".join(pretrained.PUBLISHED)} either; {TRAIN_FIRST}')

def read_file(path, kind):
    """The dictionary in a file of torch's. Raises SystemExit, in one line, for one of no use."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise zipfile.BadZipFile
        content = torch.load(path, map_location='cpu', weights_only=True)
    except PermissionError:  # which is no damage
        raise
    except Exception as error:  # a damaged file can fail anywhere
        raise SystemExit(f'error: {path} is not a readable {kind}: it is damaged, or of another '
                         f'program ({type(error).__name__})') from None
    require(isinstance(content, dict), f'{path} is not a {kind}: it holds no dictionary')
    return content

def load(path):
    """The dictionary in a checkpoint file, of this project or of nanoGPT, or what stands for it in
    a Hugging Face folder. Raises SystemExit if it holds none."""
    foreign = str(path).endswith(('.json', '.safetensors'))
    checkpoint = {'model': None, 'model_args': None, 'model_type': 'gpt', 'task': 'text',
                  **(pretrained.read(path) if foreign else read_file(path, 'checkpoint'))}
    wrong = [key for key, kind in KINDS.items()
             if not isinstance(checkpoint.get(key, kind()), kind)]
    require(not wrong and type(checkpoint['model_args'].get('vocab_size')) is int, f'{path} is not '
            f'a checkpoint: its {[*wrong, "model_args"][0]!r} is missing or damaged')
    return checkpoint

def load_to_resume(folder):
    """last.pt of a run. Raises SystemExit, with the way on, for one that is not from train.py."""
    path = os.path.join(folder, 'last.pt')
    require(os.path.isfile(path), f'no run to resume in {folder}: name the folder of one with '
            f'--out_dir, or begin one without --init_from=resume')
    checkpoint = load(path)
    for key, kind in TO_RESUME.items():
        require(isinstance(checkpoint.get(key), kind)
                and (checkpoint[key] or key not in ('config', 'rng')),
                f'{path} cannot be resumed: {key!r} is missing, as if another program wrote it; '
                f'{WAY_ON.format(path)}')
    known = {key: checkpoint[key] for key in ('task', 'model_type')}
    checkpoint['config'] = {**known, **checkpoint['config'], **checkpoint['model_args']}
    return checkpoint

def load_weights(model, state_dict):
    """Load weights of the same sizes; a longer position embedding is cut to the model's window, a
    padded vocabulary to the model's own; gates to the past half may be new. Takes what nanoGPT
    saves, too: prefixes of compiled and parallel models, causal masks, no tied output matrix.
    Raises SystemExit if they do not fit."""
    own = model.state_dict()
    gates = {name: value for name, value in own.items() if name.endswith('past_gate')}  # closed
    weights = gates | {re.sub(r'^((module|_orig_mod)\.)+', '', name): value
                       for name, value in state_dict.items() if not name.endswith('.attn.bias')}
    wpe, wte, head = 'transformer.wpe.weight', 'transformer.wte.weight', 'lm_head.weight'
    if head in own and wte in weights:
        weights.setdefault(head, weights[wte])
    for name in {wpe, wte, head} & weights.keys() & own.keys():
        weights[name] = weights[name][:len(own[name])]
    if odd := sorted(own.keys() ^ weights.keys()):
        side = 'has no' if odd[0] in own else 'has a'
        raise SystemExit(f'error: the checkpoint {side} {odd[0]}: take the model_type, layers, '
                         f'carry and position of its training, and its model.py')
    for name, value in weights.items():
        then, now = tuple(value.shape), tuple(own[name].shape)
        remedy = f'a window or segment of {then[0]} at most' if name == wpe else 'the same sizes'
        require(then == now, f'{name} is {then} in the checkpoint and {now} here: take {remedy}')
        require(value.is_floating_point() and value.isfinite().all(),
                f'{name} of the checkpoint is not finite, or of no floats: take an earlier')
    model.load_state_dict(weights)

def load_model(checkpoint, model_type=None, device='cpu', **sizes):
    """The model of a checkpoint, as the type and with the sizes asked for; by default just as it
    was saved. Raises SystemExit if they do not fit."""
    model_type = model_type or checkpoint['model_type']
    try:
        model = make_model(model_type, {**checkpoint['model_args'], **sizes})
        load_weights(model, checkpoint['model'])
    except Exception as error:  # whatever a file can hold in place of sizes and weights
        raise SystemExit(f'error: the checkpoint is damaged, in its sizes or its weights '
                         f'({type(error).__name__})') from None
    return model.to(device)

def newest_run(task=None):
    """The folder of the newest run under out/, of the given task if any; those of other tasks that
    are passed over are named on standard error. Raises SystemExit if there is none."""
    found = [path for place in ('last.pt', os.path.join('*', 'last.pt'))
             for path in glob.glob(os.path.join(ROOT, 'out', place))]
    for path in sorted(found, key=os.path.getmtime, reverse=True):
        folder, other = os.path.dirname(path), load(path)['task']
        if task in (None, other):
            return folder
        write(sys.stderr, f'{os.path.relpath(folder, ROOT)} is left out: its task is {other!r}\n')
    kind = f' on the task {task!r}' if task else ''
    raise SystemExit(f'error: no trained model{kind} under out/; {TRAIN_FIRST}')

def fingerprint(model):
    """A text that names a model by its type, sizes and weights: 16 hexadecimal digits."""
    digest = hashlib.sha256(f'{type(model).__name__} {vars(model.config)}'.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

def save_state(path, state, model, generator):
    """Write a streaming state and that of its random numbers, atomically. Raises SystemExit if it
    cannot be written, or if another kind of file is there."""
    check_kind(path, STATE)
    content = {'model': fingerprint(model), 'state': vars(state.clone()),  # not views of more
               'rng': generator.get_state()}
    save(path, content, 'a state that was there is kept')

def load_state(path, model, generator):
    """The state that save_state wrote; its random numbers go on from there in a generator of the
    same kind of device. Raises SystemExit if the file is missing or damaged, or if another model
    wrote it."""
    require(os.path.isfile(path), f'no state file at {path} (--save_state=PATH writes one)')
    content = read_file(path, 'state')
    require({'model', 'state', 'rng'} <= content.keys(), f'{path} is no state')
    require(content['model'] == fingerprint(model),
            f'{path} is not a state of this model: name its run with --out_dir')
    try:
        state = Rows(**content['state'])
        for name, value in vars(new_state(model, len(state))).items():
            found = getattr(state, name)
            if rowwise(lambda x: x.shape, found) != rowwise(lambda x: x.shape, value):
                raise ValueError
            setattr(state, name, rowwise(lambda x, y: x.to(y.device), found, value))
        if generator and content['rng'].shape == generator.get_state().shape:
            generator.set_state(content['rng'])
    except Exception:  # whatever a file can hold in place of these tensors
        raise SystemExit(f"error: {path} is damaged, or of another version: its tensors are not "
                         f"those of this model's state") from None
    return state

def check_run(folder, resumes):
    """Raise SystemExit if a file that a run writes is there, and of another program."""
    for name, mark in {**RUN_FILES, 'log.jsonl': b'' if resumes else START}.items():
        check_kind(os.path.join(folder, name), mark)

def open_run(folder, keep, start):
    """Make a run's folder ready: of its log stay the lines that are whole and of which keep(record)
    says so, and the record `start` follows; without keep a run starts anew, and the files of
    another go, but last.pt, which is the new one's."""
    path, lines = os.path.join(folder, 'log.jsonl'), []
    gone = () if keep else {*RUN_FILES} - {'last.pt'}
    for name in os.listdir(folder):
        if name in gone or is_temporary(name):  # left by a process that was killed
            os.remove(os.path.join(folder, name))
    if keep and os.path.exists(path):
        with open(path, 'rb') as f:
            lines = [line for line in f if is_kept(line, keep)]
    write_file(path, lambda f: f.writelines([*lines, f'{json.dumps(start)}\n'.encode()]))

def is_kept(line, keep):
    """Whether a line of a log is whole, and its record one of which keep(record) says so."""
    try:
        return line.endswith(b'\n') and keep(json.loads(line))
    except (ValueError, TypeError, AttributeError):  # torn, or of another kind
        return False
