"""A phase of the soak: the core, the world around it, those who act in it, and a referee who looks on.

`Play` alone knows all of them. It tells the core what happens, one event at a time, and hands the core's commands to
those who carry them out.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import accumulate

from benchmarks.soak.clients import Clients
from benchmarks.soak.mishaps import Mishaps
from benchmarks.soak.processes import Processes
from benchmarks.soak.referee import Referee
from benchmarks.soak.stage import REST_S, SHOWN, STEP_S, Tally, Violation, catalogue_of
from benchmarks.soak.world import Effect, Events, World
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.core import SchedulerCore
from scheduler.costs.measurements import Record
from scheduler.errors import UnknownModel


class Play:
    """`recent`: the last events, each with its number and time."""

    def __init__(self, seed: int, phase: int) -> None:
        self._chance = random.Random(f"{seed}/{phase}")
        self._catalogue = catalogue_of(phase, self._chance)
        self.tally = Tally()
        self.recent: deque[tuple[int, float, ev.Event]] = deque(maxlen=SHOWN)
        self._records: dict[tuple[str, str], Record] = {}
        self.world = World(self._chance)
        self._clients = Clients(self.world)
        self._processes = Processes(self.world, self._clients, self._catalogue.policy.load_timeout_s)
        self._mishaps = Mishaps(self.world, self._clients, self._processes)
        self._clients.turn_tide()
        self._begin_scheduler()

    # ------------------------------------------------------------------ the core and its surroundings

    def _begin_scheduler(self) -> None:
        tag = f"{self.world.begin_generation()}."
        self._core = SchedulerCore(self._catalogue, tag, tuple(self._records.values()))
        self._referee = Referee(self._core, self.tally)
        for machine in self.world.machines.values():
            machine.there = False
            self._tell(self._processes.join(machine))

    def _restart(self) -> None:
        """The scheduler starts anew: ready runners are found, all others are killed, and who waited asks again."""
        self._processes.outlive_scheduler()
        self._begin_scheduler()

    def _tell(self, events: Events | None) -> None:
        for event in events or ():
            self._send(event)

    def _send(self, event: ev.Event) -> None:
        """One event; what its commands lead to comes later."""
        self.tally.events += 1
        self.recent.append((self.tally.events, self.world.now, event))
        self._referee.before(event)
        try:
            commands = self._core.handle(event, self.world.now)
        except UnknownModel:
            if not isinstance(event, (ev.UnloadAsked, ev.PinAsked)):
                raise
            commands = []
        self._referee.after(event, commands)
        for command in commands:
            self._carry_out(command)
        self._referee.check(event, self.world.now)

    def _carry_out(self, command: cmd.Command) -> None:
        chance, world = self._chance, self.world
        match command:
            case cmd.StartReplica():
                self._processes.start(command)
            case cmd.StopReplica():
                self._processes.stop(command)
            case cmd.GrantLease():
                self._clients.granted(command)
            case cmd.CancelAnswer():
                self._clients.cancelled(command.lease_id)
            case cmd.CheckReplica():
                world.answer(chance.random() * 2, partial(self._processes.check, command.replica_id))
            case cmd.ReadShape():
                world.answer(chance.expovariate(3.0), partial(world.read_header, command))
            case cmd.ReadAhead():
                self.tally.prefetches += 1
                world.answer(chance.expovariate(0.2), partial(world.read_ahead, command))
            case cmd.StopReadAhead():
                pass  # read-ahead ends earlier, or just does not notice in time
            case cmd.Remember():
                self._records[command.record.kind, command.record.key] = command.record
            case cmd.RefuseRequest() | cmd.Announce():
                pass

    # ------------------------------------------------------------------ the loop

    def run(self, events: int) -> None:
        """Random actions until there were so many events since the beginning."""
        actions, weights = zip(*self._weighed(), strict=True)
        cumulative = list(accumulate(weights))
        while self.tally.events < events:
            for action in self._chance.choices(actions, cum_weights=cumulative, k=1000):
                self._tell(self.world.due())
                self._tell(action())
                self.world.now += self._chance.expovariate(1 / STEP_S)
                if self.tally.events >= events:
                    break

    def _weighed(self) -> list[tuple[Effect, float]]:
        return [
            (self._clients.ask, 24.0),
            (self.world.read_some_device, 22.0),
            (self.world.read_some_node, 8.0),
            (self._tick, 20.0),
            (self._clients.renew, 1.5),
            (self._cancel, 1.0),
            (self._mishaps.strike, 0.15),
            (self._mishaps.others_use_memory, 0.1),
            (self._clients.turn_tide, 0.02),
            (self._time_jumps, 0.01),
            (self._quiet, 0.005),
            (self._restart, 0.005),
        ]

    def _tick(self) -> Events:
        return (ev.Ticked(),)

    def _cancel(self) -> Events:
        return self._clients.cancel(list(self._referee.queued))

    def _time_jumps(self) -> None:
        self.world.now += self._chance.choice((3.0, 12.0, 40.0, 130.0, 1000.0))

    def _quiet(self) -> Events:
        """Nobody asks for a while."""
        for _ in range(self._chance.choice((20, 60, 200))):
            self.world.now += 1.0
            yield from self.world.due()
            yield from self.world.read_machine(self.world.some_machine())
            yield from self._clients.renew()
            yield ev.Ticked()

    # ------------------------------------------------------------------ the end

    def come_to_rest(self) -> None:
        """Nothing goes wrong any more and nobody asks: everybody is answered, and everything can be unloaded."""
        self.world.calm = True
        for machine in self.world.machines.values():
            machine.foreign.clear()
            machine.lost.clear()
            machine.silent.clear()
            machine.host_foreign = 0
            self._tell(self._processes.join(machine))
        core = self._core
        self._settle(lambda: not (len(core.queue) or self._clients.held or self._referee.leases), "requests")
        for name in list(core.models.by_name) + [replica.model for replica in core.replicas.values()]:
            self._send(ev.UnloadAsked(name))
        self._settle(lambda: not core.replicas and self.world.at_rest, "replicas")
        self._referee.check_empty()
        if left := [runner.command.replica_id for runner in self.world.processes()]:
            raise Violation(f"processes are left: {left}")

    def _settle(self, done: Callable[[], bool], what: str) -> None:
        until = self.world.now + REST_S
        while not done():
            if self.world.now > until:
                waiting = [(w.request_id, w.model, w.reason) for w in self._core.queue]
                there = [(r.replica_id, r.state.value, len(r.leases)) for r in self._core.replicas.values()]
                raise Violation(f"{what} do not end: {waiting} {there}")
            self.world.now += 1.0
            self._tell(self.world.due())
            for machine in self.world.machines.values():
                self._tell(self.world.read_machine(machine))
            self._tell(self._clients.renew())
            self._send(ev.Ticked())
