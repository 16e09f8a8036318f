"""Turn a text into a data set of tokens: data/NAME/train.bin, val.bin and meta.json."""
import difflib
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time

import numpy as np

from configurator import configure

dataset = ''        # name: shakespeare, python, or one of your choice together with --file
file = ''           # text to read, UTF-8; a local copy in the case of shakespeare
tokenizer = 'char'  # char (one token per character) or gpt2 (byte pairs)
data_dir = 'data'   # folder of all data sets

# Settings are read before the constants below exist: those are not for the command line.
if __name__ == "__main__":
    config = configure(globals(), positional="dataset")

HERE = os.path.dirname(os.path.abspath(__file__))
BUILT_IN = ("shakespeare", "python")
TOKENIZERS = ("char", "gpt2")
MAX_VOCAB = 65536  # what uint16 can number
GPT2_VOCAB = 50257
MIN_TOKENS = 20
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SIZE = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = (10, 30)  # seconds to connect, and between two pieces of the answer
PAUSES = (1, 3)     # seconds to wait before each further try
CHUNK = 64 * 1024
PRINTABLE = bytes(range(0x20, 0x7f)) + b"\t\n"
UNPRINTABLE = bytes(set(range(256)) - set(PRINTABLE))


class DownloadError(SystemExit):
    """A text could not be downloaded; the caller may go on with another data set."""


class Tokenizer:
    """Text to token ids and back.

    spec: {"kind": "char", "chars": the sorted distinct characters} or {"kind": "gpt2"}.
    Raises SystemExit if the spec is damaged or the files of gpt2 cannot be loaded.
    """

    def __init__(self, spec):
        problem = _spec_problem(spec)
        if problem:
            raise SystemExit(f"error: damaged tokenizer description ({problem}): prepare the data set again")
        self.spec = dict(spec)
        self._gpt2 = _load_gpt2() if spec["kind"] == "gpt2" else None
        self._codes = None if self._gpt2 else _codes(spec["chars"])
        self.vocab_size = GPT2_VOCAB if self._gpt2 else len(spec["chars"])

    def encode(self, text, start=0):
        """Return the list of token ids of a text; SystemExit on a character not in the vocabulary.

        start: position of the text in a longer one, for that message.
        """
        return self.encode_array(text, start).tolist()

    def encode_array(self, text, start=0):
        """Return the token ids of a text as a uint16 array; SystemExit as encode()."""
        if self._gpt2:
            return np.array(self._gpt2.encode_ordinary(text), dtype="<u2")
        codes = _codes(text)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            position = int(unknown[0])
            char = text[position]
            raise SystemExit(f"error: character {char!r} (U+{ord(char):04X}) at position {start + position} is not among "
                             f"the {self.vocab_size} characters of the data set: leave it out, "
                             "or prepare the data with --tokenizer=gpt2")
        return ids.astype("<u2")

    def decode(self, ids):
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD. Raises SystemExit as decode_bytes()."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Return the UTF-8 bytes of token ids; those of gpt2 may begin or end inside a character.

        Raises SystemExit on an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise SystemExit(f"error: token id {i} is outside the vocabulary of {self.vocab_size}: "
                                 "use the data set that the model was trained on")
        if self._gpt2:
            return self._gpt2.decode_bytes(ids)
        return "".join(self.spec["chars"][i] for i in ids).encode("utf-8", "surrogatepass")


