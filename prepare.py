"""Turn a text into a data set of tokens: data/NAME/train.bin, val.bin and meta.json."""
import lib.start  # noqa: F401 (before torch)
import hashlib
import json
import os
import random
import re
import runpy
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from configurator import configure
from lib.console import brief, require, say
from lib.files import check_kind, fetch

dataset = ''        # name: shakespeare, python, python_mixed (its files in random order, so that
                    # the validation text is of the same kind), or one of your choice with --file
file = ''           # text to read, UTF-8; shakespeare: a local copy
tokenizer = 'char'  # char (one token per character) or gpt2 (byte pairs)
data_dir = 'data'   # folder of all data sets

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_VOCAB = 65536  # what uint16 can number
SHAKESPEARE_URL = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
                   'data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PYTHON = 'python', 'python_mixed'
UNPRINTABLE = bytes(set(range(256)) - {*range(0x20, 0x7f), *b'\t\n'})

class DownloadError(SystemExit):
    """A text could not be downloaded; the caller may go on with another data set."""

class Tokenizer:
    """Text to token ids and back.

    spec: {'kind': 'char', 'chars': the sorted distinct characters} or {'kind': 'gpt2'}.
    Raises SystemExit if the spec is damaged or the files of gpt2 cannot be loaded.
    """

    def __init__(self, spec):
        self.vocab_size = vocab_size_of(spec)
        require(self.vocab_size, 'damaged tokenizer description: prepare the data set again')
        require(self.vocab_size <= MAX_VOCAB, f'the text has {self.vocab_size:,} distinct '
                f'characters, more than {MAX_VOCAB:,}: use --tokenizer=gpt2')
        self.spec = dict(spec)
        self._gpt2 = _load_gpt2() if spec['kind'] == 'gpt2' else None
        if not self._gpt2:
            self._ids = np.full(sys.maxunicode + 1, -1, np.int32)  # of every character
            self._ids[_codes(spec['chars'])] = np.arange(self.vocab_size)

    def encode(self, text, start=0):
        """Token ids of a text, (N,) uint16. SystemExit on a character that the vocabulary has not;
        its position is counted from `start`."""
        if self._gpt2:
            return self._gpt2.encode_to_numpy(text, disallowed_special=()).astype('<u2')
        ids = self._ids[_codes(text)]
        if (ids < 0).any():
            i = int((ids < 0).argmax())
            raise SystemExit(f'error: character {text[i]!r} (U+{ord(text[i]):04X}) at position '
                             f'{start + i} is not in the vocabulary: leave it out, or prepare the '
                             'data with --tokenizer=gpt2')
        return ids.astype('<u2')

    def decode(self, ids):
        """Return the text of token ids, U+FFFD for bytes that are not UTF-8; see decode_bytes()."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def decode_bytes(self, ids):
        """Return the UTF-8 bytes of token ids: of gpt2's, one may hold a part of a character."""
        if self._gpt2:
            return self._gpt2.decode_bytes(ids)
        return ''.join(self.spec['chars'][i] for i in ids).encode('utf-8', 'surrogatepass')

def prepare(dataset, file='', tokenizer='char', data_dir='data'):
    """Write a data set and return the path of its folder; the arguments are the settings above.

    A relative data_dir lies beside this file. An older data set of that name is replaced only by a
    complete one. Raises DownloadError if the text cannot be downloaded, SystemExit with a one-line
    message on any other bad input.
    """
    _check_request(dataset, file, tokenizer)
    data_dir = os.path.join(HERE, data_dir)
    folder = os.path.join(data_dir, dataset)
    meta = os.path.join(folder, 'meta.json')
    check_kind(meta, b'"tokenizer": ')
    for part in ('train.bin', 'val.bin'):  # a meta.json of ours says that they are ours
        require(os.path.exists(meta) or not os.path.exists(os.path.join(folder, part)), f'{folder} '
                f'has a {part} without a meta.json of ours: rename it, or choose another name')
    encoder = Tokenizer({'kind': 'gpt2'}) if tokenizer == 'gpt2' else None  # before a download
    given = file
    if dataset == 'shakespeare' and not file:
        file = os.path.join(data_dir, 'shakespeare.txt')
        try:
            fetch(SHAKESPEARE_URL, file, 1, SHAKESPEARE_SHA256)
        except SystemExit as error:
            raise DownloadError(f'{error}, give a local copy with --file=PATH, or use what needs '
                                'no network: python prepare.py python') from None
    name = os.path.basename(file) or f'Python {sys.version.split()[0]}'
    text = read_text(file, mixed=dataset == 'python_mixed')
    require(text, f'{name} is empty: use a longer text')
    require(dataset != 'shakespeare' or _sha256(text.encode()) == SHAKESPEARE_SHA256,
            f'{file} is not tiny Shakespeare, by its SHA-256: '
            f"{'choose another name for it' if given else 'delete it'}")
    encoder = encoder or Tokenizer(_char_spec(text))
    ids = encoder.encode(text)
    require(len(ids) >= 20, f'{name} has {len(ids)} tokens and needs 20: use a longer text')
    n_train = int(0.9 * len(ids))
    parts = {'train.bin': ids[:n_train].tobytes(), 'val.bin': ids[n_train:].tobytes()}
    meta = {'dataset': dataset, 'source': name, 'sha256': _sha256(text.encode()),
            'tokenizer': encoder.spec, 'vocab_size': encoder.vocab_size, 'n_chars': len(text),
            'n_train': n_train, 'n_val': len(ids) - n_train,
            'files': {part: _sha256(content) for part, content in parts.items()}}
    _write(folder, {**parts, 'meta.json': (json.dumps(meta, indent=1) + '\n').encode()})
    say(f'{dataset}: {n_train:,} training and {len(ids) - n_train:,} validation tokens, '
        f'vocabulary of {encoder.vocab_size:,}, written to {folder}')
    return folder

