"""All limits on what clients may send and hold, in one place. docs/http_api.md tells them to people."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from actors.gateway.errors import BodyTooLarge, TooMuchHeld
from scheduler.units import KIB, MIB, format_bytes

MAX_BODY_BYTES = 32 * MIB
MAX_ORDER_BYTES = 64 * KIB  # of /api/v1: a name and a number

MAX_CONTENT_BYTES = 60 * MIB
"""Of a request as it goes to a runner, which takes 64 MiB: numbers such as 1e15 are written anew, and grow."""

INLINE_BYTES = 4 * KIB
"""Bodies up to this size are read on the event loop. The worst of them (1,000 lists of one token) took 0.3 ms there,
less than any request costs. Of 64 KiB they took 4 ms, or 45 on a busy machine, and a hundred clients starved all
others. Larger ones go to a process of their own, which costs 1 ms more."""

PARSE_CPU_S = 5
"""Processor time for reading a large body. 32 MiB took 0.3 s as text, 2 s as token ids."""

PARSE_S = 60.0  # the same by the clock, on a machine whose cores are all busy with models

PARSE_DATA_BYTES = 512 * MIB
"""Memory of the process that reads large bodies. 32 MiB need 310 MiB as text, 340 MiB as token ids."""

MAX_HELD_BYTES = 256 * MIB
"""Of all large requests together, from their first byte until they are answered. Waiting requests are held, too: this
is room for 500 prompts of 128,000 tokens. One source (an API key, or an address) may have half of it."""

MAX_HEAD_BYTES = 32 * KIB  # request line and headers; 8,000 empty headers cost 30 ms
MAX_HEAD_LINES = 128  # 7,900 short headers took 17 ms of the event loop, each time
MAX_QUERY_PARTS = 64  # 8,000 took 13 ms
FREE_LINES, MIN_LINE_BYTES = MAX_HEAD_LINES + 64, 256
"""Of a request whose body comes in chunks: so many lines, and then one for so many bytes. 8 KiB of it cost h11 17 ms in
chunks of one byte, 0.64 in chunks of 150 and 0.19 in chunks of 512. Who writes chunks at all writes kilobytes."""

HEAD_S = 20.0  # from a connection's (or a request's) first moment to the end of its headers
BODY_S = 60.0  # from there to the end of the body: 32 MiB at 4.5 Mbit/s
STALL_S = 60.0
"""A client that takes nothing for so long holds a slot that others wait for: it counts as gone."""

REST_S, REST_BYTES = 2.0, 64 * KIB
"""Of a body in chunks whose request was answered already: so much is still read, and the connection is closed soon."""

FETCH_S = 15.0  # of one file at an address
MAX_FETCH_WAIT_S = 60.0  # of all files of a request, with the wait for their turn
MAX_REDIRECTS = 3
MAX_ADDRESS_LENGTH = 4096  # characters; signed addresses of storage services have up to 2,000
MAX_FETCHED_BYTES = 20 * MIB
"""Of all files of a request. Their base64 is copied several times on the event loop, 60 ms each for 56 MiB."""
FETCHES, FETCHES_OF_ONE = 4, 2
"""At a time, and those of one source. Each takes up to 47 MiB, the file and its base64, until the request holds it."""

KEEP_ALIVE_S = 75  # longer than clients keep idle connections pooled, so that they never reuse one being closed

MAX_CONNECTIONS = 4096
MAX_FOLLOWERS = 64
MAX_FOLLOWERS_OF_ONE = 16
"""Of the events. Each is woken for every notice; people and monitors are a handful."""

RETRY_S = 5.0  # a guess: answers and connections end within seconds


def connection_limit() -> int:
    """`MAX_CONNECTIONS`, or what the process's open files allow: a quarter of them is left for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft * 3 // 4)


def connection_limit_of_address() -> int:
    """A web interface or a reverse proxy opens one connection per user who waits, all from one address; so does
    loopback. Half of all is far above that, and leaves the other half for others."""
    return connection_limit() // 2


class Held:
    """Counts the bytes of large requests that the gateway holds."""

    def __init__(self, limit_bytes: int = MAX_HELD_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0
        self._of: Counter[str] = Counter()  # sources

    @contextmanager
    def request(self, source: str, max_body_bytes: int) -> Iterator[HeldBody]:
        """The share of one request of `source`, until it is answered."""
        body = HeldBody(self, source, max_body_bytes)
        try:
            yield body
        finally:
            self.count(source, -body.counted_bytes)
            if not self._of[source]:
                del self._of[source]

    def count(self, source: str, more_bytes: int) -> None:
        """`source` holds so much more. Raises TooMuchHeld."""
        for whose, held_bytes, limit_bytes in (
            ("", self.held_bytes, self._limit_bytes),
            (" of yours", self._of[source], self._limit_bytes // 2),
        ):
            if more_bytes > 0 and held_bytes + more_bytes > limit_bytes:
                raise TooMuchHeld(
                    f"the gateway holds {format_bytes(held_bytes)} of large requests{whose} (waiting or running); "
                    f"the maximum is {format_bytes(limit_bytes)}; try again later",
                    retry_after_s=RETRY_S,
                )
        self.held_bytes += more_bytes
        self._of[source] += more_bytes


class HeldBody:
    """The share of one request in `Held`. The first `INLINE_BYTES` are not counted: small requests always get in, and
    the number of connections bounds them."""

    def __init__(self, held: Held, source: str, max_body_bytes: int) -> None:
        self._held = held
        self._source = source
        self._max_body_bytes = max_body_bytes
        self._seen_bytes = 0
        self.counted_bytes = 0

    def add(self, n_bytes: int) -> None:
        """Count `n_bytes` more. Raises BodyTooLarge, or TooMuchHeld."""
        self._seen_bytes += n_bytes
        if self._seen_bytes > self._max_body_bytes:
            raise too_large(self._max_body_bytes)
        more = max(0, self._seen_bytes - INLINE_BYTES) - self.counted_bytes
        self._held.count(self._source, more)
        self.counted_bytes += more

    def hold(self, n_bytes: int) -> None:
        """Count bytes of the answer. Raises TooMuchHeld."""
        self._held.count(self._source, n_bytes)
        self.counted_bytes += n_bytes


def too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {format_bytes(limit_bytes)}, the limit of this route")
