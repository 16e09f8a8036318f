"""Files that are written or fetched whole or not at all, and folders that one process owns while it
lives."""
import hashlib
import os
import re
import time

from lib.console import Progress, brief, require

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

PAUSES, TIMEOUT = (0, 1, 3), (10, 30)  # seconds before each try; to connect, to go on
RECORD, PICTURE = b'"what": "', b'tEXtSource'  # what these files of ours hold near their start
locks = {}  # path of a folder: an open file in it, whose lock ends with this process

def own_folder(folder):
    """Make a folder and keep it for this process; a killed one leaves no lock behind.

    Raises OSError if it cannot be written, SystemExit if another process has it.
    """
    path = os.path.join(os.path.realpath(folder), '.lock')
    if path in locks:
        return
    os.makedirs(folder, exist_ok=True)
    locks[path] = open(path, 'a+')
    try:
        if fcntl:
            fcntl.flock(locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another process has it
        with locks.pop(path) as other:
            other.seek(0)
            owner = other.read().strip()
        raise SystemExit(f'error: process {owner} is at work in {folder}: wait for it, or take '
                         f'another --out_dir') from None
    locks[path].truncate(0)
    print(os.getpid(), file=locks[path], flush=True)

def temporary_name(path):
    """The path of a file of this process alone, beside the one at path, a link's target."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f'.{name}.{os.getpid()}.tmp')

def is_temporary(name):
    """Whether this is a name that temporary_name() gives."""
    return re.fullmatch(r'\..+\.\d+\.tmp', name)

def check_kind(path, mark):
    """Raise SystemExit if what is at path is not of this program: a file without the mark in its
    first 4 KB, or no file at all."""
    fine = not os.path.exists(path)
    if os.path.isfile(path):  # a pipe would wait
        with open(path, 'rb') as f:
            fine = mark in f.read(4096)
    require(fine, f'{path} is of another kind, or another program, and is not replaced: rename it, '
                  f'or go elsewhere')

def check_place(path, mark):
    """As check_kind; and raise OSError, which is explained at the script's end, if no file can be
    written to path."""
    check_kind(path, mark)
    temporary = temporary_name(path)
    open(temporary, 'wb').close()
    os.remove(temporary)

def write_file(path, write, kept='what was there is kept'):
    """Have write(f) write a file atomically: at path is the old one or the new one, whole.

    f: a file opened for bytes. A link is written through. Raises SystemExit if that cannot be done.
    """
    target, temporary = os.path.realpath(path), temporary_name(path)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(temporary, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk's
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, 'strerror', None) or str(cause).splitlines()[0]
        raise SystemExit(f'error: cannot write {path}: {reason}; {kept}') from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

def fetch(url, path, least, sha256=''):
    """Fetch a file of `least` bytes or more, unless it is there. What came of one that is cut off
    is kept beside it, and another call goes on from there. Raises SystemExit if it cannot be had,
    OSError if there is no place for it."""
    folder = os.path.dirname(path)
    if os.path.isfile(path):
        return
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, '.lock'), 'a') as lock:
        if fcntl:  # another process may be at it: wait for it
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isfile(path):  # another process has fetched it
            return
        for pause in PAUSES:
            time.sleep(pause)
            try:
                with open(f'{path}.part', 'ab') as part:
                    receive(url, part, least, sha256)
                os.replace(part.name, path)
                return
            except Exception as error:  # from a missing package to a proxy's broken answer
                reason = brief(error)
    raise SystemExit(f'error: cannot fetch {url} ({reason}): try again online, or put that file, '
                     f'fetched elsewhere, at {path}')

def receive(url, part, least, sha256):
    """One try to append what is missing. Raises errors of many kinds."""
    import requests
    begin = part.seek(0, os.SEEK_END)
    headers = {'Range': f'bytes={begin}-', 'Accept-Encoding': 'identity'}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code in (200, 416):  # no ranges, or nothing there: from the first byte on
            begin = part.seek(part.truncate(0))
        answer.raise_for_status()
        total = begin + int(answer.headers['Content-Length'])
        if total < least:
            raise ValueError(f'another file, of {total:,} bytes')
        progress = Progress(f'fetching {os.path.basename(url)}', total - begin, 'bytes')
        for block in answer.iter_content(1 << 16):
            part.write(block)
            progress.at(part.tell() - begin)
        progress.close()
    part.flush()
    os.fsync(part.fileno())
    if part.tell() != total:  # which older versions of urllib3 let pass
        raise ValueError(f'cut off after {part.tell():,} of {total:,} bytes')
    if not has_sha256(part.name, sha256):
        part.truncate(0)
        raise ValueError('another file, by its SHA-256')

def has_sha256(path, sha256):
    """Whether a file has this SHA-256; True if none is known."""
    with open(path, 'rb') as f:
        return not sha256 or hashlib.file_digest(f, 'sha256').hexdigest() == sha256
