"""prepare.py: texts, tokenizers, download, damaged data sets, and one-line errors."""
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, check_error

import prepare
from prepare import DownloadError, Tokenizer, load_meta

TEXT = 'To be,\r or\0not\u2028to be\x85\x1cé😀\n' * 4
PARTS = ['meta.json', 'train.bin', 'val.bin']
TRUE = b'First Citizen: speak. ' * 20  # in the place of tiny Shakespeare

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

def make(text=TEXT, dataset='mine', **settings):
    """Write a text and prepare it in the folder `data`."""
    Path('my.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    settings = {'file': 'my.txt', 'data_dir': os.path.abspath('data'), **settings}
    return prepare.prepare(dataset, **settings)

def ids_of(folder, *parts):
    return np.concatenate([np.fromfile(f'{folder}/{part}.bin', '<u2') for part in parts])

def sha256(content):
    return hashlib.sha256(content).hexdigest()

def fail_with(error):
    def call(*args, **kwargs):
        raise error
    return call

def test_data_set_of_characters(here, monkeypatch):
    folder = make()
    chars, n_train = ''.join(sorted(set(TEXT))), int(0.9 * len(TEXT))
    assert folder == os.path.abspath('data/mine') and sorted(os.listdir(folder)) == PARTS
    hashes = {part: sha256(Path(folder, part).read_bytes()) for part in PARTS[1:]}
    assert load_meta(folder) == {
        'dataset': 'mine', 'source': 'my.txt', 'sha256': sha256(TEXT.encode()),
        'tokenizer': {'kind': 'char', 'chars': chars}, 'vocab_size': len(chars), 'files': hashes,
        'n_chars': len(TEXT), 'n_train': n_train, 'n_val': len(TEXT) - n_train}
    assert Tokenizer(load_meta(folder)['tokenizer']).decode(ids_of(folder, 'train', 'val')) == TEXT
    monkeypatch.setattr(prepare, 'HERE', str(here / 'program'))  # relative paths lie beside it
    assert make(data_dir='d') == str(here / 'program/d/mine')

def test_line_ends_are_kept_and_a_byte_order_mark_is_not():
    raw = b'\xef\xbb\xbf' + b'ab\r\n' * 10 + b'c\rd'
    kept = load_meta(make(raw))
    assert kept['tokenizer']['chars'] == '\n\rabcd'
    assert (kept['n_chars'], kept['sha256']) == (43, sha256(raw[3:]))

@pytest.mark.parametrize('text, words', [
    (b'\xef\xbb\xbf', 'my.txt is empty'), (b'a' * 19, 'my.txt has 19 tokens'),
    (b'\xef\xbb\xbfab\xff' + b'd' * 99, "my.txt|'utf-8' codec|position 5|UTF-8 with --file=PATH")])
def test_bad_texts(text, words):
    check_error(words, make, text)
    assert not os.path.exists('data')
    assert load_meta(make('ab' * 10))['n_val'] == 2  # the shortest that is enough

@pytest.mark.parametrize('settings, words', [
    *[({'dataset': name}, f'{name!r} cannot name a data set|letters|--file')
      for name in ('', '../x', '-x', 'x\n')],
    ({'file': ''}, "python prepare.py mine --file=PATH"), ({'file': 'a\0b'}, 'null byte'),
    ({'dataset': 'python'}, "'python' takes no --file|another name"), ({'file': '.'}, 'directory'),
    ({'tokenizer': 'chr'}, "char or gpt2, not 'chr'"),
    ({'file': 'none.txt'}, 'none.txt|No such file|--file=PATH'),
    ({'data_dir': '/dev/null/x'}, 'cannot write|Not a directory|--data_dir'),
    ({'dataset': 'shakespeare'}, 'my.txt is not tiny Shakespeare|SHA-256|another name')])
def test_bad_requests(settings, words):
    check_error(words, make, **settings)

def test_a_pipe_is_read_only_where_a_program_writes_into_it():
    os.mkfifo('pipe')
    check_error('pipe is a directory, a pipe or|--file=/dev/stdin', make, file='pipe')
    read, write = os.pipe()
    os.write(write, TEXT.encode())
    os.close(write)
    assert load_meta(make(file=f'/dev/fd/{read}'))['n_chars'] == len(TEXT)
    os.close(read)

def test_older_data_set_is_replaced_and_nothing_else():
    for folder in ('elsewhere', 'data'):
        os.makedirs(folder)
    os.symlink(os.path.abspath('elsewhere'), 'data/mine')
    Path('elsewhere/thesis.txt').write_text('precious')
    make('old text ' * 9)
    assert load_meta(make())['n_chars'] == len(TEXT) and os.path.islink('data/mine')
    assert Path('elsewhere/thesis.txt').read_text() == 'precious'
    assert sorted(os.listdir('elsewhere')) == sorted([*PARTS, 'thesis.txt'])

@pytest.mark.parametrize('name, words', [
    ('train.bin', 'data/mine has a train.bin without a meta.json of ours'),
    ('meta.json', 'mine/meta.json is of another kind')])
def test_the_files_of_another_program_are_not_replaced(name, words):
    os.makedirs('data/mine')
    Path('data/mine', name).write_text('{"vocab": 3}')
    check_error(words, make, file='none.txt')  # before it is read
    assert os.listdir('data/mine') == [name]
    assert Path('data/mine', name).read_text() == '{"vocab": 3}'

@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left')])
@pytest.mark.parametrize('owner, name, last', [
    (Path, 'write_bytes', 'val.bin'), (os, 'replace', 'train.bin')])
def test_failure_leaves_the_older_data_set_and_nothing_else(monkeypatch, error, owner, name, last):
    make()
    before = {part: Path('data/mine', part).read_bytes() for part in PARTS}
    real = getattr(owner, name)

    def fail(first, *args, **kwargs):  # where the first argument ends as told
        return fail_with(error)() if str(first).endswith(last) else real(first, *args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        patch.setattr(prepare, 'read_text', lambda *args, **kwargs: 'another text ' * 9)
        patch.setattr(owner, name, fail)
        make()
    assert type(error) is KeyboardInterrupt or 'No space left' in caught.value.code
    assert {path.name: path.read_bytes() for path in Path('data/mine').iterdir()} == before

@pytest.mark.parametrize('name, content, words', [
    ('train.bin', None, 'train.bin is missing'), ('train.bin', bytes(172), 'train.bin is damaged'),
    ('meta.json', b'{', 'meta.json|JSON'), ('meta.json', b'[' * 100000, 'damaged'),
    *[('meta.json', {key: value}, 'damaged') for key, value in (
        ('files', None), ('vocab_size', 15), ('sha256', None), ('tokenizer', None))]])
def test_damaged_data_set(name, content, words):
    path = Path(make(), name)
    load_meta(path.parent)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content}).encode()
    path.unlink() if content is None else path.write_bytes(content)
    check_error(f'{words}|python prepare.py mine [--file=PATH]', load_meta, path.parent)

