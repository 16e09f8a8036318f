"""The tasks: each module of this folder trains models on one, and measures them (tasks/text.py).

A task's module has its settings as commented globals, which are keys of train.py, a class Task and
a function probe(model, saved, p, device), which measures the model of the checkpoint `saved` by the
settings p of probe.py and returns what, metrics, curves and notes of a record.

Task(s) checks the settings s of train.py and finds the data. Then it has
    sizes                    of the model, beyond the settings: vocab_size at least
    tokenizer, data          the vocabulary as prepare.py describes it, and what identifies the
                             text; None, {} where there is none
    note                     what every line of the log is to say, '' for nothing
    start(model, device, autocast)   before the first update
    backward()               adds the gradient of one update to the parameters; the mean loss, still
                             on the device, and the number of tokens that were read
    figures()                further figures of a line of the log
    evaluate()               {'val_loss': the lower the better, 'val_error': its error, ...}
    describe(figures)        evaluate()'s figures as a line of text
    state(), load_state()    what goes on where a run is resumed
"""
import importlib
import os
import pkgutil


def task_names():
    return sorted(module.name for module in pkgutil.iter_modules([os.path.dirname(__file__)]))


def find_task(name):
    """The module of a task. Raises SystemExit if there is none of that name."""
    if name not in task_names():
        known = ', '.join(map(repr, task_names()))
        raise SystemExit(f'error: task must be one of {known}, not {name!r}')
    return importlib.import_module(f'tasks.{name}')
