"""A server on this machine that answers as told: whole, cut off, slowly, with something else."""
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib import files

CONTENT = bytes(range(256)) * 1024 + b'end'  # of a file: four blocks and a bit

class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        web, begin = self.server, int(self.headers['Range'][6:-1])
        web.begins.append(begin)
        how = web.answers.pop(0)
        start = 0 if how == 'whole' else begin
        body = {'wrong': web.content[::-1], 'other': b'<html>'}.get(how, web.content)[start:]
        code = (206 if body else 416) if start else 200
        self.send_response({'moved': 302, 'broken': 503}.get(how, code))
        self.send_header('Content-Length', len(body))
        self.send_header('Location', '/elsewhere')
        self.end_headers()
        half = len(body) // 2 if how in ('cut', 'slow') else len(body)
        self.wfile.write(body[:half])
        if how == 'slow':
            web.end.wait(60)
            self.wfile.write(body[half:])

@pytest.fixture
def web(monkeypatch):
    """A server of CONTENT that answers as told, one answer after the other."""
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setattr(files, 'PAUSES', (0, 0, 0))
    monkeypatch.setattr(files, 'TIMEOUT', (60, 1))
    with ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        vars(server).update(answers=[], begins=[], content=CONTENT, end=threading.Event())
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.end.set()
        server.shutdown()
