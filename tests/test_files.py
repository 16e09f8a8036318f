"""lib/files.py: what is fetched is whole, whatever the server does."""
import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from web import CONTENT

from lib import files

@pytest.mark.parametrize('answers, part, begins', [
    ('moved ranges', 0, [0, 0]), ('wrong whole', 0, [0, 0]), ('other whole', 0, [0, 0]),
    ('cut whole', 0, [0, 1 << 17]), ('ranges ranges', len(CONTENT), [len(CONTENT), 0]),
    ('cut slow ranges', 0, [0, 1 << 17, 3 << 16]),
    ('cut broken broken ranges', 9, [9, *[9 + (1 << 16)] * 3])])
def test_a_file_is_fetched_whole(web, tmp_path, answers, part, begins):
    sha256 = '' if 'other' in answers else hashlib.sha256(CONTENT).hexdigest()
    fetch = partial(files.fetch, f'http://127.0.0.1:{web.server_port}', str(tmp_path / 'x'))
    web.answers = answers.split()
    (tmp_path / 'x.part').write_bytes(CONTENT[:part])
    with ThreadPoolExecutor() as processes:  # what one cannot have, another goes on with
        for job in [processes.submit(fetch, 1 << 18, sha256) for _ in range(3)]:
            job.exception()
    assert (tmp_path / 'x').read_bytes() == CONTENT and (web.begins, web.answers) == (begins, [])
    (tmp_path / '.lock').unlink()
    (tmp_path / '.lock').mkdir()  # where it is, nothing needs to be written
    fetch(1 << 18, sha256)

def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(os, 'fsync', lambda file: done.append('written'))
    monkeypatch.setattr(os, 'replace', lambda *paths: done.append('named') or replace(*paths))
    files.write_file(tmp_path / 'x', lambda f: f.write(b'x'))
    assert done == ['written', 'named']

def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(files, 'locks', {})
    monkeypatch.setattr(files.fcntl, 'flock', flock)
    with pytest.raises(OSError, match='No locks'):
        files.own_folder(str(tmp_path))

def test_what_urllib3_does_not_notice(web, tmp_path, monkeypatch):
    """Older versions end an answer that was cut off as if it were whole."""
    monkeypatch.setattr('requests.Response.iter_content', lambda *args: iter([CONTENT[:9]]))
    web.answers = ['whole'] * 3
    with pytest.raises(SystemExit, match=f'cut off after 9 of 262,147 .* at {tmp_path}'):
        files.fetch(f'http://127.0.0.1:{web.server_port}', str(tmp_path / 'x'), 1)