def test_characters_there_and_back():
    tokenizer = Tokenizer(json.loads(json.dumps({'kind': 'char', 'chars': '\nabé😀'})))
    ids = tokenizer.encode('b😀\na').tolist()
    assert tokenizer.vocab_size == 5 and ids == [2, 4, 0, 1]
    assert tokenizer.encode('').tolist() == [] and tokenizer.decode([]) == ''
    assert tokenizer.decode(np.array(ids)) == 'b😀\na'
    assert tokenizer.encode('é').dtype == 'u2'
    for text, words in (('abc', "'c'|U+0063|position 102|gpt2"), ('\udcff', "'\\udcff'|U+DCFF")):
        check_error(words, tokenizer.encode, text, start=100)
    for spec in (None, {}, {'kind': 'word'}, {'kind': ['char']},
                 *({'kind': 'char', 'chars': chars} for chars in ('', 'ba', 'aa', ['a']))):
        check_error('damaged tokenizer', Tokenizer, spec)

def test_too_many_distinct_characters():
    everything = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x10801)]))
    check_error('65,537 distinct characters', make, everything)
    folder = make(everything[1:])  # the most that fits, up to id 65535
    assert load_meta(folder)['vocab_size'] == 65536 and ids_of(folder, 'val')[-1] == 65535

def test_gpt2():
    try:
        gpt2 = Tokenizer({'kind': 'gpt2'})
    except SystemExit as error:
        pytest.skip(str(error)[:100])
    assert gpt2.encode('hello world').tolist() == [31373, 995] and gpt2.vocab_size == 50257
    assert gpt2.decode(gpt2.encode(TEXT).tolist()) == TEXT
    assert gpt2.decode(gpt2.encode('😀').tolist()[:1]) == '\ufffd'
    signs = ''.join(map(chr, range(14, 26)))  # of tasks/needle.py
    assert gpt2.encode(signs).tolist() == [*range(202, 214)]
    assert len(gpt2.encode('^' * 1_000_000)) == 250_000
    folder = make(tokenizer='gpt2')
    meta = load_meta(folder)
    assert (meta['vocab_size'], meta['tokenizer'], len(TEXT)) == (50257, gpt2.spec, meta['n_chars'])
    assert gpt2.decode(ids_of(folder, 'train', 'val').tolist()) == TEXT

