"""Imported by every script before torch: how threads wait, how an error that ends it is shown."""
import os
import sys

from lib.console import explain

# OpenMP's threads spin so long before they sleep: without a limit they collapse beside other work,
# without spinning two are slower than one (docs/log.md, 2026-11-28).
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '20000')

def tell(kind, error, trace):
    """Show what ends the script; without a traceback unless the program is to blame."""
    if issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what standard output still holds
    elif issubclass(kind, KeyboardInterrupt):
        print('stopped', file=sys.stderr)
    elif line := explain(error):
        print(line, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)

sys.excepthook = tell
