"""The task 'text': predict the next token of a corpus."""
import os

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from configurator import at_least
from lib.console import Progress, require, say
from lib.contract import border, carries, unit
from lib.gradients import backpropagate, piece
from lib.history import probe_text as probe  # noqa: F401 (what probe.py measures)
from lib.processes import WORLD, from_all, from_writer, mean, my_share
from lib.records import ROOT
from lib.rows import rowwise
from lib.scoring import documents, mean_and_error, token_losses
from prepare import DownloadError, Tokenizer, load_meta, prepare

dataset = 'shakespeare'  # folder under data_dir; a built-in corpus is prepared if it is missing
offline_dataset = ''     # used, loudly, where dataset cannot be downloaded; '' stops instead
data_dir = 'data'        # folder of the prepared data sets
stretch = 0              # tokens drawn in one piece, cut into sequences; 0 is block_size
document = ''            # one token, such as a character, at which a document begins: what is
                         # before it is forgotten; '' is for one text
stream = False           # rows read the corpus in order, a carry passing from update to update
eval_tokens = 0          # tokens of the validation split that are scored; 0 is all of it
set_aside = 0.0          # share of the training split, its end, that is kept from training and
                         # scored in place of the validation split: to search settings

def open_data(s, name):
    """Folder and meta of a data set, which is prepared now if it is missing."""
    folder = os.path.join(ROOT, s.data_dir, name)
    if not os.path.isfile(os.path.join(folder, 'meta.json')):
        prepare(name, data_dir=s.data_dir)
    return folder, load_meta(folder)

def find_data(s):
    """Name, folder and meta of the data set; of the offline one if it cannot be had."""
    try:
        return s.dataset, *open_data(s, s.dataset)
    except DownloadError as error:
        if s.offline_dataset in ('', s.dataset):
            raise
        say(f"{error}\n{'!' * 80}\n!!! '{s.dataset}' cannot be downloaded. TRAINING ON "
            f"'{s.offline_dataset}' INSTEAD (offline_dataset);\n!!! do not compare the losses.\n"
            f"{'!' * 80}")
        return s.offline_dataset, *open_data(s, s.offline_dataset)

def on_all_machines(find):
    """What find() returns on this machine, a folder and its meta at the end of it. Raises
    SystemExit if the data set of another machine is not the same."""
    *_, folder, meta = found = from_writer(find, each_machine=True)
    files = from_all(meta['files'])
    require(files.count(files[0]) == WORLD, f'{folder} is not the same on all machines, by the '
            f"SHA-256 of its files: copy the first one's")
    return found

def split_documents(x, y, border):
    """Tokens and targets x, y (B, T), each document in a row of its own: (more rows, at most T),
    the short ones padded at their ends, with targets of -1."""
    rows = torch.cat((x.long(), y[:, -1:].long()), dim=1)
    found = [piece for row in rows for piece in documents(row, border)]
    return (pad_sequence([piece[:-1] for piece in found], batch_first=True),
            pad_sequence([piece[1:] for piece in found], batch_first=True, padding_value=-1))

