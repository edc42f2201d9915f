"""Brings Arriero up on a Ray cluster and takes it down again; both may be repeated.

`bring_up` needs a connected driver. The same version with the same settings is left alone; another one is replaced:
its runners are ended and their memory is back before the new scheduler starts. Everything is detached, so that the
service outlives the driver (a `ray job submit` included). Drivers take turns (`turn`): who comes second finds what the
first one has brought up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.devices.node import NodeSettings
from actors.devices.processes import Process
from actors.gateway.actor import GatewayActor, GatewaySettings
from actors.gateway.address import check_exposure
from actors.names import GATEWAY, GPU_PREFIX, NAMESPACE, NODE_PREFIX, RUNNER_PREFIX, SCHEDULER
from actors.scheduler import SchedulerActor, SchedulerSettings
from actors.turn import turn
from scheduler.config import Catalogue
from scheduler.errors import Rejected, Unavailable
from scheduler.server import Server

HEAD_RESOURCE = "node:__internal_head__"  # Ray gives it to the head node alone
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
GATEWAY_CLOSE_S = 3.0  # it tells its clients that it ends, and gives them two to hear it
KILL_AFTER_S = 10.0
LOGS = "Ray's logs (/tmp/ray/session_latest/logs)"

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A running Arriero: the gateway's URL on the head's machine, and whether this call started it."""

    url: str
    version: str
    replaced: str = ""  # the version that ran before, if another did
    found: bool = False  # it was running already


def bring_up(catalogue: Catalogue, say: Say = lambda _: None) -> Deployment:
    """Start (or replace, or find) Arriero on the cluster that this driver is connected to.

    Raises Rejected for an unsafe or impossible gateway address and Unavailable when Ray starts no actors.
    """
    check_exposure(catalogue.server.host, catalogue.server.keys)
    with turn(say):
        return _bring_up(catalogue, say)


def _bring_up(catalogue: Catalogue, say: Say) -> Deployment:
    server = catalogue.server
    head = _head_node()
    version = _version(catalogue)
    replaced = ""
    if (running := _find(SCHEDULER)) is not None:
        before, url = _ask(running.version.remote()), _url()
        if before == version and url:
            return Deployment(url, version, found=True)
        _check_port(running, server, url)
        replaced = before or "an unresponsive scheduler"
        say(f"replacing {replaced} by {version}")
    _take_down(say)  # also clears what a crash may have left
    try:
        return Deployment(_start_all(catalogue, head, version, say), version, replaced)
    except RayActorError as error:
        _take_down()
        raise Unavailable(
            f"Arriero does not start: {_cause(error)}; details are in {LOGS}", retry_after_s=10.0
        ) from error
    except BaseException:
        _take_down()
        raise


def _check_port(running: Any, server: Server, url: str | None) -> None:
    """Raises Rejected where the gateway could not listen: what runs is not ended for that."""
    if not server.port or (url and url.rpartition(":")[2] == str(server.port)):
        return
    with contextlib.suppress(TypeError):  # one of another version may not know the question
        if _ask(running.free_port.remote(server.host, server.port)) == 0:
            taken = f"the gateway cannot listen on {server.host}:{server.port}: another program uses it"
            goes_on = f"Arriero still runs{f' at {url}' if url else ''}, unchanged"
            raise Rejected(f"{taken}; choose another --port. {goes_on}")


def _start_all(catalogue: Catalogue, head: str, version: str, say: Say) -> str:
    """Start scheduler and gateway on the head node; the gateway's URL, once a node has joined."""
    state_directory = Path(tempfile.gettempdir()) / f"arriero-{os.getuid()}" / head[:12]
    settings = SchedulerSettings(
        catalogue=catalogue,
        node=NodeSettings(_model_paths(catalogue), tuple(catalogue.virtual_gpus), str(state_directory)),
        version=version,
    )
    on_head = NodeAffinitySchedulingStrategy(head, soft=False)
    say("starting the scheduler")
    scheduler = _start(SchedulerActor, SCHEDULER, on_head, settings)
    host = catalogue.server.host
    port: int = catalogue.server.port or _get(scheduler.free_port.remote(host), "the scheduler does not start")
    say("starting the gateway")
    more_ports = (catalogue.server.ollama_port,) if catalogue.server.ollama_port else ()
    listening = GatewaySettings(host, port, catalogue.server.keys, more_ports, catalogue.server.media_hosts)
    gateway = _start(GatewayActor, GATEWAY, on_head, listening, scheduler)
    try:
        url: str = _get(gateway.url.remote(), "the gateway does not start")
    except RayActorError as error:
        ports = " and ".join(map(str, (port, *more_ports)))
        raise Rejected(f"the gateway cannot listen on {host}:{ports}: {_cause(error)}") from error
    say("waiting for the first node")
    if trouble := _get(scheduler.await_ready.remote(START_TIMEOUT_S), "the scheduler does not answer"):
        raise Unavailable(f"no machine joined within {START_TIMEOUT_S:.0f} s: {trouble}", retry_after_s=10.0)
    return url


