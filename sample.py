"""Continue a text with a trained model, token by token; all that is needed is in its checkpoint.

    python sample.py --start="ROMEO:" --max_new_tokens=300
    python sample.py --start=FILE:book.txt --max_new_tokens=0 --save_state=book.state
    python sample.py --load_state=book.state --start="And so"
"""
import codecs
import os
import signal
import sys

import torch

from configurator import at_least, configure
from lib import checkpoint as ckpt
from lib import device as machine
from lib.console import Progress, write
from lib.streaming import new_state, read_, stream
from prepare import Tokenizer

out_dir = ''          # run's folder or checkpoint; '' takes the newest run under out/
start = '\n'          # prompt, may be empty; \n and \t as one writes them, \\ for a backslash;
                      # FILE:path reads it from a file, FILE:- from standard input
num_samples = 1       # texts to write
max_new_tokens = 500  # tokens of each; 0 only reads the prompt
temperature = 0.8     # below 1 bolder, above 1 wilder; 0 always takes the likeliest token
top_k = 0             # sample from the k likeliest tokens only; 0 from all
top_p = 0.0           # sample from the fewest tokens with this share of the probability; 0 from all
seed = 0              # of the sampling; 0 goes on with a loaded state's, and is 1337 without one
save_state = ''       # file that keeps the state of all that was read and written
load_state = ''       # such a file, to go on from
device = 'auto'       # 'auto' takes cuda, mps or cpu, the first that is there
threads = 1           # CPU threads; one token at a time leaves no work for more

BLOCK = 1 << 16  # bytes of a prompt that are read at a time, at most


class Interrupt:
    """What Ctrl-C and SIGTERM do: finish the token or block under way, keep the state if asked to,
    end. Twice: end at once."""

    def __init__(self):
        self.wanted = self.waiting = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.waiting:
            raise KeyboardInterrupt

    def read(self, raw):
        """What there is to read, at most a block; nothing at the end, and once one is to stop."""
        self.waiting = True
        try:
            return b'' if self.wanted else raw.read1(BLOCK)
        except KeyboardInterrupt:
            return b''
        finally:
            self.waiting = False


def prompt_text(s, tokenizer):
    """The prompt as it was written, its escapes replaced; the default one if it can be read; ''
    for a file. Raises SystemExit if it holds what is not UTF-8."""
    default_is_new = 'start' not in s.given and '\n' not in tokenizer.spec.get('chars', '\n')
    if default_is_new or s.start.startswith('FILE:'):
        return ''
    try:
        s.start.encode('utf-8')
    except UnicodeEncodeError:
        raise SystemExit('error: --start is not UTF-8: write it in a file, and name that as '
                         '--start=FILE:path') from None
    escapes = {'\\n': '\n', '\\t': '\t', '\\\\': '\\'}
    parts, text = [], s.start
    while text:
        known = text[:2] in escapes
        parts.append(escapes[text[:2]] if known else text[0])
        text = text[2 if known else 1:]
    return ''.join(parts)


