"""The command line without a service: options over the catalogue, clear errors, listings for people and machines."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arriero import machine
from arriero.api import GpuStatus, LayoutShare, Notice, Plan, PlanShare, PlanVictim, QueueEntry, ReplicaStatus, Status
from arriero.cli import cluster, observe, plan
from arriero.cli.main import app, main
from arriero.machine import Remembered, cluster_address, forget, recall, remember, state_path
from scheduler.errors import Rejected, Unavailable, UnknownModel
from scheduler.units import GIB

runner = CliRunner()

REPLICA = ReplicaStatus(
    replica_id="m-1", model="m", state="ready", node="box", n_gpu_layers=20, n_ctx=4096, slots=2, active=0, n_threads=4,
    idle_s=12.0,
    layout=[LayoutShare(device="gpu0", layers=20, bytes=GIB), LayoutShare(device="host", layers=13, bytes=2 * GIB)],
)  # fmt: skip
STATUS = Status(
    version="1", uptime_s=1.0, mode="shared", replicas=[REPLICA],
    gpus=[
        GpuStatus(
            device_id="d", node_id="n", label="gpu0", product="card", kind="cuda", total_bytes=8 * GIB,
            free_bytes=5 * GIB, used_bytes=3 * GIB, booked_bytes=GIB, foreign_bytes=2 * GIB,
            utilisation=0.5, temperature_c=61.0, state="ok",
        )
    ],
    queue=[QueueEntry(request_id="r", model="other", waited_s=3.0, reason="waiting for m (busy)")],
)  # fmt: skip
PLAN = Plan(
    model="m", verdict="evict", tier="one GPU", node="box",
    shares=[PlanShare(device="gpu0", layers=33, bytes=5 * GIB, free_before_bytes=GIB, free_after_bytes=2 * GIB)],
    victims=[PlanVictim(replica_id="v-1", model="v", idle_s=40.0, frees={"gpu0": 6 * GIB})],
    reasons=["one GPU (gpu1): needs 5.0 GiB on gpu1; 1.0 GiB free of 4.0 GiB"],
)  # fmt: skip


NOTICES = [
    Notice(seq=1, at_s=0, kind="node_joined", message="box joined"),
    Notice(seq=2, at_s=1, kind="placed", message="m: one GPU: gpu0", model="m", replica_id="m-1"),
    Notice(seq=3, at_s=2, kind="placed", message="v: one GPU: gpu1", model="v", replica_id="v-1"),
    Notice(seq=4, at_s=3, kind="replica_evicted", message="m is evicted for v", model="m", replica_id="m-1"),
    Notice(seq=5, at_s=4, kind="placed", message="m: CPU only", model="m", replica_id="m-2"),
]


class Gateway:
    """Answers as the client would."""

    def events(self, *, after: int = 0, follow: bool = True) -> Iterator[Notice]:
        yield from NOTICES[after:]

    def status(self) -> Status:
        return STATUS

    def plan(self, model: str, *, n_ctx: int | None = None) -> Plan:
        if model != "m":
            raise UnknownModel(f"no model named {model!r}; did you mean 'm'?")
        return PLAN


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def client(url: str | None) -> Iterator[Gateway]:
        yield Gateway()

    monkeypatch.setattr(observe, "client", client)
    monkeypatch.setattr(plan, "client", client)
    monkeypatch.setattr(observe.console, "width", 160)


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def output(*arguments: str, status: int = 0) -> str:
    result = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return str(result.output)


@pytest.mark.usefixtures("gateway")
def test_ps_says_where_layers_lie_and_what_is_waited_for() -> None:
    text = output("ps")
    assert "20 layers on gpu0, 13 in host RAM" in text
    assert "waiting 3 s for other: waiting for m (busy)" in text


@pytest.mark.usefixtures("gateway")
def test_gpus_tells_foreign_memory_apart() -> None:
    text = output("gpus")
    assert "1.0 GiB" in text and "2.0 GiB" in text and "61 °C" in text


@pytest.mark.usefixtures("gateway")
def test_plan_explains_itself_with_numbers() -> None:
    text = output("plan", "m")
    assert "fits after evicting" in text
    assert "evicts v (idle 40 s), which frees 6.0 GiB on gpu0" in text
    assert "needs 5.0 GiB on gpu1" in text


@pytest.mark.usefixtures("gateway")
def test_why_tells_the_story_of_one_replica() -> None:
    text = output("why", "m-1")
    assert "m: one GPU: gpu0" in text and "m is evicted for v" in text
    assert "CPU only" not in text and "v: one GPU" not in text and "joined" not in text
    newest = output("why", "m")
    assert "CPU only" in newest and "makes room" not in newest
    with pytest.raises(UnknownModel, match="no notices about a replica or model 'x'"):
        output("why", "x")


@pytest.mark.usefixtures("gateway")
def test_events_of_one_model() -> None:
    text = output("events", "--model", "v")
    assert "v: one GPU: gpu1" in text and "m makes room" not in text and "joined" not in text


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("call", [("ps",), ("gpus",), ("plan", "m")])
def test_every_listing_prints_json_and_nothing_else(call: tuple[str, ...]) -> None:
    assert json.loads(output(*call, "--json"))


@pytest.mark.usefixtures("gateway")
def test_an_error_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["arriero", "plan", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: no model named 'x'; did you mean 'm'?\n"


def settings(**options: Any) -> Any:
    given = dict.fromkeys(("models", "catalogue", "host", "port", "api_key", "virtual_gpus"))
    return cluster._settings(**(given | {"single": False} | options))


def test_options_win_over_the_catalogue(tmp_path: Path) -> None:
    file = tmp_path / "arriero.yaml"
    file.write_text("model_paths: [/srv/models]\nserver: {port: 9000}\npolicy: {keep_alive_s: 1}\n")
    with pytest.raises(Rejected, match=r"unknown key policy.keep_alive_s"):
        settings(catalogue=file)
    file.write_text("model_paths: [/srv/models]\nserver: {port: 9000}\npolicy: {lease_ttl_s: 5}\n")
    chosen = settings(catalogue=file, port=9001, models=["extra"], single=True, virtual_gpus="1GiB,64MiB")
    assert chosen.server.port == 9001
    assert chosen.model_paths == ("/srv/models", str(Path("extra").absolute()))
    assert chosen.policy.max_active_models == 1 and chosen.policy.lease_ttl_s == 5
    assert chosen.virtual_gpus == (GIB, 64 << 20)


def test_without_models_and_catalogue_the_usual_folder_is_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings().model_paths == ("~/models",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: [", "is not valid YAML"),
        (b"\xff\xfe", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (b"- 1", "is a mapping"),
        (b"modles: {}", "did you mean models"),
    ],
)
def test_a_bad_catalogue_names_the_file_and_the_fault(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    with pytest.raises(Rejected, match=said) as refused:
        cluster.load_catalogue(file)
    assert str(file) in refused.value.message


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:1/\n", "http://127.0.0.1:port"])
def test_a_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(Rejected, match=r"is not the URL of an Arriero gateway, such as http://127\.0\.0\.1:11535"):
        output("ps", "--url", url)


def test_a_key_that_cannot_be_sent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_API_KEY", "schlüssel")
    with pytest.raises(Rejected, match="printable ASCII"):
        output("ps", "--url", "http://127.0.0.1:1")


def test_a_size_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(Rejected, match=r"--virtual-gpus: '12 bananas' is not a size"):
        settings(virtual_gpus="12 bananas")


def test_another_distribution_s_scheduler_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster.check_packages()  # this environment is sound
    stranger = types.ModuleType("scheduler")
    stranger.__file__ = str(tmp_path / "scheduler" / "__init__.py")
    monkeypatch.setitem(sys.modules, "scheduler", stranger)
    monkeypatch.setattr(cluster.importlib.metadata, "packages_distributions", lambda: {"scheduler": ["cronlike"]})
    with pytest.raises(Rejected, match=r"'scheduler'.*the distribution cronlike"):
        cluster.check_packages()


def test_the_address_of_a_job_server_is_none_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert cluster_address(None) == ""  # it is there for `ray job submit`
    assert cluster_address("head:6379") == "head:6379"
    with pytest.raises(Rejected, match=r"job server.*HOST:6379"):
        cluster_address("http://head:8265")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address(None) == "head:6379"


@pytest.mark.parametrize("address", ["x", "ray://head:10001", "head:", ":6379", "head:port", "a b:1"])
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Rejected, match="is not the address of a Ray cluster; write it as HOST:6379"):
        cluster_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Rejected, match="is not the address of a Ray cluster"):
        cluster_address(None)


def test_a_cluster_that_does_not_answer_is_named() -> None:
    for command in ("up", "down"):
        with pytest.raises(Unavailable, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused"):
            output(command, "--address", "127.0.0.1:1")


def test_an_open_gateway_is_refused_before_a_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "connect", lambda *_, **__: pytest.fail("it connects to Ray"))
    with pytest.raises(Rejected, match=r"0\.0\.0\.0"):
        output("up", "--host", "0.0.0.0")


def test_the_state_file_is_private_and_forgets() -> None:
    state = Remembered(url="http://127.0.0.1:1", api_key="secret-key", ray_pid=1)
    remember(state)
    assert recall() == state
    assert state_path().stat().st_mode & 0o777 == 0o600
    assert state.ray_process is None  # pid 1 is not a Ray that was started then
    forget()
    assert recall() == Remembered()
    state_path().write_text("{broken")
    assert recall() == Remembered()


def test_up_goes_on_showing_events_when_the_gateway_was_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    class Restarting(Gateway):
        def events(self, *, after: int = 0, follow: bool = True) -> Iterator[Notice]:
            asked.append(after)
            yield from [notice for notice in NOTICES if notice.seq > after][:2]
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            raise Unavailable("the gateway has gone")

    @contextmanager
    def fake(url: str) -> Iterator[Restarting]:
        yield Restarting()

    monkeypatch.setattr(cluster, "client", fake)
    monkeypatch.setattr(cluster, "FOLLOW_AGAIN_S", 0.01)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        cluster._follow("http://127.0.0.1:1")
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert asked == [0, 2, 4]
    shown = capsys.readouterr().out
    assert [shown.count(notice.message) for notice in NOTICES] == [1] * len(NOTICES)
