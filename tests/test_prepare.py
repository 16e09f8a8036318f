"""prepare.py: texts, tokenizers, download, damaged data sets, and one-line errors."""
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import requests

import prepare
from prepare import DownloadError, Tokenizer, load_meta

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = 'To be, or not to be: é😀\n' * 4
PARTS = ['meta.json', 'train.bin', 'val.bin']


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(text=TEXT, dataset='mine', **settings):
    """Write a text and prepare it in the folder `data`."""
    Path('my.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    settings = {'file': 'my.txt', 'data_dir': os.path.abspath('data'), 'quiet': True, **settings}
    return prepare.prepare(dataset, **settings)


def check_error(words, call, *args, kind=SystemExit, **kwargs):
    """A SystemExit in one line that holds all of the words, which | separates."""
    with pytest.raises(SystemExit) as caught:
        call(*args, **kwargs)
    message = caught.value.code
    assert type(caught.value) is kind and message.startswith('error: ')
    assert '\n' not in message and len(message) < 600
    assert all(word in message for word in words.split('|')), message


def command(*argv, setup='', **env):
    """Run prepare.py as a program; `setup` is code that runs before it."""
    code = (f"{setup}\nimport runpy, sys\nsys.argv = ['prepare.py', *sys.argv[1:]]\n"
            f"runpy.run_path({os.path.join(ROOT, 'prepare.py')!r}, run_name='__main__')")
    return subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': ROOT, **env})


def ids_of(folder, *parts):
    return np.concatenate([np.fromfile(f'{folder}/{part}.bin', '<u2') for part in parts])


def fail_with(error):
    def call(*args, **kwargs):
        raise error
    return call


# texts

def test_data_set_of_characters(capsys):
    folder = make(quiet=False)
    chars, n_train = ''.join(sorted(set(TEXT))), int(0.9 * len(TEXT))
    assert folder == os.path.abspath('data/mine') and sorted(os.listdir(folder)) == PARTS
    assert os.listdir('data') == ['mine']
    hashes = {part: hashlib.sha256(Path(folder, part).read_bytes()).hexdigest()
              for part in PARTS[1:]}
    assert load_meta(folder) == {
        'dataset': 'mine', 'source': 'my.txt', 'sha256': hashlib.sha256(TEXT.encode()).hexdigest(),
        'tokenizer': {'kind': 'char', 'chars': chars}, 'vocab_size': len(chars), 'files': hashes,
        'n_chars': len(TEXT), 'n_train': n_train, 'n_val': len(TEXT) - n_train}
    assert ids_of(folder, 'train', 'val').tolist() == [chars.index(c) for c in TEXT]
    assert len(ids_of(folder, 'train')) == n_train
    assert capsys.readouterr().out == ('mine: 86 training and 10 validation tokens, '
                                       f'vocabulary of 13, written to {folder}\n')
    make()
    assert capsys.readouterr().out == ''


def test_relative_data_dir_lies_beside_the_program(monkeypatch, here):
    monkeypatch.setattr(prepare, 'HERE', str(here / 'program'))
    assert make(data_dir='d') == str(here / 'program' / 'd' / 'mine')


def test_line_ends_are_kept_or_turned_into_those_of_unix(capsys):
    raw = b'\xef\xbb\xbf' + b'ab\r\n' * 10 + b'c\rd'
    kept = load_meta(make(raw, quiet=False))
    assert kept['tokenizer']['chars'] == '\n\rabcd' and kept['n_chars'] == 43
    out = capsys.readouterr().out
    assert out.startswith('my.txt: 10 lines end in \\r\\n; --newlines=unix ')
    unix = load_meta(make(raw, newlines='unix', quiet=False))
    assert unix['tokenizer']['chars'] == '\n\rabcd' and unix['n_chars'] == 33
    assert capsys.readouterr().out.count('\n') == 1 and unix['sha256'] != kept['sha256']
    assert load_meta(make('ab\n' * 10))['sha256'] == load_meta(
        make('ab\r\n' * 10, newlines='unix'))['sha256']


@pytest.mark.parametrize('char', ['\r', '\0', '\u2028', '\x85', '\x1c'])
def test_unusual_characters_are_data(char, capsys):
    folder = make(f'ab{char}' * 9, quiet=False)
    meta = load_meta(folder)
    assert Tokenizer(meta['tokenizer']).decode(ids_of(folder, 'train', 'val')) == f'ab{char}' * 9
    assert capsys.readouterr().out.count('\n') == 1


def test_gzip_is_unpacked():
    packed = gzip.compress(TEXT.encode())
    assert load_meta(make(packed))['sha256'] == load_meta(make())['sha256']
    check_error('my.txt|cannot read|EOFError: Compressed file', make, packed[:-9])
    check_error('BadGzipFile', make, packed[:-8] + bytes(8))


@pytest.mark.parametrize('text, words', [
    (b'', 'my.txt|is empty'), (b'\xef\xbb\xbf', 'is empty'), (b'a' * 19, 'my.txt|19 tokens|20'),
    (b'abc\xff' + b'd' * 99, 'my.txt|not UTF-8|byte 3'),
    (b'\xef\xbb\xbfab\xff' + b'd' * 99, 'not UTF-8|byte 5')])
def test_bad_texts(text, words):
    check_error(words, make, text)
    assert not os.path.exists('data')


def test_shortest_text():
    meta = load_meta(make('ab' * 10))
    assert (meta['n_train'], meta['n_val']) == (18, 2)


@pytest.mark.parametrize('settings, words', [
    ({'dataset': ''}, 'usage: python prepare.py NAME|shakespeare or python'),
    ({'dataset': '../x'}, "'../x'|letters"), ({'dataset': '.x'}, "'.x'"),
    ({'dataset': '-x'}, "'-x'"), ({'dataset': 'a b'}, "'a b'"), ({'dataset': 'x\n'}, 'letters'),
    ({'dataset': 'a/b'}, '--file'), ({'file': ''}, "'mine'|--file=PATH|shakespeare or python"),
    ({'dataset': 'python'}, "'python' takes no --file|another name"),
    ({'tokenizer': 'chr'}, "char or gpt2, not 'chr'"), ({'newlines': 'dos'}, 'keep or unix'),
    ({'data_dir': ''}, 'data_dir is empty'), ({'file': 'a\0b'}, 'null byte'),
    ({'file': 'none.txt'}, "'none.txt'|No such file|--file=PATH"),
    ({'file': '.'}, "'.'|Is a directory"),
    ({'dataset': 'n' * 300}, 'cannot write|name too long|--data_dir'),
    ({'data_dir': '/dev/null/x'}, 'cannot write|Not a directory'),
    ({'dataset': 'shakespeare'}, 'my.txt is not tiny Shakespeare|SHA-256|another name')])
def test_bad_requests(settings, words):
    check_error(words, make, **settings)


# replacing an older data set

def test_older_data_set_is_replaced_and_a_linked_folder_stays_linked():
    make('old text ' * 9)
    assert load_meta(make())['n_chars'] == len(TEXT)
    assert os.listdir('data') == ['mine'] and sorted(os.listdir('data/mine')) == PARTS
    os.mkdir('elsewhere')
    os.symlink(os.path.abspath('elsewhere'), 'data/linked')
    make(dataset='linked')
    load_meta(make(dataset='linked'))
    assert os.path.islink('data/linked') and sorted(os.listdir('elsewhere')) == PARTS


def test_other_files_are_never_replaced():
    os.makedirs('data/mine')
    for path in ('data/mine/thesis.txt', 'data/note'):
        Path(path).write_text('precious')
    check_error('thesis.txt|choose another name', make)
    check_error('note|Not a directory', make, dataset='note')
    assert {Path(path).read_text() for path in ('data/mine/thesis.txt', 'data/note')} == {'precious'}


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
@pytest.mark.parametrize('owner, name, when', [
    (json, 'dumps', ''), (os, 'mkdir', ''), (Path, 'write_bytes', 'val.bin'), (os, 'rename', 'new'),
    (os, 'rename', 'mine')])
def test_failure_leaves_the_older_data_set_and_nothing_else(monkeypatch, error, owner, name, when):
    make()
    before = {part: Path('data/mine', part).read_bytes() for part in PARTS}
    Path('new.txt').write_text('another text ' * 9)
    real = getattr(owner, name)

    def fail(first, *args, **kwargs):  # where the name of the first argument is as told
        return fail_with(error)() if str(first).endswith(when) else real(first, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises((KeyboardInterrupt, SystemExit), match=str(error.args[1:])[2:-3] or None):
            prepare.prepare('mine', file='new.txt', data_dir=os.path.abspath('data'), quiet=True)
    assert os.listdir('data') == ['mine']
    assert {part: Path('data/mine', part).read_bytes() for part in PARTS} == before


def test_full_disk():
    make()
    Path('big.txt').write_text('0123456789' * 2000)
    limit = 'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))'
    done = command('mine', '--file=big.txt', '--data_dir=data', setup=limit)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1)
    assert done.stderr.startswith('error: cannot write') and 'too large' in done.stderr
    assert os.listdir('data') == ['mine'] and load_meta('data/mine')['n_chars'] == len(TEXT)


# damaged data sets

def change(**entries):
    def apply(folder):
        meta = json.loads(Path(folder, 'meta.json').read_text())
        Path(folder, 'meta.json').write_text(json.dumps({**meta, **entries}))
    return apply


def put(name, content):
    return lambda folder: Path(folder, name).write_bytes(content)


def drop(name):
    return lambda folder: os.remove(f'{folder}/{name}')


@pytest.mark.parametrize('damage, words', [
    (drop('meta.json'), 'meta.json is missing'), (put('meta.json', b'{'), 'meta.json|not JSON'),
    (drop('train.bin'), 'train.bin is missing'), (drop('val.bin'), 'val.bin is missing'),
    (put('val.bin', b'x' * 19), 'val.bin is damaged|19 bytes|20'), (put('train.bin', b''), '0 bytes'),
    (put('meta.json', b'\xff'), 'meta.json|not JSON'), (put('meta.json', b'[]'), 'meta.json'),
    (put('meta.json', b'[' * 100000), 'not JSON'), (change(files=None), 'older version'),
    (change(n_train=None), 'meta.json'), (change(n_val=0), 'meta.json'),
    (change(n_val=True), 'meta.json'), (change(n_train=-5), 'train.bin|172 bytes, not -10'),
    (change(vocab_size='13'), 'meta.json'), (change(vocab_size=15), 'meta.json'),
    (change(sha256=None), 'meta.json'), (change(tokenizer={'kind': 'gpt2'}), 'meta.json'),
    (change(tokenizer=None), 'meta.json'), (change(files={'x': 'y'}), 'train.bin|SHA-256'),
    (change(tokenizer={'kind': 'char', 'chars': 'zyxwvutsrqpon'}), 'meta.json'),
    (put('train.bin', bytes(172)), 'train.bin is damaged|SHA-256'),
    (put('val.bin', b'\1\0' * 9 + b'\15\0'), 'val.bin|id 13 is beyond the vocabulary of 13')])
def test_damaged_data_set(damage, words):
    folder = make()
    load_meta(folder)
    damage(folder)
    check_error(f'{words}|prepare it again|python prepare.py mine --file=PATH', load_meta, folder)


def test_hashes_are_compared_only_if_asked_for():
    folder = make()
    put('val.bin', bytes(20))(folder)
    assert load_meta(folder, check=False)['n_val'] == 10
    put('val.bin', bytes(19))(folder)
    check_error('19 bytes', load_meta, folder, check=False)


def test_missing_data_set(monkeypatch):
    check_error('is missing|python prepare.py mine --file=PATH', load_meta, 'mine')
    with pytest.raises(SystemExit, match='python prepare.py shakespeare$'):
        load_meta('shakespeare/')
    os.makedirs('mine/meta.json')
    check_error('Is a directory', load_meta, 'mine')


# tokenizers

def test_characters_there_and_back():
    tokenizer = Tokenizer(json.loads(json.dumps({'kind': 'char', 'chars': '\nabé😀'})))
    assert tokenizer.vocab_size == 5 and tokenizer.encode('b😀\na') == [2, 4, 0, 1]
    assert tokenizer.encode('') == [] and tokenizer.decode([]) == ''
    assert all(type(i) is int for i in tokenizer.encode('ab'))
    assert tokenizer.decode(np.array([2, 4, 0, 1])) == 'b😀\na'
    assert tokenizer.encode_array('é').dtype == np.uint16


@pytest.mark.parametrize('text, words', [
    ('abc', "'c'|U+0063|position 102|3 characters|gpt2"), ('a\x00', r"'\x00'|U+0000|position 101"),
    ('\U0001f600', 'U+1F600|position 100'), ('a\n', r"'\n'"), ('\udcff', r"'\udcff'|U+DCFF")])
def test_unknown_character(text, words):
    check_error(words, Tokenizer({'kind': 'char', 'chars': 'abd'}).encode, text, start=100)


def test_id_outside_the_vocabulary():
    for bad in (-1, 3):
        decode = Tokenizer({'kind': 'char', 'chars': 'abd'}).decode
        check_error(f'token id {bad} ', decode, [0, bad])


@pytest.mark.parametrize('spec', [
    None, [], {}, {'kind': 'word'}, {'kind': 'char'}, {'kind': 'char', 'chars': ''},
    {'kind': 'char', 'chars': 'ba'}, {'kind': 'char', 'chars': 'aa'},
    {'kind': 'char', 'chars': ['a']}, {'kind': ['char']}])
def test_damaged_tokenizer(spec):
    check_error('damaged tokenizer', Tokenizer, spec)


def test_too_many_distinct_characters():
    everything = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x10801)]))
    assert len(everything) == prepare.MAX_VOCAB + 1
    check_error('65,537 distinct characters', make, everything)
    folder = make(everything[1:])  # the most that fits, up to id 65535
    assert load_meta(folder)['vocab_size'] == 65536 and ids_of(folder, 'val')[-1] == 65535


