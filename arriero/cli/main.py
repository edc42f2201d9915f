"""The `arriero` command: its verbs, and how errors end it (one clear line, exit status 1; 2 for a wrong call)."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from arriero import __version__
from arriero.cli import advise, cluster, files, observe, plan, pull, simulate, use
from arriero.cli.printing import print_error
from scheduler.errors import ArrieroError

app = typer.Typer(
    name="arriero",
    help="Arriero places, loads, serves and evicts GGUF models on your GPUs, by their real cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Service": (cluster.up, cluster.down, cluster.demo),
    "Look": (observe.ps, observe.gpus, observe.models, plan.plan, observe.events, observe.why),
    "Use": (use.run, use.chat, use.load, use.unload, use.pin),
    "Files (no service needed)": (files.inspect, files.footprint, advise.advise, pull.pull, simulate.simulate),
}
for panel, verbs in VERBS.items():
    for verb in verbs:
        app.command(rich_help_panel=panel)(verb)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `arriero` script."""
    try:
        app()
    except ArrieroError as error:
        print_error(error.message)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
