"""sample.py: needs nothing but the checkpoint, and does what its settings say."""
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
from conftest import ROOT, TEXT


@pytest.fixture
def model_dir(train, tmp_path):
    train(learning_rate=3e-3, max_iters=30)
    return tmp_path / 'out'


@pytest.fixture
def sample(run, model_dir):
    return lambda *args: run('sample.py', f'--out_dir={model_dir}', '--max_new_tokens=20', '--device=cpu', *args)


def test_the_checkpoint_is_enough(run, model_dir, tmp_path):
    os.makedirs(tmp_path / 'elsewhere')
    shutil.copy(model_dir / 'ckpt.pt', tmp_path / 'elsewhere' / 'ckpt.pt')
    shutil.rmtree(model_dir)
    done = run('sample.py', f"--out_dir={tmp_path / 'elsewhere'}", '--start=ape', '--max_new_tokens=5', '--num_samples=2')
    texts = done.out.split('-' * 40 + '\n')
    assert done.code == 0 and len(texts) == 2
    for text in texts:
        assert text.startswith('ape') and len(text) == 3 + 5 + 1 and set(text) <= set(TEXT)


def test_seed_and_temperature(sample):
    assert sample('--seed=1').out == sample('--seed=1').out != sample('--seed=2').out
    assert sample('--temperature=0', '--seed=1').out == sample('--temperature=0', '--seed=2').out
    assert sample('--top_k=1', '--seed=1').out == sample('--temperature=0').out


def test_prompts_of_any_length(sample, tmp_path):
    (tmp_path / 'prompt.txt').write_text(TEXT[:200])
    for start, text in [('', ''), ('a', 'a'), (TEXT[:50], TEXT[:50]), (f"FILE:{tmp_path / 'prompt.txt'}", '')]:
        done = sample(f'--start={start}')
        assert done.code == 0 and done.out.startswith(text) and len(done.out) == len(text) + 20 + 1
    assert sample('--start=ape', '--max_new_tokens=0').out == 'ape\n'


def test_a_state_goes_on_in_a_fresh_process_as_if_there_had_been_no_break(sample, tmp_path):
    (tmp_path / 'book.txt').write_text(TEXT)
    book, state = f"--start=FILE:{tmp_path / 'book.txt'}", tmp_path / 'book.state'
    whole = sample(book, '--max_new_tokens=60')
    assert whole.code == 0 and f'read {len(TEXT):,} tokens' in whole.err and len(whole.out) == 61
    first = sample(book, '--max_new_tokens=20', f'--save_state={state}')
    assert f'{len(TEXT) + 20:,} tokens condensed' in first.err and state.stat().st_size < 100_000
    again = sample(f'--load_state={state}', '--start=', '--max_new_tokens=40')
    assert first.out[:-1] + again.out == whole.out
    assert sample(f'--load_state={state}', '--start=', '--max_new_tokens=40', '--seed=9').out != again.out
    only_read = sample(book, '--max_new_tokens=0', f'--save_state={state}')
    assert only_read.out == '\n'
    assert sample(f'--load_state={state}', '--start=', '--max_new_tokens=60').out == whole.out


def test_a_prompt_comes_from_standard_input(sample, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    done = sample('--start=FILE:-', '--temperature=0')
    assert done.code == 0 and f'read {len(TEXT):,} tokens' in done.err
    assert done.out == sample(f'--start={TEXT}', '--temperature=0').out[len(TEXT):]


def test_samples_share_the_prompt_and_not_the_draws(sample):
    texts = sample('--start=ape', '--num_samples=3').out.split('-' * 40 + '\n')
    assert len(texts) == 3 and all(text.startswith('ape') for text in texts) and len(set(texts)) == 3


def test_ctrl_c_ends_cleanly_and_keeps_the_state(model_dir, tmp_path):
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'sample.py'), f'--out_dir={model_dir}', '--device=cpu',
                                '--max_new_tokens=1000000', f"--save_state={tmp_path / 'state'}"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)  # communicate misses what is buffered
    begun = b''
    while len(begun) < 20:
        begun += process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    out, err = (begun + out).decode(), err.decode()
    assert process.returncode == 0 and 'Traceback' not in err
    assert f'{len(out) - 1:,} tokens condensed' in err and (tmp_path / 'state').exists()


def test_ctrl_c_loses_nothing_of_a_prompt_that_comes_slowly(model_dir, tmp_path):
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'sample.py'), f'--out_dir={model_dir}', '--device=cpu', '--start=FILE:-',
                                '--max_new_tokens=0', f"--save_state={tmp_path / 'state'}"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdin.write(TEXT.encode())
    said = b''
    while b'tokens/s' not in said:  # all but what may be the beginning of a longer word is read
        said += process.stderr.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and f'{len(TEXT):,} tokens condensed' in err.decode(), err


