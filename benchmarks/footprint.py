"""Predicted footprints against what the installed llama.cpp allocates, per architecture, and what knowing them costs.

The models are a small one of every architecture that llama.cpp can run, each loaded for real with several layouts and
contexts; an error is (predicted - allocated) / allocated, per buffer. Reading a header and asking for one footprint is
timed beside `gguf.GGUFReader` on the same files, and beside `llama-fit-params` when its path is given. Run:
python -m benchmarks.footprint [--fit-params PATH]
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from benchmarks.table import print_table
from scheduler.costs.footprint import footprint
from scheduler.costs.graph.templates import TEMPLATES
from scheduler.costs.params import ContextParams, DeviceSpec, Layout
from scheduler.costs.shape import read_shape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "costs"))
shapes: Any = importlib.import_module("gguf_shapes")
truth: Any = importlib.import_module("test_against_llama_cpp")
every: Any = importlib.import_module("test_every_architecture")

ROUNDS = 5
ON_ONE_GPU = Layout((DeviceSpec("gpu0"),), -1, (1.0,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit-params", type=Path, help="llama-fit-params, to be timed on the same files")
    fit_params: Path | None = parser.parse_args().fit_params
    with tempfile.TemporaryDirectory() as folder:
        errors(make_all(Path(folder)))
        golden = {
            name: shapes.write_model(spec, Path(folder) / f"golden-{name}.gguf") for name, spec in shapes.GOLDEN.items()
        }
        times(golden, fit_params)


def make_all(folder: Path) -> dict[str, Path]:
    """The models of gguf_shapes, and one of every architecture that has none there."""
    paths = {name: shapes.write_model(spec, folder / f"{name}.gguf") for name, spec in shapes.SMALL.items()}
    drawn = {spec.arch for spec in shapes.SMALL.values()}
    program = Path(shapes.__file__).with_name("every_architecture.py")
    made = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, check=True)
    for line in made.stdout.splitlines():
        model = json.loads(line)
        if "path" in model and model["arch"] not in drawn:
            paths[Path(model["path"]).stem] = Path(model["path"])
    return paths


def errors(paths: dict[str, Path]) -> None:
    """One row per model: buffers compared, how many are equal, and by how much the others lie above."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    fixed: dict[str, list[bool]] = defaultdict(list)
    models = {name: read_shape(path) for name, path in paths.items()}
    for devices in (0, 2):
        cases = [case for name in paths for case in _cases(name, devices) if every.may_be_run(models[name], *case[1:])]
        answers = truth.ask(paths, cases, devices=devices, real=True)
        for (name, layout, context), answer in zip(cases, answers, strict=True):
            ours = footprint(models[name], layout, context)
            places = {f"RPC{i}": device for i, device in enumerate(ours.devices)} | {"host": ours.host}
            for place, got in places.items():
                weights, cache, compute = answer["bytes"].get(place, [0, 0, 0])
                fixed[name].append((got.weights_bytes, got.kv_bytes) == (weights, cache))
                found[name].append((got.compute_bytes, compute))
    rows = []
    for name, pairs in sorted(found.items(), key=lambda item: (models[item[0]].architecture not in TEMPLATES, item[0])):
        above = [predicted / allocated - 1 for predicted, allocated in pairs if allocated]
        rows.append(
            (
                name,
                "template" if models[name].architecture in TEMPLATES else "bound",
                f"{sum(fixed[name])} of {len(fixed[name])}",
                f"{sum(predicted == allocated for predicted, allocated in pairs)} of {len(pairs)}",
                f"{min(above):+.1%}",
                f"{statistics.median(above):+.1%}",
                f"{max(above):+.1%}",
            )
        )
    header = ("model", "compute by", "weights and cache equal", "compute equal", "least", "median", "most")
    print_table("Predicted against allocated, real loads on the CPU and on two devices", header, rows)


def _cases(name: str, devices: int) -> list[Any]:
    layouts = [truth.on_devices(1, 1), every.ONE_OF_THREE] if devices else [Layout()]
    if name in every.TARGETS:  # cannot be loaded alone
        return []
    return [(name, layout, context) for layout in layouts for context in every.CONTEXTS[:3]]


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
    footprint(read_shape(path), ON_ONE_GPU, ContextParams())


def _run(program: Path, path: Path) -> None:
    subprocess.run([program, "-m", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    main()
