"""prepare.py: the data sets, own text and built-in, and a one-line error for every bad input."""
import hashlib
import json
import os
import subprocess
import sys

import pytest

import prepare
from prepare import Tokenizer, load_meta
from prepared import PARTS, ROOT, TEXT, command, error_of, fail_with, here, ids_of, make  # noqa: F401, fixtures too


def test_data_set_of_characters(make, here):
    folder = make()
    assert folder == str(here / "data" / "mine") and sorted(os.listdir(folder)) == PARTS
    assert os.listdir(here / "data") == ["mine"]
    meta = load_meta(folder)
    chars = "".join(sorted(set(TEXT)))
    n_train = int(0.9 * len(TEXT))
    assert meta == {"dataset": "mine", "source": "my.txt", "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
                    "tokenizer": {"kind": "char", "chars": chars}, "vocab_size": len(chars), "n_chars": len(TEXT),
                    "n_train": n_train, "n_val": len(TEXT) - n_train}
    train, val = ids_of(folder, "train"), ids_of(folder, "val")
    assert (len(train), len(val)) == (meta["n_train"], meta["n_val"])
    expected = [chars.index(c) for c in TEXT]
    assert [*train, *val] == expected
    assert Tokenizer(meta["tokenizer"]).decode([*train, *val]) == TEXT


def test_byte_order_mark_is_dropped_and_line_ends_are_kept(make):
    meta = load_meta(make(b"\xef\xbb\xbf" + b"ab\r\n" * 10))
    assert meta["tokenizer"]["chars"] == "\n\rab" and meta["n_chars"] == 40


def test_relative_data_dir_lies_beside_the_program(make, monkeypatch, here):
    monkeypatch.setattr(prepare, "HERE", str(here / "program"))
    assert make(data_dir="d") == str(here / "program" / "d" / "mine")


def test_only_the_summary_is_printed_and_nothing_when_quiet(make, capsys):
    make()
    assert capsys.readouterr().out == ""
    folder = make(quiet=False)
    out = capsys.readouterr().out
    assert out == f"mine: 86 training and 10 validation tokens, vocabulary of 13, written to {folder}\n"


def test_shortest_text(make):
    meta = load_meta(make("ab" * 10))
    assert (meta["n_train"], meta["n_val"]) == (18, 2)
    assert "19 tokens" in error_of(make, "a" * 19)


@pytest.mark.parametrize("text, words", [
    (b"", ["my.txt", "is empty"]), (b"\xef\xbb\xbf", ["is empty"]), (b"short", ["my.txt", "5 tokens", "20"]),
    (b"abc\xff" + b"d" * 99, ["my.txt", "not UTF-8", "byte 3"]),
    (b"\xef\xbb\xbfab\xff" + b"d" * 99, ["not UTF-8", "byte 5"]),
])
def test_bad_texts(make, here, text, words):
    message = error_of(make, text)
    assert all(word in message for word in words), message
    assert not (here / "data").exists()


@pytest.mark.parametrize("settings, words", [
    ({"dataset": ""}, ["usage: python prepare.py NAME", "shakespeare or python"]),
    ({"dataset": "../x"}, ["'../x'", "letters"]), ({"dataset": ".x"}, ["'.x'"]), ({"dataset": "-x"}, ["'-x'"]),
    ({"dataset": "a b"}, ["'a b'"]), ({"dataset": "x\n"}, ["letters"]), ({"dataset": "a/b"}, ["--file"]),
    ({"file": ""}, ["'mine'", "--file=PATH", "shakespeare, python"]),
    ({"dataset": "shakespear", "file": ""}, ["did you mean shakespeare?"]),
    ({"dataset": "pyton", "file": ""}, ["did you mean python?"]),
    ({"dataset": "python"}, ["'python' takes no --file", "another name"]),
    ({"tokenizer": "chr"}, ["'chr'", "did you mean char?"]), ({"tokenizer": "x"}, ["char, gpt2"]),
    ({"data_dir": ""}, ["data_dir is empty"]),
    ({"file": "none.txt"}, ["'none.txt'", "No such file", "--file=PATH"]),
    ({"file": "."}, ["'.'", "Is a directory"]), ({"file": "a\0b"}, ["null byte"]),
    ({"dataset": "n" * 300}, ["cannot write", "name too long", "--data_dir"]),
    ({"data_dir": "/dev/null/x"}, ["cannot write", "Not a directory"]),
    ({"dataset": "shakespeare"}, ["my.txt", "112 bytes", "1115394 bytes", "86c4e6aa", "another name",
                                  hashlib.sha256(TEXT.encode()).hexdigest()]),
])
def test_bad_requests(make, settings, words):
    message = error_of(make, **settings)
    assert all(word.lower() in message.lower() for word in words), message


