"""Those who ask, hold leases, and give them back or do not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.soak.players import Client, Runner
from benchmarks.soak.stage import MODELS
from benchmarks.soak.world import Events, World
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.costs.paces import Pace
from scheduler.units import LeaseId, ReplicaId, RequestId


class Clients:
    """`held`: who holds which lease. They want nothing before the first `turn_tide`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = world.chance
        self.held: dict[LeaseId, Client] = {}
        self._popular: list[float] = []
        self._busy = 1.0

    def ask(self) -> Events:
        chance = self._chance
        if chance.random() > self._busy:
            return
        serial = self._world.count()
        model = chance.choices(tuple(MODELS), self._popular)[0] if chance.random() > 0.003 else "unicorn"
        kind: Any = chance.choices(("generate", "embed", "load"), (20, 5 if model == "bee" else 0.1, 1))[0]
        n_ctx = None if chance.random() < 0.9 else chance.choice((300, 300, 2048, 8192, 16384, 40000))
        deadline_s = None if chance.random() < 0.8 else chance.choice((0.5, 3.0, 20.0, 100.0))
        priority = None if chance.random() < 0.7 else chance.randint(-3, 6)
        prefix = chance.choice(("", "a", "b", "c")) if chance.random() < 0.5 else ""
        request_id = RequestId(f"r{serial}")
        key = chance.choice(("", "ann", "ann", "ann", "bob", "cid"))
        again = chance.choice(("", f"again{chance.randint(0, 30)}", f"once{serial}"))
        fingerprint = again if kind != "load" else ""
        yield ev.RequestArrived(request_id, model, kind, n_ctx, deadline_s, priority, key, prefix, fingerprint)

    def granted(self, grant: cmd.GrantLease) -> None:
        vanished = not self._world.calm and self._chance.random() < 0.003
        self.held[grant.lease_id] = Client(grant.request_id, grant.replica_id, vanished)
        self._world.later(self._chance.expovariate(3.0), partial(self._answered, grant.lease_id))

    def _answered(self, lease_id: LeaseId) -> Events:
        """The answer has ended, well or not."""
        client = self.held.pop(lease_id, None)
        if client is None or client.vanished:
            return
        runner = self._world.runners.get(client.replica_id)
        failed = runner is None or runner.state != "ready" or self._chance.random() < 0.002
        yield ev.LeaseReleased(lease_id, "failed" if failed else "served", None if failed else self._pace())

    def cancelled(self, lease_id: LeaseId) -> None:
        if lease_id in self.held:
            self.held[lease_id].cancelled = True
            self._world.later(self._chance.random(), partial(self._answered, lease_id))

    def _pace(self) -> Pace | None:
        chance = self._chance
        if chance.random() < 0.7:
            return None
        tokens, answer = chance.randint(0, 2000), chance.randint(0, 500)
        slow = chance.choice((1.0, 1.0, 1.0, 3.0, 0.0, 1e6))
        return Pace(tokens, tokens * 0.001 * slow, answer, answer * chance.uniform(0.01, 0.03) * slow, tokens + answer)

    def renew(self) -> Events:
        held = tuple(lease_id for lease_id, client in self.held.items() if not client.vanished)
        if held:
            yield ev.LeasesRenewed(held)

    def cancel(self, waiting: Sequence[RequestId]) -> Events:
        """One of those who wait leaves, or one of those who are answered."""
        if waiting and self._chance.random() < 0.5:
            yield ev.RequestCancelled(self._chance.choice(waiting))
        elif self.held:
            lease_id = self._chance.choice(list(self.held))
            yield ev.RequestCancelled(self.held[lease_id].request_id)
            self.cancelled(lease_id)
            if self._chance.random() < 0.7:
                self.held.pop(lease_id)

    def of_runner(self, replica_id: ReplicaId) -> tuple[LeaseId, ...]:
        """Leases that the runner still answers."""
        return tuple(
            lease_id
            for lease_id, client in self.held.items()
            if client.replica_id == replica_id and not client.cancelled
        )

    def notice(self, runner: Runner) -> None:
        """The runner has ended: those whom it answered find out, each in its time."""
        for lease_id, client in self.held.items():
            if client.replica_id == runner.command.replica_id:
                self._world.later(self._chance.random(), partial(self._answered, lease_id))

    def lose_gateway(self) -> Events:
        self.held.clear()
        yield ev.ClientsLost()

    def turn_tide(self) -> None:
        """Others are popular now, and there is more or less to do."""
        self._popular = [self._chance.paretovariate(0.7) for _ in MODELS]
        self._busy = self._chance.choice((0.05, 0.2, 0.4, 0.8))