def test_gpt2():
    try:
        gpt2 = Tokenizer({'kind': 'gpt2'})
    except SystemExit as error:
        pytest.skip(str(error)[:100])
    assert gpt2.vocab_size == 50257 and gpt2.encode('hello world') == [31373, 995]
    assert gpt2.decode(gpt2.encode(TEXT)) == TEXT and gpt2.decode(gpt2.encode('😀')[:1]) == '\ufffd'
    assert 50256 not in gpt2.encode('<|endoftext|>')
    assert len(gpt2.encode('^' * 1_000_000)) == 250_000
    check_error('50257', gpt2.decode, [50257])
    folder = make(tokenizer='gpt2')
    meta = load_meta(folder)
    assert (meta['vocab_size'], meta['tokenizer']) == (50257, {'kind': 'gpt2'})
    assert gpt2.decode(ids_of(folder, 'train', 'val')) == TEXT and meta['n_chars'] == len(TEXT)


@pytest.mark.parametrize('module', [
    None, types.SimpleNamespace(get_encoding=fail_with(ConnectionError('no\nroute ' + 'x ' * 999)))])
def test_gpt2_that_cannot_be_loaded(monkeypatch, module):
    monkeypatch.setitem(sys.modules, 'tiktoken', module)
    check_error('TIKTOKEN_CACHE_DIR', make, tokenizer='gpt2')
    assert not os.path.exists('data')


