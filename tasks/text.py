"""The task 'text': predict the next token of a corpus."""
import os

import numpy as np
import torch

from configurator import at_least
from lib.console import require
from lib.gradients import backpropagate
from lib.history import probe_text as probe  # noqa: F401 (what probe.py measures)
from lib.processes import WORLD, from_writer, mean, my_share, sum_over
from lib.records import ROOT
from lib.rows import Rows, rowwise
from lib.scoring import mean_and_error, token_losses
from prepare import DownloadError, load_meta, prepare

dataset = 'shakespeare'  # folder under data_dir; a built-in corpus is prepared if it is missing
offline_dataset = ''     # used, loudly, where dataset cannot be downloaded; '' stops instead
data_dir = 'data'        # folder of the prepared data sets
stretch = 0              # tokens drawn in one piece, cut into sequences; 0 is block_size
stream = False           # rows read the corpus in order, a carry passing from update to update
eval_tokens = 0          # tokens of the validation split that are scored; 0 is all of it


def check(s):
    """Refuse settings that would fail later, or worse, not fail at all."""
    at_least(s, stretch=0, eval_tokens=0)
    B, T, span = s.batch_size, s.block_size, s.stretch or s.block_size
    require(s.eval_tokens != 1, 'eval_tokens=1 leaves no token to predict: take 2 or more, or 0')
    require(s.stretch % T == B * T % span == 0, f'stretch={s.stretch} must be a multiple of '
            f'block_size={T} and divide batch_size * block_size = {B * T}')
    require(not (s.stretch and s.stream), 'stream=True reads the corpus in order: set stretch=0')
    require(B * T // span % WORLD == 0, f'{WORLD} processes cannot share batch_size={B} sequences '
            f'equally, in stretches of {span} tokens')


def find_data(s):
    """Name and meta of the data set, prepared now if it is missing; the offline one if it cannot
    be had."""
    data_dir = os.path.join(ROOT, s.data_dir)
    for name in filter(None, (s.dataset, s.offline_dataset)):
        folder = os.path.join(data_dir, name)
        try:
            if not os.path.exists(os.path.join(folder, 'meta.json')):
                prepare(name, data_dir=data_dir)
            return name, load_meta(folder)
        except DownloadError as error:
            if not s.offline_dataset or name == s.offline_dataset:
                raise
            print(f"{error}\n{'!' * 80}\n!!! '{name}' cannot be downloaded. TRAINING ON "
                  f"'{s.offline_dataset}' INSTEAD (offline_dataset);\n!!! do not compare the "
                  f"losses.\n{'!' * 80}", flush=True)


class Streams:
    """Rows that read a corpus in order, and bring a carry from sequence to sequence.

    Row r of R starts at r / R of the corpus. A row that has less than a whole sequence before it
    begins anew at token 0, its carry dropped there: what it skips is less than a sequence, and
    stands elsewhere in those of other rows.
    """

    def __init__(self, R, T, corpus_size):
        self.T, self.corpus_size = T, corpus_size
        first = torch.arange(R) * (corpus_size - T) // R  # (R,) of the next sequence
        self.rows = Rows(at=first, fresh=torch.ones(R, dtype=torch.bool), carry=None)

    def advance(self, which):
        """Step on with rows `which` (B,): first tokens of their sequences, whether they have no
        carry (B,)."""
        at, fresh = self.rows.at[which], self.rows.fresh[which]
        ended = at + self.T >= self.corpus_size  # the last token is the target of the one before
        at, fresh = at.masked_fill(ended, 0), fresh | ended
        self.rows.put(which, Rows(at=at + self.T, fresh=torch.zeros_like(fresh)))
        return at, fresh

    def groups(self, which, fresh):
        """Rows parted by whether they have a carry: pairs of places in `which`, carry or None."""
        if self.rows.carry is None:
            return [(slice(None), None)]
        old, new = (~fresh).nonzero()[:, 0], fresh.nonzero()[:, 0]
        carry = rowwise(lambda c: c[which[old]], self.rows.carry)
        return [(places, c) for places, c in ((old, carry), (new, None)) if len(places)]


