"""Where decisions are put down while one event is handled: commands, in the order of their carrying out."""

from __future__ import annotations

from typing import Any

from scheduler import commands as cmd
from scheduler.cluster.replica import Replica
from scheduler.costs.measurements import Record


class Outbox:
    """Collects commands; `take` empties it."""

    def __init__(self) -> None:
        self._commands: list[cmd.Command] = []

    def post(self, command: cmd.Command) -> None:
        self._commands.append(command)

    def announce(self, kind: str, message: str, model: str = "", replica: Replica | None = None, **data: Any) -> None:
        """A notice for people and monitors; `replica` fills in model and replica id."""
        if replica is None:
            self.post(cmd.Announce(kind, message, model, "", data))
        else:
            self.post(cmd.Announce(kind, message, replica.model, replica.replica_id, data))

    def remember(self, record: Record | None) -> None:
        """Have a measurement kept, if it is new."""
        if record is not None:
            self.post(cmd.Remember(record))

    def take(self) -> list[cmd.Command]:
        commands, self._commands = self._commands, []
        return commands