# the python corpus

def test_python_text(here):
    folder = prepare.prepare('python', data_dir=str(here), quiet=True)
    meta = load_meta(folder)
    assert meta['source'] == 'Python ' + '.'.join(map(str, sys.version_info[:3]))
    assert set(meta['tokenizer']['chars']) <= {*map(chr, range(32, 127)), '\n', '\t'}
    text = Tokenizer(meta['tokenizer']).decode(ids_of(folder, 'train', 'val'))
    assert len(text) == meta['n_chars'] > 4_000_000
    assert hashlib.sha256(text.encode()).hexdigest() == meta['sha256']
    assert -1 < text.index('class ABCMeta(') < text.index('class ZipFile')
    assert text.index('The "assert" statement') < text.index('class ABCMeta(')


def test_python_text_takes_sorted_standard_modules_only(here, monkeypatch):
    for name in ('os.py', 'abc.py', '_sysconfigdata_x.py', 'test_os.py', 'os.txt'):
        (here / name).write_bytes(f'<{name}>\r\x0c\xe9'.encode())
    monkeypatch.setattr(prepare.sysconfig, 'get_path', lambda name: str(here))
    assert prepare._python_text().endswith(b'\n<abc.py>\n<os.py>')


def test_python_without_sources(here, monkeypatch):
    ask = dict(data_dir=str(here), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.sysconfig, 'get_path', lambda name: str(here / 'missing'))
        check_error('not installed', prepare.prepare, 'python', **ask)
    monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
    check_error('not installed', prepare.prepare, 'python', **ask)


