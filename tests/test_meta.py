"""A data set that is damaged or missing is told in one line."""
import json
import os
import pathlib

import pytest

from prepare import load_meta
from prepared import error_of, here, make  # noqa: F401, fixtures too


def change(key, value):
    def apply(folder):
        path = os.path.join(folder, "meta.json")
        with open(path) as stream:
            meta = json.load(stream)
        meta[key] = value
        with open(path, "w") as stream:
            json.dump(meta, stream)
    return apply


def put(name, content):
    return lambda folder: pathlib.Path(folder, name).write_bytes(content)


def drop(name):
    return lambda folder: os.remove(os.path.join(folder, name))


@pytest.mark.parametrize("damage, words", [
    (drop("meta.json"), ["meta.json is missing"]), (drop("train.bin"), ["train.bin is missing"]),
    (drop("val.bin"), ["val.bin is missing"]), (put("val.bin", b"x" * 19), ["val.bin is damaged", "19 bytes", "20"]),
    (put("train.bin", b""), ["train.bin is damaged"]), (put("meta.json", b"{"), ["meta.json is damaged (not JSON)"]),
    (put("meta.json", b"\xff"), ["meta.json is damaged"]), (put("meta.json", b"[]"), ["not an object"]),
    (put("meta.json", b"[" * 100000), ["meta.json is damaged"]),
    (change("n_train", None), ["n_train"]), (change("n_val", 0), ["n_val"]), (change("n_val", True), ["n_val"]),
    (change("vocab_size", "9"), ["vocab_size"]), (change("vocab_size", 15), ["vocab_size is not the tokenizer's 13"]),
    (change("tokenizer", {"kind": "gpt2"}), ["50257"]), (change("tokenizer", None), ["tokenizer"]),
    (change("tokenizer", {"kind": "char", "chars": "zyx"}), ["tokenizer"]),
])
def test_damaged_data_set(make, damage, words):
    folder = make()
    load_meta(folder)
    damage(folder)
    message = error_of(load_meta, folder)
    for word in words + ["python prepare.py mine --file=PATH"]:
        assert word in message, message


def test_missing_data_set(here):
    assert "python prepare.py mine --file=PATH" in error_of(load_meta, str(here / "mine"))
    assert error_of(load_meta, str(here / "shakespeare/")).endswith("python prepare.py shakespeare")
    (here / "mine" / "meta.json").mkdir(parents=True)
    assert "cannot read" in error_of(load_meta, str(here / "mine"))
