"""README.md and docs/: generated parts are as results/ has them, links lead somewhere."""
import glob
import json
import os
import re
import subprocess

import pytest

from lib import docs, records
from lib.pictures import curves, digest
from lib.records import ROOT, load_record, make_record, metric, save_record

PAGES = ['README.md', 'CONTRIBUTING.md', *sorted(glob.glob('docs/*.md', root_dir=ROOT))]
RECORDS = sorted(glob.glob('results/**/*.json', root_dir=ROOT, recursive=True))
PICTURES = sorted(glob.glob('results/**/*.png', root_dir=ROOT, recursive=True))

def read(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read()

def test_pages_and_pictures_are_as_the_results_have_them():
    assert not docs.stale(), 'python -m lib.docs makes them anew'

def test_every_picture_is_shown():
    text = ''.join(map(read, PAGES))
    assert all(os.path.basename(name) in text for name in PICTURES)

def test_records():
    for name in RECORDS:
        record = load_record(os.path.join(ROOT, name))
        assert os.path.getsize(os.path.join(ROOT, name)) < 300_000, name
        assert re.fullmatch(r'\d{4}-\d\d-\d\d', record['date']), name

def test_links_and_size():
    for name in PAGES:
        folder = os.path.dirname(os.path.join(ROOT, name))
        for target in re.findall(r'\]\(([^)#\s]+)', read(name)):
            found = re.match(r'https?:', target) or os.path.exists(os.path.join(folder, target))
            assert found, (name, target)
    assert len(read('README.md').splitlines()) <= 150

@pytest.fixture
def record():
    points = [{'x': 12, 'value': 1.0, 'n': 200}, {'x': 1000, 'value': 0.25, 'n': 100}]
    return {'what': 'recall', 'settings': {'name': 'fold'}, 'metrics': {'loss': {'value': 1.23456}},
            'curves': {'recall': {'x': 'distance', 'y': 'share', 'points': points}}}

def test_seeds_are_merged(record):
    points = [{'x': 12, 'value': 0.5}, {'x': 7, 'value': 0.1}]
    metrics = {'loss': metric(2.23456), 'speed': metric(3)}
    other = {**record, 'metrics': metrics, 'curves': {'recall': {'points': points}}}
    some = [{**record, 'metrics': {**metrics, 'loss': metric(1.23456)}}, other, other]
    found = docs.merged(some)
    assert docs.fill('{metrics/loss|.3f} {metrics/loss/n} {metrics/speed}', found) == '1.901 3 3'
    assert found['curves']['recall']['points'] == [{'x': 12, 'value': pytest.approx(2 / 3)}]
    assert docs.merged([record])['curves'] == record['curves']

def test_picture_carries_what_it_shows(record, tmp_path):
    path = str(tmp_path / 'recall.png')
    curves(path, 'Needle', record['curves'])
    with open(path, 'rb') as f:
        assert digest('Needle', record['curves'], True, False).encode() in f.read()

def test_a_record_is_what_was_saved_and_nothing_else_is_one(tmp_path):
    path = tmp_path / 'new' / 'a.json'
    made = make_record('probe', {'file': f'{ROOT}/my.txt'}, [1], {'loss': metric(float('nan'))},
                       {'recall': {'x': 'x', 'y': 'y', 'points': [{'x': 1, 'value': 2}]}})
    save_record(path, made)
    read = load_record(path)
    assert read == {**made, 'metrics': {'loss': metric(None)}}
    assert read['settings'] == {'file': 'my.txt'} and len(list(path.parent.iterdir())) == 1
    for wrong in ([], {key: value for key, value in read.items() if key != 'seeds'}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(SystemExit, match='a.json is no record'):
            load_record(path)
    with pytest.raises(SystemExit, match='cannot read'):
        load_record(tmp_path / 'b.json')

def test_the_commit_is_that_of_the_repository_itself(monkeypatch, tmp_path):
    """Not of one above, nor of one into which the files were unpacked without being added."""
    commit = 'git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm a'
    for name, added in ('.', True), ('copy', True), ('other', False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / 'notes').touch()
        (folder / 'model.py').touch() if added else None
        monkeypatch.delenv('GIT_DIR', raising=False)
        if name != 'copy':
            subprocess.run(commit, shell=True, check=True, cwd=folder)
        (folder / 'model.py').touch()
        monkeypatch.setattr(records, 'ROOT', str(folder))
        monkeypatch.setenv('GIT_DIR', str(tmp_path / '.git'))  # as within a hook of git's
        found = records.provenance()['commit']
        (folder / 'model.py').write_text('edited')
        assert (found == 'unknown') == (name != '.') and records.provenance()['commit'] == (
            f'{found} (changed)' if name == '.' else found)
