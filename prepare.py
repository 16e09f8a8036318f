"""Turn a text into a data set of tokens: data/NAME/train.bin, val.bin and meta.json."""
import gzip
import hashlib
import importlib
import json
import os
import re
import sys
import sysconfig
import tempfile
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np

from configurator import configure
from lib.console import say

dataset = ''        # name: shakespeare, python, or one of your choice together with --file
file = ''           # text to read, UTF-8, packed by gzip or not; shakespeare: a local copy
tokenizer = 'char'  # char (one token per character) or gpt2 (byte pairs)
newlines = 'keep'   # keep (line ends as they are) or unix (\r\n becomes \n)
data_dir = 'data'   # folder of all data sets

HERE = os.path.dirname(os.path.abspath(__file__))
BUILT_IN = ('shakespeare', 'python')
META = {'tokenizer': dict, 'vocab_size': int, 'sha256': str, 'files': dict,
        'n_train': int, 'n_val': int}  # what others read in meta.json
MAX_VOCAB = 65536  # what uint16 can number
GPT2_VOCAB = 50257
MIN_TOKENS = 20
SHAKESPEARE_URL = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                   'data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
TIMEOUT = (10, 30)     # seconds to connect, and between two pieces of the answer
PAUSES = (1, 3, None)  # seconds after each failed download; None gives up
UNPRINTABLE = bytes(set(range(256)) - {*range(0x20, 0x7f), *b'\t\n'})


class DownloadError(SystemExit):
    """A text could not be downloaded; the caller may go on with another data set."""


class Tokenizer:
    """Text to token ids and back.

    spec: {'kind': 'char', 'chars': the sorted distinct characters} or {'kind': 'gpt2'}.
    Raises SystemExit if the spec is damaged or the files of gpt2 cannot be loaded.
    """

    def __init__(self, spec):
        self.vocab_size = _vocab_size(spec)
        _check(self.vocab_size, 'damaged tokenizer description: prepare the data set again')
        self.spec = dict(spec)
        self._gpt2 = _load_gpt2() if spec['kind'] == 'gpt2' else None
        if not self._gpt2:
            self._ids = np.full(sys.maxunicode + 1, -1, np.int32)  # of every character
            self._ids[_codes(spec['chars'])] = np.arange(self.vocab_size)

    def encode(self, text, start=0):
        """Return the token ids of a text as a list; see encode_array()."""
        return self.encode_array(text, start).tolist()

    def encode_array(self, text, start=0):
        """Return the token ids of a text, uint16. SystemExit on one not in the vocabulary.

        start: position of the text in a longer one, for that message.
        """
        if self._gpt2:
            return np.array(self._gpt2.encode_ordinary(text), dtype='<u2')
        ids = self._ids[_codes(text)]
        for i in np.flatnonzero(ids < 0)[:1]:
            raise SystemExit(f'error: character {text[i]!r} (U+{ord(text[i]):04X}) at position '
                             f'{start + i} is not among the {self.vocab_size} characters of the '
                             'data set: leave it out, or prepare the data with --tokenizer=gpt2')
        return ids.astype('<u2')

    def decode(self, ids):
        """Return the text of token ids, U+FFFD for bytes that are not UTF-8; see decode_bytes()."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """Return the UTF-8 bytes of token ids: of gpt2's, one may hold a part of a character."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise SystemExit(f'error: token id {i} is outside the vocabulary of '
                                 f'{self.vocab_size}: use the data set the model was trained on')
        if self._gpt2:
            return self._gpt2.decode_bytes(ids)
        return ''.join(self.spec['chars'][i] for i in ids).encode('utf-8', 'surrogatepass')


