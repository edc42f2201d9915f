"""The node's watchdog: ends processes of ours that hang. So a hang becomes a death, which all the rest can handle.

Twice a second it looks at every registered process (`pulse`), and at the device processes of virtual GPUs. A process is
ended for one of two reasons, if several looks in a row find it:

    it is stopped    by a signal or a debugger
    it is overdue    it has not done what it promised, and it is not waiting for a disk

Deadlines are extended when more threads want to run than the machine has processors, by that ratio: with forty threads
on two processors, the decode of a tiny model took 15 s instead of some milliseconds. After a pause of the whole
machine, nobody is overdue for as long as the pause took. Reasons are kept for those who ask.
Cost: some 0.2 ms for each process and look, half a thousandth of a core.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.devices.byte_count import Holder
from actors.devices.processes import Look, kill_process, look_at, ray_title, started_at_s
from actors.devices.pulse import Promise, promises
from actors.devices.virtual import DEVICE_PROCESS

LOOK_EVERY_S = 0.5
STOPPED_LOOKS = 11  # five seconds from the first to the last
OVERDUE_LOOKS = 4  # a process that has just been woken gets the time to say so
PAUSE_S = 5.0  # between two looks: it takes so long only if the machine or the watchdog was stopped
REMEMBERED = 256  # processes that were ended

log = logging.getLogger(__name__)

_Identity = tuple[int, float]  # pid, started_at_s


@dataclass(frozen=True, slots=True)
class _Suspicion:
    """What was wrong in the last looks, in how many, and how many pages the process had read from disk by then."""

    why: str
    looks: int
    major_faults: int


class Watchdog:
    """Call `look` every `LOOK_EVERY_S` seconds, from one thread. `device_processes` names those of virtual GPUs."""

    def __init__(
        self,
        node_id: str,
        device_processes: Callable[[], Iterable[Holder]] = tuple,
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        crowding: Callable[[], float] | None = None,
        look_at: Callable[[int], Look | None] = look_at,
        kill: Callable[..., bool] = kill_process,
    ) -> None:
        self._node_id, self._device_processes, self._folder = node_id, device_processes, folder
        self._clock, self._crowding, self._look_at, self._kill = clock, crowding or _crowding, look_at, kill
        self._suspicions: dict[tuple[_Identity, str], _Suspicion] = {}
        self._reasons: dict[_Identity, str] = {}
        self._looked_at_s = clock()
        self._judges_from_s = 0.0

    def reason(self, pid: int, started: float) -> str:
        """Why that process, or a device process that worked for it, was ended from here; "" when none was."""
        return self._reasons.get((pid, started), "")

    def look(self) -> None:
        """Look at every process once, and end those that have hung for long enough."""
        now = self._clock()
        if now - self._looked_at_s > PAUSE_S:
            self._judges_from_s = now + now - self._looked_at_s
        self._looked_at_s = now
        crowding = self._crowding()
        before, self._suspicions = self._suspicions, {}  # without a finding in this look, it starts again from zero
        for promise in promises(self._node_id, folder=self._folder):
            identity = promise.pid, promise.started_at_s
            late_s = now - promise.due_at - (crowding - 1.0) * promise.allowed_s
            overdue = promise.due_at > 0.0 and late_s > 0.0 and now >= self._judges_from_s
            if why := self._judge(identity, promise.what, overdue, before):
                reason = f"it {STOOD_STILL}" if why == "stopped" else _overdue(promise, crowding)
                self._end(identity, promise.title, ray_title(promise.title), reason)
        for holder in self._device_processes():
            identity = holder.pid, holder.started_at_s
            if self._judge(identity, "", False, before):
                runner = holder.owner_pid, started_at_s(holder.owner_pid) or 0.0
                self._remember(runner, f"its device process {STOOD_STILL}")
                self._end(identity, DEVICE_PROCESS, re.escape(DEVICE_PROCESS), f"it {STOOD_STILL}")

    def _judge(
        self, identity: _Identity, what: str, overdue: bool, seen: Mapping[tuple[_Identity, str], _Suspicion]
    ) -> str:
        """What the process is to be ended for now, "stopped" or "overdue"; "" when it is not."""
        look = self._look_at(identity[0])
        if look is None or look.started_at_s != identity[1] or not (look.stopped or overdue):
            return ""
        last = seen.get((identity, what), _Suspicion("", 0, look.major_faults))
        why = "stopped" if look.stopped else "overdue" if look.major_faults == last.major_faults else "reads"
        looks = last.looks + 1 if last.why == why else 1
        if looks == {"stopped": STOPPED_LOOKS, "overdue": OVERDUE_LOOKS}.get(why):
            return why  # if it survives, it is suspected again from zero
        self._suspicions[identity, what] = _Suspicion(why, looks, look.major_faults)
        return ""

    def _end(self, identity: _Identity, what: str, titled: str, reason: str) -> None:
        self._remember(identity, reason)  # before it ends: whoever sees that asks for the reason
        ended = self._kill(*identity, titled=titled)
        log.error("%s, process %s, %s: %s", what, identity[0], "was ended" if ended else "is not ours to end", reason)

    def _remember(self, identity: _Identity, reason: str) -> None:
        self._reasons[identity] = reason
        if len(self._reasons) > REMEMBERED:
            del self._reasons[next(iter(self._reasons))]


def _crowding() -> float:
    """Threads that want to run per processor of the machine, over the last minute; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


STOOD_STILL = f"stood still for {(STOPPED_LOOKS - 1) * LOOK_EVERY_S:.0f} s (stopped by a signal or a debugger)"


def _overdue(promise: Promise, crowding: float) -> str:
    usual = f"; the slowest similar one took {promise.usual_s:.2g} s" if promise.usual_s else ""
    return f"{promise.what} took more than {promise.allowed_s * crowding:.0f} s{usual}"
