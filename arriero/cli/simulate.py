"""`arriero simulate`: a trace of requests on a cluster that is only described, decided by the production scheduler."""

from __future__ import annotations

import csv
import json as jsonlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from arriero.cli.service import AsJson, console
from scheduler.config import Catalogue, Policy, parse_catalogue
from scheduler.errors import Rejected
from scheduler.units import format_bytes

if TYPE_CHECKING:
    from scheduler.simulation.described import ModelOnDisk
    from scheduler.simulation.simulator import Run
    from scheduler.simulation.trace import TraceRequest

POLICIES: dict[str, dict[str, Any]] = {
    "lru": {"eviction": "lru", "max_active_models": None},
    "gdsf": {"eviction": "gdsf", "max_active_models": None},
    "single": {"eviction": "lru", "max_active_models": 1},
}
"""What each name changes in the catalogue's policy."""
EXAMPLE_CLUSTER = {
    "nodes": [
        {"name": "tower", "ram": "64GiB", "cores": 16, "disk_read": "3GB/s", "gpus": [{"name": "RTX 3090"}] * 2},
        {"name": "attic", "ram": "32GiB", "cores": 8, "disk_read": "500MB/s", "gpus": [{"name": "RTX 3060"}]},
    ]
}
EXAMPLE_REQUESTS, EXAMPLE_GAP_S = 600, 15.0


def simulate(
    cluster: Annotated[Path | None, typer.Option(help="Description of the cluster; an example without it.")] = None,
    catalogue: Annotated[
        Path | None, typer.Option("--catalogue", "-c", help="Catalogue with the models' files; example models without.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV of requests; made by chance without it.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"{' or '.join(POLICIES)}; given several times, they are compared.")
    ] = None,
    popularity: Annotated[
        float, typer.Option(min=0, max=10, help="Zipf exponent by which models are drawn where the trace names none.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 7,
    requests: Annotated[
        Path | None, typer.Option("--csv", help="Write what became of each request to this file.")
    ] = None,
    json: AsJson = False,
) -> None:
    """What a trace of requests would come to on a described cluster, decided by the production scheduler."""
    from arriero.cli.described import read_yaml
    from scheduler.simulation.description import parse_cluster
    from scheduler.simulation.report import summary
    from scheduler.simulation.simulator import simulate as play

    chosen = policy or ["lru"]
    for name in chosen:
        if name not in POLICIES:
            raise Rejected(f"there is no policy {name!r}; known are {', '.join(POLICIES)}")
    if not 0 <= popularity <= 10:
        raise Rejected(f"--popularity is {popularity}; it must be between 0 and 10")
    if requests is not None and len(chosen) > 1:
        raise Rejected("--csv writes the requests of one policy: give one --policy")
    description = parse_cluster(read_yaml(cluster), str(cluster)) if cluster else parse_cluster(EXAMPLE_CLUSTER)
    settings, models = _models(catalogue)
    asked = _trace(trace, list(models), popularity, seed)
    results = []
    for name in chosen:
        policies = Policy.model_validate(settings.policy.model_dump() | POLICIES[name])
        run = play(description, settings.model_copy(update={"policy": policies}), models, asked)
        results.append(summary(run, name, seed))
        if requests is not None:
            _write(requests, run)
    if json:
        print(jsonlib.dumps(results[0] if len(results) == 1 else results, indent=2))
    else:
        _show(results)


def _models(path: Path | None) -> tuple[Catalogue, dict[str, ModelOnDisk]]:
    """The catalogue, and its models on disk; without one, the example models."""
    from arriero.cli.described import read_model, read_yaml
    from scheduler.simulation.described import ModelOnDisk

    if path is None:
        return example_models()
    settings = parse_catalogue(read_yaml(path), str(path))
    if not settings.models:
        raise Rejected(f"{path} has no models; give each a name and a path")
    found, entries = {}, {}
    for i, (name, entry) in enumerate(settings.models.items()):
        file = path.parent / Path(entry.path).expanduser()
        found[name] = ModelOnDisk(f"/models/{i}.gguf", read_model(file))
        entries[name] = entry.model_copy(update={"path": found[name].path})  # so that no path is part of another
    return settings.model_copy(update={"models": entries}), found


def example_models() -> tuple[Catalogue, dict[str, ModelOnDisk]]:
    """Models of well-known sizes, and a catalogue of them."""
    from arriero.cli.described import read_model
    from arriero.example_models import EXAMPLES, write_example_model
    from scheduler.simulation.described import ModelOnDisk

    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, of in EXAMPLES.items():
            file = write_example_model(Path(folder) / f"{name}.gguf", name, of)
            models[name] = ModelOnDisk(f"/models/{name}.gguf", read_model(file))
    entries = {name: {"path": model.path} for name, model in models.items()}
    return parse_catalogue({"models": entries}), models


def _trace(path: Path | None, models: list[str], exponent: float, seed: int) -> list[TraceRequest]:
    from scheduler.simulation.trace import Popularity, made_trace, read_trace

    if path is None:
        drifting = Popularity(models, exponent, drift_s=1800.0)
        return made_trace(drifting, seed, n_requests=EXAMPLE_REQUESTS, mean_gap_s=EXAMPLE_GAP_S)
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            return read_trace(lines, Popularity(models, exponent), seed, str(path))
    except OSError as error:
        raise Rejected(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise Rejected(f"{path} is no text: {error}") from None


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


def _show(results: list[dict[str, Any]]) -> None:
    """One column per policy."""
    table = Table("", *(result["policy"] for result in results), title=f"Simulated, seed {results[0]['seed']}")
    for label, key in (
        ("requests", "requests"), ("served", "served"), ("refused", "refused"), ("cold loads", "cold_loads"),
        ("evictions", "evictions"),
    ):  # fmt: skip
        table.add_row(label, *(str(result[key]) for result in results))
    table.add_row("bytes loaded", *(format_bytes(result["bytes_loaded"]) for result in results))
    for label, key in (("wait", "wait_s"), ("first token", "ttft_s")):
        for quantile in results[0][key]:
            table.add_row(f"{label} {quantile}", *(f"{result[key][quantile]:.1f} s" for result in results))
    table.add_row("tokens/s", *(f"{result['tokens_per_s']:.1f}" for result in results))
    table.add_row("GPUs busy", *(f"{result['gpu_busy_share']:.0%}" for result in results))
    table.add_row("fairness", *(f"{result['fairness']:.2f}" for result in results))
    console.print(table)
