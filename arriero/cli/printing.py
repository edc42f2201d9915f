"""Everything that commands print goes through here: text of others shows its control characters and does nothing.

Names of files and models, strings of a GGUF, messages of a server and answers of a model are text of others. Written
to a terminal as they are they could move the cursor, hide lines or set the window's title. `console` takes strings as
plain text; what is styled is written with `styled`, whose template alone is markup.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and newline, DEL, C1: a terminal obeys them
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # break lines, or turn the order of what follows
    "\ud800-\udfff]"  # bytes of a file name that are no text: cannot be written at all
)


def printable(text: str) -> str:
    r"""`text` with what a terminal would obey in sight: "\x1b[31m" in place of a colour. Keeps tabs and newlines."""
    return _UNSEEN.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def styled(template: str, *values: object) -> Text:
    """`template` with its {} filled. It is rich's markup; the values are text of others, each in one line."""
    lines = (printable(str(value)).replace("\n", r"\n") for value in values)
    return Text.from_markup(template.format(*map(escape, lines)), emoji=False)


class PrintingConsole(Console):
    """A console that obeys nothing in what it is given but `styled` text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)  # before columns are measured


console = PrintingConsole()
errors = PrintingConsole(stderr=True)


def print_error(message: str) -> None:
    """One error, on standard error."""
    print(f"error: {printable(message)}", file=sys.stderr)


def print_piece(piece: str) -> None:
    """A piece of a model's answer: in sight on a terminal, as it is in a pipe or a file."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """JSON on standard output, nothing around it; all of it ASCII. `value` may be or hold models of the API."""
    print(json.dumps(_plain(value), indent=indent), flush=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # a pydantic record; to import pydantic for it would take a tenth of a second
        return value.model_dump(mode="json")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
