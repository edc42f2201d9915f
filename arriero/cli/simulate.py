"""`arriero simulate`: a trace of requests on clusters that are only described, decided by the production scheduler."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from arriero.cli.printing import AsJson, console, errors, print_json, styled
from scheduler.config import Catalogue, Policy, parse_catalogue
from scheduler.errors import Rejected
from scheduler.units import format_bytes

if TYPE_CHECKING:
    from scheduler.simulation.described import ModelOnDisk
    from scheduler.simulation.description import ClusterDescription
    from scheduler.simulation.report import Played
    from scheduler.simulation.simulator import Run
    from scheduler.simulation.trace import Popularity, TraceRequest

POLICIES: dict[str, dict[str, Any]] = {
    "lru": {"eviction": "lru", "max_active_models": None},
    "gdsf": {"eviction": "gdsf", "max_active_models": None},
    "single": {"eviction": "lru", "max_active_models": 1},
    "read_ahead": {"eviction": "lru", "max_active_models": None, "prefetch": "read_ahead"},
    "preload": {"eviction": "lru", "max_active_models": None, "prefetch": "preload"},
}
"""What each name changes in the catalogue's policy."""
EXAMPLE_CLUSTER = {
    "nodes": [
        {"name": "tower", "ram": "64GiB", "cores": 16, "disk_read": "3GB/s", "gpus": [{"name": "RTX 3090"}] * 2},
        {"name": "attic", "ram": "32GiB", "cores": 8, "disk_read": "500MB/s", "gpus": [{"name": "RTX 3060"}]},
    ]
}
EXAMPLE_TRACE: dict[str, float] = {"--requests": 600, "--gap": 15.0, "--burst": 4.0, "--day": 3600.0}
"""How requests are made by chance, unless options say otherwise; popularity drifts as well."""
EXAMPLE_DRIFT_S = 1800.0
LIMITS: dict[str, tuple[float, float]] = {
    "--requests": (1, 100_000),
    "--gap": (0.001, 1e6),
    "--burst": (1, 1000),
    "--day": (1, 1e8),
    "--drift": (1, 1e8),
    "--popularity": (0, 10),
}
"""Least and most that may be given."""
MAY_BE_ZERO = ("--day", "--drift")


def simulate(
    cluster: Annotated[
        list[Path] | None,
        typer.Option(help="Description of a cluster; several are compared. Default: an example."),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option("--catalogue", "-c", help="Catalogue with the models' files. Default: example models."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV of requests. Default: random requests.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(POLICIES)}; several are compared.")] = None,
    popularity: Annotated[
        float,
        typer.Option(metavar="EXPONENT", help="Exponent of Zipf's law for the models, if the trace names none."),
    ] = 1.0,
    drift: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="After this time, the popularity ranks move by one model; 0: never.",
            show_default="1800, or 0 with --trace",
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", help="Number of random requests.", show_default="600")
    ] = None,
    gap: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Mean pause between bursts, per request in a burst.", show_default="15"),
    ] = None,
    burst: Annotated[
        float | None, typer.Option(metavar="N", help="Mean number of requests in a burst.", show_default="4")
    ] = None,
    day: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Length of a day with a quiet and a busy time; 0: none.", show_default="3600"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 7,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the result of each request to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw GPUs over time and waiting times, as SVG (matplotlib).")
    ] = None,
    json: AsJson = False,
) -> None:
    """Simulate a trace of requests on described clusters with the production scheduler."""
    from scheduler.simulation.report import summary
    from scheduler.simulation.trace import Popularity

    policies = policy or ["lru"]
    for name in policies:
        if name not in POLICIES:
            raise Rejected(f"unknown policy {name!r}; known policies: {', '.join(POLICIES)}")
    _each_once("--policy", policies)
    made = {"--requests": requests, "--gap": gap, "--burst": burst, "--day": day}
    given = {option: value for option, value in made.items() if value is not None}
    if trace and given:
        raise Rejected(f"{', '.join(given)}: only for random requests, but --trace {trace} was given")
    drift_s = (0.0 if trace else EXAMPLE_DRIFT_S) if drift is None else drift
    _check(given | {"--drift": drift_s, "--popularity": popularity})
    clusters = _clusters(cluster or [])
    if csv_file and len(clusters) * len(policies) > 1:
        raise Rejected("--csv writes the requests of one run: give one --policy and one --cluster")
    settings, models = _models(catalogue)
    asked = _trace(trace, Popularity(list(models), popularity, drift_s), seed, EXAMPLE_TRACE | given)
    if plot:
        _prepare(plot)
    played = list(_play(clusters, policies, settings, models, asked))
    if csv_file:
        _write(csv_file, played[0].run)
    if plot:
        from arriero.cli.plots import write_plots

        write_plots(plot, played, list(models))
    figures = [summary(each.run, each.policy, seed) for each in played]
    if json:
        named = [f | {"cluster": p.cluster} if p.cluster else f for f, p in zip(figures, played, strict=True)]
        print_json(named[0] if len(named) == 1 else named)
    else:
        _show(played, figures)