class Task:
    """Trains on sequences from the training split, evaluates on the validation split."""

    def __init__(self, s):
        check(s)
        name, meta = from_writer(lambda: find_data(s))
        self.s, self.tokenizer = s, meta['tokenizer']
        self.data = {'dataset': name, 'wanted': s.dataset, 'sha256': meta['sha256']}
        self.sizes = {'vocab_size': meta['vocab_size']}
        folder = os.path.join(ROOT, s.data_dir, name)
        self.train_data, val_data = (np.memmap(os.path.join(folder, f'{part}.bin'), np.uint16, 'r')
                                     for part in ('train', 'val'))
        val_data = val_data[:s.eval_tokens or None]
        longest = max(s.block_size, s.stretch)
        require(len(self.train_data) > longest and len(val_data) > 1,
                f"data set '{name}' is too short ({len(self.train_data)} training and "
                f'{len(val_data)} validation tokens) for sequences of {longest}: lower block_size '
                f'or take a longer text')
        self.val_data = torch.from_numpy(val_data.astype(np.int64))
        self.generator = torch.Generator().manual_seed(s.seed)
        rows = torch.arange(s.batch_size * s.gradient_accumulation_steps)  # of an update
        self.micro_batches = rows.split(s.batch_size)
        self.streams = Streams(len(rows), s.block_size, len(self.train_data)) if s.stream else None

    @property
    def note(self):
        name, wanted = self.data['dataset'], self.data['wanted']
        return '' if name == wanted else f' [data: {name}, in place of {wanted}]'

    def start(self, model, device, autocast):
        self.model, self.val_data = model, self.val_data.to(device)
        self.kwargs = dict(chunk=self.s.bptt_segments * getattr(model, 'unit', 1), device=device,
                           recompute=self.s.recompute, autocast=autocast)

    def backward(self):
        total, n = 0.0, len(self.micro_batches)
        for rows in self.micro_batches:
            if self.streams:
                total += self.backward_streams(rows, 1 / n)
            else:
                x, y = self.random_sequences()
                total += backpropagate(self.model, x, y, share=1 / n, **self.kwargs)[0]
        return mean(total), n * self.s.batch_size * self.s.block_size

    def backward_streams(self, rows, share):
        """backward of this process's share of the streams `rows`; keeps their carries."""
        starts, fresh = self.streams.advance(rows)
        rows, total = my_share(rows), 0.0
        x, y = self.sequences(my_share(starts), self.s.block_size)
        for places, carry in self.streams.groups(rows, my_share(fresh)):
            part = share * len(x[places]) / len(x)
            loss, carry = backpropagate(self.model, x[places], y[places], carry, part,
                                        **self.kwargs)
            self.streams.rows.put(rows[places], Rows(carry=carry))
            total += loss
        return total

    def random_sequences(self):
        """This process's share of a micro-batch; all processes draw all of it, so that it does not
        depend on their number."""
        span = self.s.stretch or self.s.block_size
        count = self.s.batch_size * self.s.block_size // span
        starts = torch.randint(len(self.train_data) - span, (count,), generator=self.generator)
        return self.sequences(my_share(starts), span)

    def sequences(self, starts, span):
        """Inputs and targets, (B, block_size) of uint16 each, cut from pieces of span tokens."""
        pieces = np.stack([self.train_data[i:i + span + 1] for i in starts.tolist()])
        tokens, T = torch.from_numpy(pieces), self.s.block_size
        return tokens[:, :-1].reshape(-1, T), tokens[:, 1:].reshape(-1, T)

    def figures(self):
        return {}

    def evaluate(self):
        """The loss over the validation split, in one process; the others wait."""
        scored = from_writer(lambda: mean_and_error(token_losses(self.model, self.val_data)))
        return dict(zip(('val_loss', 'val_error'), scored))

    def describe(self, figures):
        error = figures['val_error']
        spread = '' if error is None else f' +- {error:.4f}'
        return f"validation loss {figures['val_loss']:.4f}{spread} nats per token"

    def state(self):
        """Where the random numbers of the data and the streams stand, of all processes."""
        state = {'generator': self.generator.get_state(), 'streams': None}
        if self.streams:
            rows = self.streams.rows
            mine = torch.cat([my_share(rows) for rows in self.micro_batches])
            carry = rowwise(lambda c: sum_over(torch.zeros_like(c).index_copy(
                0, mine.to(c.device), c[mine])), rows.carry)
            state['streams'] = {**vars(rows), 'carry': carry}
        return state

    def load_state(self, state, device):
        self.generator.set_state(state['generator'])
        if self.streams and state['streams']:
            rows = Rows(**state['streams'])
            require(len(rows) == len(self.streams.rows), f"the checkpoint's streams are "
                    f'{len(rows)} rows, batch_size * gradient_accumulation_steps is '
                    f'{len(self.streams.rows)}: stream=False goes on without them')
            rows.carry = rowwise(lambda c: c.to(device), rows.carry)
            self.streams.rows = rows
