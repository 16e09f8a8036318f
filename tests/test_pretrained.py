"""GPT-2's weights in and out: the same numbers, what does not fit refused, files fetched whole."""
import hashlib
import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags
from safetensors.torch import load_file, save_file
from small import all_logits, make, tokens
from test_errors import check, contents
from test_probe import SMALL
from test_train import equal
from web import CONTENT

from lib import checkpoint as ckpt
from lib import pretrained

close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
GPT2, WTE, WPE = dict(bias=True, gelu='tanh'), 'transformer.wte.weight', 'transformer.wpe.weight'
TRAP = b"cos\nmkdir\n(S'executed'\ntR."  # unpickled it makes a folder

def export(folder, kind='gpt', **sizes):
    """A small model of ours, as a Hugging Face folder."""
    model, chars = make(kind, **sizes).float(), {'kind': 'char', 'chars': 'abcdefghijk'}
    pretrained.export({'model_type': kind, 'tokenizer': chars}, model, str(folder))
    return model

def parts_of(folder):
    config = json.loads((folder / 'config.json').read_text())
    return load_file(folder / 'model.safetensors'), config

def write(folder, weights, config, name='model.safetensors'):
    folder.mkdir(exist_ok=True)
    save_file({key: x.contiguous() for key, x in weights.items() if x is not None}, folder / name)
    (folder / 'config.json').write_text(json.dumps(config))

def read(path):
    return ckpt.load_model(ckpt.load(ckpt.find_file(str(path)))).eval()

def test_huggingface_to_ours_and_back(run, tmp_path):
    """Logits of transformers, to rounding; the tensors, bit for bit, in all forms of a folder."""
    golden = torch.load(os.path.join(ROOT, 'tests/golden/gpt2_huggingface.pt'))
    given, config, idx = (golden[key] for key in ('state_dict', 'config', 'idx'))
    more = {'lm_head.weight': given.pop('lm_head.weight').clone(), 'h.0.attn.masked_bias':
            torch.tensor(-1e4), 'h.0.attn.bias': torch.ones(1, 1, 40, 40, dtype=torch.uint8)}
    short = {name.removeprefix('transformer.'): x for name, x in given.items()}
    write(tmp_path / 'a', given, config)
    write(tmp_path / 'b', {**short, **more}, config)  # as it was published
    for i in range(2):
        write(tmp_path / 'c', dict([*given.items()][i::2]), config, f'model-{i}.safetensors')
    index = tmp_path / 'c' / 'model.safetensors.index.json'
    shards = [f'../model-{i}.safetensors' for i in range(2)]  # never outside of the folder
    index.write_text(json.dumps({'weight_map': dict(enumerate(shards))}))
    for form in ('a', 'b', 'a/config.json', 'b/model.safetensors', 'c'):
        close(all_logits(read(tmp_path / form), idx).detach(), golden['logits'])
    done = run('lib/pretrained.py', tmp_path / 'c', tmp_path / 'back')
    assert done.code == 0 and 'transformers loads it' in done.out, done.err
    equal(parts_of(tmp_path / 'back')[0], given)
    check(run('lib/pretrained.py', tmp_path / 'a', tmp_path / 'back'), 'is no empty folder')
    check(run('lib/pretrained.py', tmp_path / 'a'), 'python -m lib.pretrained OUT_DIR FOLDER')
    index.write_text('{}')
    check(run('lib/pretrained.py', tmp_path / 'c', tmp_path / 'd'), 'index.json has no weight_map')

@pytest.mark.parametrize('sizes', [GPT2, dict(bias=True), dict(bias=False)], ids=str)
def test_transformers_has_the_logits_of_ours(tmp_path, sizes):
    idx, ours = tokens(2, 12), export(tmp_path / 'hf', **sizes)
    close(all_logits(read(tmp_path / 'hf'), idx).detach(), all_logits(ours, idx).detach())
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    theirs.save_pretrained(tmp_path / 'saved')
    for logits in (theirs(idx).logits, all_logits(read(tmp_path / 'saved'), idx)):
        close(logits.detach(), all_logits(ours, idx).detach())