# the download

class Server(http.server.BaseHTTPRequestHandler):
    """Gives the answers of the list `answers` in turn: a body, or a status."""

    def do_GET(self):
        self.server.asked += 1
        answer = self.server.answers.pop(0)
        self.send_response(answer if isinstance(answer, int) else 200)
        body = b'' if isinstance(answer, int) else answer
        # 'cut' announces more than it sends
        self.send_header('Content-Length', str(len(body) + 1000 * body.startswith(b'cut')))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


TRUE = b'First Citizen: speak. ' * 20


@pytest.fixture
def server(monkeypatch):
    """A loopback server in the place of the real one, and a short text in that of Shakespeare's."""
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        server.answers, server.asked, server.pauses = [], 0, []
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        url = f'http://127.0.0.1:{server.server_port}/input.txt'
        monkeypatch.setenv('NO_PROXY', '*')
        monkeypatch.setattr(prepare, 'SHAKESPEARE_URL', url)
        monkeypatch.setattr(prepare, 'SHAKESPEARE_SHA256', hashlib.sha256(TRUE).hexdigest())
        monkeypatch.setattr(prepare.time, 'sleep', server.pauses.append)
        yield server
        server.shutdown()
        thread.join()


def shakespeare(folder='.', **settings):
    return prepare.prepare('shakespeare', data_dir=os.path.abspath(folder),
                           **{'quiet': True, **settings})


