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

class Rows(SimpleNamespace):
    """Rows of a batch: each attribute is a tensor, a tuple of tensors, or None, rows first.

    Sequences that walk on and streaming states are both kept so.
    """

    def __len__(self):
        first = next(value for value in vars(self).values() if value is not None)
        return len(first[0] if isinstance(first, tuple) else first)

    def pick(self, rows):
        """A copy of some rows, in any order and number: a slice, a list, a mask or indices."""
        rows = rows.cpu() if torch.is_tensor(rows) else rows  # serves tensors on every device
        return Rows(**{name: rowwise(lambda x: x[rows].clone(), value)
                       for name, value in vars(self).items()})

    def clone(self):
        return self.pick(slice(None))

    def put(self, rows, other):
        """Replace some rows, in place, by those of `other`; what `other` has not got stays."""
        rows = rows.cpu() if torch.is_tensor(rows) else rows

        def replace(mine, new):
            with torch.inference_mode(mine.is_inference()):  # as a state is that has been read into
                mine[rows] = new.to(mine.dtype)
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
        sizes = []
        for value in vars(self).values():
            rowwise(lambda x: sizes.append(x.nbytes), value)
        return sum(sizes)