def test_gpt2_that_cannot_be_loaded(monkeypatch):
    offline = fail_with(ConnectionError('no\nroute ' + 'x ' * 999))
    for module in (None, types.SimpleNamespace(get_encoding=offline)):
        monkeypatch.setitem(sys.modules, 'tiktoken', module)
        check_error('TIKTOKEN_CACHE_DIR', make, tokenizer='gpt2')
    assert not os.path.exists('data')

def test_python_text(here, monkeypatch):
    folder = prepare.prepare('python', data_dir=str(here))
    meta = load_meta(folder)
    assert meta['source'] == 'Python ' + '.'.join(map(str, sys.version_info[:3]))
    assert set(meta['tokenizer']['chars']) <= {*map(chr, range(32, 127)), '\n', '\t'}
    text = Tokenizer(meta['tokenizer']).decode(ids_of(folder, 'train', 'val'))
    assert len(text) > 4_000_000 and sha256(text.encode()) == meta['sha256']
    assert text.index('The "assert"') < text.index('class ABCMeta(') < text.index('class ZipFile')
    monkeypatch.setattr(prepare.sysconfig, 'get_path', lambda name: str(here))
    check_error('library of Python|--file=PATH', prepare.prepare, 'python', data_dir=str(here))
    (here / 'pydoc_data').mkdir()
    (here / 'pydoc_data/topics.py').write_text("topics = {'b': '2', 'a': '1'}")
    for name in ('os.py', 'abc.py', '_sysconfigdata_x.py', 'os.txt'):
        (here / name).write_bytes(f'<{name}>\r\x0c\xe9'.encode())
    assert prepare._python_text() == b'1\n2\n<abc.py>\n<os.py>'
    mixed = [prepare._python_text(mixed=True) for _ in range(2)]
    assert mixed[0] == mixed[1] != prepare._python_text()
    assert sorted(mixed[0].split()) == [b'1', b'2', b'<abc.py>', b'<os.py>']

@pytest.fixture
def shakespeare(web, monkeypatch):
    """prepare() of what a server on this machine has in place of tiny Shakespeare."""
    web.content = TRUE
    monkeypatch.setattr(prepare, 'SHAKESPEARE_URL', f'http://127.0.0.1:{web.server_port}')
    monkeypatch.setattr(prepare, 'SHAKESPEARE_SHA256', sha256(TRUE))
    return lambda **settings: prepare.prepare('shakespeare', data_dir=os.getcwd(), **settings)

def test_download_is_kept_and_used_again_only_if_it_is_right(web, shakespeare):
    web.answers = ['broken', 'whole']
    meta = load_meta(shakespeare())
    assert meta['source'] == 'shakespeare.txt' and meta['n_chars'] == len(TRUE)
    shakespeare()
    assert web.answers == [] and Path('shakespeare.txt').read_bytes() == TRUE
    Path('shakespeare.txt').write_bytes(TRUE[:-1] + b'!')
    check_error('shakespeare.txt is not tiny Shakespeare|delete it', shakespeare)
    Path('copy.txt').write_bytes(TRUE)
    assert load_meta(shakespeare(file='copy.txt'))['source'] == 'copy.txt'

def test_failed_download(web, shakespeare, monkeypatch):
    web.answers = ['broken', 'broken', 'wrong']
    words = f'SHA-256|{prepare.SHAKESPEARE_URL}|--file=PATH|python prepare.py python'
    check_error(words, shakespeare, kind=DownloadError)
    assert web.answers == [] and 'shakespeare.txt' not in os.listdir()
    check_error('missing|with: python prepare.py shakespeare', load_meta, 'shakespeare/')
    monkeypatch.setitem(sys.modules, 'requests', None)
    check_error('cannot fetch|requests', shakespeare, kind=DownloadError)

def test_program_interrupted_and_import_that_does_nothing():
    for argv, setup, printed, said in (
            (['python', '--data_dir=d'], 'import os, _thread\nreal = os.mkdir\nos.mkdir = lambda '
             '*args: (real(*args), _thread.interrupt_main())', '', 'stopped\n'),
            (['--nonsense'], 'import prepare, sys\nprint({"torch", "requests", "tiktoken"} & '
             '{*sys.modules})\nraise SystemExit(1)', 'set()\n', '')):
        code = (f"{setup}\nimport runpy, sys\nsys.argv = ['prepare.py', *sys.argv[1:]]\n"
                f"runpy.run_path({os.path.join(ROOT, 'prepare.py')!r}, run_name='__main__')")
        done = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True,
                              env={**os.environ, 'PYTHONPATH': ROOT})
        assert done.returncode and (done.stdout, done.stderr) == (printed, said)
    assert not [path for path in Path('d').rglob('*') if path.is_file()]
