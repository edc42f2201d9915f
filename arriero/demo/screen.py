"""What the demo shows: on a terminal a live view of GPUs, models, events and answers, elsewhere plain lines."""

from __future__ import annotations

import contextlib
import threading
from collections import deque

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from arriero.api import ArrieroError, Status
from arriero.cli.observe import COLOURS, print_notice, where
from arriero.cli.printing import console, styled
from arriero.client import Client
from scheduler.units import format_bytes

REFRESH_S = 0.25
REMEMBERED = 40
FRAMES = 8  # lines that the four panels' borders take


class Line:
    """One answer on the screen."""

    def __init__(self, screen: Screen, model: str, prompt: str) -> None:
        self.model, self.prompt = model, prompt
        self.text, self.state = "", "waiting"
        self._screen = screen

    def add(self, piece: str) -> None:
        self.text, self.state = self.text + piece, "…"

    def end(self, first_s: float, total_s: float, error: str) -> None:
        self.state = f"failed: {error}" if error else f"{first_s:.2f} s to the first token, {total_s:.2f} s in all"
        self._screen.ended(self)


class Screen:
    """Follows the service while it is open, in threads of its own."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lines: deque[Line] = deque(maxlen=REMEMBERED)
        self._events: deque[Text] = deque(maxlen=REMEMBERED)
        self._status: Status | None = None
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._follow, daemon=True)]
        self._live: Live | None = None
        if console.is_terminal:
            self._threads.append(threading.Thread(target=self._look, daemon=True))

    def __enter__(self) -> Screen:
        if console.is_terminal:
            self._live = Live(get_renderable=self._picture, console=console, refresh_per_second=8, transient=True)
            self._live.start()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        console.print(text, style="bold")

    def line(self, model: str, prompt: str) -> Line:
        line = Line(self, model, prompt)
        self._lines.append(line)
        return line

    def ended(self, line: Line) -> None:
        if self._live is None:
            console.print(
                styled("  {} {} [dim]({})[/]", f"{line.model:<18}", repr(line.text.strip()), line.state), soft_wrap=True
            )

    def _follow(self) -> None:
        with contextlib.suppress(ArrieroError):
            for notice in self._client.events():
                if self._closing.is_set():
                    return
                if self._live is None:
                    print_notice(notice)
                else:
                    colour = COLOURS.get(notice.kind, "default")
                    self._events.append(
                        Text(f"{notice.kind:<16} {notice.message}", style=colour, no_wrap=True, overflow="ellipsis")
                    )

    def _look(self) -> None:
        while not self._closing.wait(REFRESH_S):
            with contextlib.suppress(ArrieroError):
                self._status = self._client.status()

    def _picture(self) -> RenderableType:
        """Four panels that fit the height of the terminal. If it is low, the oldest events and answers are left out."""
        gpus, replicas = _gpus(self._status), _replicas(self._status)
        left = console.height - FRAMES - gpus.row_count - 1
        replica_rows = min(replicas.row_count, max(1, left // 3))
        event_rows = max(1, (left - replica_rows) // 2)
        answer_rows = max(1, left - replica_rows - event_rows)
        answers = Table.grid(padding=(0, 1), expand=True)
        answers.add_column(style="bold", no_wrap=True)
        answers.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        answers.add_column(style="dim", no_wrap=True)
        running = [line for line in list(self._lines) if line.state == "…"]
        others = [line for line in list(self._lines) if line.state != "…" and line.text]
        for line in (others + running)[-answer_rows:]:
            answers.add_row(line.model, line.text.strip()[-200:], line.state.split(" to the")[0])
        return Group(
            Panel(gpus, title="GPUs"),
            Panel(replicas, title="loaded and waiting", height=replica_rows + 2),
            Panel(Group(*list(self._events)[-event_rows:]), title="events", height=event_rows + 2),
            Panel(answers, title="answers", height=answer_rows + 2),
        )


def _gpus(status: Status | None) -> Table:
    table = Table.grid(padding=(0, 1))
    for gpu in status.gpus if status else ():
        used = gpu.total_bytes - gpu.free_bytes
        table.add_row(
            gpu.label,
            ProgressBar(total=gpu.total_bytes, completed=used, width=40),
            f"{format_bytes(used)} of {format_bytes(gpu.total_bytes)} used",
        )
    return table


def _replicas(status: Status | None) -> Table:
    table = Table.grid(padding=(0, 2))
    for replica in status.replicas if status else ():
        table.add_row(replica.model, replica.state, where(replica), "busy" if replica.active else "")
    for entry in status.queue if status else ():
        table.add_row(Text(entry.model, "dim"), Text("waiting", "yellow"), Text(entry.reason, "dim"), "")
    return table