def prepare(dataset, file='', tokenizer='char', data_dir='data', quiet=False):
    """Write a data set and return the path of its folder.

    dataset: 'shakespeare', 'python', or a name of one's own together with `file`.
    file: path of a UTF-8 text.
    tokenizer: 'char' or 'gpt2'.
    data_dir: folder of all data sets; a relative one lies beside this file.
    quiet: print nothing.
    Raises DownloadError if the text cannot be downloaded, SystemExit with a one-line message on
    any other bad input. An older data set of that name is replaced only by a complete one.
    """
    _check_request(dataset, file, tokenizer, data_dir)
    data_dir = os.path.join(HERE, data_dir)
    folder = os.path.join(data_dir, dataset)
    _check_replaceable(folder)
    encoder = Tokenizer({"kind": "gpt2"}) if tokenizer == "gpt2" else None  # before a long download
    try:
        raw, origin = _source(dataset, file, data_dir, quiet)
        text = _decode_text(raw, file or dataset)
        encoder = encoder or Tokenizer({"kind": "char", "chars": _vocabulary(text)})
        ids = encoder.encode_array(text)
        if len(ids) < MIN_TOKENS:
            raise SystemExit(f"error: {file or dataset} gives {len(ids)} tokens and at least {MIN_TOKENS} are "
                             "needed: use a longer text")
        n_train = int(0.9 * len(ids))
        meta = {"dataset": dataset, **origin, "sha256": hashlib.sha256(raw).hexdigest(),
                "tokenizer": encoder.spec, "vocab_size": encoder.vocab_size,
                "n_chars": len(text), "n_train": n_train, "n_val": len(ids) - n_train}
        _write(folder, ids, meta)
    except OSError as error:
        reason = error.strerror or error
        raise SystemExit(f"error: cannot write {error.filename or folder} ({reason}): "
                         "free some space, or choose another folder with --data_dir=PATH") from None
    if not quiet:
        print(f"{dataset}: {n_train:,} training and {len(ids) - n_train:,} validation tokens, "
              f"vocabulary of {encoder.vocab_size:,}, written to {folder}")
    return folder


def load_meta(folder):
    """Read a data set's meta.json and check that the data set is whole.

    folder: what prepare() returned.
    Returns the dict of meta.json.
    Raises SystemExit naming the damaged or missing file and the remedy.
    """
    name = os.path.basename(os.path.abspath(folder))
    again = f"prepare it again with: python prepare.py {name}" + ("" if name in BUILT_IN else " --file=PATH")
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as stream:
            meta = json.load(stream)
    except FileNotFoundError:
        raise SystemExit(f"error: no data set: {path} is missing: {again}") from None
    except OSError as error:
        raise SystemExit(f"error: cannot read {path} ({error.strerror}): {again}") from None
    except (ValueError, RecursionError):
        raise SystemExit(f"error: {path} is damaged (not JSON): {again}") from None
    problem = _meta_problem(meta)
    if problem:
        raise SystemExit(f"error: {path} is damaged ({problem}): {again}")
    for part in ("train", "val"):
        path = os.path.join(folder, f"{part}.bin")
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size != 2 * meta[f"n_{part}"]:
            wanted = 2 * meta[f"n_{part}"]
            problem = "is missing" if size is None else f"is damaged ({size} bytes, not {wanted})"
            raise SystemExit(f"error: {path} {problem}: {again}")
    return meta


def _meta_problem(meta):
    """Say what is wrong with the content of a meta.json; '' if nothing is."""
    if not isinstance(meta, dict):
        return "not an object"
    for key in ("vocab_size", "n_train", "n_val"):
        if type(meta.get(key)) is not int or meta[key] < 1:
            return f"{key} is no positive integer"
    spec = meta.get("tokenizer")
    problem = _spec_problem(spec)
    if problem:
        return problem
    expected = GPT2_VOCAB if spec["kind"] == "gpt2" else len(spec["chars"])
    return "" if meta["vocab_size"] == expected else f"vocab_size is not the tokenizer's {expected}"


def _spec_problem(spec):
    """Say what is wrong with a tokenizer's description; '' if nothing is."""
    if not isinstance(spec, dict) or spec.get("kind") not in TOKENIZERS:
        return "tokenizer is of no known kind"
    chars = spec.get("chars")
    if spec["kind"] == "gpt2":
        return ""
    if not isinstance(chars, str) or not 0 < len(chars) <= MAX_VOCAB or list(chars) != sorted(set(chars)):
        return "tokenizer has no sorted list of characters"
    return ""


