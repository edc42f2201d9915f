"""A stand-in for a hub: repositories of files, as huggingface.co lists and gives them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class Hub:
    """`repos`: the folder of each. `asked`: every path, and the range that was wanted of it. `ranges` False: it does
    not know of ranges, and gives whole files. `codes`: what it answers for repositories that it does not show.
    `cuts_at`: it closes the connection after so many bytes of a longer answer, and then gives no more of any file (0:
    never). `wrong`: files whose checksum it tells wrongly."""

    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.revisions = {"main"}
        self.asked: list[tuple[str, str]] = []
        self.sent_bytes = 0
        self.ranges = True
        self.codes: dict[str, tuple[int, str]] = {}
        self.tokens: list[str] = []
        self.cuts_at = 0
        self.was_cut = False
        self.also: tuple[str, ...] = ()  # paths that it lists besides
        self.wrong: set[str] = set()

    def sha256(self, file: Path) -> str:
        """Large files have no content: theirs is made up."""
        if file.name in self.wrong or file.stat().st_size > 2**28:
            return "0" * 64
        return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of `hub`, while it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((path, self.headers.get("Range", "")))
            hub.tokens.append(self.headers.get("Authorization", ""))
            if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
                self._list(*listed.groups())
            elif wanted := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repo, _, name = wanted.groups()
                elsewhere = f"http://localhost:{self.server.server_address[1]}"  # where large files lie
                told = {"Location": f"{elsewhere}/files/{repo}/{name}", "X-Repo-Commit": COMMIT}
                if (file := hub.repos[repo] / name).is_file():
                    told |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-Etag": f'"{hub.sha256(file)}"'}
                self._answer(302, b"", told)
            elif wanted := re.fullmatch(r"/files/([^/]+/[^/]+)/(.+)", path):
                if hub.cuts_at and hub.was_cut:
                    self._answer(400, b"", {})
                else:
                    self._give(hub.repos[wanted[1]] / wanted[2])
            else:
                self._answer(404, b"", {})

        def _list(self, repo: str, revision: str) -> None:
            if repo not in hub.repos:
                status, code = hub.codes.get(repo, (401, ""))
                self._answer(status, b'{"error": "no"}', {"X-Error-Code": code} if code else {})
            elif revision not in hub.revisions:
                self._answer(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"})
            else:
                folder = hub.repos[repo]
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
                listed = [
                    {"type": "file", "path": path, "size": size, "oid": "0"}
                    | {"lfs": {"oid": hub.sha256(folder / path), "size": size, "pointerSize": 0}}
                    for path, size in sizes.items()
                ]
                listed += [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in hub.also]
                self._answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

        def _give(self, path: Path) -> None:
            size = path.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None or not hub.ranges:
                self._answer(200, b"" if self.command == "HEAD" else path.read_bytes(), {})
                return
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
            with path.open("rb") as file:
                file.seek(first)
                body = file.read(last - first + 1)
            self._answer(206, body, {"Content-Range": f"bytes {first}-{last}/{size}"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            hub.sent_bytes += len(body)
            cut_at = hub.cuts_at if status in (200, 206) and 0 < hub.cuts_at < len(body) else 0
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if cut_at:
                self.wfile.write(body[:cut_at])
                hub.was_cut = True
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