def prepare(dataset, file='', tokenizer='char', newlines='keep', data_dir='data', quiet=False):
    """Write a data set and return the path of its folder; the arguments are the settings above.

    A relative data_dir lies beside this file. quiet: print nothing.
    Raises DownloadError if the text cannot be downloaded, SystemExit with a one-line message on
    any other bad input. An older data set of that name is replaced only by a complete one.
    """
    _check_request(dataset, file, tokenizer, newlines, data_dir)
    data_dir, name = os.path.join(HERE, data_dir), file or dataset
    folder = os.path.join(data_dir, dataset)
    tell = (lambda line: None) if quiet else say
    encoder = Tokenizer({'kind': 'gpt2'}) if tokenizer == 'gpt2' else None  # before a download
    try:
        _check_replaceable(folder)
        raw, source = _source(dataset, file, data_dir, tell)
        if newlines == 'unix':
            raw = raw.replace(b'\r\n', b'\n')
        elif pairs := raw.count(b'\r\n'):
            tell(f'{name}: {pairs:,} lines end in \\r\\n; --newlines=unix would make that \\n')
        text = _decode(raw, name)
        chars = ''.join(map(chr, np.flatnonzero(np.bincount(_codes(text)))))
        _check(encoder or len(chars) <= MAX_VOCAB, f'the text has {len(chars):,} distinct '
               f'characters, more than {MAX_VOCAB:,}: use --tokenizer=gpt2')
        encoder = encoder or Tokenizer({'kind': 'char', 'chars': chars})
        ids = encoder.encode_array(text)
        _check(len(ids) >= MIN_TOKENS, f'{name} gives {len(ids)} tokens and at least '
               f'{MIN_TOKENS} are needed: use a longer text')
        n_train = int(0.9 * len(ids))
        parts = {'train.bin': ids[:n_train], 'val.bin': ids[n_train:]}
        meta = {'dataset': dataset, 'source': source, 'sha256': _sha256(raw),
                'tokenizer': encoder.spec, 'vocab_size': encoder.vocab_size, 'n_chars': len(text),
                'n_train': n_train, 'n_val': len(ids) - n_train,
                'files': {name: _sha256(part) for name, part in parts.items()}}
        _write(folder, {**parts, 'meta.json': (json.dumps(meta, indent=1) + '\n').encode()})
    except OSError as error:
        raise SystemExit(f'error: cannot write {error.filename or folder} '
                         f'({error.strerror or error}): free some space, or choose another folder '
                         'with --data_dir=PATH') from None
    tell(f'{dataset}: {n_train:,} training and {len(ids) - n_train:,} validation tokens, '
         f'vocabulary of {encoder.vocab_size:,}, written to {folder}')
    return folder


def load_meta(folder, check=True):
    """Return the dict of a data set's meta.json, after checking that the data set is whole.

    check: read train.bin and val.bin as well, for ids beyond the vocabulary and their SHA-256.
    Raises SystemExit naming the damaged or missing file and the remedy.
    """
    name, path = os.path.basename(os.path.abspath(folder)), os.path.join(folder, 'meta.json')
    own = '' if name in BUILT_IN else ' --file=PATH'
    again = f'prepare it again with: python prepare.py {name}{own}'
    try:
        meta = json.loads(Path(path).read_text('utf-8'))
        whole = isinstance(meta, dict) and all(type(meta.get(key)) is kind and meta[key]
                                               for key, kind in META.items())
        _check(whole and meta['vocab_size'] == _vocab_size(meta['tokenizer']),
               f'{path} is damaged or of an older version: {again}')
        for part in ('train', 'val'):
            path = os.path.join(folder, f'{part}.bin')
            size, expected = os.path.getsize(path), 2 * meta[f'n_{part}']
            _check(size == expected, f'{path} is damaged ({size} bytes, not {expected}): {again}')
            ids = np.fromfile(path, '<u2') if check else np.zeros(1)
            _check(ids.max() < meta['vocab_size'], f'{path} is damaged (id {ids.max()} is beyond '
                   f"the vocabulary of {meta['vocab_size']}): {again}")
            _check(not check or _sha256(ids) == meta['files'].get(f'{part}.bin'),
                   f'{path} is damaged (its SHA-256 is not the one in meta.json): {again}')
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', '') or 'not JSON'
        raise SystemExit(f'error: {path} is missing or damaged ({reason}): {again}') from None
    return meta


def _vocab_size(spec):
    """The number of tokens of a tokenizer's description; 0 if that is damaged."""
    kind, chars = map(spec.get, ('kind', 'chars')) if isinstance(spec, dict) else (None, None)
    if kind != 'char' or not isinstance(chars, str) or list(chars) != sorted(set(chars)):
        return GPT2_VOCAB if kind == 'gpt2' else 0
    return len(chars) if len(chars) <= MAX_VOCAB else 0


def _check(fine, message):
    if not fine:
        raise SystemExit(f'error: {message}')


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _codes(text):
    """The code points of a text. Lone surrogates, as in undecodable arguments, are let through."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')


def _load_gpt2():
    try:
        import tiktoken
        return tiktoken.get_encoding('gpt2')
    except Exception as error:  # from a missing package to a proxy's broken answer
        raise SystemExit(f'error: the tokenizer gpt2 cannot be loaded ({_reason(error)}): install '
                         'tiktoken and go online once, or set TIKTOKEN_CACHE_DIR to a folder that '
                         'holds its files') from None


def _reason(error):
    """One short line about an exception."""
    return textwrap.shorten(f'{type(error).__name__}: {error}', 300, placeholder='...')


def _check_request(dataset, file, tokenizer, newlines, data_dir):
    """Refuse settings that cannot be meant."""
    built_in = ' or '.join(BUILT_IN)
    _check(dataset, 'no data set named: usage: python prepare.py NAME [--file=PATH] '
                    f'[--tokenizer=char|gpt2], where NAME is {built_in}, or any other with --file')
    _check(re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9._-]*', dataset),
           f"{dataset!r} cannot name a data set: use letters, digits, '.', '_' and '-', and begin "
           "with a letter or digit; a text's path goes into --file=PATH")
    _check(tokenizer in ('char', 'gpt2'), f'tokenizer must be char or gpt2, not {tokenizer!r}')
    _check(newlines in ('keep', 'unix'), f'newlines must be keep or unix, not {newlines!r}')
    _check(data_dir, 'data_dir is empty: name a folder with --data_dir=PATH')
    _check(not (dataset == 'python' and file),
           "the data set 'python' takes no --file: use another name for your own text")
    _check(dataset in BUILT_IN or file,
           f'no text for the data set {dataset!r}: give it with --file=PATH, or choose {built_in}')


def _check_replaceable(folder):
    """Refuse to replace anything that is not a data set: it may be somebody's work."""
    names = set(os.listdir(folder) if os.path.exists(folder) else ())
    others = sorted(names - {'train.bin', 'val.bin', 'meta.json'})
    _check(not others, f"{folder} holds other files ({', '.join(others[:3])}): "
                       'move them away, or choose another name')


