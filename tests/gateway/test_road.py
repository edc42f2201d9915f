"""The tokens' road: a real listener and the gateway's connections to it, with a replica that needs no model."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import socket
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_replica import ScriptedReplica

from actors.endpoint import Endpoint
from actors.frames import BrokenFrame, FrameReader, packed, pieces
from actors.gateway.roads import AHEAD_BYTES, Frame, Roads
from actors.leasing import TokenCounts
from actors.road import Kind, packed_counts, packed_error, packed_generate, read_counts, read_error, read_generate
from actors.serving.listener import MOST_UNPROVED, Listener
from actors.serving.protocol import GenerateRequest, ReplyForm, Sampling, content_of
from scheduler.costs.paces import Pace
from scheduler.errors import EngineFailed, Rejected
from scheduler.units import LeaseId, NodeId

T = TypeVar("T")
HERE, THERE = NodeId("here"), NodeId("there")
PATIENCE_S = 60.0
STREAM = ReplyForm(stream=True)


class Stage:
    """A listener on this node, and gateways on it and on another one."""

    def __init__(self) -> None:
        self.replica = ScriptedReplica()
        self.listener = Listener(self.replica, HERE, "127.0.0.1")
        self.endpoint = self.listener.endpoint

    def run(self, scene: Callable[[Roads], Awaitable[T]], node_id: NodeId = HERE) -> T:
        async def whole() -> T:
            roads = Roads(node_id)
            try:
                return await scene(roads)
            finally:
                roads.close()
                await asyncio.sleep(0)

        return asyncio.run(asyncio.wait_for(whole(), PATIENCE_S))

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE_S)
        connection.connect(f"\0{self.endpoint.name}")
        return connection


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.listener.close()


def request(prompt: str) -> tuple[bytes, bytes]:
    return packed_generate(GenerateRequest(content_of(prompt=prompt), reply=STREAM))


async def heard(roads: Roads, endpoint: Endpoint, prompt: str, lease: str = "l1") -> list[Frame]:
    async with contextlib.aclosing(roads.answer(endpoint, LeaseId(lease), Kind.GENERATE, request(prompt))) as answer:
        return [frame async for arrived in answer for frame in arrived]


def words(frames: list[Frame]) -> list[str]:
    """The texts of all events but the last, which says the end."""
    events = [payload for kind, payload in frames if kind == Kind.EVENT]
    return [event.split(b'"text": "')[1].split(b'"')[0].decode() for event in events]


@pytest.mark.parametrize("node_id", [HERE, THERE], ids=["on its node", "over TCP"])
def test_an_answer_comes_whole_and_in_order(stage: Stage, node_id: NodeId) -> None:
    said = " ".join(str(number) for number in range(3000))

    async def scene(roads: Roads) -> None:
        for _ in range(2):  # the second one on the same connection
            *frames, (kind, counts) = await heard(roads, stage.endpoint, said)
            assert words(frames) == [*said.split(), ""]
            assert (kind, read_counts(counts)) == (Kind.ENDED, TokenCounts(1, 0, 2))
        assert [len(idle) for idle in roads._idle.values()] == [1]

    stage.run(scene, node_id)
    assert [one.lease_id for one in stage.replica.asked] == ["l1", "l1"]


def test_errors_come_as_what_they_are(stage: Stage) -> None:
    async def scene(roads: Roads) -> None:
        ((_, refused),) = await heard(roads, stage.endpoint, "refuse")
        error = read_error(refused)
        assert isinstance(error, Rejected) and error.details == {"n_ctx": 4096}
        ((_, crashed),) = await heard(roads, stage.endpoint, "crash")
        assert isinstance(read_error(crashed), EngineFailed) and "a bug" in read_error(crashed).message
        assert words(await heard(roads, stage.endpoint, "well")) == ["well", ""]

    stage.run(scene)


def test_a_frame_larger_than_what_is_read_ahead_arrives(stage: Stage) -> None:
    word = "x" * (10 * AHEAD_BYTES)

    async def scene(roads: Roads) -> None:
        for _ in range(2):
            assert words(await heard(roads, stage.endpoint, f"{word} small")) == [word, "small", ""]

    for node_id in (HERE, THERE):
        stage.run(scene, node_id)


def test_a_refusal_is_told_without_all_that_it_quotes() -> None:
    told = packed_error(Rejected("no " * 1_000_000))
    assert len(told) < 10_000 and read_error(told).message.startswith("no no")


@pytest.mark.slow
def test_a_reader_that_stops_stalls_its_own_answer_alone(stage: Stage) -> None:
    async def scene(roads: Roads) -> None:
        slow = roads.answer(stage.endpoint, LeaseId("slow"), Kind.GENERATE, request("flood"))
        frames = await anext(slow)
        before, quiet = -1, 0
        while quiet < 10:  # until what lies between is full
            quiet = quiet + 1 if stage.replica.said == before else 0
            before = stage.replica.said
            await asyncio.sleep(0.1)
        assert before < 50_000, "it went on saying what nobody read"
        for _ in range(3):
            assert words(await heard(roads, stage.endpoint, "quick", "quick")) == ["quick", ""]
        assert stage.replica.said < before + 10
        async for arrived in slow:
            frames += arrived
        assert words(frames) == ["flood"] * 100_000 + [""]
        assert frames[-1][0] == Kind.ENDED

    stage.run(scene)


def test_leaving_ends_the_answer(stage: Stage) -> None:
    async def scene(roads: Roads) -> None:
        answer = roads.answer(stage.endpoint, LeaseId("left"), Kind.GENERATE, request("one wait"))
        assert words(await anext(answer)) == ["one"]
        await answer.aclose()

    stage.run(scene)
    stage.replica.wait_for_end("left")


@pytest.mark.slow
def test_a_thousand_streams_that_are_opened_and_left(stage: Stage) -> None:
    async def one(roads: Roads, number: int) -> None:
        lease = LeaseId(f"l{number}")
        answer = roads.answer(stage.endpoint, lease, Kind.GENERATE, request("one wait" if number % 2 else "wait"))
        if number % 2:
            await anext(answer)
        else:
            asking = asyncio.ensure_future(anext(answer))  # type: ignore[arg-type]
            await asyncio.sleep(0.001 * (number % 5))
            asking.cancel()
            await asyncio.wait([asking])
        await answer.aclose()

    async def scene(roads: Roads) -> None:
        for first in range(0, 1000, 100):
            await asyncio.gather(*(one(roads, first + number) for number in range(100)))
        assert words(await heard(roads, stage.endpoint, "still here")) == ["still", "here", ""]
        assert sum(map(len, roads._idle.values())) == 1

    stage.run(scene)
    for asked in stage.replica.asked[:-1]:
        stage.replica.wait_for_end(asked.lease_id)


def run_listener(told: Connection) -> None:
    told.send(Listener(ScriptedReplica(), HERE, "127.0.0.1").endpoint)
    told.recv()


@pytest.mark.parametrize("node_id", [HERE, THERE], ids=["on its node", "over TCP"])
@pytest.mark.parametrize("said", [0, 1, 2, 7])
@pytest.mark.slow
def test_a_runner_that_dies_is_noticed_at_any_frame(said: int, node_id: NodeId) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    runner = context.Process(target=run_listener, args=[there])
    runner.start()
    endpoint: Endpoint = here.recv()
    frames: list[Frame] = []

    async def scene() -> None:
        roads = Roads(node_id)
        with pytest.raises(ConnectionError):
            async for arrived in roads.answer(endpoint, LeaseId("l"), Kind.GENERATE, request("w " * said + "die")):
                frames.extend(arrived)
        with pytest.raises(OSError):
            await heard(roads, endpoint, "after")

    asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))
    runner.join()
    assert words(frames) == ["w"] * said


def test_nobody_speaks_without_a_proof(stage: Stage) -> None:
    endpoint = stage.endpoint
    liar = Endpoint(endpoint.node_id, endpoint.name, endpoint.host, endpoint.port, b"guessed")
    proof, ask = endpoint.proof(LeaseId("l")), b"".join(request("word"))
    for frames in (
        packed(Kind.PROOF, liar.proof(LeaseId("l"))) + packed(Kind.GENERATE, ask),
        packed(Kind.PROOF, proof[:-1] + b"m") + packed(Kind.GENERATE, ask),  # another's lease
        packed(Kind.PROOF, b""),
        packed(Kind.PROOF, proof + b"x" * 300),
        packed(Kind.GENERATE, ask),
        packed(Kind.PROOF, proof) + packed(Kind.EVENT, b"x"),
        packed(Kind.PROOF, proof) + packed(Kind.GENERATE, b"no JSON\n{}"),
    ):
        with stage.connect() as connection:
            connection.sendall(frames)
            assert connection.recv(100) == b"", frames
    assert stage.replica.asked == []
    with stage.connect() as connection:  # one request for each proof
        connection.sendall(packed(Kind.PROOF, proof) + packed(Kind.GENERATE, b"".join(request("wait"))))
        connection.sendall(packed(Kind.GENERATE, ask))
        assert connection.recv(100) == b""
    assert len(stage.replica.asked) == 1
    assert "guessed" not in repr(liar)


def test_garbage_ends_its_connection_and_nothing_else(stage: Stage) -> None:
    chance = random.Random(1)
    proof = packed(Kind.PROOF, stage.endpoint.proof(LeaseId("l")))
    for number in range(200):
        with stage.connect() as connection:
            if number % 2:
                connection.sendall(proof)
            with contextlib.suppress(OSError):
                connection.sendall(chance.randbytes(chance.randrange(1, 2000)))
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    answer: list[Frame] = stage.run(lambda roads: heard(roads, stage.endpoint, "well"))
    assert words(answer) == ["well", ""]


def test_silent_strangers_keep_nobody_out(stage: Stage) -> None:
    with contextlib.ExitStack() as strangers:
        silent = [strangers.enter_context(stage.connect()) for _ in range(3 * MOST_UNPROVED)]
        answer: list[Frame] = stage.run(lambda roads: heard(roads, stage.endpoint, "well"))
        assert words(answer) == ["well", ""]
        assert silent[0].recv(1) == b"", "the oldest has to go"


@given(
    frames=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=20),
)
def test_frames_are_cut_out_of_any_pieces(frames: list[Frame], cuts: list[int]) -> None:
    sent = b"".join(packed(kind, payload) for kind, payload in frames)
    edges = sorted({0, len(sent), *(min(cut, len(sent)) for cut in cuts)})
    reader = FrameReader()
    read = [sent[start:end] for start, end in pairwise(edges)]
    assert [frame for piece in read for frame in reader.frames(piece)] == frames


@given(
    sizes=st.lists(st.integers(0, 200_000), min_size=1, max_size=5),
    parts=st.integers(1, 3),
    cut=st.integers(1_000, 100_000),
)
@settings(deadline=None, max_examples=50)
def test_large_frames_come_whole_whatever_is_sent_and_read_at_a_time(sizes: list[int], parts: int, cut: int) -> None:
    frames = [(kind, bytes([65 + kind]) * size) for kind, size in enumerate(sizes)]
    sent = b""
    for kind, payload in frames:
        step = len(payload) // parts + 1
        sent += b"".join(pieces(kind, [payload[at : at + step] for at in range(0, len(payload), step)]))
    reader = FrameReader()
    read = [frame for at in range(0, len(sent), cut) for frame in reader.frames(sent[at : at + cut])]
    assert read == frames


def test_a_frame_beyond_the_limit_is_refused() -> None:
    reader = FrameReader(longest_bytes=3)
    assert list(reader.frames(packed(1, b"abc"))) == [(1, b"abc")]
    with pytest.raises(BrokenFrame, match="4 bytes; 3"):
        list(reader.frames(packed(1, b"abcd")))


def test_requests_and_counts_come_through_unchanged() -> None:
    sampling: dict[str, Any] = {"temperature": 0.3, "seed": 7, "logit_bias": {5: -100.0, 9: 2.5}}
    reply = ReplyForm("chat", True, True, "chatcmpl-1", "a model", 17)
    asked = GenerateRequest(b'{"prompt": "a\\nb"}\n', LeaseId("l"), 12, ("\n", "é"), Sampling(**sampling), reply)
    assert read_generate(b"".join(packed_generate(asked)), LeaseId("l")) == asked
    for counts in (TokenCounts(), TokenCounts(1, 2, 3, Pace(1, 0.5, 2, 0.25, 9))):
        assert read_counts(packed_counts(counts)) == counts
