"""The download of Shakespeare: tried again, checked, kept, and never half a file."""
import hashlib
import http.server
import os
import sys
import threading

import pytest

import prepare
from prepare import DownloadError, load_meta
from prepared import error_of, fail_with, here  # noqa: F401, fixtures too


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
