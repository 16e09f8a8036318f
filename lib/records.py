"""Records of results: one JSON shape for all that is measured, with what it takes to repeat it."""
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from lib.console import count, require
from lib.device import cpu_info
from lib.files import write_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPE = {'what', 'command', 'commit', 'date', 'hardware', 'seeds', 'versions', 'settings',
         'metrics', 'curves', 'notes'}

def portable(value):
    """A setting or a word of the command, its path as seen from the repository's folder."""
    key, equals, path = str(value).rpartition('=')
    if not isinstance(value, str) or not os.path.isabs(path):
        return value
    inside = path.startswith(ROOT + os.sep)
    return key + equals + (os.path.relpath(path, ROOT) if inside else os.path.basename(path))

def git(words):
    """What git says of the repository whose top level is ROOT; '' where there is none, or none
    that these files are of."""
    above = os.path.dirname(os.path.realpath(ROOT))  # where no repository is looked for
    words = f'ls-files --error-unmatch model.py > {os.devnull} && git {words}'
    env = {key: value for key, value in os.environ.items() if not key.startswith('GIT_')}
    return subprocess.run(f'git {words}', shell=True, cwd=ROOT, capture_output=True, text=True,
                          env={**env, 'GIT_CEILING_DIRECTORIES': above}).stdout.strip()

def provenance(device='cpu'):
    """Where a result comes from."""
    gpu, found = device.startswith('cuda'), re.search('model name.*: (.*)', cpu_info())
    cpu = found[1].strip() if found else platform.processor() or platform.machine()
    hardware = f"{cpu}, {count(os.cpu_count() or 1, 'core')}"
    hardware = torch.cuda.get_device_name() if gpu else hardware
    commit = git('rev-parse --short=12 HEAD') or 'unknown'
    changed = git('status --porcelain -uno -- . ":!results" ":!*.md"')
    return {'command': ' '.join([os.path.basename(sys.argv[0]), *map(portable, sys.argv[1:])]),
            'commit': commit + (' (changed)' if changed else ''),
            'date': datetime.date.today().isoformat(), 'hardware': hardware,
            'versions': {'python': platform.python_version(), 'torch': str(torch.__version__)},
            'threads': torch.get_num_threads()}

def metric(value, error=None, n=None, **more):
    """A measured figure, its standard error, how many were measured; more: low, high, sd."""
    return {'value': value, 'error': error, 'n': n, **more}

def make_record(what, settings, seeds, metrics, curves=None, notes=(), device='cpu'):
    """A record. metrics: {name: metric(...)}; curves: {name: {'x': axis title, 'y': axis title,
    'points': [{'x', 'value', ...}]}}."""
    settings = {key: portable(value) for key, value in settings.items()}
    return {'what': what, **provenance(device), 'seeds': list(seeds), 'settings': settings,
            'metrics': metrics, 'curves': curves or {}, 'notes': list(notes)}

def save_record(path, record):
    """Write a record atomically; NaN becomes null. Raises SystemExit if that cannot be done."""
    record = json.loads(json.dumps(record), parse_constant=lambda name: None)
    text = json.dumps(record, indent=1, ensure_ascii=False) + '\n'
    text = re.sub(r'[\[{][^\[\]{}]{,300}[\]}]', lambda m: re.sub(r'\n\s*', ' ', m[0]), text)
    write_file(path, lambda f: f.write(text.encode(errors='replace')))

def load_record(path):
    """What save_record wrote. Raises SystemExit if it is missing, not JSON, or no record."""
    try:
        record = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f'error: cannot read {path}: {error}') from None
    require(isinstance(record, dict) and SHAPE <= record.keys(),
            f'{path} is no record as lib/records.py has it')
    return record

def result_path(name, in_results):
    """The path of a result, in a folder that is made if it is missing: results/NAME, which the docs
    are made from, or else out/NAME."""
    path = os.path.join(ROOT, 'results' if in_results else 'out', name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path
