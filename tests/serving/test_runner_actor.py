"""Runners as real Ray actors: loading, streaming, cancelling, and dying, on one small cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.devices.byte_count import ByteCount
from actors.serving.protocol import Chunk, EmbedRequest, LoadDevice, LoadFailure, LoadReport, content_of
from actors.serving.runner import RunnerActor
from scheduler.errors import ArrieroError, Rejected

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


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)


def hear(stream: Any) -> list[Chunk | ArrieroError]:
    return [got(reference) for reference in stream]


def test_loads_on_two_virtual_gpus_and_streams_like_llama_cpp_python(
    start: Any, spec: Any, sample: Any, ask: Any, baseline: Callable[..., str], virtual_gpus: tuple[LoadDevice, ...]
) -> None:
    path = sample("qwen3moe")
    runner = start()
    loaded = spec(path, devices=virtual_gpus, n_gpu_layers=-1, tensor_split=(2.0, 3.0))
    report = got(runner.load.remote("r", loaded))
    assert isinstance(report, LoadReport)
    assert got(runner.process.remote()).identity == (report.pid, report.process_started_at_s)
    chunks = hear(runner.generate.remote(ask()))
    assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == baseline(path, ask())
    status = got(runner.describe.remote())
    assert (status.state, status.report, status.active_requests) == ("ready", report, ())
    counts = [ByteCount(gpu.state_path) for gpu in virtual_gpus]
    assert all(count.holders() for count in counts)
    ray.kill(runner)
    wait_until(lambda: not psutil.pid_exists(report.pid))
    wait_until(lambda: not any(count.holders() for count in counts))


def test_expected_failures_are_values(start: Any, spec: Any, sample: Any, ask: Any, tmp_path: Path) -> None:
    runner = start()
    before = hear(runner.generate.remote(ask()))
    assert [type(item).__name__ for item in before] == ["EngineFailed"]
    assert isinstance(got(runner.load.remote("r", spec(sample("llama")))), LoadReport)
    (refusal,) = hear(runner.generate.remote(ask(prompt=(1,) * 9999)))
    assert isinstance(refusal, Rejected)
    assert refusal.details["prompt_tokens"] == 9999
    assert isinstance(got(runner.embed.remote(EmbedRequest(content_of(inputs=["x" * 9999])))), Rejected)
    assert isinstance(got(runner.set_threads.remote(0)), Rejected)
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
    for cancel in ("stream", "name"):
        stream = runner.generate.remote(ask(lease_id="long", max_tokens=None))
        assert isinstance(got(next(stream)), Chunk)
        assert got(runner.describe.remote()).active_requests == ("long",)
        if cancel == "stream":
            ray.cancel(stream)
        else:
            assert got(runner.cancel.remote("long"))
        wait_until(lambda: got(runner.describe.remote()).active_requests == ())
    assert len(hear(runner.generate.remote(ask(max_tokens=5)))) > 1


def test_more_callers_than_slots_are_all_served(start: Any, spec: Any, sample: Any, ask: Any) -> None:
    runner = start()
    got(runner.load.remote("r", spec(sample("llama"), n_seq_max=2, n_ctx=1024)))
    streams = [runner.generate.remote(ask(lease_id=str(index))) for index in range(8)]
    answers = {"".join(item.text for item in hear(stream) if isinstance(item, Chunk)) for stream in streams}
    assert len(answers) == 1
