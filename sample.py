"""
Continue a text with a trained model; everything needed is in its checkpoint.

    python sample.py --start="ROMEO:" --max_new_tokens=300
    python sample.py --start=FILE:book.txt --max_new_tokens=0 --save_state=book.state
    python sample.py --load_state=book.state --start="And so"
"""
import codecs
import os
import signal
import sys
import time

from configurator import at_least, configure

out_dir = ''          # folder of the run; '' takes the newest under out/
start = '\n'          # prompt; FILE:path reads it from a file, FILE:- from standard input; may be empty
num_samples = 1       # texts to write
max_new_tokens = 500  # tokens of each; 0 only reads the prompt
temperature = 0.8     # below 1 bolder, above 1 wilder; 0 always takes the likeliest token
top_k = 0             # draw from the k likeliest tokens only; 0 draws from all
top_p = 0.0           # draw from the fewest tokens that hold this share of the probability; 0 draws from all
seed = 0              # of the draws; 0 goes on with those of a loaded state, and is 1337 without one
save_state = ''       # file that keeps the state of all that was read and written
load_state = ''       # such a file, to go on from
device = 'auto'       # 'auto' takes cuda, mps or cpu, the first that is there
config = configure(globals())

import torch  # noqa: E402

import checkpoint as ckpt  # noqa: E402
from prepare import Tokenizer  # noqa: E402

BLOCK = 1 << 16  # bytes of a prompt that are read at a time, at most


def prompt_blocks(start):
    """The prompt as texts of bounded size. Raises SystemExit if its file cannot be read as UTF-8."""
    if not start.startswith('FILE:'):
        yield start
        return
    name = start[5:]
    try:
        if name == '-' and sys.stdin is None:
            raise OSError(None, 'it is closed')
        with sys.stdin.buffer if name == '-' else open(os.path.expanduser(name), 'rb') as raw:
            decoder, held = codecs.getincrementaldecoder('utf-8-sig')(), ''
            while block := read_or_stop(raw):
                held += decoder.decode(block)
                # cut where a word ends: the pieces of GPT-2's tokenizer never reach across
                ends = (i for i in range(len(held) - 1, 0, -1) if held[i].isspace() and not held[i - 1].isspace())
                cut = next(ends, len(held) if len(held) >= BLOCK else 0)
                if cut:
                    yield held[:cut]
                held = held[cut:]
            yield held + decoder.decode(b'', final=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise SystemExit(f"error: cannot read the prompt {name!r}: {reason}") from None


def read_or_stop(raw):
    """What there is to read, at most a block; nothing at the end, and once Ctrl-C has come."""
    global waiting
    waiting = True
    try:
        return b'' if stopped else raw.read1(BLOCK)
    except KeyboardInterrupt:
        return b''
    finally:
        waiting = False


def read_prompt(state):
    """Read the prompt into the state, block by block; returns it as text if it was given as such."""
    before, tokens, characters = time.perf_counter(), 0, 0
    for block in prompt_blocks(start):
        idx = torch.tensor([tokenizer.encode(block, characters)], dtype=torch.int64, device=device)  # (1, T)
        model.read_(idx, state)
        tokens, characters = tokens + idx.size(1), characters + len(block)
        if start.startswith('FILE:'):
            speed = tokens / (time.perf_counter() - before)
            print(f"\rread {tokens:,} tokens, {speed:,.0f} tokens/s ", end='', file=sys.stderr, flush=True)
    if start.startswith('FILE:'):
        print(file=sys.stderr)
        return ''
    return start


def write(state):
    """Print a continuation token by token, as it comes; the state reads along."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may take several tokens of GPT-2's
    nothing = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for token in model.stream(nothing, state, max_new_tokens, temperature, top_k, top_p, generator):
        print(decoder.decode(tokenizer.decode_bytes([token.item()])), end='', flush=True)
        if stopped:
            break
    print(decoder.decode(b'', final=True))


def stop(*_):
    """What Ctrl-C does: finish the token or block under way, keep the state if asked to, end. Twice: end at once."""
    global stopped
    stopped = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if waiting:
        raise KeyboardInterrupt


at_least(config, num_samples=1, max_new_tokens=0, temperature=0.0, top_k=0, top_p=0.0, seed=0)
if top_p > 1:
    raise SystemExit(f"error: top_p must be at most 1, not {top_p}")
if save_state and num_samples > 1:
    raise SystemExit("error: save_state keeps the state of one text: leave num_samples at 1")
if save_state:
    folder = os.path.dirname(save_state) or '.'
    if os.path.isdir(save_state):
        raise SystemExit(f"error: save_state={save_state!r} is a folder: name a file")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise SystemExit(f"error: cannot write {save_state}: {folder} is not a folder that can be written to")
device = ckpt.pick_device(device)
path = ckpt.find_file(os.path.join(ckpt.ROOT, out_dir) if out_dir else ckpt.newest_run())
saved = ckpt.load(path, device)
if 'tokenizer' not in saved:
    raise SystemExit(f"error: {path} holds no vocabulary: name a run of train.py with --out_dir, which gives one to another "
                     f"program's weights, too, by --init_from=PATH --max_iters=0")
tokenizer = Tokenizer(saved['tokenizer'])
for name, value in saved['model'].items():  # ids beyond the vocabulary, with which some models are padded, say nothing
    if name.endswith(('wte.weight', 'lm_head.weight')):
        saved['model'][name] = value[:tokenizer.vocab_size]
saved['model_args']['vocab_size'] = min(saved['model_args']['vocab_size'], tokenizer.vocab_size)
model = ckpt.load_model(saved, device=device).eval()
generator = torch.Generator(device).manual_seed(seed or 1337)
state = model.new_state()
if load_state:
    state, rng = ckpt.load_state(load_state, model)
    if len(state.read) != 1:
        raise SystemExit(f"error: {load_state} holds {len(state.read)} rows; sample.py goes on from one")
    if not seed and rng.shape == generator.get_state().shape:  # else another kind of device drew
        generator.set_state(rng)

if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='replace')  # a terminal that lacks a character shows another in its place
stopped = waiting = False
mine = state
signal.signal(signal.SIGINT, stop)
try:
    prompt = read_prompt(state)
    for i in range(num_samples):
        if i:
            print('-' * 40)
        mine = state.clone() if i + 1 < num_samples else state
        print(prompt, end='', flush=True)
        if not stopped:
            write(mine)
        if stopped:
            break
except FloatingPointError as error:
    raise SystemExit(f"error: {error}: the model's weights give no number there; a state saved before is still good"
                     ) from None
except SystemExit as error:  # a prompt that cannot be read on: what came before is not lost
    kept = ''
    if save_state and state.read[0]:
        ckpt.save_state(save_state, state, model, generator)
        kept = f"; {save_state} holds the {int(state.read[0]):,} tokens before"
    raise SystemExit(f"{error}{kept}") from None
except BrokenPipeError:  # whoever reads the text has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
if save_state:
    ckpt.save_state(save_state, mine, model, generator)
    print(f"{int(mine.read[0]):,} tokens condensed in {save_state}, {os.path.getsize(save_state):,} bytes", file=sys.stderr)
