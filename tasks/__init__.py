"""The tasks: each module of this folder trains models on one, and measures them (tasks/text.py).

Its settings are commented globals, keys of train.py. probe(model, saved, p, device) measures the
model of the checkpoint `saved`, whose `config` are the settings of its run, by the settings p of
probe.py: what, metrics, curves and notes of a record. Task(s) checks the settings s of train.py and
finds the data. Then it has
    sizes                    of the model, beyond the settings: vocab_size at least
    tokenizer, data          the vocabulary, and what identifies the text; None, {} without a text
    note                     what every line of the log is to say, '' for nothing
    start(model, device, autocast)   before the first update
    backward()               adds the gradient of an update; mean loss, on the device, and tokens
    step                     if it is there and not None, what does a micro-step in backward(), as
                             lib.gradients.piece: on CUDA train.py may put a captured one there
    figures()                further figures of a line of the log
    evaluate()               {'val_loss': the lower the better, 'val_error': its error, ...}
    describe(figures)        evaluate()'s figures as a line of text
    state(), load_state()    what goes on where a run is resumed
"""
import importlib
import pkgutil

from lib.console import require

def find_task(name, part='Task'):
    """The module of a task. Raises SystemExit if there is none of that name, or without the part
    that is wanted of it."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    require(name in known, f'task must be one of {", ".join(map(repr, known))}, not {name!r}')
    task = importlib.import_module(f'tasks.{name}')
    require(hasattr(task, part), f'tasks/{name}.py has no {part}: write one, as tasks/__init__.py '
            f'says')
    return task
