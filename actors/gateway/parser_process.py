"""The process that reads large bodies for the gateway: a bounded amount of memory, and an end with its parent.

Python's interpreter lock is held while a large value is built, so a thread would stop the gateway's event loop, and
the values of a hostile body take thirty times its size. It says READY
when it has started; then one message each way, for as long as there are any:

    in    (form, request id, name of the API key), and the body
    out   an `Ask` without its content, and the content; or an ArrieroError

It ends over a body that needs more time (SIGXCPU) or memory than there may be.
"""

from __future__ import annotations

import os
import pickle
import resource
import socket
import struct
import sys
import time
from dataclasses import replace
from io import BufferedRWPair

from actors.devices.processes import end_with_parent
from actors.gateway.forms import Form, read_ask
from actors.gateway.limits import MAX_BODY_BYTES, PARSE_CPU_S, PARSE_DATA_BYTES, too_large
from scheduler.errors import ArrieroError

READY = b"ready"
HEAD = struct.Struct("<II")
"""Of a message: the bytes of its pickled part, and the bytes that follow as they are."""


def message(small: object, large: bytes | bytearray = b"") -> tuple[bytes, bytes | bytearray]:
    """A message in two pieces, so that what is large is not copied."""
    packed = pickle.dumps(small)
    return HEAD.pack(len(packed), len(large)) + packed, large


def _answer(form: Form, request_id: str, key: str, body: bytes) -> tuple[bytes, bytes | bytearray]:
    try:
        ask = read_ask(form, body, request_id, key)
        if len(ask.request.content) > MAX_BODY_BYTES:  # a message without a content has one of "null" afterwards
            raise too_large(MAX_BODY_BYTES)
    except ArrieroError as error:
        return message(error)
    return message(replace(ask, request=replace(ask.request, content=b"")), ask.request.content)


def _serve(stream: BufferedRWPair) -> None:
    stream.write(READY)
    stream.flush()
    while head := stream.read(HEAD.size):
        small, large = HEAD.unpack(head)
        form, request_id, key = pickle.loads(stream.read(small))
        body = stream.read(large)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + PARSE_CPU_S, hard))
        stream.writelines(_answer(form, request_id, key, body))
        stream.flush()


def main() -> None:
    """Serves the socket that is standard input, until its other end is closed."""
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (PARSE_DATA_BYTES, PARSE_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # jiter cries when its memory ends
    with socket.socket(fileno=os.dup(0)) as connection, connection.makefile("rwb") as stream:
        try:
            _serve(stream)
        except (MemoryError, ConnectionError):
            os._exit(1)  # its parent knows, or is gone


if __name__ == "__main__":
    main()