def _codes(text):
    """The code points of a text. Lone surrogates, as in undecodable arguments, are let through."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _vocabulary(text):
    """The sorted distinct characters of a text, as a string."""
    codes = np.unique(_codes(text))
    if len(codes) > MAX_VOCAB:
        raise SystemExit(f"error: the text has {len(codes):,} distinct characters, more than {MAX_VOCAB:,}: "
                         "use --tokenizer=gpt2")
    return codes.tobytes().decode("utf-32-le")


def _load_gpt2():
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # from a missing package to a proxy's broken answer
        raise SystemExit(f"error: the tokenizer gpt2 cannot be loaded ({_reason(error)}): install tiktoken and go "
                         "online once, or set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None


def _reason(error):
    """One short line about an exception."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 160 else line[:157] + "..."


def _check_request(dataset, file, tokenizer, data_dir):
    if not dataset:
        raise SystemExit("error: no data set named: usage: python prepare.py NAME [--file=PATH] "
                         "[--tokenizer=char|gpt2], "
                         f"where NAME is {' or '.join(BUILT_IN)}, or any other with --file")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", dataset):
        raise SystemExit(f"error: {dataset!r} cannot name a data set: use letters, digits, '.', '_' and '-', "
                         "and begin with a letter or digit; a text's path goes into --file=PATH")
    if tokenizer not in TOKENIZERS:
        near = difflib.get_close_matches(tokenizer, TOKENIZERS, 1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TOKENIZERS)}"
        raise SystemExit(f"error: unknown tokenizer {tokenizer!r}: {remedy}")
    if not data_dir:
        raise SystemExit("error: data_dir is empty: name a folder with --data_dir=PATH")
    if dataset == "python" and file:
        raise SystemExit("error: the data set 'python' takes no --file: use another name for your own text")
    if dataset not in BUILT_IN and not file:
        near = difflib.get_close_matches(dataset, BUILT_IN, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise SystemExit(f"error: no text for the data set {dataset!r}: {meant}Give it with --file=PATH, "
                         f"or use a built-in one: {', '.join(BUILT_IN)}")


def _check_replaceable(folder):
    """Refuse to replace anything that is not a data set: it may be somebody's work."""
    if os.path.isdir(folder):
        try:
            others = sorted(set(os.listdir(folder)) - {"train.bin", "val.bin", "meta.json"})
        except OSError as error:
            raise SystemExit(f"error: cannot read {folder} ({error.strerror}): choose another name") from None
        if others:
            raise SystemExit(f"error: {folder} holds other files ({others[0]!r}): "
                             "move them away, or choose another name")
    elif os.path.lexists(folder) and not os.path.islink(folder):
        raise SystemExit(f"error: {folder} is a file, not a folder: choose another name")


def _source(dataset, file, data_dir, quiet):
    """Return the bytes of a data set's text and what meta.json says about their origin."""
    if dataset == "python":
        version = platform.python_version()
        return _python_text(), {"source": f"{platform.python_implementation()} {version}", "python": version}
    if file:
        raw = _read_file(file)
        if dataset == "shakespeare" and not _is_shakespeare(raw):
            raise SystemExit(f"error: {file} is not tiny Shakespeare ({_mismatch(raw)}): "
                             "give a true copy, or use another name for your own text")
        return raw, {"source": os.path.basename(file)}
    return _shakespeare(os.path.join(data_dir, "shakespeare.txt"), quiet), {"source": SHAKESPEARE_URL}


def _read_file(path):
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(f"error: cannot read {path!r} ({reason}): "
                         "give the path of a text with --file=PATH") from None


def _decode_text(raw, name):
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: {name} is not UTF-8 (at byte {error.start}): convert it to UTF-8") from None
    if not text:
        raise SystemExit(f"error: {name} is empty: use a longer text")
    return text


def _python_text():
    """Python's own documentation and library: some 5 MB of text that is there without a network."""
    try:
        from pydoc_data.topics import topics
        sources = [topics[key].encode("utf-8") for key in sorted(topics)]
        library = sysconfig.get_path("stdlib")
        # sys.stdlib_module_names leaves out tests, build settings and what a distributor has added
        modules = sorted(name for name in os.listdir(library)
                         if name.endswith(".py") and name[:-3] in sys.stdlib_module_names)
        if not modules:
            raise FileNotFoundError("no modules in the library's folder")
        for name in modules:
            with open(os.path.join(library, name), "rb") as stream:
                sources.append(stream.read())
    except (ImportError, OSError) as error:
        raise SystemExit(f"error: the sources of the Python library are not installed ({_reason(error)}): "
                         "use another Python, or your own text with NAME --file=PATH") from None
    return b"\n".join(sources).translate(None, UNPRINTABLE)


def _is_shakespeare(raw):
    return len(raw) == SHAKESPEARE_SIZE and hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256


def _mismatch(raw):
    return (f"{len(raw)} bytes, SHA-256 {hashlib.sha256(raw).hexdigest()}, "
            f"expected {SHAKESPEARE_SIZE} bytes, SHA-256 {SHAKESPEARE_SHA256}")


def _shakespeare(path, quiet):
    """Return tiny Shakespeare from the copy kept at `path`, downloading that first if need be."""
    if os.path.isfile(path):
        raw = _read_file(path)
        if _is_shakespeare(raw):
            return raw
    raw = _download(quiet)
    if not _is_shakespeare(raw):
        raise _download_error(f"it is not the expected text: {_mismatch(raw)}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as stream:
            stream.write(raw)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    return raw


def _download_error(reason):
    return DownloadError(f"error: cannot download {SHAKESPEARE_URL} ({reason}): give a local copy with --file=PATH, "
                         "or use the data set that needs no network: python prepare.py python")


def _download(quiet):
    """Fetch tiny Shakespeare; what may be a passing failure is tried again."""
    try:
        import requests
    except ImportError as error:
        raise _download_error(_reason(error)) from None
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    for pause in PAUSES + (None,):
        try:
            return _fetch(requests, quiet)
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 0)
            again = isinstance(error, passing) or status >= 500
            if pause is None or not again:
                raise _download_error(_reason(error)) from None
        if not quiet:
            print(f"no success, next try in {pause} s")
        time.sleep(pause)


def _fetch(requests, quiet):
    """One try at the download. Raises requests.RequestException."""
    raw = bytearray()
    with requests.get(SHAKESPEARE_URL, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        try:
            for chunk in response.iter_content(CHUNK):
                raw += chunk
                if not quiet:
                    share = min(100, 100 * len(raw) // SHAKESPEARE_SIZE)
                    print(f"\rdownloading {SHAKESPEARE_URL}: {share} %", end="", flush=True)
                if len(raw) > SHAKESPEARE_SIZE:  # not the text; its end may never come
                    break
        finally:
            if not quiet:
                print()
    return bytes(raw)


def _write(folder, ids, meta):
    """Write a data set beside its place and move it there when it is complete."""
    folder = os.path.realpath(folder)  # a link to a folder elsewhere stays a link
    parent, name = os.path.split(folder)
    new, old = (os.path.join(parent, f".{name}.{os.getpid()}.{end}") for end in ("new", "old"))
    n_train = meta["n_train"]
    parts = {"train.bin": ids[:n_train].tobytes(), "val.bin": ids[n_train:].tobytes(),
             "meta.json": (json.dumps(meta, indent=1) + "\n").encode("ascii")}
    os.makedirs(parent, exist_ok=True)
    try:
        os.mkdir(new)
        for part, content in parts.items():
            # not ndarray.tofile: it can miss the error of a disk that fills up at the end
            with open(os.path.join(new, part), "wb") as stream:
                stream.write(content)
        _exchange(new, folder, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(new, folder, old):
    """Put `new` in the place of `folder`; should that fail, what was there comes back."""
    try:
        if os.path.isdir(folder):
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        if os.path.isdir(old) and not os.path.exists(folder):
            os.rename(old, folder)
        raise


if __name__ == "__main__":
    try:
        prepare(**config)
    except KeyboardInterrupt:
        raise SystemExit("error: interrupted: run it again to prepare the data set") from None
