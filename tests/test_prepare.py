"""prepare.py: the data sets, the tokenizers, the download, and a one-line error for every bad input."""
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

import prepare
from prepare import DownloadError, Tokenizer, load_meta

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


# own text

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


def fail_with(error):
    def call(*args, **kwargs):
        raise error
    return call


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


# tokenizers

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


# the built-in texts

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


class Server(http.server.BaseHTTPRequestHandler):
    """Gives the answers of the list `answers` in turn: a body, or a status."""

    def do_GET(self):
        self.server.asked += 1
        answer = self.server.answers.pop(0)
        self.send_response(answer if isinstance(answer, int) else 200)
        body = b"" if isinstance(answer, int) else answer
        # "cut" announces more than it sends
        self.send_header("Content-Length", str(len(body) + (1000 if body.startswith(b"cut") else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


TRUE = b"First Citizen: speak. " * 20


@pytest.fixture
def server(monkeypatch):
    """A loopback server in the place of the real one, and a short text in that of Shakespeare's."""
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        server.answers, server.asked, server.pauses = [], 0, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(prepare, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(prepare, "SHAKESPEARE_SIZE", len(TRUE))
        monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TRUE).hexdigest())
        monkeypatch.setattr(prepare.time, "sleep", server.pauses.append)
        yield server
        server.shutdown()
        thread.join()


def shakespeare(folder, **settings):
    return prepare.prepare("shakespeare", data_dir=str(folder), **{"quiet": True} | settings)


@pytest.mark.parametrize("failures", [[], [503], [500, b"cut"]])
def test_download(server, here, capsys, failures):
    server.answers = failures + [TRUE]
    meta = load_meta(shakespeare(here, quiet=False))
    assert meta["source"] == prepare.SHAKESPEARE_URL and meta["n_chars"] == len(TRUE)
    assert (here / "shakespeare.txt").read_bytes() == TRUE
    assert sorted(os.listdir(here)) == ["shakespeare", "shakespeare.txt"]
    assert server.asked == len(failures) + 1 and len(server.pauses) == len(failures)
    assert server.pauses == sorted(set(server.pauses)) and sum(server.pauses) < 10
    out = capsys.readouterr().out
    assert f"downloading {prepare.SHAKESPEARE_URL}: 100 %\n" in out and out.count("next try") == len(failures)


def test_quiet_download_into_a_new_folder(server, here, capsys):
    server.answers = [503, TRUE]
    shakespeare(here / "new" / "data")
    assert capsys.readouterr().out == ""


def test_download_is_kept_and_used_again_only_if_it_is_right(server, here):
    server.answers = [TRUE, TRUE]
    shakespeare(here)
    shakespeare(here)
    assert server.asked == 1
    (here / "shakespeare.txt").write_bytes(TRUE[:-1] + b"!")
    shakespeare(here)
    assert server.asked == 2 and (here / "shakespeare.txt").read_bytes() == TRUE


def test_local_copy_needs_no_download(server, here):
    (here / "copy.txt").write_bytes(TRUE)
    assert load_meta(shakespeare(here, file="copy.txt"))["source"] == "copy.txt"
    assert server.asked == 0


@pytest.mark.parametrize("answers, asked, words", [
    ([404], 1, ["404"]), ([503] * 4, 3, ["503"]), ([b"cut"] * 4, 3, []),
    ([b"<html>"], 1, ["not the expected text", "6 bytes"]), ([TRUE + b"x" * 300000], 1, ["not the expected text"]),
])
def test_failed_download(server, here, answers, asked, words):
    server.answers = list(answers)
    message = error_of(shakespeare, here, kind=DownloadError)
    for word in words + [prepare.SHAKESPEARE_URL, "--file=PATH", "python prepare.py python"]:
        assert word in message
    assert server.asked == asked and os.listdir(here) == []
    assert "300440 bytes" not in message  # nothing is read far beyond the expected size


@pytest.mark.parametrize("name, tries", [("ConnectionError", 3), ("Timeout", 3), ("TooManyRedirects", 1)])
def test_only_passing_failures_are_tried_again(server, here, monkeypatch, name, tries):
    import requests
    calls = []

    def get(url, **settings):
        calls.append(settings)
        raise getattr(requests, name)("x\ny" * 999)
    monkeypatch.setattr(requests, "get", get)
    message = error_of(shakespeare, here, kind=DownloadError)
    assert len(calls) == tries and name in message and len(message) < 500
    connect, read = calls[0]["timeout"]
    assert 0 < connect <= 30 and 0 < read <= 60 and calls[0]["stream"] is True


def test_download_without_requests(server, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    error_of(shakespeare, here, kind=DownloadError)


def test_download_that_cannot_be_kept(server, here, monkeypatch):
    server.answers = [TRUE]
    monkeypatch.setattr(os, "replace", fail_with(OSError(28, "No space left on device")))
    assert "No space left" in error_of(shakespeare, here)
    assert os.listdir(here) == []


# meta.json

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
