"""`arriero plan FILE --cluster SPEC`: the plan for a cluster that is only described. Talks to no service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from arriero.cli.price_table import PricedRow, price_table
from arriero.cli.printing import console, print_json, styled
from scheduler.config import NAME, parse_catalogue
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import Rejected
from scheduler.simulation.described import DescribedCluster, ModelOnDisk
from scheduler.simulation.description import ClusterDescription, parse_cluster
from scheduler.simulation.planning import DescribedPlan, PricedPlacement, plan_on
from scheduler.units import format_bytes


def plan_for(file: str, spec: Path, n_ctx: int | None, json: bool) -> None:
    """Print where the model in `file` would go on the cluster that `spec` describes."""
    description = parse_cluster(read_yaml(spec), str(spec))
    files = resident_files(description, spec.parent)
    path = Path(file)
    shapes = {name: read_model(where) for name, where in files.items()}
    name = next((name for name, where in files.items() if where.resolve() == path.resolve()), _name(path, files))
    shapes.setdefault(name, read_model(path))
    models = {name: ModelOnDisk(f"/models/{i}.gguf", shape) for i, (name, shape) in enumerate(shapes.items())}
    entries = {name: {"path": model.path} for name, model in models.items()}
    cluster = DescribedCluster(description, parse_catalogue({"models": entries}, str(spec)), models)
    found = plan_on(cluster, name, n_ctx)
    if json:
        print_json(as_json(found))
    else:
        show(name, found)


def read_yaml(path: Path) -> Any:
    """What the YAML file holds. Raises Rejected when it cannot be read or is no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Rejected(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Rejected(f"{path} is not YAML: {error}") from None


def read_model(path: Path) -> ModelShape:
    """The shape of the model in the file. Raises Rejected when it cannot be read, InvalidGGUF when it is no model."""
    try:
        return read_shape(path)
    except OSError as error:
        raise Rejected(f"{path}: {error.strerror or error}") from None


def resident_files(description: ClusterDescription, folder: Path) -> dict[str, Path]:
    """The file of each model that is loaded, by name; relative ones are in `folder`."""
    files: dict[str, Path] = {}
    for node in description.nodes:
        for replica in node.replicas:
            path = folder / Path(replica.file).expanduser()
            if not NAME.fullmatch(replica.model):
                raise Rejected(f"replica {replica.model!r}: a model's name may hold letters, digits and ._:@/+- only")
            if files.setdefault(replica.model, path) != path:
                raise Rejected(f"replica {replica.model} has two files: {files[replica.model]} and {path}")
    return files


def _name(path: Path, taken: dict[str, Path]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._:@+-]+", "-", path.name.removesuffix(".gguf")).strip("-._:@+")[:100] or "model"
    return stem if stem not in taken else f"{stem}@{len(taken)}"


# ---------------------------------------------------------------------- JSON


def as_json(found: DescribedPlan) -> dict[str, Any]:
    """The plan as docs/planning.md describes it."""
    best = _priced(found.best) if found.best else {"placement": None, "cost_s": None, "tokens_per_s": None}
    refusal = found.refusal
    return {
        **best,
        "alternatives": [_priced(other) for other in found.alternatives],
        "passed_over": list(found.passed_over),
        "refusal": {"reasons": list(refusal.reasons), "would_fit_if": list(refusal.would_fit_if)} if refusal else None,
    }


def _priced(found: PricedPlacement) -> dict[str, Any]:
    placement, price = found.placement, found.price
    first = placement.n_layers - placement.layout.n_gpu_layers
    devices = []
    for device_id, count, need in zip(placement.device_ids, placement.layers, placement.device_bytes, strict=True):
        devices.append({"gpu": _number(device_id), "layers": [first, first + count - 1], "bytes": need})
        first += count
    context = placement.context
    return {
        "placement": {
            "node": placement.node_id,
            "tier": placement.tier,
            "devices": devices,
            "host": {
                "layers": placement.n_layers - placement.layout.n_gpu_layers,
                "bytes": placement.host_bytes,
                "experts": placement.layout.spills_experts,
            },
            "n_cpu_moe": placement.n_spilled_experts,
            "n_ctx": context.n_ctx if context.kv_unified else context.n_ctx // context.n_seq_max,
            "evicts": list(found.evicts),
        },
        "cost_s": {
            "wait": price.wait_s,
            "release": price.release_s,
            "load": price.load_s,
            "service": price.service_s,
            "regret": price.regret_s,
            "total": price.total_s,
        },
        "tokens_per_s": found.tokens_per_s,
    }


def _number(device_id: str) -> int:
    return int(device_id.rpartition("gpu")[2])


# ---------------------------------------------------------------------- for people


def show(name: str, found: DescribedPlan) -> None:
    """The winner and what else could be had, each with the terms of its price; or why not, and what would help."""
    if found.refusal:
        console.print(styled("[bold]{}[/] [red]does not fit[/]", name))
        for reason in found.refusal.reasons:
            console.print(f"- {reason}", style="dim", soft_wrap=True)
        for way in found.refusal.would_fit_if:
            console.print(f"it would fit with: {way}", soft_wrap=True)
        return
    assert found.best is not None
    title = f"{name}: the plan, and what else could be had (seconds)"
    console.print(price_table(title, [_row(found.best, True), *(_row(other, False) for other in found.alternatives)]))
    for reason in found.passed_over:
        console.print(f"- {reason}", style="dim", soft_wrap=True)


def _row(found: PricedPlacement, chosen: bool) -> PricedRow:
    price = found.price
    terms = price.wait_s, price.release_s, price.load_s, price.service_s, price.regret_s, price.total_s
    return PricedRow(chosen, _where(found), *terms, found.tokens_per_s)


def _where(found: PricedPlacement) -> str:
    placement = found.placement
    shares = [
        f"gpu{_number(device_id)}: {layers} ({format_bytes(need)})"
        for device_id, layers, need in zip(placement.device_ids, placement.layers, placement.device_bytes, strict=True)
    ]
    spilled = placement.n_layers - placement.layout.n_gpu_layers
    if spilled or placement.layout.spills_experts:
        what = f"experts of {placement.n_spilled_experts}" if placement.layout.spills_experts else str(spilled)
        shares.append(f"RAM: {what} ({format_bytes(placement.host_bytes)})")
    evicts = f", evicting {', '.join(found.evicts)}" if found.evicts else ""
    return f"{placement.node_id} {', '.join(shares)}{evicts}"
