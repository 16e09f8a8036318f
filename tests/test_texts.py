"""Tokenizers, and the text of the python corpus."""
import hashlib
import json
import sys
import types

import numpy as np
import pytest

import prepare
from prepare import Tokenizer, load_meta
from prepared import TEXT, error_of, fail_with, gpt2, here, ids_of, make  # noqa: F401, fixtures too


def test_characters_there_and_back():
    tokenizer = Tokenizer({"kind": "char", "chars": "\nabé😀"})
    assert tokenizer.vocab_size == 5 and tokenizer.encode("b😀\na") == [2, 4, 0, 1] and tokenizer.encode("") == []
    assert all(type(i) is int for i in tokenizer.encode("ab"))
    assert tokenizer.decode(np.array([2, 4, 0, 1])) == "b😀\na" and tokenizer.decode([]) == ""
    assert Tokenizer(json.loads(json.dumps(tokenizer.spec))).encode("é") == [3]


@pytest.mark.parametrize("text, words", [
    ("abc", ["'c'", "U+0063", "position 2", "3 characters", "gpt2"]), ("a\x00", [r"'\x00'", "U+0000", "position 1"]),
    ("\U0001f600", ["U+1F600", "position 0"]), ("a\n", [r"'\n'"]), ("\udcff", [r"'\udcff'", "U+DCFF"]),
])
def test_unknown_character(text, words):
    message = error_of(Tokenizer({"kind": "char", "chars": "abd"}).encode, text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("bad", [-1, 3])
def test_id_outside_the_vocabulary(bad):
    assert f"token id {bad} " in error_of(Tokenizer({"kind": "char", "chars": "abd"}).decode, [0, bad])


@pytest.mark.parametrize("spec", [
    None, [], {}, {"kind": "word"}, {"kind": "char"}, {"kind": "char", "chars": ""}, {"kind": "char", "chars": "ba"},
    {"kind": "char", "chars": "aa"}, {"kind": "char", "chars": ["a"]},
])
def test_damaged_tokenizer(spec):
    assert "damaged tokenizer" in error_of(Tokenizer, spec)


def test_too_many_distinct_characters(make):
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10801)]))
    assert len(everything) == prepare.MAX_VOCAB + 1
    assert "65,537 distinct characters" in error_of(make, everything)
    folder = make(everything[1:])  # the most that fits, up to id 65535
    assert load_meta(folder)["vocab_size"] == 65536 and ids_of(folder, "val")[-1] == 65535


def test_gpt2(make, gpt2):
    assert gpt2.vocab_size == 50257 and gpt2.spec == {"kind": "gpt2"}
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.decode(gpt2.encode(TEXT)) == TEXT
    assert gpt2.decode(gpt2.encode("😀")[:1]) == "\ufffd"
    assert 50256 not in gpt2.encode("<|endoftext|>")
    assert "50257" in error_of(gpt2.decode, [50257])
    folder = make(tokenizer="gpt2")
    meta = load_meta(folder)
    assert (meta["vocab_size"], meta["tokenizer"], meta["n_chars"]) == (50257, {"kind": "gpt2"}, len(TEXT))
    assert gpt2.decode([*ids_of(folder, "train"), *ids_of(folder, "val")]) == TEXT


@pytest.mark.parametrize("module", [
    None, types.SimpleNamespace(get_encoding=fail_with(ConnectionError("no\nroute " + "x" * 999)))])
def test_gpt2_that_cannot_be_loaded(make, monkeypatch, module, here):
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    message = error_of(make, tokenizer="gpt2")
    assert "TIKTOKEN_CACHE_DIR" in message and len(message) < 400 and not (here / "data").exists()


def test_python_text(here):
    folder = prepare.prepare("python", data_dir=str(here), quiet=True)
    meta = load_meta(folder)
    assert meta["python"] == ".".join(map(str, sys.version_info[:3])) and meta["source"].endswith(" " + meta["python"])
    assert meta["n_chars"] > 4_000_000 and set(meta["tokenizer"]["chars"]) <= {*map(chr, range(32, 127)), "\n", "\t"}
    text = Tokenizer(meta["tokenizer"]).decode(np.concatenate([ids_of(folder, "train"), ids_of(folder, "val")]))
    assert text.encode() == prepare._python_text()
    assert hashlib.sha256(text.encode()).hexdigest() == meta["sha256"]
    from pydoc_data.topics import topics
    first, last = topics[min(topics)], topics[max(topics)]
    assert text.startswith(first[:50])
    assert text.index(last[:200]) < text.index("class ABCMeta(") < text.index("class ZipFile")


def test_python_text_takes_sorted_standard_modules_only(here, monkeypatch):
    for name in ("os.py", "abc.py", "_sysconfigdata_x.py", "test_os.py", "sitecustomize.py", "os.txt"):
        (here / name).write_bytes(f"<{name}>\r\x0c\xe9".encode())
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(here))
    assert prepare._python_text().endswith(b"\n<abc.py>\n<os.py>")


@pytest.mark.parametrize("library", ["empty", "missing"])
def test_python_without_sources(here, monkeypatch, library):
    (here / "empty").mkdir()
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(here / library))
    assert "not installed" in error_of(prepare.prepare, "python", data_dir=str(here), quiet=True)


def test_python_without_topics(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "not installed" in error_of(prepare.prepare, "python", data_dir=str(here), quiet=True)
