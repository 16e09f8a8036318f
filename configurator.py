"""Settings as commented globals, changed by config files and flags.

A script lists its settings as globals, one a line with a comment: public bools, ints, floats and
texts whose names are not all capitals. `s = configure(globals())` gives s.key for each key. It is
set by `--key=value` on the command line, or by a line `key = value` in a config file named there.
"""
import difflib
import inspect
import linecache
import os
import re
import runpy
import sys
import traceback
import types
from contextlib import suppress
from glob import glob

from lib.console import require, say

KINDS = {bool: 'True or False', int: 'an integer below 2 ** 63', float: 'a finite number',
         str: 'text'}

class Settings:
    """The value of every key as a read-only attribute; `given` is the set of keys that were set."""

    def __init__(self, values, given=()):
        vars(self).update(values, given=frozenset(given))

    def __setattr__(self, key, value):
        raise AttributeError(f'settings are read-only: take replace({key}={value!r})')

    def as_dict(self):
        """Return a new dict of every key and its value."""
        return {key: value for key, value in vars(self).items() if key != 'given'}

    def replace(self, **changes):
        """Return new settings with some values changed."""
        return Settings({**self.as_dict(), **changes}, self.given)

def configure(namespace, argv=None, positional=None, parts=None):
    """Return the Settings of a script: its defaults, changed by config files and then by flags.

    namespace: the script's globals(), only read. argv: its command line, if not sys.argv[1:].
    positional: the key that a bare argument sets; without it a bare argument is a config file.
    parts: function of the Settings of the script's own keys. It returns a list of modules and
    dataclasses whose defaults are keys as well, where the script has none of that name.
    Raises SystemExit with one line on bad input, and after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    wants_help = {'-h', '--help'} & set(argv)
    script = types.SimpleNamespace(**{'__file__': 'script.py', '__doc__': '', **namespace})
    entries = _read([item for item in argv if item not in wants_help], positional,
                    os.path.dirname(os.path.abspath(script.__file__)))
    defaults = defaults_of(script)
    sources = [(script, defaults)]
    known = Settings(*_apply([entry for entry in entries if entry[1] in defaults], defaults))
    for part in parts(known) if parts else ():
        more = {key: value for key, value in defaults_of(part).items() if key not in defaults}
        sources.append((part, more))
        defaults = {**defaults, **more}
    if wants_help:
        say(_help(sources, positional))
        raise SystemExit(0)
    return Settings(*_apply(entries, defaults))

def merge(saved, given, fixed=(), here=()):
    """Return the Settings with which a run goes on, and a list of notes for its user.

    saved: dict of the run's settings so far, which count for all keys that are not in given.given.
    fixed: keys that stay as saved. here: keys that are never taken from `saved`.
    Raises SystemExit if a saved value is of the wrong kind.
    """
    keys = [key for key in given.as_dict() if key in saved and key not in here
            and (key in fixed or key not in given.given)]
    changes = {key: _check('the saved run is damaged: ', key, saved[key], getattr(given, key))
               for key in keys}
    notes = [f'resume: {key} stays {value!r}' for key, value in changes.items()
             if key in given.given and value != getattr(given, key)]
    return given.replace(**changes), notes

def numbers(key, text, least=0):
    """The whole numbers in a text such as '12,48,192', each once, rising. SystemExit on others."""
    with suppress(ValueError):
        found = sorted({int(item) for item in text.split(',')})
        if found[0] >= least and found[-1] < 2 ** 48:
            return found
    raise SystemExit(f'error: {key} must be whole numbers from {least} on, not {text!r:.80}')

def at_least(settings, **least):
    """Raise SystemExit if a setting is smaller than told."""
    for key, value in least.items():
        have = getattr(settings, key)
        require(have >= value, f'{key} must be at least {value}, not {have}')

def one_of(settings, **choices):
    """Raise SystemExit if a setting is none of its choices."""
    for key, known in choices.items():
        have = getattr(settings, key)
        require(have in known, f'{key} must be one of {", ".join(map(repr, known))}, not {have!r}')

def show(settings):
    """Return settings as text, one aligned `key = value` a line."""
    width = max(map(len, settings.as_dict()), default=0)
    return '\n'.join(f'{key:<{width}} = {value!r}' for key, value in settings.as_dict().items())

def hint(key, known, prefix=''):
    """Say which known key was probably meant, or where the keys are listed."""
    near = difflib.get_close_matches(key, known, 1)
    return f'did you mean {prefix}{near[0]}?' if near else '--help lists the keys'

def run_file(name, folder):
    """Run a config file, looked for here and in `folder`; return the names it sets, unchecked."""
    path = next(filter(os.path.isfile, [os.path.abspath(name), os.path.join(folder, name)]), '')
    near = hint(name, glob('config/*.py', root_dir=folder))
    require(path, f'{name!r} is no config file and not --key=value: {near}')
    try:
        found = runpy.run_path(path, run_name='__config__')
    except (Exception, SystemExit) as error:
        lines = [getattr(error, 'lineno', None) or 1]  # of a SyntaxError in the file itself
        frames = traceback.extract_tb(error.__traceback__)
        lines += [frame.lineno for frame in frames if frame.filename == path]
        reason = ' '.join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
        raise SystemExit(f'error: {name}:{lines[-1]}: {reason}: correct the config file') from None
    return {key: value for key, value in found.items() if not key.startswith('_')}

def is_helper(value):
    """Whether a name in a config file is no setting, but something to compute settings with."""
    return callable(value) or isinstance(value, types.ModuleType)

def defaults_of(source):
    """{key: default} of a script, a module or a dataclass."""
    keys = getattr(source, '__dataclass_fields__', vars(source))
    return {key: value for key in keys if type(value := getattr(source, key, None)) in KINDS
            and not key.startswith('_') and not key.isupper()}

def _read(argv, positional, folder):
    """[(origin, key, value)] of files ('FILE: '), then of flags ('--', the value is a text)."""
    bare = [item for item in argv if not item.startswith('-')]
    flags = [item for item in argv if item.startswith('-')]
    for flag in flags:
        require('=' in flag, f'{flag!r} is not --key=value')
    entries = [('--', *flag.removeprefix('--').split('=', 1)) for flag in flags]
    if not positional:
        return [(f'{name}: ', *setting) for name in bare
                for setting in run_file(name, folder).items()] + entries
    require(len(bare) < 2, f'only one {positional} can be given, not {bare[:2]}')
    return [('--', positional, item) for item in bare] + entries

def _apply(entries, defaults):
    """Return the values of all keys and the set of those given, from what _read() returned."""
    values, given = dict(defaults), set()
    for origin, key, value in entries:
        if key not in defaults:
            flag = '--' * (origin == '--')
            require(is_helper(value), f'unknown key {origin}{key}: {hint(key, defaults, flag)}')
            continue
        value = _check(origin, key, value, defaults[key])
        if value and f'_{key}'.endswith(('_dir', '_file', '_state')):
            value = os.path.expanduser(value)  # a file's own stays relative: a script places it
            value = os.path.abspath(value) if origin == '--' else value
        values[key] = value
        given.add(key)
    return values, given

def _check(origin, key, value, default):
    """Return a value in the default's type, a flag's text parsed. SystemExit if that cannot be."""
    kind, found = type(default), value
    if origin == '--' and kind is bool:
        found = {'true': True, 'false': False}.get(value.lower())
    elif origin == '--':
        for convert in (float, kind):  # int by itself too: float rounds 9007199254740993
            with suppress(ValueError):
                found = convert(value)
    with suppress(ValueError, OverflowError):  # of int(nan), int(inf) and float(10 ** 400)
        similar = type(found) is kind or {type(found), kind} == {int, float}  # a bool is no int
        limit = {int: 2 ** 63, float: float('inf')}.get(kind)
        if similar and kind(found) == found and (limit is None or abs(found) < limit):
            return kind(found)
    raise SystemExit(f'error: {origin}{key}={value!r:.80}: expected {KINDS[kind]}')

def _help(sources, positional):
    """The text of --help. sources: list of (script, module or dataclass, its {key: default})."""
    script, bare = sources[0][0], positional.upper() if positional else '[config.py ...]'
    lines = [f'usage: python {os.path.basename(script.__file__)} {bare} [--key=value ...]']
    lines += [*(script.__doc__ or '').splitlines()[:1], '']
    for source, keys in sources:
        if source is not script:
            lines += ['', f'settings of {source.__name__}']
        lines += _listing(source, {key: f'--{key}={value!r}' for key, value in keys.items()})
    return '\n'.join(lines).replace('\n\n\n', '\n\n')

def _listing(source, flags):
    """Lines of --help: the flags of a source, each below and beside its comments there."""
    lines = [*linecache.getlines(getattr(source, '__file__', ''))]
    for cls in source.__mro__[:-1] if isinstance(source, type) else ():
        lines += inspect.getsourcelines(cls)[0]
    width, shown, above = max(map(len, flags.values()), default=0), [], []
    for line in lines:
        _, _, comment = line.rstrip().partition('  # ')
        setting = re.match(r' *(\w+)(: \w+)? = ', line)
        key = setting and setting[1]
        if key in flags:  # later assignments are the script's business
            shown += [*(above or []), f'  {flags.pop(key):<{width}}  {comment}'.rstrip()]
            above = None
        elif above is None and line.startswith(' ' * 8):  # the comment beside goes on
            shown.append(' ' * (width + 4) + comment.strip())
        else:
            above = [*(above or ['']), line.strip('# \n')] if line.lstrip()[:1] == '#' else []
    return shown + [f'  {flag}' for flag in flags.values()]
