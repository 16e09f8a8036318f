"""
The sequences of the needle task: a key among filler, and the question for it.

    filler  MARK 3 1 4 1 5  filler ... filler  ASK 3 1 4 1 5

At ASK and at each digit after it the next digit is to be predicted.
"""
import torch

DIGITS = 10  # different digits of a key


class NeedleTask:
    """Draws sequences from a seed. Tokens: the filler's from 0 on, then ten digits, MARK and ASK.

    Args:
        seed: of everything that is drawn.
        key_length: digits of a key, k.
        filler: number of different filler tokens.
        text (N,) int64 or None: filler is taken from it, in contiguous pieces; None draws random tokens.
    """

    def __init__(self, seed, key_length, filler, text=None):
        self.draw = torch.Generator().manual_seed(seed)
        self.key_length, self.filler, self.text = key_length, filler, text
        self.first_digit, self.mark, self.ask = filler, filler + DIGITS, filler + DIGITS + 1
        self.vocab_size = self.ask + 1

    def integers(self, low, high, *shape):
        """Random integers, low <= i < high."""
        return torch.randint(low, high, shape, generator=self.draw)

    def places(self, B):
        """B random places of the text, (B,); None if there is no text."""
        return None if self.text is None else self.integers(0, len(self.text), B)

    def filling(self, B, T, at=None):
        """B rows of T tokens of filler, (B, T); of a text from places at (B,) on, by default random ones, round and round."""
        if self.text is None:
            return self.integers(0, self.filler, B, T)
        at = self.places(B) if at is None else at
        return self.text[(at[:, None] + torch.arange(T)) % len(self.text)]

    def keys(self, B):
        """Digits of B keys, (B, k)."""
        return self.integers(self.first_digit, self.first_digit + DIGITS, B, self.key_length)

    def put_key(self, x, keys, start):
        """MARK and the digits into x (B, T), in place, from place start (B,) of each row on."""
        needle = torch.cat((torch.full_like(keys[:, :1], self.mark), keys), dim=1)
        x.scatter_(1, start[:, None] + torch.arange(needle.size(1)), needle)

    def put_question(self, x, keys, start):
        """ASK and all digits but the last into x (B, T), in place, from place start (B,) on.

        Returns the targets (B, T): the digit that is to follow, -1 where none is asked for.
        """
        y, places = torch.full_like(x, -1), start[:, None] + torch.arange(self.key_length)
        y.scatter_(1, places, keys)
        x.scatter_(1, places, torch.cat((torch.full_like(keys[:, :1], self.ask), keys[:, :-1]), dim=1))
        return y

    def new(self, B, T, tail):
        """B sequences of T tokens with a key anywhere and its question in the last `tail` tokens.

        Returns tokens (B, T), targets (B, T), keys (B, k), and the place after each key (B,).
        """
        x, keys, k = self.filling(B, T), self.keys(B), self.key_length
        asked = self.integers(max(T - tail, k + 1), T - k + 1, B)
        start = (torch.rand(B, generator=self.draw) * (asked - k)).long()
        self.put_key(x, keys, start)
        return x, self.put_question(x, keys, asked), keys, start + k + 1

    def old(self, keys, T, tail):
        """Filler for rows that have read their keys (B, k) before, with the question in the last `tail` tokens: x, y (B, T)."""
        x = self.filling(len(keys), T)
        return x, self.put_question(x, keys, self.integers(T - tail, T - self.key_length + 1, len(keys)))
