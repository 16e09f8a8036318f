"""sample.py: needs nothing but the checkpoint, does what its settings say, and loses nothing."""
import io
import os
import shutil
import signal
import subprocess
import sys
from subprocess import PIPE

import pytest
import torch
from conftest import ROOT, TEXT

from lib import checkpoint

LINE = '-' * 40 + '\n'
SCRIPT = [sys.executable, '-c', f"""import runpy, sys; sys.path.insert(0, {ROOT!r})
from lib import console; console.REPEAT = 0
runpy.run_path({ROOT!r} + '/sample.py', run_name='__main__')
assert 'torch._dynamo' not in sys.modules  # the compiler, half of a start
"""]

@pytest.fixture
def sample(run, model_dir):
    common = f'--out_dir={model_dir}', '--max_new_tokens=20', '--device=cpu'
    return lambda *args: run('sample.py', *common, *args)

def change(path, **entries):
    """Replace entries of a saved dictionary: by a value, or by what a function makes of it."""
    saved = torch.load(path, weights_only=True)
    saved.update({key: value(saved.get(key)) if callable(value) else value
                  for key, value in entries.items()})
    torch.save(saved, path)

def other_chars(old, new):
    """A vocabulary with other characters in place of some."""
    change = str.maketrans(old, new)
    return lambda spec: {**spec, 'chars': ''.join(sorted(spec['chars'].translate(change)))}

def test_settings(sample):
    done = sample('--start=ape', '--num_samples=3')
    assert 'fold, trained on tiny' in done.err and len(texts := {*done.out.split(LINE)}) == 3
    for text in texts:
        assert text.startswith('ape') and len(text) == 3 + 20 + 1 and {*text} <= {*TEXT}
    assert sample('--seed=1').out == sample('--seed=1').out != sample('--seed=2').out
    first, second = sample('--temperature=0', '--seed=2', '--num_samples=2').out.split(LINE)
    assert first == second == sample('--top_k=1').out == sample('--top_p=1e-9').out

def test_prompts(sample, model_dir, tmp_path):
    """Of any length, with escapes as one types them; the default one only where it is known; what
    comes before a bad character is not lost."""
    change(model_dir / 'ckpt.pt', tokenizer=other_chars('y.', 'n\\'))
    (tmp_path / 'text').write_text(words := 'ape bee cow 1234 ' * 9)
    for start, text in [('', ''), (words, words), (f"FILE:{tmp_path / 'text'}", ''),
                        ('ape\\nbee', 'ape\nbee'), ('a\\\\nb', 'a\\nb'), ('a\\e', 'a\\e')]:
        done = sample(f'--start={start}')
        assert done.out.startswith(text) and len(done.out) == len(text) + 20 + 1, done.err
    change(model_dir / 'ckpt.pt', tokenizer=other_chars('n\\\n', 'y.\t'))
    assert len(sample().out) == 20 + 1 and sample('--start=\\n').code == 1
    (tmp_path / 'text').write_text(words + ' \u20ac')
    done = sample(f"--start=FILE:{tmp_path / 'text'}", f"--save_state={tmp_path / 'state'}")
    assert done.code == 1 and f'(U+20AC) at position {len(words) + 1}' in done.err
    assert f'{len(words) - 1} tokens before' in done.err and (tmp_path / 'state').exists()

def test_a_state_goes_on_as_if_there_had_been_no_break(sample, tmp_path, monkeypatch):
    (tmp_path / 'book.txt').write_text(text := TEXT[:500])
    book, state = f"--start=FILE:{tmp_path / 'book.txt'}", tmp_path / 'book.state'
    assert len((whole := sample(book, '--max_new_tokens=60')).out) == 61
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(text.encode())))
    assert sample('--start=FILE:-', '--max_new_tokens=60').out == whole.out
    first = sample(book, f'--save_state={state}')
    assert f'{len(text) + 20:,} tokens condensed' in first.err and state.stat().st_size < 100_000
    more = f'--load_state={state}', '--start=', '--max_new_tokens=40'
    again = sample(*more)
    assert first.out[:-1] + again.out == whole.out and sample(*more, '--seed=9').out != again.out