def test_a_slow_prompt_is_cut_where_words_end(run, model_dir, monkeypatch):
    names = run('sample.py', f'--out_dir={model_dir}', '--max_new_tokens=0').globals

    class Slow(io.BytesIO):
        def read1(self, n):
            return self.read(3)
    text = 'caf\u00e9 au lait, three, o\u00f9 four'
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=Slow(text.encode())))
    blocks = list(names['prompt_blocks']('FILE:-'))
    assert ''.join(blocks) == text and len(blocks) > 3 and all(block[0] == ' ' for block in blocks[1:])
    monkeypatch.setattr(sys, 'stdin', None)
    with pytest.raises(SystemExit, match="cannot read the prompt '-'"):
        list(names['prompt_blocks']('FILE:-'))


def test_a_terminal_that_lacks_a_character_loses_nothing(model_dir, tmp_path):
    saved = torch.load(model_dir / 'ckpt.pt', weights_only=True)
    saved['tokenizer']['chars'] = saved['tokenizer']['chars'][:-1] + '\u00e9'
    torch.save(saved, model_dir / 'ckpt.pt')
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'sample.py'), f'--out_dir={model_dir}', '--device=cpu', '--start=\u00e9',
                           '--max_new_tokens=3', f"--save_state={tmp_path / 'state'}"], capture_output=True,
                          env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0 and done.stdout[:1] == b'?' and b'4 tokens condensed' in done.stderr


@pytest.mark.parametrize('window_tokens', [1, 6])
def test_the_benchmark_divides_by_the_tokens_that_it_generates(run, model_dir, tmp_path, monkeypatch, window_tokens):
    """By a clock that goes on by a second each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(time, 'perf_counter', lambda: float(next(ticks)))
    done = run('bench.py', f'--out_dir={model_dir}', f'--results_dir={tmp_path}', '--device=cpu', '--contexts=4', '--rounds=1', '--gpt_window=4',
               f'--window_tokens={window_tokens}')
    assert done.code == 0, done.err
    made = json.load(open(tmp_path / 'generation.json'))
    assert made['gpt_uncached_tokens_per_s'] == max(1, window_tokens // 4) and made['table'][0]['tokens_per_s'] == window_tokens


def test_a_folder_cannot_take_the_state(sample, tmp_path):
    done = sample(f'--save_state={tmp_path}')
    assert done.code == 1 and 'is a folder: name a file' in done.err and done.out == ''


def test_words_are_never_cut_between_two_blocks_of_a_prompt(run, model_dir, tmp_path):
    names = run('sample.py', f'--out_dir={model_dir}', '--max_new_tokens=0').globals
    names['prompt_blocks'].__globals__['BLOCK'] = 10
    for text in ('one two  three\n\nfour five six seven', 'x' * 35 + ' y', ' a  ', 'caf\u00e9 \u00e9t\u00e9 ' * 9):
        (tmp_path / 'text').write_text(text, encoding='utf-8')
        blocks = list(names['prompt_blocks'](f"FILE:{tmp_path / 'text'}"))
        assert ''.join(blocks) == text
        for before, after in zip(blocks, blocks[1:]):
            assert not after or 'x' in text or after[0].isspace() and not before[-1].isspace()


def test_a_bad_character_late_in_a_prompt_loses_nothing(run, model_dir, tmp_path):
    (tmp_path / 'text').write_text(TEXT * 8 + '\u20ac')
    done = run('sample.py', f'--out_dir={model_dir}', f"--start=FILE:{tmp_path / 'text'}", f"--save_state={tmp_path / 'state'}")
    assert done.code == 1 and f'(U+20AC) at position {8 * len(TEXT)}' in done.err
    assert (tmp_path / 'state').exists() and 'tokens before' in done.err


def test_ids_beyond_the_vocabulary_are_never_drawn(run, model_dir):
    saved = torch.load(model_dir / 'ckpt.pt', weights_only=True)
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        saved['model'][name] = torch.cat((saved['model'][name], 9 * torch.ones(40, 16)))  # a padded vocabulary
    saved['model_args']['vocab_size'] += 40
    torch.save(saved, model_dir / 'ckpt.pt')
    done = run('sample.py', f'--out_dir={model_dir}', '--start=', '--max_new_tokens=50', '--temperature=5')
    assert done.code == 0, done.err


def test_the_newest_run_is_the_default(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'ROOT', str(tmp_path))
    for name, age in (('new', 0), ('old', 1000)):
        os.makedirs(tmp_path / 'out' / name)
        saved = torch.load(model_dir / 'ckpt.pt', weights_only=True)
        saved['tokenizer']['chars'] = saved['tokenizer']['chars'].replace('.', {'new': '/', 'old': '.'}[name])
        torch.save(saved, tmp_path / 'out' / name / 'ckpt.pt')
        time = os.path.getmtime(tmp_path / 'out' / name / 'ckpt.pt') - age
        os.utime(tmp_path / 'out' / name / 'ckpt.pt', (time, time))
    os.remove(model_dir / 'ckpt.pt')
    assert run('sample.py', '--start=/', '--max_new_tokens=1').code == 0  # only the newer one knows a slash
