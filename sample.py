"""Continue a text with a trained model, token by token; all that is needed is in its checkpoint.

    python sample.py --start="ROMEO:" --max_new_tokens=300
    python sample.py --start=FILE:book.txt --max_new_tokens=0 --save_state=book.state
    python sample.py --load_state=book.state --start="And so"
    python sample.py --init_from=gpt2 --start="Hello"
"""
import lib.start  # noqa: F401 (before torch)
import codecs
import os
import re
import sys

import torch

from configurator import at_least, configure
from lib import checkpoint as ckpt
from lib.console import Progress, count, lost, require, write
from lib.device import set_up
from lib.files import check_place
from lib.processes import Stop
from lib.streaming import new_state, read_, stream
from prepare import Tokenizer

out_dir = ''          # run's folder or checkpoint; '' takes the newest run under out/
init_from = ''        # in place of a run: weights of another program, as train.py takes them
start = '\n'          # prompt, may be empty; \n and \t as one writes them, \\ for a backslash;
                      # FILE:path reads it from a file, FILE:- from standard input
num_samples = 1       # texts to write
max_new_tokens = 500  # tokens of each; 0 only reads the prompt
temperature = 0.8     # below 1 safer, above 1 wilder; 0 always takes the likeliest token
top_k = 0             # sample from the k likeliest tokens only; 0 from all
top_p = 0.0           # sample from the fewest tokens with this share of the probability; 0 from all
seed = 0              # of the sampling; 0 goes on with a loaded state's, and is 1337 without one
save_state = ''       # file that keeps the state of all that was read and written
load_state = ''       # such a file, to go on from
device = 'auto'       # 'auto' takes cuda, mps or cpu, the first that is there
threads = 1           # CPU threads; one token at a time leaves no work for more

BLOCK = 1 << 16  # bytes of a prompt that are read at a time, at most
ESCAPES = {'n': '\n', 't': '\t', '\\': '\\'}  # as one writes them after a backslash

def check(s):
    at_least(s, num_samples=1, max_new_tokens=0, temperature=0.0, top_k=0, top_p=0.0, seed=0,
             threads=0)
    require(not (s.init_from and s.out_dir), 'init_from is in place of out_dir: give one of them')
    require(s.top_p <= 1, f'top_p must be at most 1, not {s.top_p}')
    require(not s.save_state or s.num_samples == 1,
            'save_state keeps the state of one text: leave num_samples at 1')
    require(s.start.startswith('FILE:') or s.start == s.start.encode('utf-8', 'replace').decode(),
            '--start is not UTF-8: write it in a file, and name that as --start=FILE:path')
    if s.save_state:
        check_place(s.save_state, ckpt.STATE)

def read_bytes(raw):
    """What there is to read, at most a block; nothing at the end, and once one is to stop."""
    stop.waiting = True
    try:
        return b'' if stop.signal else raw.read1(BLOCK)
    except KeyboardInterrupt:
        return b''
    finally:
        stop.waiting = False

def file_blocks(name):
    """A file of UTF-8 as texts of bounded size. Raises SystemExit if it cannot be read."""
    try:
        require(name != '-' or sys.stdin, 'cannot read the prompt: standard input is closed')
        with sys.stdin.buffer if name == '-' else open(name, 'rb') as raw:
            decoder, held = codecs.getincrementaldecoder('utf-8-sig')(), ''
            while block := read_bytes(raw):
                held += decoder.decode(block)
                # cut where a word ends: the pieces of GPT-2's tokenizer never reach across
                ends = [match.start() for match in re.finditer(r'(?<=\S)\s', held)]
                cut = ends[-1] if ends else len(held) if len(held) >= BLOCK else 0
                yield held[:cut]
                held = held[cut:]
            yield held + decoder.decode(b'', final=not stop.signal)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise SystemExit(f'error: cannot read the prompt {name!r}: {reason}') from None

def read_file(name):
    """Read a file into the state, block by block, and tell how far it is."""
    name = os.path.expanduser(name)
    size = os.path.getsize(name) if os.path.isfile(name) else sys.maxsize
    progress, characters = Progress(f'reading {name}', size, 'bytes'), 0
    for block in file_blocks(name):
        read_text(block, characters)
        characters += len(block)
        progress.at(progress.done + len(block.encode()), f'{int(state.read[0]):,} tokens')
    progress.close()

def read_text(text, characters=0):
    ids = torch.tensor(tokenizer.encode(text, characters), dtype=torch.int64, device=device)
    read_(model, ids[None], state)

def write_sample(state):
    """Print a continuation token by token, as it comes; the state reads along."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # characters of several tokens
    nothing = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for token in stream(model, nothing, state, s.max_new_tokens, s.temperature, s.top_k, s.top_p,
                        generator):
        write(sys.stdout, decoder.decode(tokenizer.decode_bytes([token.item()])))
        if stop.signal:
            break
    write(sys.stdout, decoder.decode(b'', final=True) + '\n')

def write_samples():
    prompt = '' if s.start.startswith('FILE:') else text
    for i in range(s.num_samples):
        write(sys.stdout, '-' * 40 + '\n' if i else '')
        if s.max_new_tokens and not stop.signal:
            write(sys.stdout, prompt)
            write_sample(state.clone() if i + 1 < s.num_samples else state)

# --- the model ------------------------------------------------------------------------------------
s = configure(globals())
check(s)
device = set_up(s.device, s.threads, products='torch')
path = ckpt.find_file(s.init_from or s.out_dir or ckpt.newest_run('text'))
saved = ckpt.load(path)
require(saved.get('tokenizer') and saved['task'] == 'text', f'{path} is of another task, or holds '
        f'no vocabulary: name a run of train.py on text with --out_dir; it gives one to weights of '
        f'another program, too, by --init_from=PATH --max_iters=0')
tokenizer = Tokenizer(saved['tokenizer'])
model = ckpt.load_model(saved, device=device, vocab_size=tokenizer.vocab_size).eval()
corpus = saved.get('data', {}).get('dataset', 'an unnamed corpus')
write(sys.stderr, f"{os.path.relpath(path)}: {saved['model_type']}, trained on {corpus}\n")

# --- read and write -------------------------------------------------------------------------------
text = re.sub(r'\\([nt\\])', lambda match: ESCAPES[match[1]], s.start)
if 'start' not in s.given and (s.load_state or '\n' not in tokenizer.spec.get('chars', '\n')):
    text = ''  # a state is gone on from; a vocabulary may have no line ends
generator = torch.Generator(device).manual_seed(s.seed or 1337)
own = None if s.seed else generator  # which goes on as the state's did
state = ckpt.load_state(s.load_state, model, own) if s.load_state else new_state(model)
require(len(state) == 1, f'{s.load_state} holds {len(state)} rows; sample.py goes on from one')
stop = Stop()
try:
    if s.start.startswith('FILE:'):
        read_file(s.start[5:])
    else:
        read_text(text)
    write_samples()
except SystemExit as error:  # a prompt that cannot be read on: what came before is not lost
    kept = ''
    if s.save_state and state.read[0]:
        ckpt.save_state(s.save_state, state, model, generator)
        kept = f'; {s.save_state} holds the {int(state.read[0]):,} tokens before'
    raise SystemExit(f'{error}{kept}') from None
if s.save_state:
    ckpt.save_state(s.save_state, state, model, generator)
    write(sys.stderr, f"{count(int(state.read[0]), 'token')} condensed in {s.save_state}, "
                      f'{os.path.getsize(s.save_state):,} bytes\n')
if sys.stdout in lost:
    sys.exit(1)