def test_shakespeare_of_the_right_size_but_other_content(make):
    assert "is not tiny Shakespeare" in error_of(make, "x" * prepare.SHAKESPEARE_SIZE, "shakespeare")


# replacing an older data set

def test_older_data_set_is_replaced(make, here):
    make("old text " * 9)
    meta = load_meta(make())
    assert meta["n_chars"] == len(TEXT)
    assert os.listdir(here / "data") == ["mine"] and sorted(os.listdir(here / "data" / "mine")) == PARTS


def test_linked_folder_stays_linked(make, here):
    (here / "data").mkdir()
    (here / "elsewhere").mkdir()
    os.symlink(here / "elsewhere", here / "data" / "mine")
    make()
    load_meta(make())
    assert os.path.islink(here / "data" / "mine") and sorted(os.listdir(here / "elsewhere")) == PARTS


def test_other_files_are_never_replaced(make, here):
    work = here / "data" / "mine"
    work.mkdir(parents=True)
    (work / "thesis.txt").write_text("precious")
    assert "'thesis.txt'" in error_of(make)
    assert (work / "thesis.txt").read_text() == "precious"
    (here / "data" / "note").write_text("precious")
    assert "is a file" in error_of(make, dataset="note")


@pytest.mark.parametrize("error, expected", [
    (KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), SystemExit),
])
@pytest.mark.parametrize("name", ["json.dumps", "os.mkdir", "prepare.open", "prepare._exchange", "os.rename"])
def test_failure_leaves_the_older_data_set_and_nothing_else(make, here, monkeypatch, name, error, expected):
    make()
    before = {part: (here / "data" / "mine" / part).read_bytes() for part in PARTS}
    new = here / "new.txt"
    new.write_text("another text " * 9)
    owner, _, attribute = name.rpartition(".")
    real_open = open
    if attribute == "open":  # only the second file that is written fails
        def replacement(path, mode="r", **kwargs):
            return fail_with(error)() if str(path).endswith("val.bin") else real_open(path, mode, **kwargs)
    elif attribute == "rename":  # the move of the new one fails, the older one was already out of the way
        real_rename = os.rename
        def replacement(source, target):
            return fail_with(error)() if source.endswith(".new") else real_rename(source, target)
    else:
        replacement = fail_with(error)
    monkeypatch.setattr({"json": json, "os": os, "prepare": prepare}[owner], attribute, replacement, raising=False)
    with pytest.raises(expected) as caught:
        prepare.prepare("mine", file=str(new), data_dir=str(here / "data"), quiet=True)
    if expected is SystemExit:
        assert "No space left" in caught.value.code and "--data_dir" in caught.value.code
    monkeypatch.undo()
    assert os.listdir(here / "data") == ["mine"]
    assert {part: (here / "data" / "mine" / part).read_bytes() for part in PARTS} == before


def test_full_disk(make, here):
    make()
    (here / "big.txt").write_text("0123456789" * 2000)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    done = command("mine", "--file=big.txt", "--data_dir=data", cwd=here, setup=limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1 and "too large" in done.stderr
    assert os.listdir(here / "data") == ["mine"] and load_meta(here / "data" / "mine")["n_chars"] == len(TEXT)


# the program

def test_program(here):
    (here / "my.txt").write_text("a" * 25)
    done = command("mine", "--file=my.txt", "--data_dir=d", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"mine: 22 training and 3 validation tokens, vocabulary of 1, written to {here}/d/mine\n"


@pytest.mark.parametrize("argv, words", [
    ([], "usage: python prepare.py NAME"), (["mine"], "--file=PATH"), (["a", "b"], "too many"),
    (["mine", "--tokeniser=char"], "did you mean --tokenizer?"), (["mine", "--SHAKESPEARE_SIZE=1"], "unknown key"),
    (["mine", "--file"], "--file=VALUE"),
])
def test_program_on_bad_input(here, argv, words):
    done = command(*argv, cwd=here)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and words in done.stderr


def test_program_interrupted(here):
    done = command("python", "--data_dir=d", cwd=here, setup="import os, _thread\n_mkdir = os.mkdir\n"
                   "def mkdir(*a, **k):\n    _mkdir(*a, **k)\n    _thread.interrupt_main()\nos.mkdir = mkdir")
    assert done.returncode == 1 and done.stderr.startswith("error: interrupted") and done.stderr.count("\n") == 1
    assert os.listdir(here / "d") == []


def test_help_shows_settings_with_comments_and_no_constants(here):
    done = command("--help", cwd=here)
    assert done.returncode == 0 and done.stdout.startswith("usage: python prepare.py DATASET [--key=value ...]\n")
    assert done.stdout.count("\n  --") == 4 and "--tokenizer='char'  char (one token" in done.stdout


def test_import_is_light_and_does_nothing(here):
    code = "import sys, prepare, configurator; print({'torch', 'requests', 'tiktoken'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=here, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT})
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "") and os.listdir(here) == []