@pytest.mark.parametrize('kind, sizes', [
    ('fold', dict(carry='gated', local='sliding', gelu='tanh')), ('gpt', dict(position='rotary'))])
def test_what_is_no_gpt2_goes_with_what_it_needs(run, tmp_path, capsys, kind, sizes):
    model = export(tmp_path / 'hf', kind, **sizes)
    assert f'a {kind} of foldGPT is needed to run it' in capsys.readouterr().out
    assert parts_of(tmp_path / 'hf')[1]['model_type'] == 'foldgpt'  # which transformers refuses
    equal(read(tmp_path / 'hf').state_dict(), model.state_dict())
    done = run('sample.py', f"--out_dir={tmp_path / 'hf'}", '--start=abc', '--max_new_tokens=5')
    assert done.code == 0 and done.out.startswith('abc') and len(done.out) == 9, done.err
    (tmp_path / 'text').write_text('abcdeghijk' * 40)
    done = run('probe.py', f"--init_from={tmp_path / 'hf'}", f"--file={tmp_path / 'text'}",
               f"--out_dir={tmp_path / 'new' / 'place'}", *SMALL)
    assert done.code == 0 and {'hf', 'new', 'text'} == {*os.listdir(tmp_path)}, done.err
    assert (tmp_path / 'new' / 'place' / 'probe.json').is_file()

@pytest.mark.parametrize('spoiled, part', [
    *[({key: value}, f'{key}={value!r} does not fit') for key, value in (
        ('activation_function', 'relu'), ('scale_attn_by_inverse_layer_idx', True),
        ('scale_attn_weights', False), ('tie_word_embeddings', False), ('n_inner', 24),
        ('add_cross_attention', True), ('layer_norm_epsilon', 1e-6), ('model_type', 'llama'))],
    (dict(n_head=3), 'must be a multiple of n_head=3'), (dict(n_head='2'), "n_head='2' must be"),
    (dict(n_layer=5), 'has no transformer.h.4'), ({WTE: None}, f'{WTE} is [0]'),
    (dict(vocab_size=16), f'{WTE} is [11, 8], not vocab_size'),
    (dict(n_positions=9), f'{WPE} is [12, 8], not n_positions * n_embd = [9, 8]'),
    (dict(model_type='foldgpt', foldgpt=[]), "its 'model_args' is missing or damaged"),
    ({'score.weight': torch.ones(2, 8)}, 'has a score.weight'),
    ({'lm_head.weight': torch.ones(11, 8)}, f'lm_head.weight is not {WTE}'),
    ({WTE: torch.full((11, 8), torch.nan)}, f'{WTE} of the checkpoint is not finite'),
    ({WTE: torch.ones(11, 8).double()}, 'float64'), ({'config.json': b'[]'}, 'TypeError'),
    *[({'model.safetensors': raw}, 'files of pickle, such as') for raw in (b'', TRAP)]])
def test_what_does_not_fit_is_refused_by_name(run, tmp_path, monkeypatch, spoiled, part):
    monkeypatch.chdir(tmp_path)
    export('hf', **GPT2)
    (weights, config), raw = parts_of(tmp_path / 'hf'), {}
    for key, x in spoiled.items():
        kind = raw if isinstance(x, bytes) else weights if '.weight' in key else config
        kind[key] = x
    write(tmp_path / 'hf', weights, config)
    for name, content in raw.items():
        (tmp_path / 'hf' / name).write_bytes(content)
    before = contents(tmp_path)
    check(run('sample.py', '--init_from=hf'), part)
    assert contents(tmp_path) == before and os.listdir() == ['hf']