class Task:
    """Trains on sequences from the training split, evaluates on the validation split."""

    def __init__(self, s):
        at_least(s, stretch=0, eval_tokens=0, set_aside=0.0)
        require(s.set_aside < 1, f'set_aside={s.set_aside} must be a share below 1')
        B, T, span = s.batch_size, s.block_size, s.stretch or s.block_size
        require(s.eval_tokens != 1, 'eval_tokens=1 leaves no token to predict: take 2 or more')
        require(s.stretch % T == 0 and B * T % span == 0, f'stretch={s.stretch} must be a multiple '
                f'of block_size={T} and divide batch_size * block_size = {B * T}')
        require(not (s.stretch and s.stream), 'stream=True reads in order: set stretch=0')
        require(B * T // span % WORLD == 0, f'{WORLD} processes cannot share batch_size={B} '
                f'sequences equally, in stretches of {span} tokens')
        name, folder, meta = on_all_machines(lambda: find_data(s))
        self.s, self.tokenizer, self.span = s, meta['tokenizer'], span
        self.data = {'dataset': name, 'wanted': s.dataset, 'sha256': meta['sha256']}
        self.sizes, self.border = {'vocab_size': meta['vocab_size']}, -1
        if s.document:
            require(not (s.stream or s.bptt_segments or s.recompute), 'with document, text is not '
                    'read in order: set stream=False, bptt_segments=0, recompute=False')
            ids = Tokenizer(self.tokenizer).encode(s.document).tolist()
            require(len(ids) == 1, f'document={s.document!r} must be one token, not {len(ids)}')
            self.sizes['border'], self.border = ids[0], ids[0]
        self.train_data, val_data = (np.memmap(os.path.join(folder, f'{part}.bin'), np.uint16, 'r')
                                     for part in ('train', 'val'))
        if s.set_aside:
            kept = int((1 - s.set_aside) * len(self.train_data))
            self.train_data, val_data = self.train_data[:kept], self.train_data[kept:]
        val_data = val_data[:s.eval_tokens or None]
        require(len(self.train_data) > span and len(val_data) > 1, f"data set '{name}' is too "
                f'short ({len(self.train_data)} training and {len(val_data)} validation tokens) '
                f'for sequences of {span}: lower block_size or take a longer text')
        self.val_data = torch.from_numpy(val_data.astype(np.int64))
        self.generator = torch.Generator().manual_seed(s.seed)
        rows = torch.arange(B * s.gradient_accumulation_steps)  # of an update
        self.micro_batches = rows.split(B)
        self.at = rows * (len(self.train_data) - T) // len(rows)  # of all streams
        self.carries = [None] * len(self.micro_batches)  # of this process's share of each
        self.step = None if s.recompute or s.document else piece

    @property
    def note(self):
        name, wanted = self.data['dataset'], self.data['wanted']
        return '' if name == wanted else f' [data: {name}, in place of {wanted}]'

    def start(self, model, device, autocast):
        window = 2 * unit(model) if carries(model) else model.config.block_size
        require(len(self.val_data) > window, f'{len(self.val_data)} tokens to score are no more '
                f'than a window of {window}: take a longer text, or more eval_tokens')
        require(border(model) == self.border, 'the model has another border of documents, or none: '
                '--document names it')
        self.model, self.val_data = model, self.val_data.to(device)
        self.kwargs = dict(chunk=self.s.bptt_segments * unit(model), device=device,
                           recompute=self.s.recompute, autocast=autocast)

    def backward(self):
        total, n = 0.0, len(self.micro_batches)
        for i, rows in enumerate(self.micro_batches):
            x, y = self.next_of_streams(rows) if self.s.stream else self.random_sequences()
            loss, carry = backpropagate(self.model, x, y, self.carries[i], 1 / n, step=self.step,
                                        **self.kwargs)
            self.carries[i] = carry if self.s.stream else None
            total += loss
        return mean(total), n * self.s.batch_size * self.s.block_size

    def next_of_streams(self, rows):
        """This process's share of the next sequences of the streams `rows`. Stream r of R starts at
        r / R of the corpus; with less than a whole sequence before it, it goes on at token 0."""
        at, T = self.at[rows], self.s.block_size
        at[at + T >= len(self.train_data)] = 0  # the last token is a target alone
        self.at[rows] = at + T
        return self.sequences(my_share(at), T)

    def random_sequences(self):
        """This process's share of a micro-batch; all processes draw all of it, so that it does not
        depend on their number."""
        count = self.s.batch_size * self.s.block_size // self.span
        starts = torch.randint(len(self.train_data) - self.span, (count,), generator=self.generator)
        return self.sequences(my_share(starts), self.span)

    def sequences(self, starts, span):
        """Inputs and targets, (B, block_size) of uint16 each, cut from pieces of span tokens."""
        pieces = np.stack([self.train_data[i:i + span + 1] for i in starts.tolist()])
        tokens, T = torch.from_numpy(pieces), self.s.block_size
        x, y = tokens[:, :-1].reshape(-1, T), tokens[:, 1:].reshape(-1, T)
        return split_documents(x, y, self.border) if self.s.document else (x, y)

    def figures(self):
        return {}

    def evaluate(self):
        """The loss over the validation split, in one process; the others wait."""
        progress = Progress('validation', len(self.val_data))
        losses = from_writer(lambda: mean_and_error(token_losses(self.model, self.val_data,
                                                                 progress.at)))
        progress.close()
        return dict(zip(('val_loss', 'val_error'), losses))

    def describe(self, figures):
        spread = f" +- {figures['val_error']:.4f}" if figures['val_error'] else ''
        what = 'loss of the part set aside' if self.s.set_aside else 'validation loss'
        return f"{what} {figures['val_loss']:.4f}{spread} nats per token"

    def state(self):
        """Where the random numbers of the data and the streams stand, of all processes."""
        carries = [rowwise(lambda *shares: torch.cat(shares),
                           *from_all(rowwise(torch.Tensor.cpu, carry))) for carry in self.carries]
        return {'generator': self.generator.get_state(), 'at': self.at, 'carries': carries}

    def load_state(self, state, device):
        self.generator.set_state(state['generator'])
        if self.s.stream:
            require(len(state['at']) == len(self.at), f"the checkpoint's streams are "
                    f"{len(state['at'])} rows, batch_size * gradient_accumulation_steps is "
                    f'{len(self.at)}: stream=False goes on without them')
            self.at.copy_(state['at'])
            carry = rowwise(lambda *some: torch.cat(some), *state['carries'])  # of all rows
            self.carries = [rowwise(lambda c: my_share(c[rows]).to(device), carry)
                            for rows in self.micro_batches]