def _source(dataset, file, data_dir, tell):
    """Return the bytes of a data set's text and a word about their source."""
    if dataset == 'python':
        return _python_text(), f'Python {sys.version.split()[0]}'
    if file:
        raw = _read(file)
        _check(dataset != 'shakespeare' or _sha256(raw) == SHAKESPEARE_SHA256,
               f'{file} is not tiny Shakespeare, which has another SHA-256: '
               'give a true copy, or use another name for your own text')
        return raw, os.path.basename(file)
    path = os.path.join(data_dir, 'shakespeare.txt')  # kept from an earlier download
    if not os.path.isfile(path) or _sha256(_read(path)) != SHAKESPEARE_SHA256:
        tell(f'downloading {SHAKESPEARE_URL}')
        _write(path, _download())
    return _read(path), SHAKESPEARE_URL


def _read(path):
    """Return the bytes of a text, unpacked if gzip has packed it."""
    try:
        raw = Path(path).read_bytes()
        return gzip.decompress(raw) if raw.startswith(b'\x1f\x8b') else raw
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, 'strerror', '') or _reason(error)
        raise SystemExit(f'error: cannot read {path!r} ({reason}): '
                         'give the path of a text with --file=PATH') from None


def _decode(raw, name):
    """Return the text of UTF-8 bytes, without a byte order mark."""
    try:
        text = raw.decode('utf-8').removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        raise SystemExit(f'error: {name} is not UTF-8 (at byte {error.start}): '
                         'convert it to UTF-8') from None
    _check(text, f'{name} is empty: use a longer text')
    return text


def _python_text():
    """Python's own documentation and library: some 5 MB of text that is there without a network."""
    try:
        topics = importlib.import_module('pydoc_data.topics').topics
        texts = [topics[key].encode('utf-8') for key in sorted(topics)]
        # sys.stdlib_module_names leaves out tests, build settings and what a distributor has added
        modules = [path for path in sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
                   if path.stem in sys.stdlib_module_names]
        if not modules:
            raise FileNotFoundError('no modules in the folder of the library')
        texts += [path.read_bytes() for path in modules]
    except (ImportError, OSError) as error:
        raise SystemExit(f'error: the sources of the Python library are not installed '
                         f'({_reason(error)}): use your own text with --file=PATH') from None
    return b'\n'.join(texts).translate(None, UNPRINTABLE)


def _download():
    """Fetch tiny Shakespeare; what may be a passing failure is tried again."""
    for pause in PAUSES:
        try:
            import requests
            answer = requests.get(SHAKESPEARE_URL, timeout=TIMEOUT)
            answer.raise_for_status()
            if _sha256(answer.content) != SHAKESPEARE_SHA256:
                raise ValueError('not the expected text, its SHA-256 is another')
            return answer.content
        except Exception as error:  # from a missing package to a proxy's broken answer
            status = getattr(getattr(error, 'response', None), 'status_code', 500)
            if pause is None or status < 500 or isinstance(error, (ImportError, ValueError)):
                raise DownloadError(
                    f'error: cannot download {SHAKESPEARE_URL} ({_reason(error)}): give a local '
                    'copy with --file=PATH, or use the data set that needs no network: '
                    'python prepare.py python') from None
        time.sleep(pause)


def _write(path, content):
    """Write bytes as a file, or {name: bytes} as a folder: completely, or what was there stays."""
    path = os.path.realpath(path)  # a link to a folder elsewhere stays a link
    parent, name = os.path.split(path)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{name}.', dir=parent) as temporary:
        new, old = Path(temporary, 'new'), Path(temporary, 'old')
        if isinstance(content, dict):
            new.mkdir()
        for name, part in content.items() if isinstance(content, dict) else [('', content)]:
            # not ndarray.tofile: it can miss the error of a disk that fills up at the end
            (new / name).write_bytes(part)
        try:
            if os.path.exists(path):
                os.rename(path, old)
            os.rename(new, path)
        except BaseException:
            if old.exists() and not os.path.exists(path):
                os.rename(old, path)
            raise


if __name__ == '__main__':
    prepare(**configure(globals(), positional='dataset').as_dict())
