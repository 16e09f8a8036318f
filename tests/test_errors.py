"""Every bad input gets one clear line on stderr and exit code 1, and costs nothing that was there."""
import os
import subprocess
import sys

import pytest
import torch

import bench_training
import prepare as prepare_module
from checkpoint import pick_device
from conftest import ROOT


def check(done, *parts):
    lines = done.err.strip().splitlines()
    assert done.code == 1 and len(lines) == 1, (done.code, done.err)
    assert lines[0].startswith('error: ') and all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize('content, parts', [
    (b'', ['is empty']),
    (b'too short', ['9 tokens', 'at least 20']),
    ('caf\u00e9 '.encode('latin-1') * 20, ['not UTF-8', 'byte 3']),
    (''.join(map(chr, [*range(32, 0xd800), *range(0xe000, 0xe000 + 12000)])).encode(), ['distinct characters', '--tokenizer=gpt2']),
    (None, ['No such file', '--file'])])
def test_bad_texts(run, tmp_path, content, parts):
    path = tmp_path / 'text.txt'
    if content is not None:
        path.write_bytes(content)
    check(run('prepare.py', 'mine', f'--file={path}', f"--data_dir={tmp_path / 'data'}"), *parts)
    assert not os.path.exists(tmp_path / 'data') or not os.listdir(tmp_path / 'data')


@pytest.mark.parametrize('args, parts', [
    ([], ['NAME']),
    (['my/text'], ["'my/text' cannot name a data set"]),
    (['shakespear'], ['did you mean shakespeare']),
    (['mine', '--tokenizer=chars', '--file=x'], ["unknown tokenizer 'chars'", 'did you mean char']),
    (['shakespeare', f'--file={__file__}'], ['not tiny Shakespeare', '1115394 bytes', '86c4e6aa']),
    (['python', '--file=x'], ['takes no --file']),
    (['mine', '--fil=x'], ['unknown key --fil', 'did you mean --file'])])
def test_prepare(run, tmp_path, args, parts):
    check(run('prepare.py', *args, f"--data_dir={tmp_path / 'data'}"), *parts)
    assert not os.path.exists(tmp_path / 'data')


def test_no_network(run, tmp_path, monkeypatch):
    import requests

    def get(*args, **kwargs):
        raise requests.ConnectionError('no route to host')
    monkeypatch.setattr(requests, 'get', get)
    monkeypatch.setattr(prepare_module.time, 'sleep', lambda seconds: None)
    check(run('prepare.py', 'shakespeare', f'--data_dir={tmp_path}'), 'cannot download https://', '--file=PATH')
    assert not os.listdir(tmp_path)


def test_gpt2_files_that_cannot_be_fetched(run, tmp_path, monkeypatch):
    import tiktoken

    def get_encoding(name):
        raise ConnectionError('no route to host')
    monkeypatch.setattr(tiktoken, 'get_encoding', get_encoding)
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 9)
    check(run('prepare.py', 'mine', f"--file={tmp_path / 'text.txt'}", '--tokenizer=gpt2', f'--data_dir={tmp_path}'),
          'TIKTOKEN_CACHE_DIR')


def limited(limit, *command):
    """Run a script under a limit on the size of the files it writes: to the script, a full disk."""
    code = f'import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = sys.argv[1:]; ' \
           f'sys.path.insert(0, {ROOT!r}); runpy.run_path(sys.argv[0], run_name="__main__")'
    done = subprocess.run([sys.executable, '-c', code, *map(str, command)], capture_output=True, text=True)
    done.code, done.err = done.returncode, done.stderr
    return done


def test_a_full_disk(train, data_dir, tmp_path):
    (tmp_path / 'text.txt').write_text('to be or not to be ' * 9000)
    check(limited(100_000, os.path.join(ROOT, 'prepare.py'), 'mine', f"--file={tmp_path / 'text.txt'}",
                  f"--data_dir={tmp_path / 'data'}"), 'cannot write', 'free some space')
    assert not os.listdir(tmp_path / 'data')
    train()
    before = (tmp_path / 'out' / 'last.pt').read_bytes()
    check(limited(20_000, os.path.join(ROOT, 'train.py'), f"--out_dir={tmp_path / 'out'}", f'--data_dir={data_dir}',
                  '--init_from=resume', '--max_iters=21', '--device=cpu', '--dataset=tiny'), 'cannot write', 'is kept')
    check(limited(600, os.path.join(ROOT, 'train.py'), f"--out_dir={tmp_path / 'out'}", f'--data_dir={data_dir}',
                  '--init_from=resume', '--max_iters=21', '--device=cpu', '--dataset=tiny'), 'cannot write', 'out')
    assert (tmp_path / 'out' / 'last.pt').read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / 'out') if name.endswith('.tmp')]


def test_an_unwritable_folder(train, tmp_path):
    (tmp_path / 'file').write_text('')
    check(train(out_dir=tmp_path / 'file' / 'out'), 'cannot write')


