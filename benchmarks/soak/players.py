"""Who plays a part around the core: processes, machines, and those who are answered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from benchmarks.soak.stage import Box
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.facts import ModelFile, NodeFacts
from scheduler.cluster.replica import Placement
from scheduler.simulation.physics import Process
from scheduler.units import DeviceId, ReplicaId, RequestId


@dataclass(eq=False, kw_only=True)
class Runner(Process):
    """A process. `device_bytes`: what it really holds; `promised`: what the core knows that it may hold."""

    command: cmd.StartReplica
    promised: dict[DeviceId, int]
    state: str = "starting"  # loading, ready, failed, stopping
    ready: ev.ReplicaReady | None = None

    @property
    def placement(self) -> Placement:
        return self.command.placement

    def may_hold(self, device_id: DeviceId) -> int:
        """All that it holds there, or will once it is loaded."""
        if self.state in ("starting", "loading"):
            return self.promised.get(device_id, 0)
        return self.device_bytes.get(device_id, 0)

    def exceeds(self, device_id: DeviceId) -> bool:
        """Whether it took more than it was given: nobody could know."""
        return self.device_bytes.get(device_id, 0) > self.promised.get(device_id, 0)


@dataclass(eq=False)
class Machine:
    """One of `BOXES` as it is now."""

    box: Box
    facts: NodeFacts
    files: tuple[ModelFile, ...]
    there: bool = False
    lives: int = 0
    foreign: Counter[DeviceId] = field(default_factory=Counter)
    host_foreign: int = 0
    lost: dict[DeviceId, str] = field(default_factory=dict)
    silent: set[DeviceId] = field(default_factory=set)

    def find(self, device_id: DeviceId) -> None:
        """A lost GPU is back."""
        self.lost.pop(device_id, None)


@dataclass(eq=False)
class Client:
    """Who holds a lease. One that has `vanished` never says that it has ended; `cancelled`: the runner has ended it."""

    request_id: RequestId
    replica_id: ReplicaId
    vanished: bool = False
    cancelled: bool = False
