"""Runners: the actor of each replica, and one spare per node.

A runner takes time to start (a Ray worker, its imports) and then has no cards chosen and no model. So every
node keeps one that has started: a load takes it, and another is started once that load has ended. A spare costs its
node a Python process, some 60 MiB of RAM of its own. Whoever restarts the scheduler finds spares by name and ends them.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.devices.processes import Process
from actors.endpoint import Endpoint
from actors.names import runner_name
from actors.serving.runner import RunnerActor
from scheduler.units import DeviceId, NodeId

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunnerHandle:
    """A runner, where it runs, and the devices it may use; its process and where it answers, once it said so."""

    name: str
    actor: Any
    node_id: NodeId
    device_ids: tuple[DeviceId, ...] = ()
    process: Process | None = None
    endpoint: Endpoint | None = None

    def kill(self) -> None:
        """End its process; the memory is back when that is gone."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.actor, no_restart=True)


class Spares:
    """At most one runner per node that waits for a load."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._spares: dict[NodeId, RunnerHandle] = {}

    def stand_by(self, node_id: NodeId) -> None:
        """See to it that the node has a spare; returns before it has started. Whoever finds none starts one itself."""
        if node_id not in self._spares:
            try:
                self._spares[node_id] = spare = self.start(node_id)
                spare.actor.introduce.remote()  # the first call takes longer than others: it finds the way
            except Exception as error:  # Ray's head may be away: no reason to give up what has just been loaded
                log.warning("node %s gets no spare runner now: %s", node_id, error)

    def take(self, node_id: NodeId) -> RunnerHandle | None:
        """The node's spare, if it has one. It may have died unnoticed."""
        return self._spares.pop(node_id, None)

    def forget(self, node_id: NodeId) -> None:
        """The node is lost, and its spare with it."""
        if (spare := self.take(node_id)) is not None:
            spare.kill()

    def start(self, node_id: NodeId) -> RunnerHandle:
        """A new runner; returns before it has started."""
        name = runner_name(secrets.token_hex(4))
        actor = (
            remote(RunnerActor)
            .options(
                name=name,
                namespace=self._namespace,
                lifetime="detached",
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote()
        )
        return RunnerHandle(name, actor, node_id)


def remote(actor: Any) -> Any:
    """The actor class as Ray has made it: type checkers see the plain one."""
    return actor
