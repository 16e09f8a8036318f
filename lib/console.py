"""What scripts tell the person who runs them: lines of text, and the progress of long work."""
import os
import re
import signal
import sys
import time
from textwrap import shorten

lost = []      # streams that could not take what was written
REPEAT = 30.0  # seconds between lines of progress where no terminal shows them

def say(text):
    """Print a line at once. Nobody reads on (a closed pipe): this process is sent SIGTERM."""
    write(sys.stdout, f'{text}\n')

def write(stream, text):
    """Write to a stream at once; what it cannot take is lost, without a traceback."""
    if stream is None:  # closed when the process started
        return
    encoding = stream.encoding or 'utf-8'
    try:
        stream.write(text.encode(encoding, 'replace').decode(encoding))
        stream.flush()
    except OSError as error:  # a closed pipe, a full disk: from here on the stream leads nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            signal.raise_signal(signal.SIGTERM)
            return
        lost.append(stream)
        if stream is not sys.stderr:
            write(sys.stderr, f'what is printed is lost from here on: {error.strerror}\n')

def require(fine, problem):
    """Raise SystemExit, with the problem in one line, unless it is fine."""
    if not fine:
        raise SystemExit(f'error: {problem}')

def brief(error, width=80):
    """The kind and the message of an exception, in one short line."""
    return shorten(f'{type(error).__name__}: {error}', width, placeholder=' ...')

def explain(error):
    """A line about an error of a file, of the memory, of other processes or of weights; None about
    any other."""
    text = ' '.join(str(error).split())[:100]
    if isinstance(error, OSError):
        where = f'cannot use {error.filename}: ' if error.filename else ''
        remedies = {PermissionError: 'get the right to it', FileNotFoundError: 'make its folder',
                    NotADirectoryError: 'make its folder'}
        remedy = remedies.get(type(error), 'make room')
        return f'error: {where}{error.strerror or text}: {remedy}, or go elsewhere'
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError)
                                          and re.search('(out of|enough|allocate) memory', text)):
        return 'error: not enough memory: lower batch_size, block_size, or the sizes of the model'
    if isinstance(error, RuntimeError) and ('gloo' in text or 'NCCL' in text):
        return ('error: another process ended, or cannot be reached: start all of them again, with '
                '--init_from=resume')
    return f'error: {text}: take other weights' if isinstance(error, FloatingPointError) else None

def count(n, thing):
    """'1 thread', '2,000 threads'."""
    return f'{n:,} {thing}' + 's' * (n != 1)

def duration(seconds):
    """'45s', '2m 05s', '3h 10m'."""
    minutes, rest = divmod(round(seconds), 60)
    text = f'{minutes}m {rest:02d}s' if minutes else f'{rest}s'
    return f'{minutes // 60}h {minutes % 60:02d}m' if minutes >= 60 else text

class Progress:
    """Share done, rate and time left of long work, on standard error of the first process."""

    def __init__(self, what, total, unit='tokens'):
        self.what, self.total, self.unit, self.done, self.width = what, max(1, total), unit, 0, 0
        self.terminal = bool(sys.stderr) and sys.stderr.isatty()
        self.silent = (os.environ.get('RANK') or '0') != '0'
        self.start = self.last = time.monotonic()

    def at(self, done, note=''):
        """Show that `done` of `total` are through, but no more often than one can read."""
        self.done, now = done, time.monotonic()
        if self.silent or not done or now - self.last < (0.2 if self.terminal else REPEAT):
            return
        self.last, rate = now, done / (now - self.start)
        share, left = min(1, done / self.total), duration(max(0, self.total - done) / rate)
        line = f'{self.what}: {share:.0%}, {rate:,.{int(rate < 10)}f} {self.unit}/s, {left} left'
        line += f', {note}' if note else ''
        write(sys.stderr, '\r' + line.ljust(self.width) if self.terminal else f'{line}\n')
        self.width = len(line) if self.terminal else 0

    def close(self):
        """Take the line off a terminal."""
        if self.width:
            write(sys.stderr, '\r' + ' ' * self.width + '\r')
