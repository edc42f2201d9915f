"""Predicted footprints against what the installed llama.cpp allocates, per architecture, and what knowing them costs.

The models are a small one of every architecture that llama.cpp can run, each loaded for real with several layouts and
contexts, and a wide one of each, which llama.cpp sizes without allocating: the small ones tell whether a figure is
equal, the wide ones what an error is worth, (predicted - allocated) / allocated of all that a device holds. Reading a
header and asking for one footprint is timed beside `gguf.GGUFReader` on the same files, and beside `llama-fit-params`
when its path is given. Run: python -m benchmarks.footprint [--fit-params PATH]
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from benchmarks.table import print_table
from scheduler.costs.footprint import computes_exactly, footprint
from scheduler.costs.graph.templates import CHECKED_BUILD
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import ModelShape, read_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "costs"))
shapes: Any = importlib.import_module("gguf_shapes")
truth: Any = importlib.import_module("comparison")

ROUNDS = 5
WIDE_CONTEXTS = [
    ContextParams(n_ctx=4096),
    ContextParams(n_ctx=32768),
    ContextParams(n_ctx=8192, flash_attn="off"),
    ContextParams(n_ctx=16384, n_seq_max=4),
]
ON_ONE_GPU = Layout((DeviceSpec("gpu0"),), -1, (1.0,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit-params", type=Path, help="llama-fit-params, to be timed on the same files")
    fit_params: Path | None = parser.parse_args().fit_params
    with tempfile.TemporaryDirectory() as folder:
        exactness(small_models(Path(folder)))
        Path(folder, "wide").mkdir()
        errors(architectures(Path(folder, "wide"), "--wide"))
        golden = {
            name: shapes.write_model(spec, Path(folder) / f"golden-{name}.gguf") for name, spec in shapes.GOLDEN.items()
        }
        times(golden, fit_params)


def small_models(folder: Path) -> dict[str, Path]:
    """The models of gguf_shapes, and one of every architecture that has none there."""
    drawn = {spec.arch for spec in shapes.SMALL.values()}
    others = {name: path for name, path in architectures(folder).items() if name.rsplit("-", 1)[0] not in drawn}
    return {name: shapes.write_model(spec, folder / f"{name}.gguf") for name, spec in shapes.SMALL.items()} | others


def architectures(folder: Path, *options: str) -> dict[str, Path]:
    """A model of every architecture, by its name."""
    program = Path(shapes.__file__).with_name("every_architecture.py")
    made = subprocess.run([sys.executable, program, *options, folder], capture_output=True, text=True, check=True)
    paths = (Path(model["path"]) for model in map(json.loads, made.stdout.splitlines()) if "path" in model)
    # drafts cannot be loaded alone
    return {path.stem: path for path in paths if path.stem not in truth.TARGETS}


def exactness(paths: dict[str, Path]) -> None:
    """One row per model: places compared, and in how many the figures are equal."""
    found: dict[str, list[tuple[bool, bool, bool]]] = defaultdict(list)
    models = {name: read_shape(path) for name, path in paths.items()}
    for devices, layouts in ((0, [Layout()]), (2, [truth.on_devices(1, 1), truth.ONE_OF_THREE])):
        for case, places in _compared(models, paths, layouts, truth.CONTEXTS[:3], devices, real=True):
            for ours, (weights, cache, compute) in places:
                fixed = (ours.weights_bytes, ours.kv_bytes) == (weights, cache)
                found[case[0]].append((fixed, ours.compute_bytes == compute, ours.compute_bytes >= compute))
    rows = []
    for name, equal in sorted(
        found.items(), key=lambda item: (not computes_exactly(models[item[0]], CHECKED_BUILD), item[0])
    ):
        counts = [f"{sum(place[column] for place in equal)} of {len(equal)}" for column in range(3)]
        rows.append((name, "template" if computes_exactly(models[name], CHECKED_BUILD) else "bound", *counts))
    header = ("model", "compute by", "weights and cache equal", "compute equal", "compute not below")
    print_table("Small models, loaded for real on the CPU and on two devices", header, rows)


def errors(paths: dict[str, Path]) -> None:
    """One row per model: by how much a device's total lies above what llama.cpp would allocate."""
    found: dict[str, list[float]] = defaultdict(list)
    models = {name: read_shape(path) for name, path in paths.items()}
    for devices, layouts in ((1, [truth.on_devices(1)]), (2, [truth.on_devices(1, 1), truth.on_devices(3, 1)])):
        for case, places in _compared(models, paths, layouts, WIDE_CONTEXTS, devices, real=False):
            for ours, allocated in places[:devices]:
                if sum(allocated):
                    found[case[0]].append(ours.total_bytes / sum(allocated) - 1)
    rows = [
        (name, str(len(above)), *(f"{value:+.1%}" for value in (min(above), statistics.median(above), max(above))))
        for name, above in sorted(found.items(), key=lambda item: -max(item[1]))
    ]
    print_table("Wide models, all that a device holds", ("model", "devices", "least", "median", "most"), rows)


def _compared(
    models: dict[str, ModelShape],
    paths: dict[str, Path],
    layouts: list[Layout],
    contexts: list[ContextParams],
    devices: int,
    *,
    real: bool,
) -> Iterator[tuple[Any, list[tuple[Any, list[int]]]]]:
    """Per case, and per device and then the host: what is predicted, and llama.cpp's (weights, cache, compute)."""
    for name in paths:
        asked = [(name, layout, context) for layout in layouts for context in contexts]
        cases = [case for case in asked if truth.may_be_run(models[name], *case[1:])]
        if not cases:
            continue
        try:
            answers = truth.ask(paths, cases, devices=devices, real=real)
        except AssertionError as error:  # these hyper-parameters do not go together
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        for case, answer in zip(cases, answers, strict=True):
            ours = footprint(models[name], *case[1:], CHECKED_BUILD)
            places = {f"RPC{i}": device for i, device in enumerate(ours.devices)} | {"host": ours.host}
            yield case, [(got, answer["bytes"].get(place, [0, 0, 0])) for place, got in places.items()]


def times(paths: dict[str, Path], fit_params: Path | None) -> None:
    """Milliseconds from file to footprint, for models with their real vocabularies' sizes."""
    rows = []
    for name, path in paths.items():
        row = [
            name,
            f"{1e3 * _best(partial(_predict, path)):.0f} ms",
            f"{1e3 * _best(partial(GGUFReader, path), rounds=1):,.0f} ms",
        ]
        if fit_params:
            row.append(f"{1e3 * _best(partial(_run, fit_params, path)):,.0f} ms")
        rows.append(row)
    header = ["model", "header and footprint", "GGUFReader, header alone"] + ["llama-fit-params"] * bool(fit_params)
    print_table("From file to footprint, warm, best of some rounds", header, rows)


def _best(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _predict(path: Path) -> None:
    footprint(read_shape(path), ON_ONE_GPU, ContextParams(), CHECKED_BUILD)


def _run(program: Path, path: Path) -> None:
    subprocess.run([program, "-m", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    main()
