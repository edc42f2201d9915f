"""`arriero pull`: fetches a model from a hub to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from arriero.cli.cluster import DEFAULT_MODELS
from arriero.cli.printing import console, errors, printable


def pull(
    model: Annotated[str, typer.Argument(help="A model on a hub: hf:org/repo:Q4_K_M.", show_default=False)],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder for models.")] = Path(DEFAULT_MODELS),
    projector: Annotated[
        bool, typer.Option(help="Also fetch the projector for pictures or sounds, if there is one.")
    ] = True,
) -> None:
    """Fetch a model to this machine: all its parts, and its projector. May be stopped, and continued later."""
    from actors.hub import Repository
    from actors.hub_fetching import fetch, files_of

    repository = Repository(model)
    paths = files_of(repository, repository.chosen(), projector=projector)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=errors, transient=True) as bar:
        total = sum(repository.files[path].size_bytes for path in paths)
        task = bar.add_task(printable(f"fetching {model}"), total=total)
        found = fetch(repository, paths, to.expanduser(), lambda count: bar.update(task, completed=count))
    for path in found:
        console.print(str(path), soft_wrap=True)
