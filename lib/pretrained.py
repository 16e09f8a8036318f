"""GPT-2's weights in and out: folders of Hugging Face's format, and the published ones.

`python -m lib.pretrained OUT_DIR FOLDER` writes a run or checkpoint as such a folder, config.json
and model.safetensors; a line says what loads it. Nothing is ever unpickled.
"""
import lib.start  # noqa: F401 (before torch)
import json
import os
import re
import sys
from pathlib import Path

import torch

from lib.console import require, say, write
from lib.files import fetch, has_sha256, write_file

URL = 'https://huggingface.co/openai-community/{}/resolve/{}/model.safetensors'
PUBLISHED = {  # name: revision; bytes, of the larger ones at least; n_layer, n_head, n_embd
    'gpt2': ('607a30d783dfa663caf39e06633721c8d4cfcd7e', 548_105_171, 12, 12, 768),
    'gpt2-medium': ('6dcaa7a952f72f9298047fd5137cd6e4f05f41da', 1_419_292_672, 24, 16, 1024),
    'gpt2-large': ('32b71b12589c2f8d625668d2335a01cac3249519', 3_096_120_320, 36, 20, 1280),
    'gpt2-xl': ('15ea56dee5df4983c59b2538573817e1667135e2', 6_230_444_800, 48, 25, 1600)}
