"""Rows: named tensors whose first dimension is the row, picked, replaced and joined together."""
from types import SimpleNamespace

import torch

def rowwise(function, *values):
    """function of tensors; of tuples of tensors, one by one; of None, None."""
    if values[0] is None:
        return None
    if isinstance(values[0], tuple):
        return tuple(function(*each) for each in zip(*values))
    return function(*values)

def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)

def index(rows, x):
    """Rows, a slice, a list, a mask or indices, as x (B, ...) takes them without a wait."""
    if not torch.is_tensor(rows):
        return rows
    rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    return rows.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else rows.to(x.device)

class Rows(SimpleNamespace):
    """Rows of a batch: each attribute is a tensor, a tuple of tensors, or None, rows first.

    Sequences that walk on and streaming states are both kept so.
    """

    def __len__(self):
        first = next(value for value in vars(self).values() if value is not None)
        return len(as_tuple(first)[0])

    def pick(self, rows):
        """A copy of some rows, in any order and number: a slice, a list, or, on the CPU, a mask or
        indices."""
        return Rows(**{name: rowwise(lambda x: x[index(rows, x)].clone(), value)
                       for name, value in vars(self).items()})

    def clone(self):
        return self.pick(slice(None))

    def put(self, rows, other):
        """Replace some rows, as in pick(), by those of `other`; what `other` has not got stays."""
        def replace(mine, new):
            with torch.inference_mode(mine.is_inference()):  # a state that was read into is
                mine[index(rows, mine)] = new.to(mine.dtype)
        for name, value in vars(other).items():
            if value is not None:
                rowwise(replace, getattr(self, name), value)

    def join(self, other):
        """These rows and after them those of `other`, or these alone if that is None."""
        if other is None:
            return self
        return Rows(**{name: rowwise(lambda *both: torch.cat(both), value, getattr(other, name))
                       for name, value in vars(self).items()})

    @property
    def nbytes(self):
        return sum(x.nbytes for value in vars(self).values() for x in as_tuple(value)
                   if x is not None)