@pytest.mark.parametrize('settings, parts', [
    (dict(lerning_rate=1), ['unknown key --lerning_rate', 'did you mean --learning_rate']),
    (dict(batch_size=1.5), ["--batch_size='1.5'", 'expected an integer', 'default 16']),
    (dict(learning_rate='fast'), ["--learning_rate='fast'", 'expected a number']),
    (dict(decay_lr='yes'), ["--decay_lr='yes'", 'True or False']),
    (dict(batch_size=0), ['batch_size must be at least 1']),
    (dict(learning_rate=-1), ['learning_rate must be at least 0']),
    (dict(dropout=1.5), ['dropout must lie in [0, 1)']),
    (dict(n_embd=15), ['n_embd=15 must be a multiple of n_head=2']),
    (dict(segment_size=5), ['block_size=16 must be a multiple of segment_size=5']),
    (dict(n_global=0), ['n_global must be at least 1']),
    (dict(model_type='gtp'), ["model_type must be one of 'gpt', 'fold'", "not 'gtp'"]),
    (dict(dtype='float16'), ["dtype must be"]),
    (dict(device='gpu'), ["device='gpu' is not available"]),
    (dict(device='meta'), ["device='meta' is not available"]),
    (dict(beta1=1.0), ['beta1=1.0']),
    (dict(learning_rate=1e-5), ['min_lr=0.0001 is above learning_rate=1e-05']),
    (dict(eval_tokens=1), ['eval_tokens=1', '2 or more']),
    (dict(out_dir=ROOT), ['out_dir must be a folder of its own']),
    (dict(stretch=24), ['stretch=24 must be a multiple of block_size=16']),
    (dict(stretch=32, stream=True), ['stream=True', 'set stretch=0']),
    (dict(stream=1), ["--stream='1'", 'True or False']),
    (dict(bptt_segments=-1), ['bptt_segments must be at least 0']),
    (dict(model_type='gpt', bptt_segments=2), ['a GPT has no segments', 'bptt_segments must be 0']),
    (dict(model_type='gpt', recompute=True), ['a GPT has no segments', 'recompute False']),
    (dict(checkpoint_interval=-1), ['checkpoint_interval must be at least 0']),
    (dict(products='mkl'), ["products must be 'auto', 'onednn' or 'torch', not 'mkl'"]),
    (dict(compile='yes'), ["compile must be 'auto', 'off', 'manual', 'kernels' or 'graphs', not 'yes'"]),
    (dict(block_size=8000), ['too short', 'lower block_size']),
    (dict(dataset='tinny'), ["no text for the data set 'tinny'"]),
    (dict(init_from='resume'), ['no checkpoint at', 'last.pt']),
    (dict(init_from='nowhere.pt'), ['no checkpoint at nowhere.pt'])])
def test_train(train, tmp_path, settings, parts):
    check(train(**settings), *parts)
    assert not os.path.exists(tmp_path / 'out')


@pytest.mark.parametrize('content, parts', [
    ('batchsize = 3', ["unknown key 'batchsize'", 'did you mean batch_size']),
    ('batch_size = "3"', ["batch_size='3'", 'expected an integer']),
    ('batch_size = (', ['config.py:1', 'SyntaxError']),
    ('x = 1 / 0', ['config.py:1', 'ZeroDivisionError'])])
def test_config_files(run, tmp_path, content, parts):
    (tmp_path / 'config.py').write_text(content)
    check(run('train.py', tmp_path / 'config.py'), *parts)


def test_a_config_file_that_is_not_there(run):
    check(run('train.py', 'config/fold_shakspeare.py'), 'not found', 'did you mean config/fold_shakespeare.py')


def test_checkpoints_that_do_not_fit(train, tmp_path, data_dir):
    train(out_dir=tmp_path / 'a')
    source = tmp_path / 'a' / 'ckpt.pt'
    check(train(init_from=source, n_global=2), 'do not fit', 'transformer.h.2', 'n_global=1', 'take as many layers')
    check(train('gpt', init_from=source, block_size=16), 'wpe.weight', '[16, 16]')
    saved = torch.load(source, weights_only=True)
    saved['tokenizer']['chars'] = saved['tokenizer']['chars'].replace('.', '/')
    torch.save(saved, tmp_path / 'other.pt')
    check(train(init_from=tmp_path / 'other.pt'), 'vocabulary is not that of')


@pytest.mark.parametrize('args, parts', [
    (['--start=Zed'], ["character 'Z' (U+005A) at position 0"]),
    (['--start=FILE:nowhere.txt'], ["cannot read the prompt 'nowhere.txt'", 'No such file']),
    (['--temperature=-1'], ['temperature must be at least 0']),
    (['--num_samples=0'], ['num_samples must be at least 1']),
    (['--top_p=1.5'], ['top_p must be at most 1']),
    (['--save_state=x', '--num_samples=2'], ['num_samples']),
    (['--load_state=nowhere'], ['there is no state at']),
    (['--save_state=nowhere/x'], ['cannot write', 'nowhere']),
    (['--max_new_token=3'], ['did you mean --max_new_tokens']),
    (['--device=gpu'], ["device='gpu' is not available"]),
    (['--out_dir=nowhere'], ['no checkpoint at'])])
