"""The plan for a model's file on a cluster that is described: in a file, or by a service's status."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from arriero.api import Status
from arriero.cli.beside import plan_beside
from arriero.cli.price_table import PricedRow, price_table
from arriero.cli.printing import console, print_json, styled
from arriero.cli.shapes import read_model
from scheduler.config import NAME, parse_catalogue
from scheduler.costs.companions import Companions, accompanied
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected, Unavailable
from scheduler.simulation.described import DescribedCluster, Kept, ModelOnDisk
from scheduler.simulation.description import ClusterDescription, GpuDescription, NodeDescription, parse_cluster
from scheduler.simulation.planning import DescribedPlan, PricedPlacement
from scheduler.units import format_bytes


@dataclass(frozen=True, slots=True)
class Described:
    """A cluster, and the file of each model that is loaded there, by name."""

    cluster: ClusterDescription
    files: Mapping[str, Path]


def read_cluster(spec: Path) -> Described:
    """The cluster in the file `spec`. Raises Rejected."""
    description = parse_cluster(read_yaml(spec), str(spec))
    return Described(description, resident_files(description, spec.parent))


def cluster_of(status: Status) -> Described:
    """The cluster of a service, without the models that it has loaded: they could be evicted. What others use is not
    free. What it does not tell (the speed of disks, labels) is as in a description that leaves it out."""
    nodes = []
    hosts = Counter(node.hostname for node in status.nodes)
    for node in status.nodes:
        gpus = [
            GpuDescription(
                name=gpu.product, total=gpu.total_bytes, free=max(0, gpu.total_bytes - gpu.foreign_bytes), kind=gpu.kind
            )
            for gpu in status.gpus
            if gpu.node_id == node.node_id and gpu.state == "ok"
        ]
        free = min(node.memory_total_bytes, node.memory_available_bytes + node.memory_reserved_bytes)
        nodes.append(
            NodeDescription(
                name=node.hostname if hosts[node.hostname] == 1 else f"{node.hostname} {node.node_id[:8]}",
                ram=node.memory_total_bytes,
                ram_free=free,
                cores=node.physical_cores,
                gpus=tuple(gpus),
            )
        )
    if not nodes:
        raise Unavailable("the service has no machines yet")
    return Described(ClusterDescription(nodes=tuple(nodes)), {})


def plan_for(
    file: str, described: Described, n_ctx: int | None, params: Mapping[str, Any], companions: Companions, json: bool
) -> None:
    """Print where the model in `file`, with these parameters of a catalogue and what comes with it, would go."""
    path, files = Path(file), described.files
    name = name_of(path, files)
    if companions == Companions():  # with something, it is another one than the replica
        name = next((name for name, where in files.items() if where.resolve() == path.resolve()), name)
    shape = None if name in files else accompanied(read_model(path), companions)
    found, kept = planned(described, name, shape, n_ctx, params, companions)
    if json:
        print_json(as_json(found, kept))
    else:
        show(name, found, kept)


def planned(
    described: Described,
    name: str,
    shape: ModelShape | None,
    n_ctx: int | None,
    params: Mapping[str, Any],
    companions: Companions,
) -> tuple[DescribedPlan, Kept]:
    """The plan for the model `name`; `shape`: None if it is one of those that are loaded."""
    shapes = {each: read_model(where) for each, where in described.files.items()}
    if shape is not None:
        shapes[name] = shape
    models = {each: ModelOnDisk(f"/models/{i}.gguf", shape) for i, (each, shape) in enumerate(shapes.items())}
    entries: dict[str, dict[str, Any]] = {each: {"path": model.path} for each, model in models.items()}
    entries[name] |= params
    catalogue = parse_catalogue({"models": entries}, "--set")
    return plan_beside(partial(DescribedCluster, described.cluster, catalogue, models), name, n_ctx, companions)


def read_yaml(path: Path) -> Any:
    """What the YAML file holds. Raises Rejected when it cannot be read or is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Rejected(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"{path} is not valid YAML: {error}") from None


def resident_files(description: ClusterDescription, folder: Path) -> dict[str, Path]:
    """The file of each model that is loaded, by name; relative ones are in `folder`."""
    files: dict[str, Path] = {}
    for node in description.nodes:
        for replica in node.replicas:
            path = folder / Path(replica.file).expanduser()
            if not NAME.fullmatch(replica.model):
                raise Rejected(f"replica {replica.model!r}: a model's name may have letters, digits and ._:@/+- only")
            if files.setdefault(replica.model, path) != path:
                raise Rejected(f"replica {replica.model} has two files: {files[replica.model]} and {path}")
    return files


def name_of(path: Path, taken: Mapping[str, Path]) -> str:
    """A name for the model in `path`, other than those `taken`."""
    stem = re.sub(r"[^A-Za-z0-9._:@+-]+", "-", path.name.removesuffix(".gguf")).strip("-._:@+")[:100] or "model"
    return stem if stem not in taken else f"{stem}@{len(taken)}"


# ---------------------------------------------------------------------- JSON


def as_json(found: DescribedPlan, kept: Kept) -> dict[str, Any]:
    """The plan as docs/planning.md describes it."""
    best = _priced(found.best) if found.best else {"placement": None, "cost_s": None, "tokens_per_s": None}
    refusal = found.refusal
    return {
        **best,
        "alternatives": [_priced(other) for other in found.alternatives],
        "passed_over": list(found.passed_over),
        "refusal": {"reasons": list(refusal.reasons), "would_fit_if": list(refusal.would_fit_if)} if refusal else None,
        "kept_bytes": {"gpu": kept.gpu_bytes, "host": kept.host_bytes},
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
            "n_ctx": context.n_ctx_slot,
            "evicts": list(found.evicts),
            "beside": {
                name: {"devices": [device.total_bytes for device in cost.devices], "host": cost.host.total_bytes}
                for name, cost in found.beside.items()
            },
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


def show(name: str, found: DescribedPlan, kept: Kept) -> None:
    """The winner and what else could be had, each with the terms of its price; or why not, and what would help."""
    if kept != Kept():
        free = f"{format_bytes(kept.gpu_bytes)} of each GPU and {format_bytes(kept.host_bytes)} of RAM"
        console.print(f"{free} are kept free for the files that come with the model", soft_wrap=True)
    if found.refusal:
        console.print(styled("[bold]{}[/] [red]does not fit[/]", name))
        for reason in found.refusal.reasons:
            console.print(f"- {reason}", style="dim", soft_wrap=True)
        for way in found.refusal.would_fit_if:
            console.print(f"it would fit with: {way}", soft_wrap=True)
        return
    assert found.best is not None
    title = f"{name}: the plan and its alternatives (seconds)"
    console.print(price_table(title, [_row(found.best, True), *(_row(other, False) for other in found.alternatives)]))
    for companion, cost in found.best.beside.items():
        shares = [
            f"{format_bytes(device.total_bytes)} on gpu{_number(device_id)}"
            for device_id, device in zip(found.best.placement.device_ids, cost.devices, strict=True)
            if device.total_bytes
        ]
        console.print(f"+ {companion}: {', '.join((*shares, f'{format_bytes(cost.host.total_bytes)} in RAM'))}")
    for reason in found.passed_over:
        console.print(f"- {reason}", style="dim", soft_wrap=True)


def _row(found: PricedPlacement, chosen: bool) -> PricedRow:
    price = found.price
    terms = price.wait_s, price.release_s, price.load_s, price.service_s, price.regret_s, price.total_s
    return PricedRow(chosen, where(found), *terms, found.tokens_per_s)


def where(found: PricedPlacement) -> str:
    """The machine, and what lies on which device."""
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