def load_meta(folder):
    """Return the dict of a data set's meta.json. SystemExit if a file is missing or damaged."""
    path = os.path.join(folder, 'meta.json')
    name = os.path.basename(os.path.abspath(folder))
    again = f'prepare it again with: python prepare.py {name} [--file=PATH]'
    try:
        meta = json.loads(Path(path).read_bytes())
        known = vocab_size_of(meta['tokenizer'])
        require(meta['vocab_size'] == known and len(meta['sha256']) == 64,
                f'{path} is damaged: {again}')
        for part in ('train.bin', 'val.bin'):
            path = os.path.join(folder, part)
            require(_sha256(Path(path).read_bytes()) == meta['files'][part],
                    f'{path} is damaged (not as meta.json has it): {again}')
    except Exception as error:  # from a missing file to a list in the place of a dict
        raise SystemExit(f'error: {path} is missing, damaged or of an older version '
                         f'({brief(error, 300)}): {again}') from None
    return meta

def _char_spec(text):
    return {'kind': 'char', 'chars': ''.join(sorted(set(text)))}

def vocab_size_of(spec):
    """The number of tokens of a tokenizer's description; 0 if that is damaged."""
    if spec == {'kind': 'gpt2'}:
        return 50257
    chars = spec.get('chars') if isinstance(spec, dict) else None
    return len(chars) if isinstance(chars, str) and spec == _char_spec(chars) else 0

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
        raise SystemExit(f'error: gpt2 cannot be loaded ({brief(error, 300)}): install tiktoken '
                         'and go online once, or set TIKTOKEN_CACHE_DIR to its folder') from None

def _check_request(dataset, file, tokenizer):
    """Refuse settings that cannot be meant."""
    require(re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9._-]*', dataset),
            f"{dataset!r} cannot name a data set: write python prepare.py NAME [--file=PATH], NAME "
            f"being shakespeare, {', '.join(PYTHON)}, or of letters, digits, '.', '_' and '-'")
    require(tokenizer in ('char', 'gpt2'), f'tokenizer must be char or gpt2, not {tokenizer!r}')
    require(dataset in ('shakespeare', *PYTHON) or file, f'{dataset!r} needs a text: python '
            f'prepare.py {dataset} --file=PATH')
    require(dataset not in PYTHON or not file, f'{dataset!r} takes no --file: choose another name')

def read_text(file, mixed=False):
    """Return a text; without a file the one that Python brings."""
    piped = file.startswith(('/dev/stdin', '/dev/fd/'))  # also what a shell makes of <(command)
    require(piped or os.path.isfile(file) or not os.path.exists(file), f'{file} is a directory, a '
            f'pipe or a device: write the text into a file, or pipe it into --file=/dev/stdin')
    try:
        raw = Path(file).read_bytes() if file else _python_text(mixed)
        return raw.decode('utf-8').removeprefix('\ufeff')
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or brief(error, 300)
        raise SystemExit(f"error: cannot read {file or 'the library of Python'} ({reason}): give a "
                         'text in UTF-8 with --file=PATH') from None

def _python_text(mixed=False):
    """Python's own documentation and library: some 5 MB of text that is there without a network.
    mixed: in random order, the same always."""
    library = Path(sysconfig.get_path('stdlib'))
    topics = runpy.run_path(str(library / 'pydoc_data' / 'topics.py'))['topics']
    texts = [topics[key].encode('utf-8') for key in sorted(topics)]
    # sys.stdlib_module_names leaves out tests, build settings and what a distributor has added
    texts += [path.read_bytes() for path in sorted(library.glob('*.py'))
              if path.stem in sys.stdlib_module_names]
    if mixed:
        random.Random(1337).shuffle(texts)
    return b'\n'.join(texts).translate(None, UNPRINTABLE)

def _write(folder, files):
    """Write {name: bytes} into a folder; what was there stays until all of it is written."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.', dir=folder) as temporary:
            for name, content in files.items():
                Path(temporary, name).write_bytes(content)
            for name in files:
                os.replace(Path(temporary, name), Path(folder, name))
    except OSError as error:
        raise SystemExit(f'error: cannot write {folder} ({error.strerror}): get the right to it, '
                         f'or room, or choose another folder with --data_dir=PATH') from None

if __name__ == '__main__':
    prepare(**configure(globals(), positional='dataset').as_dict())
