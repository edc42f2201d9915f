"""Runners as real Ray actors: loading, streaming, cancelling, and dying, on one small cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from patience import wait_until

from actors.devices.byte_count import ByteCount
from actors.endpoint import Endpoint
from actors.gateway.roads import Roads
from actors.leasing import TokenCounts
from actors.road import Kind, packed_generate, read_counts, read_error
from actors.serving.protocol import GenerateRequest, LoadDevice, LoadFailure, LoadReport, ReplyForm
from actors.serving.runner import RunnerActor
from scheduler.errors import ArrieroError, EngineFailed, Rejected
from scheduler.units import LeaseId, NodeId

pytestmark = [pytest.mark.ray, pytest.mark.llama]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="serving-tests")
    yield
    ray.shutdown()


@pytest.fixture
def start(cluster: None) -> Iterator[Callable[[], Any]]:
    """`start()`: a runner actor; killed after the test."""
    actors: list[Any] = []

    def make() -> Any:
        actors.append(RunnerActor.options(name=f"runner-{len(actors)}").remote())
        return actors[-1]

    yield make
    for actor in actors:
        ray.kill(actor)


def got(reference: Any) -> Any:
    return ray.get(reference, timeout=60)


Answer = tuple[str, TokenCounts | ArrieroError]
"""Its text, and how it ended."""


async def heard(endpoint: Endpoint, request: GenerateRequest) -> Answer:
    """The whole answer, over the runner's road."""
    roads = Roads(endpoint.node_id)
    payload = packed_generate(request)
    text = b""
    async for arrived in roads.answer(endpoint, LeaseId(request.lease_id), Kind.GENERATE, payload):
        text += b"".join(payload for kind, payload in arrived if kind == Kind.EVENT)
    kind, end = arrived[-1]
    roads.close()
    await asyncio.sleep(0)
    said = json.loads(text)["choices"][0]["text"] if text else ""
    return said, read_counts(end) if kind == Kind.ENDED else read_error(end)


def hear(runner: Any, *requests: GenerateRequest) -> list[Answer]:
    """The answers to requests that are asked at the same time."""
    endpoint = got(runner.introduce.remote()).endpoint

    async def all_of_them() -> list[Answer]:
        return await asyncio.gather(*(heard(endpoint, request) for request in requests))

    return asyncio.run(all_of_them())


def test_loads_on_two_virtual_gpus_and_streams_like_llama_cpp_python(
    start: Any, spec: Any, sample: Any, ask: Any, baseline: Callable[..., str], virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    path = sample("qwen3moe")
    runner = start()
    loaded = spec(path, devices=virtual_gpus, n_gpu_layers=-1, tensor_split=(2.0, 3.0))
    report = got(runner.load.remote("r", loaded))
    assert isinstance(report, LoadReport)
    assert got(runner.introduce.remote()).process.identity == (report.pid, report.process_started_at_s)
    assert hear(runner, ask())[0][0] == baseline(path, ask())
    status = got(runner.describe.remote())
    assert (status.state, status.report, status.active_requests) == ("ready", report, ())
    counts = [ByteCount(gpu.state_path) for gpu in virtual_gpus]
    assert all(count.holders() for count in counts)
    ray.kill(runner)
    wait_until(lambda: not psutil.pid_exists(report.pid))
    wait_until(lambda: not any(count.holders() for count in counts))


def test_expected_failures_are_values(start: Any, spec: Any, sample: Any, ask: Any, tmp_path: Path) -> None:
    runner = start()
    ((_, before),) = hear(runner, ask())
    assert isinstance(before, EngineFailed) and "this runner is idle" in before.message
    assert isinstance(got(runner.load.remote("r", spec(sample("llama")))), LoadReport)
    ((_, refusal),) = hear(runner, ask(prompt=(1,) * 9999))
    assert isinstance(refusal, Rejected)
    assert refusal.details["prompt_tokens"] == 9999
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    failure = got(start().load.remote("r", spec(bad)))
    assert isinstance(failure, LoadFailure)
    assert failure.kind == "invalid_model"


def test_answers_questions_while_it_streams_and_stops_when_cancelled(
    start: Any, spec: Any, sample: Any, ask: Any
) -> None:
    runner = start()
    got(runner.load.remote("r", spec(sample("llama"), n_ctx=8192)))
    endpoint = got(runner.introduce.remote()).endpoint
    long = ask(lease_id="long", max_tokens=None, reply=ReplyForm(stream=True))

    async def leave(by_name: bool) -> None:
        roads = Roads(NodeId("another"))
        answer = roads.answer(endpoint, LeaseId("long"), Kind.GENERATE, packed_generate(long))
        assert (await anext(answer))[0][0] == Kind.EVENT
        assert got(runner.describe.remote()).active_requests == ("long",)
        if by_name:
            assert got(runner.cancel.remote("long"))
            kind = None
            async for arrived in answer:
                kind, _ = arrived[-1]
            assert kind == Kind.FAILED
        await answer.aclose()
        roads.close()
        await asyncio.sleep(0)

    for by_name in (False, True):
        asyncio.run(leave(by_name))
        wait_until(lambda: got(runner.describe.remote()).active_requests == ())
    ((_, ended),) = hear(runner, ask(max_tokens=5))
    assert isinstance(ended, TokenCounts) and ended.completion_tokens == 5


def test_more_callers_than_slots_are_all_served(start: Any, spec: Any, sample: Any, ask: Any) -> None:
    runner = start()
    got(runner.load.remote("r", spec(sample("llama"), n_seq_max=2, n_ctx=1024)))
    answers = hear(runner, *(ask(lease_id=str(index)) for index in range(8)))
    assert len({text for text, _ in answers}) == 1