def take_down(say: Say = lambda _: None) -> bool:
    """End everything of Arriero's on this cluster, runners first; returns whether there was anything.

    Raises Unavailable when something does not end.
    """
    with turn(say):
        return _take_down(say)


def _take_down(say: Say = lambda _: None) -> bool:
    if not _names():
        return False
    if (gateway := _find(GATEWAY)) is not None:
        _ask(gateway.close.remote(), GATEWAY_CLOSE_S)
        _kill([GATEWAY])
    if (scheduler := _find(SCHEDULER)) is not None:
        _ask(scheduler.close.remote(), CLOSE_TIMEOUT_S)
        _kill([SCHEDULER])
    names = _names()  # now that nobody starts runners any more
    runners = [name for name in names if name.startswith(RUNNER_PREFIX)]
    if runners:
        say(f"stopping {len(runners)} runners")
    processes: list[Process] = _answers(
        actor.process.remote() for name in runners if (actor := _find(name)) is not None
    )
    _kill(runners)
    if processes:
        identities = [process.identity for process in processes]
        _await_ends([name for name in names if name.startswith(NODE_PREFIX)], identities, say)
    _kill(name for name in names if name.startswith((NODE_PREFIX, GPU_PREFIX)))
    deadline = time.monotonic() + END_TIMEOUT_S
    while left := _names():
        if time.monotonic() > deadline:
            raise Unavailable(f"{', '.join(left)} did not end within {END_TIMEOUT_S:.0f} s", retry_after_s=10.0)
        time.sleep(0.05)
    return True


def _await_ends(nodes: list[str], processes: Sequence[tuple[int, float]], say: Say) -> None:
    """Wait until the runners' processes are gone from every node, and their memory with them; kill what stays."""
    actors = [actor for name in nodes if (actor := _find(name)) is not None]
    stubborn = _answers((node.wait_gone.remote(tuple(processes), KILL_AFTER_S) for node in actors), END_TIMEOUT_S)
    for pid in {pid for left in stubborn for pid in left}:
        say(f"process {pid} does not end; killing it")
        for process in [process for process in processes if process[0] == pid]:
            _answers(node.kill_process.remote(*process) for node in actors)
    if any(stubborn):
        _answers((node.wait_gone.remote(tuple(processes), KILL_AFTER_S) for node in actors), END_TIMEOUT_S)


def fingerprint() -> str:
    """A short name for the code that runs: it changes with every edit of the three packages."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in ("arriero", "actors", "scheduler"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _version(catalogue: Catalogue) -> str:
    settings = hashlib.sha256(catalogue.model_dump_json().encode()).hexdigest()[:8]
    return f"0.1.0+{fingerprint()}.{settings}"


def _model_paths(catalogue: Catalogue) -> tuple[str, ...]:
    named = ((entry.path, *entry.companion_paths) for entry in catalogue.models.values())
    return (*catalogue.model_paths, *chain.from_iterable(named))


def _head_node() -> str:
    for node in ray.nodes():
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]:
            return str(node["NodeID"])
    raise Unavailable("the Ray cluster has no living head node", retry_after_s=5.0)


def _start(actor: Any, name: str, where: Any, *arguments: object) -> Any:
    for _ in range(20):
        try:
            return actor.options(name=name, namespace=NAMESPACE, lifetime="detached", scheduling_strategy=where).remote(
                *arguments
            )
        except ValueError:  # the name of a killed actor lingers for a moment
            time.sleep(0.25)
    raise Unavailable(f"Ray does not release the name {name}; see {LOGS}", retry_after_s=10.0)


def _url() -> str | None:
    """Where the running gateway listens; None when there is none that answers."""
    gateway = _find(GATEWAY)
    return _ask(gateway.url.remote()) if gateway is not None else None


def _names() -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _get(reference: Any, trouble: str) -> Any:
    """The answer of an actor that is starting. Raises Unavailable when it does not come, RayActorError when it died."""
    try:
        return ray.get(reference, timeout=2 * START_TIMEOUT_S)
    except GetTimeoutError as error:
        raise Unavailable(f"{trouble} within {2 * START_TIMEOUT_S:.0f} s; see {LOGS}", retry_after_s=10.0) from error


def _ask(reference: Any, timeout_s: float = 10.0) -> Any:
    """The answer, or None from an actor that is dead or silent."""
    return next(iter(_answers([reference], timeout_s)), None)


def _answers(references: Iterable[Any], timeout_s: float = 10.0) -> list[Any]:
    """The answers of all actors that give one in time."""
    asked = list(references)
    if not asked:
        return []
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    answers = []
    for reference in answered:
        with contextlib.suppress(RayError):
            answers.append(ray.get(reference))
    return answers


def _kill(names: Iterable[str]) -> None:
    for name in names:
        actor = _find(name)
        if actor is not None:
            ray.kill(actor, no_restart=True)


def _cause(error: RayActorError) -> str:
    """The last line of the actor's own traceback: what it really died of."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^[\w.]+: ", "", lines[-1].strip()) if lines else "its process ended"