def test_words_are_never_cut_between_two_blocks_of_a_prompt(sample, tmp_path, monkeypatch):
    file_blocks = sample().globals['file_blocks']
    file_blocks.__globals__['BLOCK'] = 10
    for text in ('one two  three\n\nfour five six', 'x' * 35 + ' y', 'café été ' * 9):
        (tmp_path / 'text').write_text(text, encoding='utf-8')
        blocks = list(filter(None, file_blocks(str(tmp_path / 'text'))))
        assert ''.join(blocks) == text and len(blocks) > 1
        for before, after in zip(blocks, blocks[1:] if 'x' not in text else ()):
            assert after[0].isspace() and not before[-1].isspace()
    monkeypatch.setattr(sys, 'stdin', None)
    with pytest.raises(SystemExit, match='cannot read the prompt'):
        list(file_blocks('-'))

@pytest.mark.parametrize('prompt, until', [('ape', 'stdout'), ('FILE:-', 'stderr')])
def test_ctrl_c_ends_cleanly_and_keeps_the_state(model_dir, tmp_path, prompt, until):
    process = subprocess.Popen(
        [*SCRIPT, f'--out_dir={model_dir}', '--max_new_tokens=1000000', f'--start={prompt}',
         f"--save_state={tmp_path / 'state'}"], stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=0)
    process.stdin.write(TEXT.encode() + b'\xc3')  # a prompt comes slowly: half a character
    said = b''
    while (b'tokens' if until == 'stderr' else b'ape') not in said:
        said += getattr(process, until).read(20) or pytest.fail(process.stderr.read().decode())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    count = len(said + out) - 1 if until == 'stdout' else len(TEXT)
    assert process.returncode == 0 and f'{count:,} tokens condensed' in err.decode()

@pytest.mark.parametrize('command', ['| head -c 10', '> /dev/full'])  # more: test_console.py
def test_whatever_becomes_of_the_output_the_state_is_kept(model_dir, tmp_path, command):
    """Where a terminal lacks the characters of the folder's name and of the text."""
    change(model_dir / 'ckpt.pt', tokenizer=other_chars('y', 'é'))
    folder = shutil.move(model_dir, tmp_path / 'прогон')
    done = subprocess.run(
        ['bash', '-c', f'set -o pipefail; "$@" {command}', 'bash', *SCRIPT, '--start=é',
         f'--out_dir={folder}', '--max_new_tokens=300', f"--save_state={tmp_path / 'state'}"],
        capture_output=True, text=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
        cwd=tmp_path)
    err = done.stderr
    assert done.returncode == ('full' in command) and 'tokens condensed' in err, err
    assert ('No space left' in err) == ('301 tok' in err) == ('full' in command)

def test_a_padded_vocabulary_and_weights_as_other_programs_save_them(sample, model_dir):
    usual = sample('--start=', '--temperature=5').out

    def padded(weights):
        weights = {**weights, 'transformer.h.0.attn.bias': torch.ones(1, 1, 4, 4)}  # a mask
        return {f'module._orig_mod.{name}': torch.cat((value, 9 * torch.ones(40, 16)))
                if name.endswith('wte.weight') else value
                for name, value in weights.items() if name != 'lm_head.weight'}  # it is tied
    change(model_dir / 'ckpt.pt', model=padded,
           model_args=lambda sizes: {**sizes, 'vocab_size': sizes['vocab_size'] + 40})
    done = sample('--start=', '--temperature=5')
    assert (done.code, done.out) == (0, usual), done.err

def test_the_newest_run_that_can_be_used_is_the_default(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'ROOT', str(tmp_path / 'root'))
    for age, name in enumerate(('needle', 'new', 'old')):
        path = shutil.copytree(model_dir, tmp_path / 'root' / 'out' / name) / 'ckpt.pt'
        change(path, task='needle' if name == 'needle' else 'text',
               tokenizer=other_chars('.', '/' if name == 'new' else '.'))
        shutil.copy(path, path.parent / 'last.pt')
        os.utime(path.parent / 'last.pt', (1e9 - age, 1e9 - age))
    done = run('sample.py', '--start=/', '--max_new_tokens=1')  # only the newer knows a slash
    assert done.code == 0 and done.out[0] == '/'
    needle, new = done.err.splitlines()
    assert new.endswith('trained on tiny')
    assert needle.startswith("out/needle is left out: its task is 'needle'")