def test_sample(run, train, tmp_path, args, parts):
    train(max_iters=1)
    check(run('sample.py', f"--out_dir={tmp_path / 'out'}", *args), *parts)


@pytest.mark.parametrize('spoil, parts', [
    (lambda path: path.write_bytes(b'garbage'), ['ckpt.pt is not a readable checkpoint']),
    (lambda path: path.write_bytes(path.read_bytes()[:-5000]), ['is not a readable checkpoint']),
    (lambda path: torch.save({'weights': 1}, path), ['is not a readable checkpoint']),
    (lambda path: torch.save({**torch.load(path, weights_only=True), 'model': {}}, path), ['Missing key'])])
def test_damaged_checkpoints(run, train, tmp_path, spoil, parts):
    train(max_iters=1)
    spoil(tmp_path / 'out' / 'ckpt.pt')
    check(run('sample.py', f"--out_dir={tmp_path / 'out'}"), *parts)
    spoil(tmp_path / 'out' / 'last.pt')
    check(train(init_from='resume'), 'readable checkpoint' if 'Missing key' not in parts else 'Missing key')


def test_from_a_real_shell(tmp_path):
    """The interpreter, too, shows one line and no traceback, from any current directory."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'train.py'), 'config/gpt_shakespeare.py', '--max_iter=3'],
                          capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == 'error: unknown key --max_iter: did you mean --max_iters?\n'


@pytest.mark.parametrize('script', ['prepare.py', 'train.py', 'sample.py'])
def test_help_names_every_key_with_default_and_comment(run, script):
    done = run(script, '--help')
    assert done.code == 0
    with open(os.path.join(ROOT, script)) as f:
        settings = [line for line in f.read().split('config = configure')[0].splitlines() if ' = ' in line and line[0].isalpha()]
    assert len(settings) >= 4
    for line in settings:
        key, comment = line.split(' = ')[0], line.split('# ')[1]
        assert f'--{key}=' in done.out and comment in done.out


@pytest.mark.parametrize('args, parts', [
    (['--parts=speeds'], ['parts are speed, memory and longest', "'speeds'"]),
    (['--rounds=0'], ['rounds must be at least 1']),
    (['--processes=3'], ['3 processes cannot share batch_size=16']),
    (['--processes=0'], ['processes must be whole numbers from 1 on', "'0'"]),
    (['--products=mkl'], ["products must be 'auto', 'onednn' or 'torch', not 'mkl'"]),
    (['--compile=fast'], ['compile must be one of auto', "'fast'"]),
    (['--sizes=2+2'], ['such as 2+2x128x4', "'2+2'"]),
    (['--threads=-1'], ['threads must be at least 0']),
    (['--budget_gb=0'], ['budget_gb must be at least 0.1']),
    (['--sizes=1+1x16x3'], ['n_embd=16 must be a multiple of n_head=3'])])
def test_training_benchmark(run, tmp_path, args, parts):
    check(run('bench_training.py', *args, f'--results_dir={tmp_path}'), *parts)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('args, parts', [
    (['--parts=generation,speeds'], ['parts are generation, speed, memory and longest', "'speeds'"]),
    (['--parts=speed', '--rounds=0'], ['rounds must be at least 1']),
    (['--parts=generation,speed', '--out_dir=nowhere'], ['no checkpoint at'])])
def test_benchmark(run, tmp_path, monkeypatch, args, parts):
    """Before anything is measured."""
    monkeypatch.setattr(bench_training, 'measure_parts', lambda c: pytest.fail('measured'))
    check(run('bench.py', *args, f'--results_dir={tmp_path}'), *parts)
    assert not os.listdir(tmp_path)


def test_the_benchmark_hands_on_what_is_given(run, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_training, 'measure_parts', seen.append)
    assert run('bench.py', '--parts=memory', '--threads=3').code == 0 and run('bench.py', '--parts=memory,speed').code == 0
    usual = bench_training.defaults()
    assert [(c['parts'], c['threads'], c['rounds']) for c in seen] == [('memory', 3, usual['rounds']), ('memory,speed', 0, usual['rounds'])]

    def interrupted(c):
        raise KeyboardInterrupt
    monkeypatch.setattr(bench_training, 'measure_parts', interrupted)
    assert 'stopped; what was measured' in run('bench.py', '--parts=memory').err


def test_a_device_with_a_number_is_the_current_one(monkeypatch):
    """What asks for no device, such as synchronize, means it; without a number nothing is taken of the first."""
    taken, current = [], []
    monkeypatch.setattr(torch, 'empty', lambda n, device: taken.append(device))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    assert pick_device('cuda') == 'cuda' and (taken, current) == ([], [])
    assert pick_device('cuda:1') == 'cuda:1' and (taken, current) == (['cuda:1'], ['cuda:1'])
    assert pick_device('cpu:0') == 'cpu'
    with pytest.raises(SystemExit, match="device='cpu:1' is not available"):
        pick_device('cpu:1')