def file_blocks(name, interrupt):
    """A file of UTF-8 as texts of bounded size. Raises SystemExit if it cannot be read."""
    try:
        if name == '-' and sys.stdin is None:
            raise OSError(None, 'it is closed')
        with sys.stdin.buffer if name == '-' else open(os.path.expanduser(name), 'rb') as raw:
            decoder, held = codecs.getincrementaldecoder('utf-8-sig')(), ''
            while block := interrupt.read(raw):
                held += decoder.decode(block)
                # cut where a word ends: the pieces of GPT-2's tokenizer never reach across
                ends = (i for i in range(len(held) - 1, 0, -1)
                        if held[i].isspace() and not held[i - 1].isspace())
                cut = next(ends, len(held) if len(held) >= BLOCK else 0)
                if cut:
                    yield held[:cut]
                held = held[cut:]
            yield held + decoder.decode(b'', final=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
        raise SystemExit(f'error: cannot read the prompt {name!r}: {reason}') from None


def read_file(name, model, tokenizer, state, interrupt):
    """Read a file into the state, block by block, and tell how far it is."""
    path = os.path.expanduser(name)
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    progress, characters, done = Progress(f'reading {name}', size or sys.maxsize, 'bytes'), 0, 0
    for block in file_blocks(name, interrupt):
        read_text(block, model, tokenizer, state, characters)
        characters, done = characters + len(block), done + len(block.encode())
        progress.at(done, f'{int(state.read[0]):,} tokens')
    progress.close()


def read_text(text, model, tokenizer, state, characters=0):
    device = state.logits.device
    read_(model, torch.tensor([tokenizer.encode(text, characters)], dtype=torch.int64,
                              device=device), state)


def first_state(s, model, generator):
    """A fresh state, or the one to go on from, and its random numbers unless a seed is given."""
    if not s.load_state:
        return new_state(model)
    state = ckpt.load_state(s.load_state, model, None if s.seed else generator)
    if len(state) != 1:
        raise SystemExit(f'error: {s.load_state} holds {len(state)} rows; sample.py goes on from '
                         f'one')
    return state


def write_sample(s, model, tokenizer, state, generator, interrupt):
    """Print a continuation token by token, as it comes; the state reads along."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # characters of several tokens
    nothing = torch.zeros(1, 0, dtype=torch.int64, device=state.logits.device)
    tokens = stream(model, nothing, state, s.max_new_tokens, s.temperature, s.top_k, s.top_p,
                    generator)
    for token in tokens:
        write(sys.stdout, decoder.decode(tokenizer.decode_bytes([token.item()])))
        if interrupt.wanted:
            break
    write(sys.stdout, decoder.decode(b'', final=True) + '\n')


def check(s):
    at_least(s, num_samples=1, max_new_tokens=0, temperature=0.0, top_k=0, top_p=0.0, seed=0,
             threads=0)
    if s.top_p > 1:
        raise SystemExit(f'error: top_p must be at most 1, not {s.top_p}')
    if s.save_state and s.num_samples > 1:
        raise SystemExit('error: save_state keeps the state of one text: leave num_samples at 1')
    if s.save_state:
        ckpt.refuse_to_replace(s.save_state)


def load_all(s):
    """The model, its tokenizer, and the path of its checkpoint. Raises SystemExit without one."""
    path = ckpt.find_file(s.out_dir or ckpt.newest_run('text'))
    saved = ckpt.load(path, machine.pick_device(s.device))
    if not saved.get('tokenizer'):
        raise SystemExit(f'error: {path} holds no vocabulary: name a run of train.py on text with '
                         f'--out_dir; it gives one to the weights of another program, too, by '
                         f'--init_from=PATH --max_iters=0')
    tokenizer = Tokenizer(saved['tokenizer'])
    vocab_size = min(saved['model_args']['vocab_size'], tokenizer.vocab_size)  # beyond is padding
    model = ckpt.load_model(saved, device=machine.pick_device(s.device), vocab_size=vocab_size)
    corpus = (saved.get('data') or {}).get('dataset', 'an unnamed corpus')
    print(f"{os.path.relpath(path)}: {saved['model_type']}, trained on {corpus}", file=sys.stderr)
    return model.eval(), tokenizer


def main(s):
    check(s)
    machine.set_threads(s.threads)
    model, tokenizer = load_all(s)
    prompt, is_file = prompt_text(s, tokenizer), s.start.startswith('FILE:')
    generator = torch.Generator(next(model.parameters()).device).manual_seed(s.seed or 1337)
    interrupt, state = Interrupt(), None
    try:
        state = first_state(s, model, generator)
        if is_file:
            read_file(s.start[5:], model, tokenizer, state, interrupt)
        else:
            read_text(prompt, model, tokenizer, state)
        for i in range(s.num_samples):
            if i:
                write(sys.stdout, '-' * 40 + '\n')
            own = state.clone() if i + 1 < s.num_samples else state
            if s.max_new_tokens and not interrupt.wanted:
                write(sys.stdout, prompt)
                write_sample(s, model, tokenizer, own, generator, interrupt)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}: the model's weights give no number there; a state saved "
                         f'before is still good') from None
    except SystemExit as error:  # a prompt that cannot be read on: what came before is not lost
        kept = ''
        if s.save_state and state and state.read[0]:
            ckpt.save_state(s.save_state, state, model, generator)
            kept = f'; {s.save_state} holds the {int(state.read[0]):,} tokens before'
        raise SystemExit(f'{error}{kept}') from None
    if s.save_state:
        ckpt.save_state(s.save_state, state, model, generator)
        size = os.path.getsize(s.save_state)
        write(sys.stderr, f'{int(state.read[0]):,} tokens condensed in {s.save_state}, {size:,} '
                          f'bytes\n')


if __name__ == '__main__':
    main(configure(globals()))
