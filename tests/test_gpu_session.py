"""The GPU session: its commands are in step with the scripts, and it keeps what it says it does."""
import os
import re
import time

import pytest
import session
import steps
from conftest import ROOT

import compare

@pytest.fixture
def record(monkeypatch, tmp_path):
    monkeypatch.setattr(session, 'OUT', str(tmp_path))
    monkeypatch.setattr(session, 'record', {'checks': {}, 'metrics': {}, 'curves': {}})
    return session.record

def keys_of(words):
    """The keys of a script, those of its task and of its model; and what it is given."""
    given = dict(word[2:].split('=', 1) for word in words[1:] if word.startswith('--'))
    if words[0] == 'train.py':
        return compare.keys_of(given), given
    with open(os.path.join(ROOT, words[0])) as f:
        return {*re.findall(r'^(\w+) = ', f.read(), re.M)}, given

@pytest.mark.parametrize('tiny', [True, False])
def test_every_step_is_a_command_that_the_scripts_know(monkeypatch, tiny):
    monkeypatch.setattr(steps, 'TINY', tiny)
    chains, made = steps.smoke_chains('/work'), set()
    for chain in chains:
        for name, words, _ in chain:
            assert name not in made  # else one result would hide the other
            made.add(name)
            if words[0] != '-m':
                known, given = keys_of(words)
                assert given.keys() <= known, name
    scripts = {words[0] for chain in chains for _, words, _ in chain}
    assert scripts >= {'train.py', 'sample.py', 'probe.py', 'bench.py', 'compare.py'}
    assert ('train graph stream' in made) != tiny

def test_what_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    go, late = tmp_path / 'go', tmp_path / 'late'
    child = (f'import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)\n'
             f'open({str(late)!r}, "w")')
    parent = tmp_path / 'parent.py'
    parent.write_text(f'import subprocess, sys, time\n'
                      f'subprocess.Popen([sys.executable, "-c", {child!r}])\n'
                      f'print("begun", flush=True)\ntime.sleep(60)\n')
    assert session.call([str(parent)], 3.0) == (None, ['begun']) and not session.alive
    go.touch()
    time.sleep(0.5)
    assert not late.exists()

@pytest.mark.parametrize('code, result', [
    ('print("written to x")', 'ok'), ('print("nothing")', 'FAILED'), ('written to', 'FAILED'),
    ('print("written to x, compile does not work here")', 'FAILED')])
def test_a_step_is_judged_by_its_end_and_by_what_it_prints(record, tmp_path, monkeypatch, code,
                                                           result):
    monkeypatch.setattr(session, 'BUDGET', 1000.0)
    (tmp_path / 'step.py').write_text(code)
    chain = [('step', [str(tmp_path / 'step.py')], 'written to'), ('next', ['no.py'], '')]
    session.run_chain(chain, session.BUDGET)
    assert record['checks']['step']['result'] == result
    assert record['checks']['next']['result'] == ('FAILED' if result == 'ok' else 'not measured')
    assert (tmp_path / 'session.json').stat().st_size > 100

def test_a_speed_is_kept_if_it_is_of_what_it_says(record, monkeypatch):
    """And the efficiency is by FLOPs, to the GPT's fastest way."""
    monkeypatch.setattr(session, 'WAYS', ['graph', 'off'])
    flops = {'GPT': 1.0, 'fold l=12': 2.0}
    for name, way, batch, rate, compiled in (
            ('GPT', 'off', 64, 10.0, 'off'), ('GPT', 'off', 256, 20.0, 'off'),
            ('fold l=12', 'graph', 64, 99.0, 'off'), ('fold l=12', 'off', 64, 8.0, 'off')):
        found = {'batch': batch, 'rate': rate, 'ready': 3.0, 'mb': 1.0, 'compiled': compiled}
        session.keep_speed(name, way, found, flops)
    values = {key: one['value'] for key, one in record['metrics'].items()}
    assert values['GPT, off, tokens per second'] == 20 and values['GPT, off, batch'] == 256
    assert values['fold l=12, off, efficiency'] == pytest.approx(0.8)
    assert not any(key.startswith('fold l=12, graph') for key in values)
    assert record['checks']['speed fold l=12, graph, batch 64']['result'] == 'FAILED'
    assert session.fastest('GPT') == (10.0, 'off', 3.0)  # at the batch of all
