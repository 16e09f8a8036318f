"""Every bad input gets one line on stderr and exit code 1, and costs nothing that was there."""
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, check
from test_sample import change, other_chars

from lib.checkpoint import FILES, save

def contents(folder):
    """What is in all files of a folder, in any depth; and nothing temporary is left there."""
    found = {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}
    assert not [path for path in found if path.suffix == '.tmp']
    return {path: content for path, content in found.items() if path.name != '.lock'}

@pytest.mark.parametrize('settings, parts', [
    (dict(batch_size=0), ['batch_size must be at least 1']),
    (dict(gradient_accumulation_steps=3 * 10 ** 7), ['tokens is too large: lower batch_size']),
    (dict(learning_rate=-1), ['learning_rate must be at least 0']),
    (dict(n_embd=4 * 10 ** 6), ['this model takes some 6,144,', 'this machine has']),
    (dict(set_aside=1.0), ['set_aside=1.0 must be a share below 1']),
    (dict(task='txt'), ["task must be one of 'facts', 'mqar', 'needle', 'pairs', ", "'txt'"]),
    (dict(device='meta'), ["device='meta' is not available"]),  # which torch knows
    (dict(beta1=1.0), ['beta1=1.0']), (dict(n_local=100000), ['n_local=100000 must be at most']),
    (dict(learning_rate=1e-5), ['min_lr=0.0001 is above learning_rate=1e-05']),
    (dict(decay_from=1.5), ['decay_from=1.5']),
    (dict(eval_tokens=8), ['8 tokens to score are no more than a window of 8']),
    (dict(out_dir=ROOT), ['is not empty', '--out_dir=... goes elsewhere']),
    (dict(model_type='gpt', bptt_segments=2), ['has no segments', 'bptt_segments must be 0']),
    (dict(model_type='gpt', recompute=True), ['has no segments', 'recompute False']),
    (dict(dtype='float16'), ['dtype must be']), (dict(compile='yes'), ['compile must be']),
    (dict(products='mkl'), ['products must be', "not 'mkl'"]),
    (dict(dataset='tinny'), ["'tinny'"]),
    (dict(threads=100000), ['threads=100000 is more than this machine can use']),
    (dict(init_from='resume'), ['no run to resume in /', '/out: name the folder', '--out_dir']),
    (dict(init_from='nowhere.pt'), ['no checkpoint at nowhere.pt'])])
def test_train(train, tmp_path, settings, parts):
    check(train(**settings), *parts)
    assert contents(tmp_path) == {}

@pytest.mark.parametrize('args, parts', [
    (['--start=\udcff'], ['--start is not UTF-8', '--start=FILE:path']),
    (['--start=FILE:nowhere.txt'], ["cannot read the prompt 'nowhere.txt'", 'No such file']),
    (['--start=FILE:{}/out/ckpt.pt'], ['cannot read the prompt', 'it is not UTF-8']),
    (['--temperature=-1'], ['temperature must be at least 0']),
    (['--top_p=1.5'], ['top_p must be at most 1']),
    (['--load_state=nowhere'], ['no state file at']),
    (['--load_state={}/out/ckpt.pt'], ['ckpt.pt is no state']),
    (['--save_state={}/x', '--num_samples=2'], ['num_samples']),
    (['--save_state={}/nowhere/x'], ['cannot use', 'nowhere/.x', 'No such file']),
    (['--save_state={}/out/ckpt.pt'], ['ckpt.pt is of another kind, or']),
    (['--save_state={}/pipe'], ['is of another kind, or'])])
def test_sample(run, model_dir, tmp_path, args, parts):
    (tmp_path / 'prompt').write_text('ape')
    os.mkfifo(tmp_path / 'pipe')
    before = contents(tmp_path)
    done = run('sample.py', f'--out_dir={model_dir}', f"--start=FILE:{tmp_path / 'prompt'}",
               *(arg.replace('{}', str(tmp_path)) for arg in args))
    check(done, *parts)
    assert contents(tmp_path) == before and done.out == ''

def sizes(**changed):
    return lambda sizes: {**sizes, **changed}

