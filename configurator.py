"""Settings as commented globals, changed by config files and flags.

A script lists its settings as globals, one a line with a comment; `s = configure(globals())` gives
s.key for each. A key is a public bool, int, float or text whose name is not all capitals. Both
`--key=value` on the command line and a line `key = value` in a config file named there set it.
"""
import ast
import difflib
import inspect
import linecache
import math
import os
import runpy
import sys
import textwrap
import traceback
import types
from contextlib import suppress
from dataclasses import fields
from glob import glob
from itertools import takewhile

from lib.console import say

KINDS = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'text'}
LARGEST = {int: 2 ** 63 - 1, float: sys.float_info.max}  # that a tensor can hold


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
        """Return new settings with some values changed. Raises TypeError on an unknown key."""
        if unknown := changes.keys() - self.as_dict():
            raise TypeError(f'no such settings: {sorted(unknown)}')
        return Settings({**self.as_dict(), **changes}, self.given)


def configure(namespace, argv=None, positional=None, parts=None):
    """Return the Settings of a script: its defaults, changed by config files and then by flags.

    namespace: the script's globals(), which are only read.
    argv: the command line without the script's name; sys.argv[1:] unless given.
    positional: the key that a bare argument sets; without it a bare argument is a config file.
    parts: function of the dict of the values of the script's own keys. It returns a list of
    modules and dataclasses whose defaults are keys as well, where the script has none of that name.
    Raises SystemExit with a one-line message on bad input, and with 0 after --help. From then on
    Ctrl-C and a closed pipe end the script without a traceback.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else argv
    wants_help = {'-h', '--help'} & set(argv)
    script = types.SimpleNamespace(**{'__file__': 'script.py', '__doc__': '', **namespace})
    defaults = _defaults(script)
    sources, known, entries = [(script, dict(defaults))], defaults, []
    with suppress(SystemExit if wants_help else ()):  # help comes whatever else is wrong
        entries = _read([item for item in argv if item not in wants_help], positional,
                        os.path.dirname(os.path.abspath(script.__file__)))
        known, _ = _apply([entry for entry in entries if entry[1] in defaults], defaults)
    for part in parts(known) if parts else ():
        more = {key: value for key, value in _defaults(part).items() if key not in defaults}
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
    changes, notes = {}, []
    for key, value in given.as_dict().items():
        if key not in saved or key in here or key in given.given and key not in fixed:
            continue
        changes[key] = _check('the saved run: ', key, saved[key], value)
        if key in given.given and value != changes[key]:
            notes.append(f'resume: {key} stays {changes[key]!r}')
    return given.replace(**changes), notes


def numbers(key, text, least=0, multiple=1):
    """Return the whole numbers in a setting's text, such as '12,48,192', each once and rising.

    Raises SystemExit unless they are numbers, not below `least` and multiples of `multiple`.
    """
    with suppress(ValueError):
        found = sorted({int(item) for item in text.split(',')})
        if found[0] >= max(0, least) and not any(n % multiple for n in found):
            return found
    kind = f', multiples of {multiple}' if multiple > 1 else ''
    raise SystemExit(f'error: {key} must be whole numbers from {least} on{kind}, '
                     f'separated by commas, not {text!r}')


def at_least(settings, **least):
    """Raise SystemExit if a setting is smaller than told."""
    for key, value in least.items():
        if (found := getattr(settings, key)) < value:
            raise SystemExit(f'error: {key} must be at least {value}, not {found}')


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
    path = _find_config(name, folder)
    try:
        found = runpy.run_path(path, run_name='__config__')
    except (Exception, SystemExit) as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        reason = ' '.join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
        raise SystemExit(f'error: {name}:{lines[-1] if lines else 1}: {reason}: '
                         'correct the config file') from None
    return {key: value for key, value in found.items() if not key.startswith('_')}


def is_helper(value):
    """Whether a name in a config file is no setting, but something to compute settings with."""
    return callable(value) or isinstance(value, types.ModuleType)


def _excepthook(kind, error, trace):
    """Show what ends the script; without a traceback if it was stopped or nobody reads on."""
    if issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what standard output still holds
    elif issubclass(kind, KeyboardInterrupt):
        print('stopped', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _defaults(source):
    """{key: default} of a script, a module or a dataclass."""
    items = vars(source).items()
    if isinstance(source, type):
        items = [(field.name, field.default) for field in fields(source)]
    return {key: value for key, value in items
            if type(value) in KINDS and not key.startswith('_') and not key.isupper()}


def _read(argv, positional, folder):
    """Run the config files and split the flags of a command line.

    Returns a list of (origin, key, value), those of the files first. The origin is 'FILE: ', or
    '--' for a flag. The value of a flag is its text, None if it has none.
    """
    bare, flags = [], []
    for item in argv:
        key, equals, text = item.removeprefix('--').partition('=')
        if item.startswith('--'):
            flags.append(('--', key, text if equals else None))
        elif item.startswith('-') or equals and not item.endswith('.py'):
            meant = item.lstrip('-') if equals else 'key=value (--help lists the keys)'
            raise SystemExit(f'error: {item!r} is not a flag: write --{meant}')
        else:
            bare.append(item)
    if positional is None:
        return [(f'{name}: ', key, value) for name in bare
                for key, value in run_file(name, folder).items()] + flags
    if len(bare) > 1:
        raise SystemExit(f'error: {bare[1]!r} is one argument too many: '
                         f'only one {positional} can be given')
    return [('--', positional, item) for item in bare] + flags


def _apply(entries, defaults):
    """Return the values of all keys and the set of those given, from what _read() returned."""
    values, given = dict(defaults), set()
    for origin, key, value in entries:
        if key in defaults:
            if origin == '--' and value is None:
                raise SystemExit(f'error: --{key} has no value: write --{key}=VALUE, '
                                 f'where VALUE is {KINDS[type(defaults[key])]}')
            value = _check(origin, key, value, defaults[key])
            if value and (key.endswith(('_dir', '_file', '_state')) or key == 'file'):
                value = os.path.expanduser(value)  # relative in a file: from the script's folder
                value = os.path.abspath(value) if origin == '--' else value
            values[key] = value
            given.add(key)
        elif origin == '--':
            raise SystemExit(f"error: unknown key --{key}: {hint(key, defaults, '--')}")
        elif not is_helper(value):
            raise SystemExit(f'error: {origin}unknown key {key!r}: {hint(key, defaults)}')
    return values, given


def _check(origin, key, value, default):
    """Return a value in the default's type, a flag's text parsed; SystemExit if it has no such."""
    kind, found = type(default), value
    if origin == '--' and kind is bool:
        found = {'true': True, 'false': False}.get(value.lower())
    elif origin == '--' and kind is not str:
        for convert in (float, kind):  # int by itself too: float rounds 9007199254740993
            with suppress(ValueError):
                found = convert(value)
    fits = type(found) is kind
    if kind in LARGEST and type(found) in LARGEST:  # a bool is no number here
        limit = math.inf if kind is type(found) is float else LARGEST[kind]
        fits = abs(found) <= limit and (kind is float or found % 1 == 0)
    if fits:
        return kind(found)
    shown = textwrap.shorten(repr(value), 80, placeholder='...')
    raise SystemExit(f'error: {origin}{key}={shown}: expected {KINDS[kind]} (default {default!r})')


def _find_config(name, folder):
    """Return the path of a config file, looked up here and then beside the script."""
    for path in (os.path.abspath(name), os.path.join(folder, name)):
        if os.path.isfile(path) and name.endswith('.py'):
            return path
    stems = [entry[:-3] for entry in glob('*.py', root_dir=os.path.join(folder, 'config'))]
    near = difflib.get_close_matches(os.path.basename(name).removesuffix('.py'), stems, 1)
    remedy = f'did you mean config/{near[0]}.py?' if near else 'give its path, or --key=value'
    problem = 'not found' if name.endswith('.py') else 'is not a .py file'
    raise SystemExit(f'error: config file {name!r} {problem}: {remedy}')


def _help(sources, positional):
    """The text of --help. sources: list of (script, module or dataclass, its {key: default})."""
    script, bare = sources[0][0], positional.upper() if positional else '[config.py ...]'
    lines = [f'usage: python {os.path.basename(script.__file__)} {bare} [--key=value ...]']
    lines += [*(script.__doc__ or '').strip().splitlines()[:1], '']
    for source, keys in sources:
        lines += [] if source is script else ['', f'settings of {source.__name__}']
        comments = _comments(source)
        width = max((len(f'--{key}={value!r}') for key, value in keys.items()), default=0)
        for key, value in keys.items():
            heading, comment = comments.get(key, ('', ''))
            lines += ['', heading] if heading else []
            lines.append(f"  {f'--{key}={value!r}':<{width}}  {comment}".rstrip())
    return '\n'.join(lines).replace('\n\n\n', '\n\n')


def _comments(source):
    """{key: (heading of the group it opens, its own comment)}, read where a source is written."""
    found, classes = {}, source.__mro__[:-1] if isinstance(source, type) else ()
    texts = [textwrap.dedent(inspect.getsource(cls)) for cls in classes]
    for text in texts or [''.join(linecache.getlines(source.__file__))]:
        body = ast.parse(text).body
        for node in body[0].body if classes else body:
            key = getattr(getattr(node, 'targets', [getattr(node, 'target', None)])[0], 'id', None)
            if key not in found:  # later assignments are the script's business
                above, after = _around(text.splitlines(), node)
                found[key] = (above, after) if after else ('', above)
    return found


def _around(lines, node):
    """The comment lines above a statement, and the comment after it with those that continue it."""
    indent = ' ' * node.col_offset
    rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()
    above = takewhile(lambda line: line.startswith(indent + '#'), lines[:node.lineno - 1][::-1])
    after = takewhile(lambda line: line.startswith(indent + ' ') and line.lstrip()[:1] == '#',
                      [f'{indent} {rest}', *lines[node.end_lineno:]])
    return [' '.join(line.lstrip('# ') for line in part) for part in ([*above][::-1], after)]
