"""The task 'mqar': multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, appendix).

    key value key value ... key value  filler KEY filler filler KEY ...

Pairs come first. Each key comes back once among random tokens, more often soon than late (a power
law), and its value is to be predicted there. Keys are of one half of the vocabulary, values of the
other. Beside it, the task 'pairs' asks how many pairs are held as the text goes on.
"""
import torch

from configurator import at_least
from lib.console import require, say
from lib.memory import APART, MemoryTask, RandomSequences, answer, share
from lib.processes import RANK, WORLD, mean
from lib.records import metric

lengths = '64:4,128:8,256:16'  # tokens of a sequence and pairs in it, drawn at every update
vocabulary = 8192       # different tokens

POWER = 0.01  # of the law by which keys come back

class Sequences(RandomSequences):
    """Sequences of key-value pairs and of questions."""

    def __init__(self, s, seed):
        super().__init__(seed)
        self.vocab_size, self.half = s.vocabulary, s.vocabulary // 2

    def new(self, B, T, pairs):
        """Tokens and targets (B, T), -1 where nothing is asked for."""
        x = self.integers(0, self.vocab_size, B, T)
        keys = self.uniform(B, self.half).argsort(dim=1)[:, :pairs]
        values = self.integers(self.half, self.vocab_size, B, pairs)
        x[:, :2 * pairs] = torch.stack((keys, values), dim=2).flatten(1)
        places = torch.arange(1, (T - 2 * pairs) // 2 + 1)  # of two tokens each
        chances = (POWER * places ** (POWER - 1)).expand(B, -1)
        drawn = torch.multinomial(chances, pairs, generator=self.generator)
        at = 2 * pairs + 2 * drawn
        return x.scatter_(1, at, keys), torch.full_like(x, -1).scatter_(1, at, values)

def read_lengths(text):
    """[(tokens, pairs)] of a text such as '64:4,128:8'. Raises SystemExit for what is none."""
    try:
        found = [tuple(map(int, part.split(':'))) for part in text.split(',')]
        fits = all(4 <= 4 * pairs <= tokens <= 1 << 24 for tokens, pairs in found)
    except ValueError:
        fits = False
    require(fits, f'lengths={text!r} must be such as 64:4,128:8: tokens, at most {1 << 24:,}, and '
                  'pairs, at most a quarter of them')
    return found

class Task(MemoryTask):
    """Trains on all lengths, one at an update."""

    def __init__(self, s):
        at_least(s, vocabulary=4)
        self.lengths = read_lengths(s.lengths)
        require(max(pairs for _, pairs in self.lengths) <= s.vocabulary // 2,
                f'vocabulary={s.vocabulary} has too few keys for lengths={s.lengths}')
        super().__init__(s, Sequences(s, s.seed + APART * RANK))
        self.asked = f'the values recalled (tokens:pairs {s.lengths})'

    def start(self, model, device, autocast):
        super().start(model, device, autocast)
        most, W = max(T for T, _ in self.lengths), model.config.block_size
        require(self.carries or W >= most,
                f'block_size={W} is shorter than the {most} tokens of lengths={self.s.lengths}')

    def backward(self):
        at = int(torch.randint(len(self.lengths), (), generator=self.shared))
        T, pairs = self.lengths[at]
        with self.autocast:
            x, y = self.sequences.new(self.B, T, pairs)
            loss, right, _ = answer(self.model, x, y, None, self.device)
        loss.backward()
        self.follow(right.cpu()[y >= 0], 0.05)
        return mean(loss.detach()), WORLD * self.B * T

    def measure(self):
        found = [recall_of(self.model, self.s, *size, 100, self.device) for size in self.lengths]
        return sum(found) / len(found), 100 * len(found)

@torch.no_grad()
def recall_of(model, s, T, pairs, n, device):
    """The share of right answers in n fresh sequences."""
    sequences, some = Sequences(s, s.seed + APART * (1 + T)), []
    for rows in torch.arange(n).split(50):
        x, y = sequences.new(len(rows), T, pairs)
        some.append(answer(model, x, y, None, device)[1].cpu()[y >= 0])
    return torch.cat(some).float().mean().item()

def probe(model, saved, p, device):
    """Recall at each length: the setting sequences of p."""
    s, points = saved['config'], []
    for T, pairs in read_lengths(s.lengths):
        recall = recall_of(model, s, T, pairs, p.sequences, device)
        points.append({'x': pairs, **share(recall * p.sequences, p.sequences)})
        say(f'{T} tokens, {pairs} pairs: recall {recall:.3f}')
    curve = {'x': 'pairs', 'y': 'values recalled', 'points': points}
    values = s.vocabulary - s.vocabulary // 2
    return {'what': 'associative recall', 'metrics': {'chance': metric(1 / values)},
            'curves': {'recall': curve}, 'notes': []}