SPOILED = [
    (lambda raw: b'garbage', ['is not a readable checkpoint: it is damaged, or of another']),
    (lambda raw: raw[:50_000] + bytes(2000) + raw[52_000:], ['it is damaged']),
    ([1], ['it holds no dictionary']),
    (dict(best_val_loss=np.float64(1)), ['or of another program (UnpicklingError)']),
    (dict(model=None), ["its 'model' is missing or damaged"]),
    (dict(model={3: torch.ones(3)}), ['damaged']),
    (dict(model=lambda weights: {n: v * torch.nan for n, v in weights.items()}), ['not finite']),
    (dict(model=lambda weights: {f'a.{n}': v for n, v in weights.items()}), ['has a a.']),
    (dict(model_args=None), ["its 'model_args' is missing or damaged"]),
    (dict(model_args=dict(n_embd=16)), ["its 'model_args' is missing or damaged"]),
    (dict(model_args=sizes(n_embd='16')), ['damaged']),
    (dict(model_args=sizes(n_embd=32)), ['(23, 16) in the checkpoint and (23, 32) here']),
    (dict(model_args=sizes(n_local=10 ** 30)), ['n_local=1000']),
    (dict(model_args=sizes(carry='gated')), ['has no carry_gate', 'take the model_type']),
    (dict(model_type=['fold']), ["its 'model_type' is missing or damaged"]),
    (dict(model_type='gtp'), ["model_type must be one of 'gpt', 'fold'"]),
    (dict(data='tiny'), ["its 'data' is missing or damaged"])]

@pytest.mark.parametrize('i', range(len(SPOILED)))
def test_checkpoints(run, train, model_dir, tmp_path, i):
    """No script takes one that is not whole, and none touches it; all three read it alike."""
    spoiled, parts = SPOILED[i]
    path = model_dir / 'ckpt.pt'
    if isinstance(spoiled, dict):
        change(path, **spoiled)
    elif callable(spoiled):
        path.write_bytes(spoiled(path.read_bytes()))
    else:
        torch.save(spoiled, path)
    shutil.copy(path, model_dir / 'last.pt')
    before = contents(tmp_path)
    script = ('sample.py', 'probe.py', '')[i % 3]
    done = run(script, f'--out_dir={model_dir}') if script else train(init_from='resume')
    check(done, *parts)
    assert contents(tmp_path) == before

def state_with(**entries):
    return dict(state=lambda state: {**state, **entries})

@pytest.mark.parametrize('model_type, spoiled', [
    ('fold', dict(model='another', part='is not a state of this model')),
    ('fold', dict(state=None, part='is of another kind')), ('fold', dict(rng=None)),
    ('fold', dict(rng=torch.zeros(5056, dtype=torch.uint8))), ('fold', state_with(carry=None)),
    ('fold', state_with(carry=torch.zeros(1, 4, 8))), ('fold', state_with(cache=())),
    ('gpt', state_with(tokens=None))])
def test_states(run, trained, tmp_path, model_type, spoiled):
    out = trained(model_type=model_type)
    words, path = [f'--out_dir={out}', '--max_new_tokens=3'], out / 'state'
    assert run('sample.py', *words, f'--save_state={path}', '--start=ape').code == 0
    change(path, **{key: value for key, value in spoiled.items() if key != 'part'})
    before = contents(tmp_path)
    check(run('sample.py', *words, f'--save_state={path}', f'--load_state={path}'),
          spoiled.get('part', 'is damaged'))
    assert contents(tmp_path) == before

def test_checkpoints_that_do_not_fit(train, trained):
    plain, gated = trained('a') / 'ckpt.pt', trained('b', carry='gated') / 'ckpt.pt'
    check(train(init_from=plain, n_global=2), 'transformer.h.2', 'layers')
    check(train(init_from=gated), 'has a carry_gate', 'layers, carry')
    check(train('gpt', init_from=plain), 'wpe.weight is (4, 16)', '(16, 16) here')
    change(plain, tokenizer=other_chars('.', '/'))
    check(train(init_from=plain), 'vocabulary is not that of')

