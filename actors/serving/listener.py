"""The runner's end of the tokens' road: takes requests on its own sockets and sends answers (`actors.road`).

One thread serves all connections. It accepts them, reads requests, notices who has left, and sends what a slow reader
could not take at once. Other threads have requests prepared. The engine's thread writes its tokens itself, after each
turn, without blocking. What a connection does not take is kept here, and its answer is stalled meanwhile. So at most
one turn's tokens are kept for a slow reader. A connection must prove a lease before its request. Few connections
without a proof are kept, and they hold next to no memory.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
from collections import OrderedDict, deque
from functools import partial
from threading import Lock, Thread
from typing import Any, Protocol

from actors import road
from actors.endpoint import LONGEST_PROOF_BYTES, listen
from actors.frames import BrokenFrame, FrameReader, packed
from actors.leasing import TokenCounts
from actors.road import Kind
from actors.serving.fair_threads import FairThreads
from actors.serving.jobs import Embedded, Hearer, Work
from actors.serving.preparation import Errand
from actors.serving.protocol import Chunk, EmbedRequest, GenerateRequest
from actors.serving.replies import AnyReply, reply_in
from scheduler.errors import ArrieroError, EngineFailed
from scheduler.units import LeaseId, NodeId

READ_BYTES = 65536
PREPARED_AT_ONCE = 64  # more than any sensible number of slots
MOST_UNPROVED = 256
"""Connections that have not proved a lease. Beyond this number the oldest is closed. A gateway sends its proof with its
first bytes, and never has more connections at once than a replica may have slots (64)."""

log = logging.getLogger(__name__)


class Replica(Protocol):
    """What answers (`Runner`). Methods raise ArrieroError."""

    def prepare(
        self, request: GenerateRequest | EmbedRequest, hearer: Hearer[Any], errand: Errand | None = None
    ) -> Work: ...
    def submit(self, job: Work) -> None: ...
    def drop(self, job: Work) -> None: ...
    def resume(self) -> None: ...


class Listener:
    """Listens from construction on; `close()` ends it and its connections."""

    def __init__(self, replica: Replica, node_id: NodeId, host: str) -> None:
        self._replica = replica
        self.endpoint, listening = listen(node_id, host)
        self._preparing = FairThreads(PREPARED_AT_ONCE, len(os.sched_getaffinity(0)), "prepare")
        self._unproved: OrderedDict[_Connection, None] = OrderedDict()
        self._blocked: deque[_Connection] = deque()  # these want to be told when they can write
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        for each in listening:
            each.setblocking(False)
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = Thread(target=self._run_or_die, name="road", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._preparing.shutdown()

    def wait_to_write(self, connection: _Connection) -> None:
        """Any thread: call `connection.write_more` when it takes bytes again."""
        self._blocked.append(connection)
        os.eventfd_write(self._wake, 1)

    # ------------------------------------------------------------------ the road's thread

    def _run_or_die(self) -> None:
        try:
            self._run()
        except BaseException:  # a runner that hears nobody is useless, and only its end would be noticed
            log.critical("the road's thread failed", exc_info=True)
            logging.shutdown()
            os._exit(1)

    def _run(self) -> None:
        while not self._closing:
            for key, events in self._selector.select():
                if isinstance(key.data, _Connection):
                    self._attend(key.data, events)
                elif key.fd == self._wake:
                    os.eventfd_read(self._wake)
                    while self._blocked:
                        self._watch(self._blocked.popleft(), selectors.EVENT_READ | selectors.EVENT_WRITE)
                else:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Connection):
                self._end(key.data)
            elif key.fd != self._wake:
                key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        os.close(self._wake)

    def _accept(self, listening: socket.socket) -> None:
        try:
            accepted, _ = listening.accept()
        except OSError as error:  # it left at once, or there is no free file descriptor
            log.warning("a connection was not accepted: %s", error)
            return
        accepted.setblocking(False)
        if accepted.family != socket.AF_UNIX:
            road.keep_alive(accepted)
        connection = _Connection(accepted, self)
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        self._unproved[connection] = None
        if len(self._unproved) > MOST_UNPROVED:
            self._end(next(iter(self._unproved)))

    def _attend(self, connection: _Connection, events: int) -> None:
        if connection.gone:
            return
        if events & selectors.EVENT_WRITE and connection.write_more():
            self._watch(connection, selectors.EVENT_READ)
            self._replica.resume()
        if events & selectors.EVENT_READ:
            try:
                data = connection.socket.recv(READ_BYTES)
                if not data:
                    raise ConnectionError("it left")
                for kind, payload in connection.reader.frames(data):
                    self._take(connection, kind, payload)
            except BlockingIOError:
                pass
            except OSError as error:
                if isinstance(error, BrokenFrame) and connection not in self._unproved:  # strangers would fill the log
                    log.warning("a connection is ended: %s", error)
                self._end(connection)

    def _watch(self, connection: _Connection, events: int) -> None:
        if not connection.gone:
            self._selector.modify(connection.socket, events, connection)

    def _end(self, connection: _Connection) -> None:
        """Close it, and drop its job: nobody reads the rest."""
        self._unproved.pop(connection, None)
        self._selector.unregister(connection.socket)
        if (job := connection.close()) is not None:
            self._replica.drop(job)

    def _take(self, connection: _Connection, kind: int, payload: bytes) -> None:
        if connection.answering:
            raise BrokenFrame("a frame came in the middle of an answer")
        if kind == Kind.PROOF:
            lease_id = self.endpoint.proved(payload)
            if lease_id is None:
                raise BrokenFrame("a proof was wrong")
            self._unproved.pop(connection, None)
            connection.lease_id = lease_id
            connection.reader.longest_bytes = road.LONGEST_ASK_BYTES
            return
        if not connection.lease_id:
            raise BrokenFrame("a request came without a proof")
        lease_id, connection.lease_id = connection.lease_id, LeaseId("")  # one request for each proof
        request: GenerateRequest | EmbedRequest
        try:
            if kind == Kind.GENERATE:
                request = road.read_generate(payload, lease_id)
                hearer: _Answer | _Vectors = _Answer(connection, reply_in(request.reply))
            elif kind == Kind.EMBED:
                request = road.read_embed(payload, lease_id)
                hearer = _Vectors(connection)
            else:
                raise BrokenFrame(f"a frame of kind {kind}")
        except (ValueError, TypeError, KeyError) as error:
            raise BrokenFrame(f"a request cannot be read ({error})") from error
        connection.answering = True
        connection.errand = Errand()
        self._preparing.submit(request.source, partial(self._answer, connection, request, hearer))

    # ------------------------------------------------------------------ threads that prepare

    def _answer(
        self, connection: _Connection, request: GenerateRequest | EmbedRequest, hearer: _Answer | _Vectors
    ) -> None:
        if connection.gone:  # while it waited for a thread
            return
        try:
            job = self._replica.prepare(request, hearer, connection.errand)
            if connection.begin(job):
                self._replica.submit(job)
            else:
                job.end()
        except ArrieroError as error:
            hearer.end(error)
        except Exception as error:
            log.exception("a request failed")
            hearer.end(EngineFailed(f"the runner failed: {type(error).__name__}: {error}"))


class _Connection:
    """A gateway's connection. Any thread may write to it."""

    def __init__(self, connected: socket.socket, listener: Listener) -> None:
        self.socket = connected
        self.reader = FrameReader(LONGEST_PROOF_BYTES)
        self.lease_id = LeaseId("")  # proved, for the next request
        self.answering = False
        self.gone = False
        self.errand = Errand()  # of the request under way
        self._listener = listener
        self._lock = Lock()
        self._job: Work | None = None
        self._unsent = bytearray()

    @property
    def stalled(self) -> bool:
        return bool(self._unsent)

    def begin(self, job: Work) -> bool:
        """`job` is what it gets; False when it has left."""
        with self._lock:
            self._job = job
            return not self.gone

    def close(self) -> Work | None:
        """Closes it; returns the job that nobody waits for any more."""
        with self._lock:
            self.gone = True
            self._unsent.clear()
            self.socket.close()
            self.errand.end()
            job, self._job = self._job, None
            return job

    def write(self, data: bytes, *, last: bool = False) -> None:
        """`last`: the answer ends with it, and the connection is free."""
        with self._lock:
            if last:
                self._job = None
                self.answering = False
            if self.gone:
                return
            if self._unsent:
                self._unsent += data
                return
            self._unsent += data[self._send(data) :]
            kept = bool(self._unsent)
        if kept:
            self._listener.wait_to_write(self)

    def write_more(self) -> bool:
        """Sends what was kept; True when nothing is left."""
        with self._lock:
            del self._unsent[: self._send(self._unsent)]
            return not self._unsent

    def _send(self, data: bytes | bytearray) -> int:
        """How many bytes were taken. All of them if nobody is there any more, which the road's thread will notice."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)


class _Answer:
    """Sends the chunks of one generation."""

    def __init__(self, connection: _Connection, reply: AnyReply) -> None:
        self._connection = connection
        self._reply = reply
        self._said = b""  # in this turn
        self._last: Chunk | None = None
        self._ended = False

    @property
    def stalled(self) -> bool:
        return self._connection.stalled

    def say(self, chunk: Chunk) -> None:
        if self._ended:  # one of several answers, after the request has failed
            return
        if data := self._reply.bytes_of(chunk):
            self._said += packed(Kind.EVENT, data)
        if chunk.finish_reason is not None and not chunk.left:
            self._last = chunk

    def flush(self) -> None:
        if self._said:
            self._connection.write(self._said)
            self._said = b""

    def close(self) -> None:
        """It holds nothing."""

    def end(self, error: BaseException | None) -> None:
        if self._ended:
            return
        self._ended = True
        last, said = self._last, self._said
        self._said = b""
        if last is not None and error is None:
            counts = TokenCounts(last.prompt_tokens, last.cached_tokens, last.completion_tokens, last.pace)
            self._connection.write(said + packed(Kind.ENDED, road.packed_counts(counts)), last=True)
        else:
            self._connection.write(said + _failed(error), last=True)


class _Vectors:
    """Sends the vectors of one embedding."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._said: list[bytes] = []
        self._prompt_tokens = 0
        self._complete = False

    @property
    def stalled(self) -> bool:
        return self._connection.stalled

    def say(self, embedded: Embedded) -> None:
        self._prompt_tokens += embedded.prompt_tokens
        self._complete = not embedded.left
        self._said.append(packed(Kind.VECTOR, embedded.vector.tobytes()))

    def flush(self) -> None:
        if self._said:
            self._connection.write(b"".join(self._said))
            self._said.clear()

    def close(self) -> None:
        """It holds nothing."""

    def end(self, error: BaseException | None) -> None:
        if error is None and self._complete:
            self._said.append(packed(Kind.ENDED, road.packed_counts(TokenCounts(self._prompt_tokens))))
        else:
            self._said.append(_failed(error))
        self._connection.write(b"".join(self._said), last=True)


def _failed(error: BaseException | None) -> bytes:
    """`error`: None for an answer that was cancelled."""
    if not isinstance(error, ArrieroError):
        error = EngineFailed(str(error) if error is not None else "the answer was cancelled")
    return packed(Kind.FAILED, road.packed_error(error))
