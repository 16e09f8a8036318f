"""configurator.py: precedence, kinds of values, help, parts, merging, and one-line errors."""
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, check_error

from configurator import Settings, at_least, configure, merge, numbers, one_of, show

SCRIPT = '''"""Train a thing.\n\nMore words."""
from configurator import configure, show
# input and output
out_dir = 'out'     # where checkpoints go
# model
batch_size = 12     # rows of a batch,
                    # all of one length
dropout = 0.1
compile = False     # "#" is no comment inside a string
name = 'a # b'
_hidden = LIMIT = 1  # not keys
settings = configure(globals())
late = 1            # no key either
batch_size = batch_size  # a later assignment
print(show(settings))
'''
@dataclass
class Small:
    size: int        # required, hence not a key
    width: int = 4   # of a layer
    batch_size: int = 99  # the script's own key

@dataclass
class Wide(Small):
    # memory
    carry: str = 'plain'  # kind of carry

@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Globals of a script in its own folder; the current directory is another one."""
    (tmp_path / 'script' / 'config').mkdir(parents=True)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    return dict(__file__=str(tmp_path / 'script' / 'train.py'), os=os, helper=show, items=[1],
                _private=1, LIMIT=1, out_dir='out', data_file='', file='', note='n', batch_size=12,
                dropout=0.1, compile=False)

def write(text, name='my.py', folder='.'):
    Path(folder, name).write_text(text)

def run_script(folder, text, *argv, stdout=subprocess.PIPE):
    write(text, folder=folder)
    return subprocess.run([sys.executable, folder / 'my.py', *argv], stdout=stdout, text=True,
                          stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': ROOT})

def test_keys_are_the_public_plain_values_of_a_namespace_and_read_only(settings, monkeypatch):
    before = dict(settings)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--note=x', '--batch_size=3', '--batch_size=5'])
    s = configure(settings)
    assert s.as_dict() == dict(out_dir='out', data_file='', file='', note='x', batch_size=5,
                               dropout=0.1, compile=False)
    assert s.given == {'note', 'batch_size'} and settings == before
    s.as_dict()['note'], changed = 'z', s.replace(note='y')
    assert (s.note, changed.note, changed.batch_size, changed.given) == ('x', 'y', 5, s.given)
    with pytest.raises(AttributeError, match='read-only'):
        s.note = 'y'

def test_flag_values(settings):
    for key, text, value in (('batch_size', '4e0', 4), ('batch_size', '4.0', 4),
                             ('batch_size', '9007199254740993', 9007199254740993),
                             ('dropout', '1', 1.0), ('note', ' a=3', ' a=3'),
                             ('compile', 'tRUE', True), ('compile', 'FALSE', False)):
        found = getattr(configure(settings, [f'--{key}={text}']), key)
        assert found == value and type(found) is type(value)

@pytest.mark.parametrize('flag, words', [
    ('--batch_size=4.5', "--batch_size='4.5'|an integer"), ('--batch_size=True', "'True'|integer"),
    ('--batch_size=nan', 'integer'), ('--batch_size=99999999999999999999', 'below 2 ** 63'),
    ('--dropout=inf', 'a finite number'), ('--dropout=' + 'x\n' * 500, 'dropout|a finite number'),
    ('--compile=1', "'1'|True or False"), ('--zzz=4', '--zzz|--help'), ('', '--key=value'),
    ('-b', "'-b' is not --key=value"), ('batch_size=4', 'no config file and not --key=value'),
    ('-batch_size=4', '--batch_size?')])
def test_bad_arguments(settings, flag, words):
    check_error(words, configure, settings, ['--note=x', flag])

def test_config_files_in_order_then_flags_wherever_they_stand(settings):
    write("batch_size = 1\nnote = 'one'\ndropout = 0", 'one.py')
    write("batch_size = 2\nnote = 'two'", 'two.py')
    s = configure(settings, ['--note=flag', 'one.py', 'two.py'])
    assert (s.batch_size, s.note, s.dropout, type(s.dropout)) == (2, 'flag', 0.0, float)
    # they may compute, and are looked for here first
    write("note = 'beside'", 'config/my.py', os.path.dirname(settings['__file__']))
    assert configure(settings, ['config/my.py']).note == 'beside'
    check_error("'config/mi' is|did you mean config/my.py?", configure, settings, ['config/mi'])
    os.mkdir('config')
    write('import os\nfrom math import floor\n_n = 3\nclass C: pass\ndef double(x): return _n * x\n'
          'batch_size = double(2) * 1.0\nnote = os.path.basename(__file__)', 'config/my.py')
    s = configure(settings, ['config/my.py'])
    assert (s.batch_size, type(s.batch_size), s.note) == (6, int, 'my.py')

@pytest.mark.parametrize('text, words', [
    ('batchsize = 3', 'unknown key my.py: batchsize: did you mean batch_size?'),
    ('batch_size = True', 'my.py: batch_size=True|integer'), ('steps = [1]', 'steps: --help'),
    ('batch_size = 2 ** 63', 'integer'), ("dropout = '1'", 'number'), ('note = None', 'None'),
    ('dropout = 10 ** 400', 'number'), ("note = 'x'\nbatch_size = = 3", 'my.py:2:|SyntaxError'),
    ('def f():\n    raise ValueError("a\\nb")\n\nf()', 'my.py:2:|ValueError: a b'),
    ("note = '1'\n\ncompile('= =', 'other.py', 'exec')", 'my.py:3:|SyntaxError'),
    ('exit(0)', 'my.py:1:|SystemExit')])
def test_bad_config_files(settings, text, words):
    write(text)
    check_error(words, configure, settings, ['my.py'])

def test_paths_of_flags_are_meant_from_here_and_those_of_files_from_the_script(settings):
    here, home = os.getcwd(), os.path.expanduser('~')
    s = configure(settings, ['--out_dir=x', '--data_file=../y', '--file=~/z', '--note=~'])
    assert (s.out_dir, s.file, s.note) == (f'{here}/x', f'{home}/z', '~')
    assert s.data_file == os.path.join(os.path.dirname(here), 'y')
    write("out_dir = 'there'\nfile = '~/z'\nnote = '~'")
    s = configure(settings, ['my.py', '--data_file='])
    assert (s.out_dir, s.data_file, s.file, s.note) == ('there', '', f'{home}/z', '~')

def test_positional_key(settings, capsys):
    assert configure(settings, ['--out_dir=x', 'my.py'], positional='note').note == 'my.py'
    check_error("only one note|'b'", configure, settings, ['a', 'b'], positional='note')
    with pytest.raises(SystemExit):
        configure(settings, ['-h'], positional='note')  # of a script whose source is not there
    assert capsys.readouterr().out.startswith('usage: python train.py NOTE [--key=value ...]\n\n')

def test_parts_bring_keys_of_their_own(settings, capsys, monkeypatch):
    write("# curriculum\nsteps = 5  # at most\nnote = 'other'\nMARK = _x = 1\n", 'a_task.py')
    monkeypatch.syspath_prepend('.')
    task, known = importlib.import_module('a_task'), {}

    def parts(values):
        known.update(values.as_dict())
        return {'n': [], 'task': [task], 'wide': [task, Wide]}[values.note]
    write("steps = 7\nnote = 'task'\nbatch_size = 3")
    s = configure(settings, ['my.py', '--batch_size=4'], parts=parts)
    assert (s.steps, s.note, s.given) == (7, 'task', {'steps', 'note', 'batch_size'})
    assert known['batch_size'] == 4 and not {'steps', 'LIMIT', 'items'} & {*known}
    s = configure(settings, ['my.py', '--note=wide', '--carry=gated'], parts=parts)
    assert [*s.as_dict().items()][-3:] == [('steps', 7), ('width', 4), ('carry', 'gated')]
    check_error('did you mean --steps?', configure, settings, ['--note=task', '--step=7'],
                parts=parts)
    check_error('unknown key my.py: steps', configure, settings, ['my.py', '--note=n'], parts=parts)
    with pytest.raises(SystemExit):
        configure(settings, ['--note=wide', '--help'], parts=parts)
    assert capsys.readouterr().out.endswith(
        '\nsettings of a_task\n\ncurriculum\n  --steps=5  at most\n\nsettings of Wide\n\n'
        "memory\n  --carry='plain'  kind of carry\n  --width=4        of a layer\n")

def test_merging_the_settings_of_a_resumed_run():
    given = Settings(dict(rate=0.1, iters=9, width=4, seed=1, threads=2, out_dir='b', new=5),
                     given={'iters', 'width', 'seed'})
    saved = dict(rate=1, iters=3, width=8, seed=1, threads=7, out_dir='a', gone=0)
    merged, notes = merge(saved, given, fixed=('width', 'seed', 'new'), here=('out_dir',))
    assert merged.as_dict() == dict(rate=1, iters=9, width=8, seed=1, threads=7, out_dir='b', new=5)
    assert merged.given == given.given and notes == ['resume: width stays 8']
    check_error("the saved run is damaged: rate='x': expected a finite", merge,
                {**saved, 'rate': 'x'}, given)

def test_help_settings_and_errors_of_a_script(tmp_path):
    done = run_script(tmp_path, SCRIPT, '--name=x', '-h')
    assert done.stdout.startswith('usage: python my.py [config.py ...] [--key=value ...]\nTrain a')
    assert "input and output\n  --out_dir='out'  where checkpoints go\n\nmodel" in done.stdout
    assert '--batch_size=12  rows of a batch,\n                   all of one' in done.stdout
    assert (done.returncode, done.stderr, done.stdout.count('\n  --')) == (0, '', 5)
    done = run_script(tmp_path, SCRIPT, '--late=3')
    error = 'error: unknown key --late: --help lists the keys\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, '', error)

def test_small_helpers():
    assert show(Settings({'a': 1, 'long': 'x'})) == "a    = 1\nlong = 'x'"
    check_error('a must be at least 2, not 1', at_least, Settings({'a': 1}), a=2)
    check_error("a must be one of 2, 'y', not 1", one_of, Settings({'a': 1}), a=(2, 'y'))
    assert numbers('at', ' 48,12, 48,0') == [0, *numbers('at', '12,48', least=1)]
    for text in ('', '12,x', '0', '1.5', '-12'):
        check_error('at must be whole numbers', numbers, 'at', text, least=1)

@pytest.mark.parametrize('end, words', [('raise KeyboardInterrupt', 'stopped\n'),
                                        ('1 / 0', 'Error'), ("print('x', flush=True)", '')])
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(tmp_path, end, words):
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads what it prints
    begin = 'import lib.start\nfrom configurator import configure\nconfigure(globals())\n'
    done = run_script(tmp_path, begin + end, stdout=writing)
    os.close(writing)
    assert done.returncode and ('Traceback' in done.stderr) == ('Error' in words)
    assert words in done.stderr if words else done.stderr == ''
