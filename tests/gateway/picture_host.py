"""A web server with pictures, good and bad, and a gateway that may fetch from it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n and so on" + bytes(range(256)) * 300
MIB = 2**20


class PictureHost(ThreadingHTTPServer):
    """`seen`: the headers of each request, by path; `left`: paths whose client has left before it had all."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port: int = self.server_address[1]
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.left: list[str] = []
        self.changed = threading.Condition()
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def wait_for(self, what: str, count: int = 1) -> None:
        """Until `seen` or `left` has so many entries."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(getattr(self, what)) >= count, 20), what

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave."""


class _Handler(BaseHTTPRequestHandler):
    server: PictureHost
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        with self.server.changed:
            self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            self.server.changed.notify_all()
        self.close_connection = True
        name, _, number = self.path.strip("/").partition("/")
        getattr(self, name)(number)

    def answer(self, status: int = 200, body: bytes | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content_Type": "image/png"} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if body:
            self.wfile.write(body)

    def ok(self, _: str) -> None:
        self.answer(body=PNG, Set_Cookie="a=b")

    def untyped(self, _: str) -> None:
        self.answer(body=PNG, Content_Type="application/octet-stream")

    def of_size(self, size: str) -> None:
        self.answer(body=b"\x89PNG" + b"\0" * (int(size) - 4))

    def redirect(self, left: str) -> None:
        self.answer(302, b"", Location=f"/redirect/{int(left) - 1}" if int(left) > 1 else "/ok")

    def away(self, to: str) -> None:
        self.answer(302, b"", Location=to)

    def gone(self, _: str) -> None:
        self.answer(404, b"a page")

    def broken(self, _: str) -> None:
        self.answer(500, b"secret")

    def page(self, _: str) -> None:
        self.answer(body=b"<html>secret", Content_Type="text/html; charset=utf-8")

    def packed(self, _: str) -> None:
        self.answer(body=b"x", Content_Encoding="gzip")

    def empty(self, _: str) -> None:
        self.answer(body=b"")

    def cut(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def nonsense(self, _: str) -> None:
        self.wfile.write(b"\0\1\2 hello\r\n\r\n")

    def endless(self, _: str) -> None:
        self.answer()
        with contextlib.suppress(OSError):
            while not self.server.closing.is_set():
                self.wfile.write(b"\0" * 65536)
        self._note_left()

    def crumbs(self, _: str) -> None:
        self.answer(Transfer_Encoding="chunked")
        with contextlib.suppress(OSError):
            while not self.server.closing.is_set():
                self.wfile.write(b"1\r\nx\r\n" * 1000)

    def silent(self, _: str) -> None:
        """Its beginning only; then it waits until the client leaves."""
        self.answer()
        self.wfile.write(b"\x89PNG")
        self.connection.settimeout(20)
        with contextlib.suppress(OSError):
            self.connection.recv(1)
        self._note_left()

    def _note_left(self) -> None:
        with self.server.changed:
            self.server.left.append(self.path)
            self.server.changed.notify_all()


@contextmanager
def picture_host() -> Iterator[PictureHost]:
    host = PictureHost()
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    try:
        yield host
    finally:
        host.closing.set()
        host.shutdown()
        thread.join()
        host.server_close()
