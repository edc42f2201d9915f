"""Runners that outlived the scheduler: found by name, asked what they are, taken back into the books.

One that is ready goes on serving, its answers under way included. One that was loading is ended, for whoever waits for
it has lost the scheduler too and asks again; and so is a spare, for a new one is started when its node joins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.effects import ready_event
from actors.names import RUNNER_PREFIX
from actors.questions import brief
from actors.serving.protocol import Introduction, RunnerStatus
from actors.spares import RunnerHandle
from scheduler import events as ev
from scheduler.units import LeaseId, ReplicaId

ANSWER_TIMEOUT_S = 15.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Survivor:
    """A ready runner and the event that tells the core of it."""

    runner: RunnerHandle
    adopted: ev.ReplicaAdopted


async def find_survivors(namespace: str) -> list[Survivor]:
    """All ready runners of an earlier scheduler; the others are ended. Takes up to `ANSWER_TIMEOUT_S`."""
    named = await asyncio.to_thread(ray.util.list_named_actors, True)
    names = [a["name"] for a in named if a["namespace"] == namespace and a["name"].startswith(RUNNER_PREFIX)]
    found = await asyncio.gather(*(_ask(name, namespace) for name in names))
    return [survivor for survivor in found if survivor is not None]


async def _ask(name: str, namespace: str) -> Survivor | None:
    try:
        actor = await asyncio.to_thread(ray.get_actor, name, namespace)
    except ValueError:  # it has ended meanwhile
        return None
    try:
        status: RunnerStatus = await asyncio.wait_for(actor.describe.remote(), ANSWER_TIMEOUT_S)
        said: Introduction = await asyncio.wait_for(actor.introduce.remote(), ANSWER_TIMEOUT_S)
    except (RayError, asyncio.TimeoutError) as error:
        log.warning("%s does not answer and is ended: %s", name, brief(error))
        _end(actor)
        return None
    spec, report = status.spec, status.report
    if status.state != "ready" or report is None or spec is None or spec.placement is None:
        log.info("%s is %s and is ended", name, status.state)
        _end(actor)
        return None
    placement = spec.placement
    replica_id = ReplicaId(status.replica_id)
    adopted = ev.ReplicaAdopted(
        replica_id=replica_id,
        model=spec.model,
        path=spec.path,
        placement=placement,
        ready=ready_event(replica_id, report),
        lease_ids=tuple(map(LeaseId, status.active_requests)),
    )
    runner = RunnerHandle(name, actor, placement.node_id, placement.device_ids, said.process, said.endpoint)
    return Survivor(runner, adopted)


def _end(actor: Any) -> None:
    with contextlib.suppress(RayError, ValueError):  # it has ended meanwhile
        ray.kill(actor, no_restart=True)
