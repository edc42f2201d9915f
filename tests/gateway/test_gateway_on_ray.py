"""The gateway actor and `RayBackend` on a real Ray, with a scripted scheduler and runners that need no model."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

ray = pytest.importorskip("ray")

import scripted_replica  # noqa: E402
from gateway_fakes import MODEL, web  # noqa: E402

from actors.endpoint import Endpoint  # noqa: E402
from actors.gateway.actor import GatewayActor, GatewaySettings  # noqa: E402
from actors.gateway.ray_backend import RayBackend  # noqa: E402
from actors.gateway.server import listen  # noqa: E402
from actors.lease_server import LeaseServer  # noqa: E402
from actors.leasing import Grant  # noqa: E402
from actors.records import Health, Notice  # noqa: E402
from actors.serving.listener import Listener  # noqa: E402
from actors.serving.protocol import GenerateRequest, content_of  # noqa: E402
from arriero import Client  # noqa: E402
from scheduler.errors import EngineFailed, InvariantBroken, Rejected, Unavailable, UnknownModel  # noqa: E402
from scheduler.events import RequestArrived  # noqa: E402
from scheduler.units import LeaseId, NodeId, ReplicaId, RequestId  # noqa: E402

pytestmark = pytest.mark.ray
NAMESPACE = "gateway-tests"
ray.cloudpickle.register_pickle_by_value(scripted_replica)  # workers do not find it
PATIENCE_S = 30.0


@ray.remote(num_cpus=0, max_restarts=1, max_concurrency=20)
class ScriptedScheduler:
    """Grants slots on `replicas` in turn; its journal is what the gateway told it."""

    def __init__(self) -> None:
        self.replicas: list[str] = []
        self.endpoints: dict[str, Endpoint] = {}
        self.journal: list[tuple[Any, ...]] = []
        self.changed = asyncio.Condition()
        self.granted = 0

    async def fate(self, replica_id: str) -> str:
        return f"{replica_id} died: killed"

    async def begin(self, replicas: list[str], endpoints: dict[str, Endpoint]) -> None:
        """A new test, with these replicas in turn."""
        self.endpoints = endpoints
        self.replicas = replicas
        self.journal.clear()
        self.granted = 0

    async def note(self, *entry: Any) -> None:
        async with self.changed:
            self.journal.append(entry)
            self.changed.notify_all()

    async def wait_for(self, what: str) -> tuple[Any, ...]:
        async with self.changed:
            await self.changed.wait_for(lambda: any(entry[0] == what for entry in self.journal))
        return next(entry for entry in self.journal if entry[0] == what)

    async def lease_endpoint(self) -> Endpoint:
        return await LeaseServer(self, NodeId(ray.get_runtime_context().get_node_id()), "127.0.0.1").start()

    async def acquire(self, request: RequestArrived) -> Any:
        await self.note("acquire", request)
        if request.model == "queued":
            await asyncio.Event().wait()
        if request.model != MODEL:
            return UnknownModel(f"no model {request.model!r} in the catalogue")
        replica = self.replicas[self.granted % len(self.replicas)]
        self.granted += 1
        return Grant(LeaseId(f"l{self.granted}"), ReplicaId(replica), self.endpoints[replica], MODEL, 60.0, 4096)

    async def release(self, lease_id: str, ending: str, usage: Any) -> None:
        await self.note("release", lease_id, ending, usage)

    async def renew(self, lease_ids: tuple[str, ...]) -> None:
        await self.note("renew", lease_ids)

    async def cancel(self, request_id: str) -> None:
        await self.note("cancel", request_id)

    async def forget_clients(self) -> None:
        await self.note("forget_clients")

    async def notices(self, after_seq: int) -> list[Notice]:
        return [Notice(seq=seq, at_s=0.0, kind="k", message="m") for seq in range(after_seq + 1, 4)]

    async def health(self) -> Health:
        return Health(status="ok", version=str(os.getpid()))

    async def plan(self, model: str, n_ctx: int | None) -> Any:
        raise ZeroDivisionError("a bug")

    async def models(self) -> Any:
        raise UnknownModel("raised, not returned")

    async def restart(self) -> None:
        os._exit(1)


@ray.remote(num_cpus=0)
class ScriptedRunner:
    """A `ScriptedReplica` behind a real listener."""

    def __init__(self) -> None:
        self.replica = scripted_replica.ScriptedReplica()
        self.listener = Listener(self.replica, ray.get_runtime_context().get_node_id(), "127.0.0.1")

    def pid(self) -> int:
        return os.getpid()

    def endpoint(self) -> Endpoint:
        return self.listener.endpoint

    def has_ended(self, lease_id: str) -> bool:
        return lease_id in self.replica.ended


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=80 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()


class Service:
    """A scheduler, a gateway and a runner that stay; tests that kill a runner start one of their own."""

    def __init__(self) -> None:
        with listen("127.0.0.1", 0) as free, listen("127.0.0.1", 0) as second:
            ports = [each.getsockname()[1] for each in (free, second)]
        self.settings = GatewaySettings(port=ports[0], api_keys={"": "s3cret"}, more_ports=(ports[1],))
        self.endpoints: dict[str, Endpoint] = {}
        self.scheduler = ScriptedScheduler.remote()
        self.gateway = GatewayActor.remote(self.settings, self.scheduler)
        self.runner = self.start_runner("stays")
        self.backend = RayBackend(self.scheduler, NodeId("another"))  # over TCP
        self.client = Client(get(self.gateway.url.remote()), api_key="s3cret")

    def start_runner(self, name: str) -> Any:
        runner = ScriptedRunner.remote()
        self.endpoints[name] = get(runner.endpoint.remote())
        return runner

    def use(self, *replicas: str) -> None:
        get(self.scheduler.begin.remote(list(replicas), self.endpoints))


@pytest.fixture(scope="module")
def service(cluster: None) -> Iterator[Service]:
    service = Service()
    with service.client:
        yield service


@pytest.fixture
def here(service: Service) -> Service:
    service.use("stays")
    return service


def get(reference: Any) -> Any:
    return ray.get(reference, timeout=PATIENCE_S)


def test_it_listens_on_a_second_port_for_ollamas_clients(here: Service) -> None:
    url = f"http://127.0.0.1:{here.settings.more_ports[0]}/api/version"
    assert httpx.get(url, trust_env=False).status_code == 401
    assert httpx.get(url, trust_env=False, headers={"Authorization": "Bearer s3cret"}).json()["version"]


def test_answers_errors_and_embeddings(here: Service) -> None:
    client = here.client
    answer = client.complete(MODEL, "mules carry")
    assert (answer.text, answer.usage.completion_tokens) == ("mulescarry", 2)
    assert list(client.complete(MODEL, "mules carry", stream=True)) == ["mules", "carry"]
    assert client.embed(MODEL, ["a", "b"]).vectors == [[1.0], [1.0]]
    with pytest.raises(UnknownModel, match="'nope'"):
        client.complete("nope", "x")
    with pytest.raises(Rejected, match="5000 tokens") as caught:
        client.complete(MODEL, "refuse")
    assert caught.value.details["n_ctx"] == 4096
    with pytest.raises(Rejected, match="5000 tokens"):
        client.embed(MODEL, "refuse")
    assert [notice.seq for notice in client.events(after=1, follow=False)] == [2, 3]
    following = client.events()
    assert [next(following).seq for _ in range(3)] == [1, 2, 3]
    following.close()
    with pytest.raises(InvariantBroken, match="plan"):
        client.plan(MODEL)
    with pytest.raises(UnknownModel, match="raised, not returned"):
        client.models()


def test_a_runner_that_dies_in_mid_answer_is_named(here: Service) -> None:
    runner = here.start_runner("killed")
    here.use("killed", "stays")
    pieces = iter(here.client.complete(MODEL, "mules wait", stream=True))
    assert next(pieces) == "mules"
    os.kill(get(runner.pid.remote()), signal.SIGKILL)
    with pytest.raises(EngineFailed, match=f"{MODEL}.*ended while it answered.*died: killed"):
        list(pieces)
    assert get(here.scheduler.wait_for.remote("release"))[1:3] == ("l1", "failed")
    assert here.client.complete(MODEL, "carry").text == "carry"


def test_a_runner_that_dies_before_its_first_token_is_replaced(here: Service) -> None:
    runner = here.start_runner("dead")
    here.use("dead", "stays")
    pid = get(runner.pid.remote())
    ray.kill(runner)
    until(lambda: not psutil.pid_exists(pid))
    assert here.client.complete(MODEL, "mules").text == "mules"
    assert get(here.scheduler.wait_for.remote("release"))[1:3] == ("l1", "failed")


def test_a_runner_with_a_bug_is_named(here: Service) -> None:
    with pytest.raises(EngineFailed, match="a bug"):
        here.client.complete(MODEL, "mules crash")


def test_leaving_ends_the_generation_in_the_runner(here: Service) -> None:
    with here.client.complete(MODEL, "mules wait", stream=True) as stream:
        assert next(iter(stream)) == "mules"
    assert get(here.scheduler.wait_for.remote("release"))[1:3] == ("l1", "left")
    until(lambda: get(here.runner.has_ended.remote("l1")))  # a runner knows a request by its lease


def test_leaving_the_queue_is_told(here: Service) -> None:
    body = {"model": "queued", "prompt": "x"}
    url = get(here.gateway.url.remote())
    with pytest.raises(httpx.ReadTimeout):
        web.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer s3cret"}, timeout=0.5)
    request = get(here.scheduler.wait_for.remote("acquire"))[1]
    assert get(here.scheduler.wait_for.remote("cancel"))[1] == request.request_id


def test_a_scheduler_that_restarts_is_asked_again(here: Service) -> None:
    before = here.client.health().version
    here.scheduler.restart.remote()
    until(lambda: here.client.health().version != before)


def test_a_gateway_that_was_closed_or_died_comes_back_at_its_address(here: Service) -> None:
    get(here.gateway.close.remote())
    with pytest.raises(Unavailable, match="`arriero up`"):
        here.client.health()
    ray.kill(here.gateway, no_restart=False)
    until(lambda: answers(here.client))
    get(here.scheduler.wait_for.remote("forget_clients"))
    assert here.client.complete(MODEL, "mules").text == "mules"


def test_unsafe_and_impossible_addresses_fail_at_creation(here: Service) -> None:
    for settings, says in (
        (GatewaySettings(host="0.0.0.0", port=0), "needs an API key"),
        (here.settings, f"port {here.settings.port}"),
    ):
        gateway = GatewayActor.remote(settings, here.scheduler)
        with pytest.raises(ray.exceptions.ActorDiedError, match=says):
            get(gateway.url.remote())
    assert "s3cret" not in repr(here.settings)


def test_a_runner_that_is_not_there(here: Service) -> None:
    async def ask() -> None:
        lease = Grant(LeaseId("l"), ReplicaId("nobody"), None, MODEL, 60.0, 4096)
        async for _ in here.backend.generate(lease, GenerateRequest(content_of(prompt="x"))):
            pass

    with pytest.raises(EngineFailed, match="replica nobody of tiny is gone"):
        asyncio.run(ask())


def answers(client: Client) -> bool:
    try:
        return client.health().status == "ok"
    except Unavailable:
        return False


def gone(scheduler: Any) -> bool:
    try:
        get(scheduler.begin.remote([], {}))
    except ray.exceptions.RayActorError:
        return True
    return False


def until(condition: Any) -> None:
    """Asks until `condition` holds; the test's own time-out is the limit."""
    while not condition():
        time.sleep(0.05)


def test_a_scheduler_that_stays_away(here: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.gateway.ray_backend.RESTART_PAUSES_S", (0.01,))
    ray.kill(here.scheduler)  # for good: keep this test the last one
    until(lambda: gone(here.scheduler))  # Ray's kill does not wait, and a last call might still be answered
    with pytest.raises(Unavailable, match="the scheduler does not answer"):
        asyncio.run(here.backend.acquire(RequestArrived(RequestId("q"), MODEL)))
