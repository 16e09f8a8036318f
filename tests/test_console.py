"""What scripts say reaches the reader or is lost without a traceback; progress is told in time."""
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lib import console
from lib.records import ROOT

SCRIPT = """import signal, sys; from lib.console import say
signal.signal(signal.SIGTERM, lambda *args: print('a wish to stop', file=sys.stderr))
for text in ('a é', 'b', 'c'):
    say(text)
    sys.stdin.readline()
"""

@pytest.mark.parametrize('out, encoding, printed, said', [
    ('|', 'ascii', b'a ?\nb\nc\n', b''), ('|', 'utf-8', 'a é\nb\nc\n'.encode(), b''),
    ('| head', 'utf-8', None, b'a wish to stop\n'), ('>&-', 'utf-8', b'', b''),
    ('> /dev/full', 'utf-8', b'',
     b'what is printed is lost from here on: No space left on device\n')])
def test_say_never_fails(out, encoding, printed, said):
    command = f'exec "{sys.executable}" -c "$SCRIPT" {out.strip("|head ")}'
    child = subprocess.Popen(command, cwd=ROOT, shell=True, stdin=-1, stdout=-1, stderr=-1, env={
        **os.environ, 'PYTHONIOENCODING': encoding, 'SCRIPT': SCRIPT})
    if out == '| head':
        assert child.stdout.readline() == 'a é\n'.encode()  # at once, though it is a pipe
        child.stdout = child.stdout.close()
    assert child.communicate(b'\n') == (printed, said) and child.returncode == 0

@pytest.mark.parametrize('error, words', [
    (MemoryError(), 'lower batch_size'), (RuntimeError('not enough memory'), 'lower batch_size'),
    (RuntimeError('gloo/tcp/pair.cc:537: \nreset'), 'error: another process ended'),
    (FloatingPointError('x'), 'take other weights'), (RuntimeError('shapes differ'), None),
    (RuntimeError('an illegal memory access was encountered'), None)])
def test_an_error_that_is_not_the_programs_is_told_in_a_line(error, words):
    line = console.explain(error)
    assert line is None if words is None else words in line

@pytest.mark.parametrize('rank, expected', [('1', ''), (
    '0', '\rwork: 1%, 10 tokens/s, 1m 59s left\rwork: 25%, 10 tokens/s, 1m 30s left, loss 2'
    f"\r{' ' * 43}\r")])
def test_progress(rank, expected, monkeypatch):
    seconds, err = iter([0.0, 0.1, 1.0, 30.0, 30.1]), io.StringIO()
    err.isatty = lambda: True
    monkeypatch.setattr(console, 'time', SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(sys, 'stderr', err)
    monkeypatch.setenv('RANK', rank)
    progress = console.Progress('work', 1200)
    for done in (1, 10, 300, 301):
        progress.at(done, 'loss 2' if done == 300 else '')
    progress.close()
    assert err.getvalue() == expected and progress.done == 301
