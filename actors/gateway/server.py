"""Listening and serving: a bound socket and a uvicorn server, both free of Ray.

The socket listens before the server runs, so a client may connect at once, and a taken port is an error right there.
"""

from __future__ import annotations

import functools
import gc
import socket
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from actors.gateway.connections import Connection, Opened
from actors.gateway.limits import KEEP_ALIVE_S, MAX_HEAD_BYTES
from scheduler.errors import Rejected

SHUTDOWN_S = 2  # clients get so long to take their last event when the gateway is told to stop


def listen(host: str, port: int) -> socket.socket:
    """A socket listening on `host`:`port` (0: any free port). Raises Rejected when that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=1024)
    except OSError as error:
        raise Rejected(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "stop what uses it (is another Arriero up?) or choose another --port"
        ) from error
    # Connections inherit it. Without it a first token waits 40 ms for the acknowledgement of the headers before it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL under which this machine reaches `listener`."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """A server that tells the clients of requests under way when it ends: by a signal, or by `should_exit`."""

    def __init__(self, app: FastAPI) -> None:
        connection = functools.partial(Connection, opened=Opened())
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(Any, connection),
                log_level="error",  # a warning for each odd request would fill the disk
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        self._closing = app.state.closing

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.freeze()  # to look through all that was imported takes the event loop 50 ms, each time

    def close(self) -> None:
        """Begin to end: requests under way get their last word, new ones are refused, then the socket is closed."""
        self._closing.begin()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing.begin()
        await super().shutdown(sockets)


def make_server(app: FastAPI) -> Server:
    """A server for `app`; run it with `serve(sockets=[listener])`."""
    return Server(app)
