"""What the tests of prepare.py share: a folder of their own, a text, and how an error looks."""
import os
import subprocess
import sys

import numpy as np
import pytest

import prepare
from prepare import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = "To be, or not to be: é😀\n" * 4
PARTS = ["meta.json", "train.bin", "val.bin"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(here):
    """Write a text and prepare it in the folder `data`."""
    def call(text=TEXT, dataset="mine", **settings):
        (here / "my.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        settings = {"file": "my.txt", "data_dir": str(here / "data"), "quiet": True} | settings
        return prepare.prepare(dataset, **settings)
    return call


@pytest.fixture(scope="session")
def gpt2():
    try:
        import tiktoken
        tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"the files of gpt2 are not here: {error}"[:100])
    return Tokenizer({"kind": "gpt2"})


def error_of(call, *args, kind=SystemExit, **kwargs):
    """The message of a SystemExit, checked for the form that every error has."""
    with pytest.raises(SystemExit) as caught:
        call(*args, **kwargs)
    message = caught.value.code
    assert type(caught.value) is kind
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def command(*argv, cwd=None, setup="", **env):
    """Run prepare.py as a program; `setup` is code that runs before it."""
    code = f"{setup}\nimport runpy, sys\nsys.argv = ['prepare.py', *sys.argv[1:]]\n" \
           f"runpy.run_path({os.path.join(ROOT, 'prepare.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT, **env})


def ids_of(folder, part):
    return np.fromfile(os.path.join(folder, f"{part}.bin"), dtype="<u2")


def fail_with(error):
    def call(*args, **kwargs):
        raise error
    return call