@contextmanager
def limited(size):
    """A limit on the size of the files that are written: to who writes them, a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)

def test_a_full_disk(run, train, model_dir, tmp_path, data_dir):
    common = f'--out_dir={model_dir}', '--device=cpu'
    small = '--histories=0,4', '--bins=4,8', '--targets=5', f'--data_dir={data_dir}'
    assert train(overwrite=True).code == 0
    assert run('sample.py', *common, f"--save_state={tmp_path / 's'}").code == 0
    before = contents(tmp_path)
    with limited(600):
        check(run('sample.py', *common, f"--save_state={tmp_path / 's'}"), 'too large', 'is kept')
        check(run('probe.py', *common, *small), 'cannot write', 'probe.json')
    with limited(15_000), pytest.raises(SystemExit, match='File too large'):  # torch reports it
        save(tmp_path / 'large.pt', {'weights': torch.zeros(10_000)})
    assert contents(tmp_path) == before
    for size in (600, 20_000):
        with limited(size):
            check(run('train.py', *common, '--init_from=resume', '--max_iters=21'), 'too large')
        after = contents(tmp_path)
        assert all(after[model_dir / name] == before[model_dir / name] for name in FILES)

@pytest.mark.parametrize('part, key, value', [
    ('rng', None, []), ('rng', None, [1]), ('optimizer', None, {'state': 1}),
    ('optimizer', 'state', [1]),
    ('task_state', 'generator', torch.zeros(3)), ('run', 'interval_loss', torch.ones(2))])
def test_where_training_stands_is_what_a_run_saves(train, trained, part, key, value):
    out = trained(stream=True)
    before = (out / 'log.jsonl').read_bytes()
    change(out / 'last.pt', **{part: (lambda old: {**old, key: value}) if key else value})
    done = train(init_from='resume', stream=True, max_iters=2)
    check(done, 'last.pt cannot be resumed', '--init_from=')
    assert (out / 'log.jsonl').read_bytes() == before and 'iter ' not in done.out

def test_sizes_that_a_damaged_config_has_not_are_those_of_the_model(train, trained):
    change(trained() / 'last.pt', config=lambda config: {
        key: value for key, value in config.items() if key not in ('block_size', 'n_embd', 'seed')})
    done = train(init_from='resume', max_iters=2, block_size=32)
    assert done.code == 0 and 'block_size stays 16' in done.out
    assert done.globals['run'].tokens == 2 * 4 * 16 and done.globals['s'].n_embd == 16

def test_a_run_of_another_kind_and_other_symbols_are_refused(train, trained, tmp_path):
    """Where a config file of another model or task is given, or another vocabulary of its size."""
    needle = dict(task='needle', symbols=3, key_length=2, first=1, longest=2, probe_distance=5)
    trained()
    check(train('gpt', init_from='resume'), "holds a run of model_type 'fold', not 'gpt'")
    check(train(init_from='resume', **needle), "holds a run of task 'text', not 'needle'")
    check(train(init_from=trained('needle', **needle), out_dir=tmp_path / 'b',
                **{**needle, 'symbols': 2}), "the checkpoint was trained with another symbols")

BENCH = '--sizes=1+1x16x2', '--window=24', '--block_sizes=24'
COMPARISON = """tokens, seeds, prompts = 24, [1], ['a']
common = dict(block_size=24, batch_size=1, dataset='tiny')
runs, probe = {'a': {}}, {'targets': 4}
"""

@pytest.mark.parametrize('script, name', [
    *[('probe.py', f'out/probe{end}') for end in ('.json', '.png', '_context_curve.png')],
    ('train.py', 'out/record.json'), ('train.py', 'out/loss.png'), ('train.py', 'out/probe.json'),
    *[('anew', f'out/{name}') for name in ('ckpt.pt', 'last.pt', 'log.jsonl')],
    ('bench.py', 'out/speed.json'),
    *[('compare.py', f'out/{name}') for name in (
        'comparison.json', 'report.md', 'loss.png', 'context.png', 'a_1/settings.json',
        'a_1/record.json', 'a_1/probe.json', 'a_1/samples.json', 'a_1/ckpt.pt', 'a_1/notes')]])
def test_what_another_program_made_is_not_replaced(
        run, train, model_dir, tmp_path, monkeypatch, script, name):
    monkeypatch.setattr('lib.records.ROOT', str(tmp_path))
    (tmp_path / 'comparison.py').write_text(COMPARISON)
    shutil.copy(model_dir / 'ckpt.pt', model_dir / 'last.pt')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'\x89PNG\r\n\x1a\n# Side {"some": "thing"}')
    before = contents(tmp_path)
    done = train(overwrite=True) if script == 'anew' else run(script, *{
        'probe.py': [f'--out_dir={model_dir}'], 'bench.py': ['--parts=generation,speed', *BENCH],
        'train.py': [f'--out_dir={model_dir}', '--init_from=resume'],
        'compare.py': [tmp_path / 'comparison.py', f"--out_dir={tmp_path / 'out'}"]}[script])
    error, whole = done.err.splitlines()[-1], done.out + done.err
    assert done.code == 1 and error.startswith('error: '), whole
    if name.endswith(('a_1/ckpt.pt', 'notes')):
        assert 'a_1 holds a run with another batch_size' in whole and ': delete it' in whole
    else:
        assert f'{name} is of another kind' in error, whole
    assert contents(tmp_path) == before

def test_what_is_started_over_stays_until_the_new_run_is_saved(
        train, trained, tmp_path, monkeypatch):
    """A disk that is full then takes nothing away; a link is written through."""
    out = trained()
    (tmp_path / 'file').touch()
    check(train(out_dir=tmp_path / 'file' / 'out'), 'cannot use', 'Not a directory')
    shutil.move(out / 'last.pt', tmp_path / 'elsewhere.pt')
    (out / 'last.pt').symlink_to('../elsewhere.pt')
    before = contents(tmp_path)

    def full(content, file):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr('torch.save', full)
        check(train(overwrite=True, init_from=out), 'No space left', 'is kept')
    assert contents(tmp_path) == before
    assert train(overwrite=True, max_iters=0).code == 0 and (out / 'last.pt').is_symlink()

