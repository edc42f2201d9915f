"""Names, headers and messages of others reach a terminal as text: nothing in them is obeyed, nothing is markup."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from arriero.api import LayoutShare, ModelInfo, Notice, QueueEntry, ReplicaStatus, Status
from arriero.cli import observe, use
from arriero.cli.main import app, main
from arriero.cli.printing import PrintingConsole, console, print_piece, printable, styled
from arriero.example_models import Dimensions, write_example_model
from scheduler.errors import Rejected

HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/][/nothing]\r\x9b31m\u202e:fire:\udcff"
SEEN = r"\x1b]0;owned\x07\x1b[2J[red]x[/][/nothing]\r\x9b31m\u202e:fire:\udcff"
SMALL = Dimensions(2, 256, 4, 2, 512, 512)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert not set(done.output) & set("\x1b\x07\r\x9b\u202e"), repr(done.output)
    return done.output


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 400)


@pytest.fixture
def hostile_file(tmp_path: Path) -> Path:
    """A GGUF whose file name, model name and architecture are all hostile."""
    file = write_example_model(tmp_path / f"{HOSTILE.replace('/', '')}.gguf", HOSTILE[:-1], SMALL)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"llama", b"\x1b[2Ja"))
    return file


def test_what_a_terminal_would_obey_is_in_sight() -> None:
    assert printable(HOSTILE) == SEEN
    assert printable("two\n\tlines, ñandú 👩‍🚀 مرحبا") == "two\n\tlines, ñandú 👩‍🚀 مرحبا"


@pytest.mark.parametrize("shown", [HOSTILE, Text(HOSTILE), styled("[bold]{}[/]", HOSTILE), Table])
def test_nothing_is_obeyed_whatever_is_printed(shown: Any) -> None:
    screen = io.StringIO()
    expected = SEEN
    if shown is Table:
        shown = Table("column " + HOSTILE, title=HOSTILE)
        shown.add_row(HOSTILE)
    elif shown == Text(HOSTILE):  # which leaves these two out
        expected = SEEN.replace(r"\x07", "").replace(r"\r", "")
    PrintingConsole(file=screen, width=400, no_color=True, force_terminal=False).print(shown)
    assert expected in screen.getvalue()
    assert not set(HOSTILE) & set("\x1b\x07\r\x9b\u202e\udcff") & set(screen.getvalue())


def test_styles_are_those_of_the_template() -> None:
    assert styled("[bold]{}[/] and {}", r"[red]a\\", "b\nc").markup == r"[bold]\[red]a\\[/bold] and b\nc"


def test_a_hostile_gguf_is_shown_and_planned(hostile_file: Path, tmp_path: Path) -> None:
    for command in ("inspect", "footprint"):
        assert r"\x1b[2J" in run(command, hostile_file)
        json.loads(run(command, hostile_file, "--json"))
    (tmp_path / "c.yaml").write_text('nodes: [{name: "b[red]\\e[2Jx", ram: 16GiB, gpus: [{name: RTX 3060}]}]')
    assert r"b[red]\x1b[2Jx" in run("plan", hostile_file, "--cluster", tmp_path / "c.yaml")
    broken = hostile_file.with_name("\x1b[31mbroken.gguf")
    broken.write_bytes(b"no model")
    assert failure("inspect", str(broken)).startswith(rf"error: {tmp_path}/\x1b[31mbroken.gguf")


def failure(*arguments: str) -> str:
    """What a command that fails says on standard error."""
    heard = io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["arriero", *arguments])
        patched.setattr(sys, "stderr", heard)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    assert "\x1b" not in heard.getvalue()
    return heard.getvalue()


REPLICA = ReplicaStatus(
    replica_id=HOSTILE, model=HOSTILE, state="ready", node=HOSTILE, n_gpu_layers=20, n_ctx=4096, slots=2, active=0,
    n_threads=4, idle_s=12.0, pinned=True, layout=[LayoutShare(device=HOSTILE, layers=20, bytes=1)],
)  # fmt: skip
QUEUED = QueueEntry(request_id="r", model=HOSTILE, waited_s=3.0, reason=HOSTILE)


class HostileGateway:
    """All that it says is hostile."""

    answer: tuple[str, ...] = ()
    finish_reason = "stop"
    reasoning = ""

    def status(self) -> Status:
        return Status(version=HOSTILE, uptime_s=1.0, mode=HOSTILE, replicas=[REPLICA], queue=[QUEUED])

    def models(self) -> list[ModelInfo]:
        invalid = ModelInfo(name=HOSTILE, state="invalid", reason=HOSTILE)
        return [invalid, ModelInfo(name=HOSTILE, state="available", architecture=HOSTILE)]

    def events(self, *, after: int = 0, follow: bool = True) -> Iterator[Notice]:
        yield Notice(seq=1, at_s=0, kind="placed", message=HOSTILE, model=HOSTILE, replica_id="m-1")

    def load(self, model: str, n_ctx: int | None) -> None:
        raise Rejected(HOSTILE)

    @contextmanager
    def chat(self, *_: object, **__: object) -> Iterator[Any]:
        yield Answer(self.answer, self.finish_reason, self.reasoning)


class Answer(SimpleNamespace):
    def __init__(self, pieces: tuple[str, ...], finish_reason: str, reasoning: str) -> None:
        super().__init__(pieces=pieces, finish_reason=finish_reason, reasoning=reasoning)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> HostileGateway:
    gateway = HostileGateway()

    @contextmanager
    def client(url: str | None) -> Iterator[HostileGateway]:
        yield gateway

    monkeypatch.setattr(observe, "client", client)
    monkeypatch.setattr(use, "client", client)
    return gateway


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize("call", [("ps",), ("models",), ("events",), ("why", "m-1")])
def test_what_a_service_says_is_shown_as_it_is(call: tuple[str, ...]) -> None:
    assert SEEN in run(*call)


@pytest.mark.usefixtures("gateway")
def test_the_message_of_an_error_is_shown_as_it_is() -> None:
    assert failure("load", "m") == f"error: {SEEN}\n"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    def stdout(is_terminal: bool) -> io.StringIO:
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return stdout


def test_an_answer_is_in_sight_on_a_terminal_and_untouched_in_a_pipe(written: Callable[[bool], io.StringIO]) -> None:
    for is_terminal, expected in ((True, SEEN), (False, HOSTILE)):
        stream = written(is_terminal)
        for piece in HOSTILE:
            print_piece(piece)
        assert stream.getvalue() == expected


@pytest.mark.parametrize(
    ("finish_reason", "reasoning", "note"),
    [
        ("stop", "", "m gave an empty answer: it ended at once"),
        ("length", "", "m used all its tokens without any text"),
        ("stop", "Hm.", "m wrote only reasoning, and no answer"),
    ],
)
def test_an_empty_answer_is_said_beside_the_output(
    gateway: HostileGateway, finish_reason: str, reasoning: str, note: str
) -> None:
    gateway.finish_reason, gateway.reasoning = finish_reason, reasoning
    done = CliRunner().invoke(app, ["run", "m", "hello"], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout == ""
    assert done.stderr.startswith(note)
    gateway.answer = ("an ", "answer")
    done = CliRunner().invoke(app, ["run", "m", "hello"], catch_exceptions=False)
    assert (done.stdout, done.stderr) == ("an answer\n", "")
