"""The tokens' road: what a gateway and a runner say to each other, in frames on a socket of the runner's own.

    gateway                          runner
    PROOF lease                   -> (nothing; a wrong one ends the connection)
    GENERATE head, content        -> EVENT* ENDED counts, or FAILED error
    EMBED head, content           -> VECTOR* ENDED counts, or FAILED error
    (ends the connection)         -> (cancels the answer)

A connection carries one answer at a time, and may be used again once that has ended. EVENT is for the client, byte by
byte; VECTOR is an array of 4-byte floats. A runner that dies ends the connection. Nothing is pickled.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict
from enum import IntEnum
from typing import Any

from actors.leasing import TokenCounts
from actors.serving.protocol import EmbedRequest, GenerateRequest, ReplyForm, Sampling
from scheduler.costs.paces import Pace
from scheduler.errors import ERRORS, ArrieroError, EngineFailed
from scheduler.units import MIB, LeaseId

LONGEST_ASK_BYTES = 64 * MIB
"""A body of 32 MiB, written anew: text with characters that JSON must escape may grow."""


LONGEST_MESSAGE = 4000  # characters of an error's

KEEPALIVE = {socket.TCP_KEEPIDLE: 2, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
"""Seconds, seconds, times: a machine without power is noticed within 8 s, about as soon as Ray notices it."""


class Kind(IntEnum):
    PROOF = 1
    GENERATE = 2
    EMBED = 3
    EVENT = 4
    VECTOR = 5
    ENDED = 6
    FAILED = 7


def keep_alive(connection: socket.socket) -> None:
    """For a connection between machines."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def packed_generate(request: GenerateRequest) -> tuple[bytes, bytes]:
    """Payload of GENERATE in two parts: a line of JSON, and the content. The lease is in the proof."""
    sampling = asdict(request.sampling)
    if request.sampling.logit_bias is not None:
        sampling["logit_bias"] = list(request.sampling.logit_bias.items())  # JSON has no numbers as keys
    head = {
        "max_tokens": request.max_tokens,
        "stop": request.stop,
        "sampling": sampling,
        "reply": asdict(request.reply),
        "source": request.source,
        "n": request.n,
        "n_probs": request.n_probs,
        "echo": request.echo,
        "lora": request.lora,
    }
    return json.dumps(head).encode() + b"\n", request.content


def read_generate(payload: bytes, lease_id: LeaseId) -> GenerateRequest:
    """The reverse. Raises ValueError, TypeError or KeyError for what is none."""
    line, _, content = payload.partition(b"\n")
    head = json.loads(line)
    sampling = head["sampling"]
    if sampling["logit_bias"] is not None:
        sampling["logit_bias"] = dict(sampling["logit_bias"])
    for name in ("samplers", "dry_sequence_breakers"):
        sampling[name] = tuple(sampling[name])
    return GenerateRequest(
        content,
        lease_id,
        max_tokens=head["max_tokens"],
        stop=tuple(head["stop"]),
        sampling=Sampling(**sampling),
        reply=ReplyForm(**head["reply"]),
        source=head["source"],
        n=head["n"],
        n_probs=head["n_probs"],
        echo=head["echo"],
        lora=None if head["lora"] is None else tuple((which, scale) for which, scale in head["lora"]),
    )


def packed_embed(request: EmbedRequest) -> tuple[bytes, bytes]:
    """Payload of EMBED in two parts: a line of JSON, and the content."""
    head = {"source": request.source, "dimensions": request.dimensions, "rerank": request.rerank}
    return json.dumps(head).encode() + b"\n", request.content


def read_embed(payload: bytes, lease_id: LeaseId) -> EmbedRequest:
    """The reverse. Raises ValueError, TypeError or KeyError for what is none."""
    line, _, content = payload.partition(b"\n")
    head = json.loads(line)
    return EmbedRequest(content, lease_id, head["source"], head["dimensions"], head["rerank"])


def packed_counts(counts: TokenCounts) -> bytes:
    """Payload of ENDED."""
    return json.dumps(asdict(counts)).encode()


def read_counts(payload: bytes) -> TokenCounts:
    told: dict[str, Any] = json.loads(payload)
    pace = told.pop("pace")
    return TokenCounts(**told, pace=Pace(**pace) if pace is not None else None)


_BY_CODE = {kind.code: kind for kind in ERRORS}


def packed_error(error: ArrieroError) -> bytes:
    """Payload of FAILED."""
    message = error.message[:LONGEST_MESSAGE]  # it may quote what a client sent
    told = {"code": error.code, "message": message, "details": error.details}
    return json.dumps(told, default=str).encode()


def read_error(payload: bytes) -> ArrieroError:
    told: dict[str, Any] = json.loads(payload)
    return _BY_CODE.get(told["code"], EngineFailed)(told["message"], **told["details"])