@pytest.mark.parametrize('failures', [[], [503], [500, b'cut']])
def test_download(server, capsys, failures):
    server.answers = failures + [TRUE]
    meta = load_meta(shakespeare('new/data', quiet=False))
    assert meta['source'] == prepare.SHAKESPEARE_URL and meta['n_chars'] == len(TRUE)
    assert Path('new/data/shakespeare.txt').read_bytes() == TRUE
    assert sorted(os.listdir('new/data')) == ['shakespeare', 'shakespeare.txt']
    assert server.asked == len(failures) + 1 and server.pauses == [1, 3][:len(failures)]
    assert capsys.readouterr().out.startswith(f'downloading {prepare.SHAKESPEARE_URL}\n')


def test_download_is_kept_and_used_again_only_if_it_is_right(server, capsys):
    server.answers = [TRUE, TRUE]
    shakespeare()
    shakespeare()
    assert server.asked == 1
    Path('shakespeare.txt').write_bytes(TRUE[:-1] + b'!')
    shakespeare()
    assert server.asked == 2 and Path('shakespeare.txt').read_bytes() == TRUE
    Path('copy.txt').write_bytes(TRUE)
    assert load_meta(shakespeare(file='copy.txt'))['source'] == 'copy.txt' and server.asked == 2
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('answers, asked, words', [
    ([404], 1, '404'), ([503] * 4, 3, '503'), ([b'cut'] * 4, 3, 'IncompleteRead'),
    ([b'<html>'], 1, 'not the expected text|SHA-256')])
def test_failed_download(server, answers, asked, words):
    server.answers = list(answers)
    words += f'|{prepare.SHAKESPEARE_URL}|--file=PATH|python prepare.py python'
    check_error(words, shakespeare, kind=DownloadError)
    assert server.asked == asked and os.listdir() == []


@pytest.mark.parametrize('error, tries', [
    (requests.ConnectionError, 3), (requests.Timeout, 3), (requests.exceptions.InvalidURL, 1)])
def test_only_passing_failures_are_tried_again(server, monkeypatch, error, tries):
    calls = []

    def get(url, **settings):
        calls.append(settings['timeout'])
        raise error('x\ny ' * 999)
    monkeypatch.setattr(requests, 'get', get)
    check_error(error.__name__, shakespeare, kind=DownloadError)
    assert len(calls) == tries and all(0 < seconds <= 60 for seconds in calls[0])


def test_download_without_requests_and_one_that_cannot_be_kept(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'requests', None)
        check_error('cannot download', shakespeare, kind=DownloadError)
    server.answers = [TRUE]
    monkeypatch.setattr(os, 'rename', fail_with(OSError(28, 'No space left on device')))
    check_error('No space left', shakespeare)
    assert os.listdir() == [] and server.pauses == []


# the program

def test_program(here):
    Path('my.txt').write_text('a' * 25)
    done = command('mine', '--file=my.txt', '--data_dir=d')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == ('mine: 22 training and 3 validation tokens, vocabulary of 1, '
                           f'written to {here}/d/mine\n')
    done = command('--help')
    assert done.stdout.startswith('usage: python prepare.py DATASET [--key=value ...]\n')
    assert done.stdout.count('\n  --') == 5 and "--tokenizer='char'  char (one" in done.stdout


@pytest.mark.parametrize('argv, words', [
    ([], 'usage: python prepare.py NAME'), (['mine'], '--file=PATH'), (['a', 'b'], 'too many'),
    (['mine', '--tokeniser=char'], 'did you mean --tokenizer?'),
    (['mine', '--MIN_TOKENS=1'], 'unknown key'), (['mine', '--file'], '--file=VALUE')])
def test_program_on_bad_input(argv, words):
    done = command(*argv)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1)
    assert done.stderr.startswith('error: ') and words in done.stderr


def test_program_interrupted():
    done = command('python', '--data_dir=d', setup='import os, _thread\n_mkdir = os.mkdir\n'
                   'def mkdir(*a, **k):\n    _mkdir(*a, **k)\n    _thread.interrupt_main()\n'
                   'os.mkdir = mkdir')
    assert done.returncode and done.stderr == 'stopped\n' and os.listdir('d') == []


def test_import_is_light_and_does_nothing():
    code = "import sys, prepare; print({'torch', 'requests', 'tiktoken'} & {*sys.modules})"
    done = subprocess.run([sys.executable, '-c', code, '--nonsense'], capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': ROOT})
    assert (done.stdout, done.stderr, os.listdir()) == ('set()\n', '', [])
