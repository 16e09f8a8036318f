"""Configuration as plain commented globals, overridden by config files and flags.

A script lists its settings as globals, one per line, each with a comment, and then says

    from configurator import configure
    config = configure(globals())

Every bool, int, float or text among the globals is then a key: `--key=value` on the command
line sets it, and so does a line `key = value` in a config file named on the command line.
"""
import ast
import difflib
import io
import math
import os
import sys
import tokenize
import types

KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
INT_LIMIT = 2 ** 63  # what a tensor of integers can hold


def configure(namespace, argv=None, positional=None):
    """Apply config files and flags to the settings in a script's globals.

    Config files come first, in their order, then the flags, wherever they stand on the line.

    namespace: the script's globals(); its public bool, int, float and str values are the keys.
    argv: the command line without the script's name; sys.argv[1:] unless given.
    positional: the key that a bare argument sets; without it a bare argument is a config file.
    Returns a dict of every key and its effective value; the namespace is updated as well, and its
    _given is the set of the keys that a file or a flag set.
    Raises SystemExit with a one-line message on bad input, and with 0 after --help. The
    namespace is then unchanged. From then on Ctrl-C ends the script with a line, where it does not
    answer it otherwise.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _excepthook
    argv = sys.argv[1:] if argv is None else list(argv)
    defaults = {key: value for key, value in namespace.items()
                if not key.startswith("_") and type(value) in KINDS}
    if "-h" in argv or "--help" in argv:
        print(_help(namespace, defaults, positional))
        raise SystemExit(0)
    files, flags = _split(argv, defaults, positional)
    config = dict(defaults)
    given = {key for key, _ in flags}
    for name in files:
        values = _read_config(name, defaults, _folder(namespace))
        config.update(values)
        given.update(values)
    for key, text in flags:
        config[key] = _absolute(key, _parse(key, text, defaults[key]))
    namespace.update(config)
    namespace["_given"] = given
    return config


def _excepthook(kind, error, trace):
    """Show what ends the script: Ctrl-C, which is no error, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def numbers(key, text, least=0, multiple=1):
    """Return the whole numbers in the text of a setting, such as '12,48,192', each once and rising.

    key: the setting's name, for the message.
    Raises SystemExit unless they are numbers, not below `least` and multiples of `multiple`.
    """
    parts = [part.strip() for part in text.split(",")]
    whole = [part.isascii() and part.isdigit() for part in parts]
    found = sorted({int(part) for part, fine in zip(parts, whole) if fine})
    if all(whole) and found[0] >= least and not any(n % multiple for n in found):
        return found
    kind = f", multiples of {multiple}" if multiple > 1 else ""
    raise SystemExit(f"error: {key} must be whole numbers from {least} on{kind}, separated by commas, not {text!r}")


def at_least(config, **least):
    """Raise SystemExit if a setting is smaller than told."""
    for key, value in least.items():
        if config[key] < value:
            raise SystemExit(f"error: {key} must be at least {value}, not {config[key]}")


def show(config):
    """Return a configuration as text, one aligned `key = value` per line.

    config: the dict that configure() returned.
    """
    width = max(map(len, config), default=0)
    return "\n".join(f"{key:<{width}} = {value!r}" for key, value in config.items())


def _split(argv, defaults, positional):
    """Sort the command line into config files and (key, text) flags."""
    files, flags = [], []
    bare = 0
    for item, following in zip(argv, argv[1:] + [""]):
        if item.startswith("--"):
            flags.append(_split_flag(item, following, defaults))
            continue
        key, equals, _ = item.lstrip("-").partition("=")  # one hyphen, or none, instead of two
        if equals and not item.endswith(".py"):
            raise SystemExit(f"error: {item!r} is not a flag: write --{item.lstrip('-')}"
                             + ("" if key in defaults else " (--help lists the keys)"))
        if item.startswith("-"):
            raise SystemExit(f"error: {item!r} is no flag: write --key=value (--help lists the keys)")
        bare += 1
        if positional is None:
            files.append(item)
        elif bare > 1:
            raise SystemExit(f"error: {item!r} is one argument too many: only one {positional} can be given")
        else:
            flags.append((positional, item))
    return files, flags


def _split_flag(item, following, defaults):
    """Split one --key=value; `following` is the next argument, for the hint to write it so."""
    key, equals, text = item[2:].partition("=")
    if key not in defaults:
        raise SystemExit(f"error: unknown key --{key}: {hint(key, defaults, '--')}")
    if not equals:
        is_bool = type(defaults[key]) is bool
        value = "True" if is_bool else "VALUE"
        if following and not following.startswith("--"):
            value = following if not is_bool or following.lower() in ("true", "false") else value
        raise SystemExit(f"error: --{key} has no value: write --key=value, here --{key}={value}")
    return key, text


def hint(key, known, prefix=""):
    """Say which known key was probably meant, or where the keys are listed."""
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {prefix}{near[0]}?" if near else "--help lists the keys"


def _bad_value(where, key, value, default):
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    kind = KINDS[type(default)]
    return SystemExit(f"error: {where}{key}={shown}: expected {kind} (default {default!r})")


