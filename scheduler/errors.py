"""The error tree. The class says whose fault an error is. The message says the cause and the way out.

    Rejected         the caller: the request cannot be served as asked
    Unavailable      the cluster: not now; `retry_after_s` says when to come back
    EngineFailed     a replica: its process or llama.cpp failed
    InvariantBroken  Arriero itself: the books do not balance

Every error survives pickling (they cross process borders) and carries a stable `code` for machines.
"""

from __future__ import annotations

from typing import Any


class ArrieroError(Exception):
    """Base of all errors. `message` is for people, `code` for machines."""

    code = "error"
    http_status = 500

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(kind: type[ArrieroError], message: str, details: dict[str, Any]) -> ArrieroError:
    error = kind.__new__(kind)
    ArrieroError.__init__(error, message, **details)
    return error


class Rejected(ArrieroError):
    """The request cannot be served as asked. The same request will be refused again."""

    code = "invalid_request"
    http_status = 400


class UnknownModel(Rejected):
    """No model of that name in the catalogue."""

    code = "model_not_found"
    http_status = 404


class InvalidGGUF(Rejected):
    """A file that is not a usable GGUF: `details` holds `path` and `offset` (bytes into the file)."""

    code = "invalid_gguf"
    http_status = 422


class Impossible(Rejected):
    """The request can never fit this cluster, whatever is evicted; the message has the numbers."""

    code = "impossible"
    http_status = 422


class Condemned(Rejected):
    """Two runners ended while they answered this request. It is not tried again."""

    code = "request_condemned"
    http_status = 422


class Unavailable(ArrieroError):
    """The cluster cannot serve the request now. The client may try again after `retry_after_s` seconds."""

    code = "unavailable"
    http_status = 503

    @property
    def retry_after_s(self) -> float:
        return float(self.details.get("retry_after_s", 1.0))


class QueueFull(Unavailable):
    """Too many requests are waiting already."""

    code = "queue_full"
    http_status = 429


class DeadlineExceeded(Unavailable):
    """The request waited longer than its deadline allows."""

    code = "deadline_exceeded"
    http_status = 504


class EngineFailed(ArrieroError):
    """A replica failed: its process ended, or llama.cpp reported an error."""

    code = "engine_failed"
    http_status = 502


class InvariantBroken(ArrieroError):
    """A bug in Arriero: the books do not balance."""

    code = "internal_error"
    http_status = 500


ERRORS: tuple[type[ArrieroError], ...] = (
    Rejected,
    UnknownModel,
    InvalidGGUF,
    Impossible,
    Condemned,
    Unavailable,
    QueueFull,
    DeadlineExceeded,
    EngineFailed,
    InvariantBroken,
)
"""All error classes, to find a class by its `code`."""