SHA256 = {'gpt2': '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'}
SIZES = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024)  # if not said
FITS = {  # values of config.json that a GPT here can have; the first if a key is missing
    'model_type': ('gpt2',), 'activation_function': ('gelu_new', 'gelu_pytorch_tanh', 'gelu'),
    'layer_norm_epsilon': (1e-5,), 'scale_attn_weights': (True,), 'tie_word_embeddings': (True,),
    'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)}
FILES = 'model.safetensors', 'model.safetensors.index.json', 'config.json'  # in this order
WTE, WPE, HEAD = 'transformer.wte.weight', 'transformer.wpe.weight', 'lm_head.weight'

def fetch_published(name):
    """The path of published weights in the cache folder, into which they are fetched once. Raises
    SystemExit if they cannot be had, or are not those that were published."""
    revision, least, *sizes = PUBLISHED[name]
    cache = os.path.expanduser(os.environ.get('FOLDGPT_CACHE') or '~/.cache/foldgpt')
    path, config = (os.path.join(os.path.abspath(cache), name, file)
                    for file in ('model.safetensors', 'config.json'))
    write(sys.stderr, '' if name in SHA256 else f'{name}: no checksum is known\n')
    fetch(URL.format(name, revision), path, least, SHA256.get(name))
    require(has_sha256(path, SHA256.get(name)),
            f'{path} is not the published file, by its SHA-256: delete it')
    if not os.path.isfile(config):
        content = json.dumps({'model_type': 'gpt2', **dict(zip(SIZES, sizes))}).encode()
        write_file(config, lambda f: f.write(content))
    return path

def open_file(path):
    """The dictionary in a file of JSON or safetensors. Raises SystemExit if it cannot be read."""
    try:
        if path.endswith('.json'):
            return {**json.loads(Path(path).read_bytes())}
        from safetensors.torch import load_file
        open(path, 'rb').close()  # of a file without rights, safetensors says that there is none
        return load_file(path)
    except PermissionError:  # which is explained at the script's end
        raise
    except Exception as error:  # from a missing package to a damaged header
        raise SystemExit(f'error: cannot read {path} ({error!r:.200}): take a whole one; files of '
                         f'pickle, such as pytorch_model.bin, are not read') from None

def weights_of(path):
    """The weights in a file of safetensors, or in the shards of an index, as our layers have them,
    in float32. Any other file stands for the model.safetensors beside it."""
    weights, files = {}, [path]
    if path.endswith('.index.json'):
        names = open_file(path).get('weight_map')
        names = {str(name) for name in names.values()} if isinstance(names, dict) else {''}
        require(all(name.endswith('.safetensors') for name in names), f'{path} has no weight_map '
                f'of files of safetensors: take a whole one')
        files = sorted(str(Path(path).parent / Path(name).name) for name in names)
    elif path.endswith('.json'):
        files = [os.path.join(os.path.dirname(path), 'model.safetensors')]
    for file in files:
        for name, x in open_file(file).items():
            name = re.sub(r'^(?=(wte|wpe|h|ln_f)\.)', 'transformer.', name)
            if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # which are no weights
                require(x.is_floating_point() and x.itemsize <= 4,
                        f'{file}: {name} is of {x.dtype}: take weights of float32')
                weights[name] = turned(name, x.float())
    return weights

def turned(name, x):
    """A weight of ours as it is there, or back: matrices of layers are stored (in, out)."""
    return x.transpose(0, -1) if re.search(r'\.(c_attn|c_proj|c_fc)\.weight$', name) else x

def read(path):
    """What a checkpoint holds (lib/checkpoint.py), from a file of a Hugging Face folder. Raises
    SystemExit, by name, for what is missing, damaged, or no model of ours."""
    place = os.path.join(os.path.dirname(path), 'config.json')
    config, weights = open_file(place), weights_of(path)
    own = config['foldgpt'] if isinstance(config.get('foldgpt'), dict) else {}  # of export()
    if config.get('model_type') == 'foldgpt':
        return {**own, 'model': weights}
    sizes = {key: config.get(key, value) for key, value in SIZES.items()}
    for key, value in sizes.items():
        require(type(value) is int and 0 < value < 2 ** 31,
                f'{place}: {key}={value!r} must be a positive whole number')
    for key, known in {**FITS, 'n_inner': (None, 4 * sizes['n_embd'])}.items():
        require(config.get(key, known[0]) in known, f'{place}: {key}={config.get(key)!r} does not '
                f'fit: a GPT here has {" or ".join(map(repr, known))}')
    for name, key in ((WTE, 'vocab_size'), (WPE, 'n_positions')):
        found, expected = [*weights.get(name, torch.zeros(0)).shape], [sizes[key], sizes['n_embd']]
        require(found == expected, f'{place}: {name} is {found}, not {key} * n_embd = {expected}')
    head = weights.pop(HEAD, weights[WTE])
    require(head is weights[WTE] or torch.equal(head, weights[WTE]),
            f'{path}: {HEAD} is not {WTE}: an output matrix of its own does not fit')
    tokenizer = {'kind': 'gpt2'} if sizes['vocab_size'] == SIZES['vocab_size'] else None
    gelu = 'none' if config.get('activation_function') == 'gelu' else 'tanh'
    return {**own, 'model': weights, 'tokenizer': own.get('tokenizer') or tokenizer, 'model_args': {
        **sizes, 'block_size': sizes['n_positions'], 'bias': True, 'gelu': gelu}}

def export(saved, model, folder):
    """Write a checkpoint's model as a Hugging Face folder. Raises SystemExit if it cannot."""
    from safetensors.torch import save
    require(not os.path.exists(folder) or os.path.isdir(folder) and not os.listdir(folder),
            f'{folder} is no empty folder: name another')
    kind, c, weights = saved['model_type'], model.config, model.state_dict()
    own = {'model_type': kind, 'model_args': vars(c), 'tokenizer': saved.get('tokenizer'),
           **{key: saved[key] for key in ('task', 'data', 'iter_num') if key in saved},
           'config': {key: value for key, value in saved.get('config', {}).items()
                      if key not in ('out_dir', 'init_from')}}  # which are this machine's
    config = {'model_type': 'foldgpt', 'foldgpt': own}
    note = f'a {kind} of foldGPT is needed to run it: python sample.py --out_dir=...'
    if kind == 'gpt' and (c.position, c.window, c.border) == ('learned', 0, -1):
        note = 'transformers loads it with GPT2LMHeadModel.from_pretrained'
        end = 50256 if c.vocab_size > 50256 else None  # of a text, in GPT-2's byte pairs
        config.update({key: vars(c).get(key, c.block_size) for key in SIZES}, model_type='gpt2',
                      architectures=['GPT2LMHeadModel'],
                      activation_function='gelu' if c.gelu == 'none' else 'gelu_new',
                      resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
                      **dict.fromkeys(('bos_token_id', 'eos_token_id'), end))
        for name in weights.keys() - {WTE, WPE, HEAD}:
            weights.setdefault(name.replace('weight', 'bias'), torch.zeros(len(weights[name])))
    if {HEAD, WTE} <= weights.keys() and torch.equal(weights[HEAD], weights[WTE]):
        del weights[HEAD]  # tied, there as well
    content = {'model.safetensors': save({name: turned(name, x).contiguous()
                                          for name, x in weights.items()}, {'format': 'pt'}),
               'config.json': json.dumps({'note': note, **config}, indent=1).encode()}
    for name in content:
        write_file(os.path.join(folder, name), lambda f: f.write(content[name]))
    say(f'{folder}: {note}')

if __name__ == '__main__':
    from lib.checkpoint import find_file, load, load_model  # which import this file
    require(len(sys.argv) == 3, 'write python -m lib.pretrained OUT_DIR FOLDER')
    checkpoint = load(find_file(sys.argv[1]))
    export(checkpoint, load_model(checkpoint), sys.argv[2])
