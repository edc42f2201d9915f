"""`arriero advise`: which quantisations of a repository fit the cluster, where, with what context, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from arriero.cli.plan import described_cluster, tokens_of
from arriero.cli.printing import AsJson, console, errors, print_json
from arriero.cli.service import Url
from scheduler.errors import ArrieroError, Rejected, Unavailable
from scheduler.units import format_bytes

if TYPE_CHECKING:
    from actors.hub import HubModel
    from scheduler.simulation.described import Kept
    from scheduler.simulation.planning import DescribedPlan


def advise(
    repository: Annotated[str, typer.Argument(help="A repository of GGUF files: hf:org/repo.", show_default=False)],
    n_ctx: Annotated[
        str, typer.Option(metavar="N", help="Tokens that a slot must hold; auto: as many as the GPUs have room for.")
    ] = "auto",
    cluster: Annotated[
        Path | None, typer.Option(help="A file that describes a cluster; without it, that of the service.")
    ] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """List which quantisations of a repository fit the cluster, where, and how fast. Reads headers only."""
    from actors.hub import Repository
    from arriero.cli.described import as_json, name_of, planned
    from scheduler.costs.companions import Companions

    there = Repository(repository)
    if there.names_one:
        raise Rejected(f"advise is about a whole repository: hf:{there.repo}; for one model there is arriero plan")
    tokens = None if n_ctx == "auto" else tokens_of(n_ctx)
    described = described_cluster(cluster, url)
    params: dict[str, Any] = {"n_ctx": "auto"} if n_ctx == "auto" else {}
    answers: list[tuple[HubModel, DescribedPlan | None, Kept | None, str]] = []
    for model in there.models:
        if errors.is_terminal:
            errors.print(f"reading the header of {model.paths[0]} …", style="dim")
        try:
            shape = there.read_shape(model)
            name = name_of(Path(model.paths[0]), described.files)
            answers.append((model, *planned(described, name, shape, tokens, params, Companions()), ""))
        except Unavailable:
            raise
        except ArrieroError as error:  # of this file alone
            answers.append((model, None, None, error.message))
    if not answers:
        raise Rejected(f"hf:{there.repo} has no GGUF files")
    if json:
        print_json(
            [
                {"quantization": model.quantization, "files": list(model.paths), "file_bytes": model.file_bytes}
                | ({"error": why} if found is None or kept is None else as_json(found, kept))
                for model, found, kept, why in answers
            ]
        )
        return
    table = Table("quantization", "size", "place", "context", "tokens/s", "load")
    for model, found, _, why in answers:
        table.add_row(
            model.quantization or Path(model.paths[0]).name, format_bytes(model.file_bytes), *_cells(found, why)
        )
    console.print(table)
    console.print("load: seconds from the disk, after it is fetched; nothing was fetched now", style="dim")


def _cells(found: DescribedPlan | None, why: str) -> tuple[str, str, str, str]:
    from arriero.cli.described import where

    if found is None:
        return why, "", "", ""
    if found.best is None:
        ways = found.refusal.would_fit_if if found.refusal else ()
        return f"does not fit; it would with {' or '.join(ways)}" if ways else "does not fit", "", "", ""
    speed = found.best.tokens_per_s
    return (
        where(found.best),
        f"{found.best.placement.context.n_ctx_slot:,}",
        f"{speed:,.1f}" if speed else "",
        f"{found.best.price.load_s:,.1f} s",
    )
