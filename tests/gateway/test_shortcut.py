"""Streams through a real gateway from a real listener: what takes the shortcut, and what must not."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import h11
import httpx
import pytest
from gateway_fakes import all_of, connect, running
from granting import NODE, TTL_S, Granting
from scripted_replica import ScriptedReplica

from actors.gateway.app import make_app
from actors.gateway.connections import Connection
from actors.serving.listener import Listener


class Stage:
    """`taken` and `refused`: parts of answers that took the shortcut, and that wanted to."""

    def __init__(self, url: str, replica: ScriptedReplica, listener: Listener) -> None:
        self.url, self.replica = url, replica
        self.listener: Listener | None = listener
        self.taken = self.refused = 0

    def close(self) -> None:
        """The runner goes."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    replica = ScriptedReplica()
    listener = Listener(replica, NODE, "127.0.0.1")
    with running(make_app(Granting(listener.endpoint), pulse_s=0.2)) as (url, _):
        stage = Stage(url, replica, listener)
        take = Connection.take

        def counting(connection: Connection, data: bytes) -> bool:
            taken = take(connection, data)
            stage.taken, stage.refused = stage.taken + taken, stage.refused + (not taken)
            return taken

        monkeypatch.setattr(Connection, "take", counting)
        yield stage
        stage.close()


def ask(prompt: str, version: str = "1.1") -> bytes:
    body = json.dumps({"model": "m", "prompt": prompt, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def texts(stream: bytes) -> list[str]:
    """Of the events of a whole answer."""
    lines = [line for line in stream.decode().split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]


@pytest.mark.slow
def test_long_answers_take_it_and_come_whole_and_in_order(stage: Stage) -> None:
    said = [str(number) for number in range(3000)]
    client = h11.Connection(h11.CLIENT)
    with contextlib.closing(connect(stage.url)) as connection:
        for _ in range(2):  # the connection is as good as before
            body = b""
            request = {"model": "m", "prompt": " ".join(said), "stream": True}
            content = json.dumps(request).encode()
            head = [("Host", "localhost"), ("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
            head_event = h11.Request(method="POST", target="/v1/completions", headers=head)
            for event in (head_event, h11.Data(data=content), h11.EndOfMessage()):
                connection.sendall(client.send(event) or b"")
            while not isinstance(event := client.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    client.receive_data(connection.recv(65536))
                elif isinstance(event, h11.Data):
                    body += event.data
            assert texts(body) == [*said, ""]
            client.start_next_cycle()
    assert stage.taken > 10


def test_answers_that_are_not_sent_in_chunks_do_not_take_it(stage: Stage) -> None:
    said = [str(number) for number in range(500)]
    with contextlib.closing(connect(stage.url)) as connection:
        connection.sendall(ask(" ".join(said), "1.0"))
        head, _, body = all_of(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert texts(body) == [*said, ""]
    assert not stage.taken and stage.refused


@pytest.mark.slow
def test_who_reads_slowly_gets_everything_and_the_replica_waits(stage: Stage) -> None:
    with httpx.stream("POST", f"{stage.url}/v1/completions", content=ask("flood").split(b"\r\n\r\n", 1)[1],
                      headers={"Content-Type": "application/json"}, timeout=TTL_S) as answer:  # fmt: skip
        before, quiet = -1, 0
        while quiet < 10:  # until what lies between is full
            quiet = quiet + 1 if stage.replica.said == before else 0
            before = stage.replica.said
            time.sleep(0.1)
        assert 0 < before < 90_000, "it went on saying what nobody read"
        assert stage.taken and stage.refused
        assert texts(answer.read()) == ["flood"] * 100_000 + [""]


def test_a_client_that_leaves_ends_the_answer(stage: Stage) -> None:
    with contextlib.closing(connect(stage.url)) as connection:
        connection.sendall(ask("a b c d e f wait"))
        while b'"f"' not in connection.recv(65536):
            pass
    stage.replica.wait_for_end("l1")


@pytest.mark.slow
def test_silence_after_it_is_bridged_and_a_lost_runner_is_told(stage: Stage) -> None:
    with contextlib.closing(connect(stage.url)) as connection:
        connection.sendall(ask("a b c wait"))
        received = b""
        while received.count(b": waiting") < 2:
            received += connection.recv(65536)
        stage.close()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65536)
    assert received.index(b'"c"') < received.index(b": waiting")
    error = json.loads(received[received.index(b'{"error"') :].split(b"\n")[0])["error"]
    assert error["code"] == "engine_failed" and "ended while it answered" in error["message"]


@pytest.mark.slow
def test_events_that_took_it_are_numbered_like_all_others(stage: Stage) -> None:
    """Also those that the gateway adds, when the runner is lost."""
    said = " ".join(str(number) for number in range(3000))
    body = {"model": "m", "input": f"{said} wait", "stream": True}
    with httpx.stream("POST", f"{stage.url}/v1/responses", json=body, timeout=TTL_S) as answer:
        numbers = []
        for line in answer.iter_lines():
            if line == ": waiting" and len(numbers) == 4 + 3000:
                stage.close()
            elif line.startswith("data: "):
                numbers.append(json.loads(line[6:])["sequence_number"])
    assert stage.taken > 10 and numbers == list(range(len(numbers)))
    assert len(numbers) == 4 + 3000 + 2


def test_a_request_that_was_sent_early_is_answered_after_it(stage: Stage) -> None:
    with contextlib.closing(connect(stage.url)) as connection:
        connection.sendall(ask(" ".join(map(str, range(200)))) + ask("second"))
        received = b""
        while received.count(b"[DONE]") < 2:
            received += connection.recv(65536)
    assert received.index(b'"199"') < received.index(b"[DONE]") < received.index(b'"second"')