def _each_once(option: str, values: Sequence[object]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise Rejected(f"{option} {value} is given twice")


def _check(given: dict[str, float]) -> None:
    """Raises Rejected for a number that is none, or outside LIMITS."""
    for option, value in given.items():
        least, most = LIMITS[option]
        if not (least <= value <= most or (value == 0 and option in MAY_BE_ZERO)):
            zero = "0, or " if option in MAY_BE_ZERO else ""
            raise Rejected(f"{option} is {value}; it must be {zero}between {least} and {most:.0f}")


def _clusters(paths: list[Path]) -> dict[str, ClusterDescription]:
    """The clusters by name: "" for a single one, else the file without its suffix, or the path where two are alike."""
    from arriero.cli.described import read_yaml
    from scheduler.simulation.description import parse_cluster

    if not paths:
        return {"": parse_cluster(EXAMPLE_CLUSTER)}
    _each_once("--cluster", paths)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    found = [parse_cluster(read_yaml(path), str(path)) for path in paths]
    return dict(zip(names, found, strict=True)) if len(paths) > 1 else {"": found[0]}


def _prepare(folder: Path) -> None:
    """Before time is spent on runs: raises Rejected where pictures could not be drawn or written."""
    from arriero.cli.plots import require_matplotlib

    require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Rejected(f"{folder}: {error.strerror or error}") from None


def _play(
    clusters: dict[str, ClusterDescription],
    policies: list[str],
    settings: Catalogue,
    models: dict[str, ModelOnDisk],
    asked: list[TraceRequest],
) -> Iterator[Played]:
    """Each policy on each cluster. On a terminal, says which one is being played."""
    from scheduler.simulation.report import Played
    from scheduler.simulation.simulator import simulate as play
    from scheduler.units import DeviceId

    with errors.status("") as status:
        for cluster, description in clusters.items():
            cards = {
                DeviceId(f"{node.name}/gpu{i}"): gpu.name
                for node in description.nodes
                for i, gpu in enumerate(node.gpus)
            }
            for policy in policies:
                status.update(styled("{} requests: {}", len(asked), ", ".join(filter(None, (cluster, policy)))))
                decides = Policy.model_validate(settings.policy.model_dump() | POLICIES[policy])
                run = play(description, settings.model_copy(update={"policy": decides}), models, asked)
                yield Played(cluster, policy, run, cards)


def _models(path: Path | None) -> tuple[Catalogue, dict[str, ModelOnDisk]]:
    """The catalogue, and its models on disk; without one, the example models."""
    from arriero.cli.described import read_yaml
    from arriero.cli.files import read_companions
    from arriero.cli.shapes import read_model
    from scheduler.config import NO_MMPROJ
    from scheduler.costs.companions import accompanied
    from scheduler.simulation.described import ModelOnDisk

    if path is None:
        return example_models()
    settings = parse_catalogue(read_yaml(path), str(path))
    if not settings.models:
        raise Rejected(f"{path} lists no models; give each a name and a path")
    found, entries = {}, {}
    for i, (name, entry) in enumerate(settings.models.items()):
        file, *adapters = (
            path.parent / Path(each).expanduser()
            for each in (entry.path, *(adapter.path for adapter in entry.adapters.values()))
        )
        named = entry.mmproj not in (None, NO_MMPROJ)
        mmproj = path.parent / Path(entry.mmproj or "").expanduser() if named else None
        drafts = entry.spec_type != "none" and entry.model_draft is not None
        draft = path.parent / Path(entry.model_draft or "").expanduser() if drafts else None
        companions = read_companions(adapters, mmproj, draft, entry.spec_type == "draft-mtp")
        shape = accompanied(read_model(file), companions)
        found[name] = ModelOnDisk(f"/models/{i}.gguf", shape)
        # So that no path is part of another; what comes with the model is in its shape.
        alone: dict[str, object] = {"path": found[name].path, "adapters": {}, "mmproj": None, "model_draft": None}
        alone |= {"spec_type": "draft-simple"} if drafts else {}
        entries[name] = entry.model_copy(update=alone)
    return settings.model_copy(update={"models": entries}), found


def example_models() -> tuple[Catalogue, dict[str, ModelOnDisk]]:
    """Models of well-known sizes, and a catalogue of them."""
    from arriero.cli.shapes import read_model
    from arriero.example_models import EXAMPLES, write_example_model
    from scheduler.simulation.described import ModelOnDisk

    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, of in EXAMPLES.items():
            file = write_example_model(Path(folder) / f"{name}.gguf", name, of)
            models[name] = ModelOnDisk(f"/models/{name}.gguf", read_model(file))
    entries = {name: {"path": model.path} for name, model in models.items()}
    return parse_catalogue({"models": entries}), models


def _trace(path: Path | None, popularity: Popularity, seed: int, made: dict[str, float]) -> list[TraceRequest]:
    """The requests in the file; without one, as many as `made` says, by chance."""
    from scheduler.simulation.trace import made_trace, read_trace

    if path is None:
        requests, gap_s, burst, day_s = made.values()
        return made_trace(popularity, seed, n_requests=int(requests), mean_gap_s=gap_s, burst=burst, day_s=day_s)
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            return read_trace(lines, popularity, seed, str(path))
    except OSError as error:
        raise Rejected(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Rejected(f"{path} is not a text file: {error}") from None


def _write(path: Path, run: Run) -> None:
    try:
        file = path.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise Rejected(f"{path}: {error.strerror or error}") from None
    with file:
        writer = csv.writer(file)
        writer.writerow(("arrived_s", "model", "granted_s", "first_token_s", "done_s", "refusal"))
        for each in run.outcomes:
            writer.writerow(
                (each.request.at_s, each.request.model, each.granted_s, each.first_token_s, each.done_s, each.refusal)
            )


def _show(played: Sequence[Played], figures: Sequence[dict[str, Any]]) -> None:
    """One column per run, in as many tables as the width asks for."""
    labels = list(_cells(figures[0]))
    columns = [list(_cells(each).values()) for each in figures]
    widest = max(len(text) for column in columns for text in column)
    widest = max(widest, *(min(len(word), 20) for each in played for word in each.name.split()))
    at_once = max(1, (console.width - max(map(len, labels)) - 4) // (widest + 3))
    per_cluster = sum(each.cluster == played[0].cluster for each in played)
    if per_cluster < at_once < len(played):  # no cluster's policies in two tables
        at_once -= at_once % per_cluster
    for first in range(0, len(played), at_once):
        runs = slice(first, first + at_once)
        table = Table(title="" if first else f"Simulated, seed {figures[0]['seed']}")
        table.add_column("", no_wrap=True)
        for each in played[runs]:
            table.add_column(each.name, justify="right", min_width=widest, overflow="fold")
        for row in zip(labels, *columns[runs], strict=True):
            table.add_row(*row)
        console.print(table)


def _cells(figures: dict[str, Any]) -> dict[str, str]:
    """What the table says of one run, by the label of the row."""
    cells = {
        "requests": str(figures["requests"]),
        "served": str(figures["served"]),
        "refused": str(figures["refused"]),
        "cold loads": str(figures["cold_loads"]),
        "evictions": str(figures["evictions"]),
        "bytes loaded": format_bytes(figures["bytes_loaded"]),
    }
    for label, key in (("wait", "wait_s"), ("first token", "ttft_s")):
        cells |= {f"{label} {quantile}": f"{seconds:.1f} s" for quantile, seconds in figures[key].items()}
    return cells | {
        "tokens/s": f"{figures['tokens_per_s']:.1f}",
        "GPUs busy": f"{figures['gpu_busy_share']:.0%}",
        "fairness": f"{figures['fairness']:.2f}",
    }