def _parse(key, text, default):
    """Turn the text of a flag into a value of the default's type."""
    kind = type(default)
    value = text
    if kind is bool:
        value = {"true": True, "false": False}.get(text.lower(), text)
    elif kind in (int, float):
        # int before float: text such as 9007199254740993 would be rounded by float
        for convert in (kind, float):
            try:
                value = convert(text)
                break
            except ValueError:
                continue
    if not _fits(value, kind):
        raise _bad_value("--", key, text, default)
    return kind(value)


def _fits(value, kind):
    """Whether a value can stand for one of the given kind without loss."""
    given = type(value)
    if kind in (bool, str):
        return given is kind
    if given not in (int, float):  # a bool is no number here
        return False
    if kind is int:
        whole = given is int or value.is_integer()
        return whole and abs(value) < INT_LIMIT
    return not math.isnan(value) if given is float else abs(value) <= sys.float_info.max


def _absolute(key, value):
    """A path given as a flag is meant from the current directory, wherever the script lies."""
    if value and (key.endswith(("_dir", "_file", "_state")) or key == "file"):
        return os.path.abspath(os.path.expanduser(value))
    return value


def _folder(namespace):
    return os.path.dirname(os.path.abspath(namespace.get("__file__", "script.py")))


def _find_config(name, folder):
    """Return the path of a config file, looked up here and then beside the script."""
    for path in (os.path.abspath(name), os.path.join(folder, name)):
        if os.path.isfile(path) and name.endswith(".py"):
            return path
    config = os.path.join(folder, "config")
    entries = os.listdir(config) if os.path.isdir(config) else []
    stems = [entry[:-3] for entry in entries if entry.endswith(".py")]
    near = difflib.get_close_matches(os.path.basename(name).removesuffix(".py"), stems, 1)
    problem = "not found" if name.endswith(".py") else "is not a .py file"
    remedy = f"did you mean config/{near[0]}.py?" if near else "give its path, or set keys as --key=value"
    raise SystemExit(f"error: config file {name!r} {problem}: {remedy}")


def run_file(name, folder):
    """Run a config file, looked for here and in `folder`, and return the names it sets, unchecked.

    Raises SystemExit with a one-line message if it is missing or fails.
    """
    path = _find_config(name, folder)
    found = {"__file__": path, "__name__": "__config__"}
    try:
        with open(path, "rb") as stream:
            exec(compile(stream.read(), path, "exec"), found)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {getattr(error, 'msg', error)}".split())
        raise SystemExit(f"error: {name}:{_error_line(error, path)}: {reason}: correct the config file") from None
    return {key: value for key, value in found.items() if not key.startswith("_")}


def is_helper(value):
    """Whether a name that a config file sets is no setting, but what it needs to work one out."""
    return isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type))


def _read_config(name, defaults, folder):
    """Run a config file and return the keys it sets, checked."""
    values = {}
    for key, value in run_file(name, folder).items():
        if is_helper(value) and key not in defaults:
            continue
        if key not in defaults:
            raise SystemExit(f"error: {name}: unknown key {key!r}: {hint(key, defaults)}")
        if not _fits(value, type(defaults[key])):
            raise _bad_value(f"{name}: ", key, value, defaults[key])
        values[key] = type(defaults[key])(value)
    return values


def _error_line(error, path):
    """The line of the config file at which an exception arose."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno or 1
    line, trace = 1, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _help(namespace, defaults, positional):
    """The text of --help: usage, purpose, and every key with its default and comment."""
    script = namespace.get("__file__", "script.py")
    bare = positional.upper() if positional else "[config.py ...]"
    lines = [f"usage: python {os.path.basename(script)} {bare} [--key=value ...]"]
    lines += (namespace.get("__doc__") or "").strip().splitlines()[:1]
    opening = len(lines)
    described = _describe(script, defaults)
    width = max((len(f"--{key}={value!r}") for key, value in defaults.items()), default=0)
    for key, value in defaults.items():
        heading, comment = described.get(key, ("", ""))
        if heading or len(lines) == opening:
            lines += ["", heading] if heading else [""]
        lines.append(f"  {f'--{key}={value!r}':<{width}}  {comment}".rstrip())
    return "\n".join(lines)


def _describe(script, keys):
    """Read from a script's source {key: (heading of the group it opens, its own comment)}."""
    try:
        with tokenize.open(script) as stream:
            source = stream.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return {}
    # line -> (text, column, whether the line holds nothing else)
    comments = {token.start[0]: (token.string.lstrip("# "), token.start[1], token.line.lstrip().startswith("#"))
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    described = {}
    for node in tree.body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        key = getattr(targets[0], "id", None)
        if key not in keys or key in described:  # later assignments are the script's business
            continue
        above = _comment_above(comments, node.lineno)
        own = _comment_after(comments, node.end_lineno)
        described[key] = (above, own) if own else ("", above)
    return described


def _comment_above(comments, line):
    """The full-line comments directly above a line; an indented one continues an earlier key's."""
    found = []
    while comments.get(line - 1, ("", 1, False))[1:] == (0, True):
        line -= 1
        found.insert(0, comments[line][0])
    return " ".join(found)


def _comment_after(comments, line):
    """The comment at the end of a line, with the indented comment lines that continue it."""
    if line not in comments:
        return ""
    found = [comments[line][0]]
    while comments.get(line + 1, ("", 0, False))[1] > 0 and comments[line + 1][2]:
        line += 1
        found.append(comments[line][0])
    return " ".join(found)