def test_a_folder_starts_a_fold(train, start, run, tmp_path, data_dir):
    weights = export(tmp_path / 'hf', vocab_size=23, **GPT2).state_dict()
    config = {**parts_of(tmp_path / 'hf')[1], 'foldgpt': {}}  # as of another program
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config))
    check(run('sample.py', f"--out_dir={tmp_path / 'hf'}"), 'holds no vocabulary')
    check(train(init_from='scratch', gelu='x'), "gelu must be one of ('none', 'tanh')")
    done = train('gated_fold', init_from=tmp_path / 'hf', n_local=2, n_global=2, max_iters=0)
    assert done.code == 0, done.err
    saved = torch.load(tmp_path / 'out' / 'last.pt')
    assert saved['model_type'] == 'gated_fold' and saved['config']['gelu'] == 'tanh'
    gates = {f'transformer.h.{i}.attn.past_gate': torch.zeros(8) for i in (2, 3)}
    equal(saved['model'], {**weights, WPE: weights[WPE][:4], **gates})
    done = start('config/fold_gpt2.py', *flags(  # cut short
        tmp_path / 'cut', data_dir, init_from=tmp_path / 'hf', n_local=3, max_iters=2,
        bptt_segments=2))
    assert done.code == 0, done.err
    assert torch.load(tmp_path / 'cut' / 'last.pt')['model']['transformer.h.3.attn.past_gate'].all()

def test_published_weights(web, run, train, tmp_path, monkeypatch):
    """sample.py needs no run for them; without a network, one line says what to do by hand."""
    export(tmp_path / 'hf', vocab_size=50257, n_layer=1, block_size=1024, **GPT2)
    web.content, web.answers = (tmp_path / 'hf' / 'model.safetensors').read_bytes(), ['whole']
    monkeypatch.setenv('FOLDGPT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setitem(pretrained.PUBLISHED, 'gpt2', ('1a', len(web.content), 1, 2, 8))
    monkeypatch.setitem(pretrained.SHA256, 'gpt2', hashlib.sha256(web.content).hexdigest())
    monkeypatch.setattr('prepare._load_gpt2', lambda: SimpleNamespace(
        encode_to_numpy=lambda text, **kwargs: np.array([7]), decode_bytes=lambda ids: b'a'))
    monkeypatch.setattr(pretrained, 'URL', 'http://127.0.0.1:1/{}/{}')
    place = tmp_path / 'cache' / 'gpt2' / 'model.safetensors'
    check(train(init_from='gpt2'), 'cannot fetch http://127.0.0.1:1/gpt2/1a', f'{place.parent}')
    monkeypatch.setattr(pretrained, 'URL', f'http://127.0.0.1:{web.server_port}/{{}}/{{}}')
    for _ in range(2):
        done = run('sample.py', '--init_from=gpt2', '--start=Hello', '--max_new_tokens=3')
        assert done.code == 0 and done.out == 'Helloaaa\n', done.err
    place.write_bytes(CONTENT)
    both = '--init_from=gpt2', '--out_dir=x'
    check(run('sample.py', *both), 'init_from is in place of out_dir: give one of them')
    check(run('probe.py', *both), 'is not the published file, by its SHA-256: delete')

@pytest.mark.parametrize('kind, keys', [
    ('fold', {}), ('gpt', {'position': 'learned', 'block_size': 24})])
def test_a_task_goes_along(train, run, tmp_path, kind, keys):
    assert train(kind, task='needle', filler='text', key_length=2, max_iters=2, **keys).code == 0
    assert run('lib/pretrained.py', tmp_path / 'out', tmp_path / 'hf').code == 0
    (tmp_path / 'my.txt').write_text('a1 b2\n' * 99)
    before = contents(tmp_path / 'hf')
    done = run('probe.py', f"--init_from={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'found'}",
               f"--file={tmp_path / 'my.txt'}", '--keys=3', '--device=cpu')
    assert done.code == 0 and 'of 3 right' in done.out, done.err
    assert (tmp_path / 'found' / 'probe.json').exists() and contents(tmp_path / 'hf') == before
