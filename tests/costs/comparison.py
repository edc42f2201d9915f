"""Compares what is predicted with what the installed llama.cpp allocates, architecture by architecture.

    comparison.py FOLDER

makes models in FOLDER, has llama.cpp load them, and prints as its last line what came out for each architecture that
has a row or that llama.cpp knows: `OUTCOMES {"release": ..., "outcomes": {architecture: [outcome, why]}}`. `make bump`
runs it under a llama-cpp-python that was built apart; the tests ask the installed one in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gguf_shapes import SMALL, write_model

from scheduler.costs.families import ROWS, Row, row_of
from scheduler.costs.footprint import bounded_footprint, drawn_footprint, effective_context
from scheduler.costs.ggml_types import KV_TYPES
from scheduler.costs.graph.templates import TEMPLATES
from scheduler.costs.params import ContextParams, DeviceSpec, Footprint, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.costs.weights import experts_pattern
from scheduler.errors import Rejected

Case = tuple[str, Layout, ContextParams]
"""A model's name, where its layers go, and its context."""

Truth = dict[str, Any]
"""llama.cpp's answer about a case: `bytes` ([weights, cache, compute] per place), `n_ctx`, `output_mib`, or `error`."""

TIMEOUT_S = 900.0
OUTPUT_ROUNDING_MIB = 0.0051
"""llama.cpp tells the size of the output buffer in its log, with two decimals."""

SMALL_CONTEXTS = [
    ContextParams(n_ctx=1024, n_outputs_max=1),
    ContextParams(n_ctx=3000, n_seq_max=3, flash_attn="off", n_outputs_max=3),
    ContextParams(n_ctx=2048, n_seq_max=4, n_ubatch=64, kv_unified=True, n_outputs_max=4),
    ContextParams(n_ctx=2048, n_ubatch=1024, swa_full=True, embeddings=True),
    ContextParams(n_ctx=512, n_batch=128, type_k="q8_0", type_v="q8_0"),
    ContextParams(n_ctx=0, n_ubatch=128, type_k="bf16", type_v="bf16"),
]
CONTEXTS = [
    *SMALL_CONTEXTS[:4],
    ContextParams(n_ctx=512, type_k="bf16", type_v="bf16"),
    ContextParams(n_ctx=1024, type_k="q8_0", type_v="q8_0"),
]
WIDE_CONTEXTS = [
    ContextParams(n_ctx=4096, n_outputs_max=1),
    ContextParams(n_ctx=16384, n_seq_max=4, n_outputs_max=4),
    ContextParams(n_ctx=8192, n_ubatch=2048),
    ContextParams(n_ctx=8192, flash_attn="off"),
]
MANY_SEQUENCES = ContextParams(n_ctx=40 * 256, n_seq_max=40, n_ubatch=128)
"""From 32 on, llama.cpp may do without fused sums of residual streams."""
STREAMS = ("deepseek4-moe", "glm5-next-moe", "qwen4exp-moe", "hy_v4-moe")

WIDE = "llama phi2 phi3 command-r gemma2 qwen3moe laguna bailingmoe qwen3tts mimo2 deepseek4 rwkv7".split()
"""Templates whose results lie in several places by turns, and bounds that were once too low for wide models."""

TARGETS = {"eagle3-dense": "llama-dense", "gemma4-assistant-dense": "gemma4-dense", "dflash-dense": "llama-dense"}
"""Drafts, and the models that they guess for."""
LOOSE = frozenset({"gemma4-assistant"})
"""It copies the cache of its target, wherever that may lie, and nothing bounds that."""


def on_devices(*split: float, **more: Any) -> Layout:
    return Layout(tuple(DeviceSpec(f"gpu{i}", "rpc") for i in range(len(split))), -1, split, **more)


ONE_OF_THREE = Layout(on_devices(1, 1).devices, 3, (2, 1))


# ---------------------------------------------------------------------- models


def every_architecture(folder: Path, *names: str, wide: bool = False) -> list[dict[str, Any]]:
    """What became of each architecture that llama.cpp knows, or of those named: its model's path, or why there is none.

    Raises RuntimeError with llama.cpp's last words when none can be made.
    """
    program = Path(__file__).with_name("every_architecture.py")
    command = [sys.executable, program, *(["--wide"] if wide else []), folder, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"no models can be made with this llama.cpp: {done.stderr.strip()[-600:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def paths_of(made: Iterable[Mapping[str, Any]]) -> dict[str, Path]:
    """The files among what was made, by name."""
    return {Path(each["path"]).stem: Path(each["path"]) for each in made if "path" in each}


def may_be_run(shape: ModelShape, layout: Layout, context: ContextParams) -> bool:
    """False where we say that llama.cpp refuses, or ends the process."""
    try:
        bounded_footprint(shape, layout, context)
    except Rejected:
        return False
    return True


# ---------------------------------------------------------------------- cases


def cases_on_the_cpu(name: str) -> list[Case]:
    return [
        (name, Layout(), context)
        for context in SMALL_CONTEXTS
        if not (name.startswith("deepseek2") and "q8_0" in context.type_k)
    ]


def cases_on_two_devices(name: str) -> list[Case]:
    layouts = [on_devices(1, 1), on_devices(1, 3), on_devices(5, 1)]
    layouts.append(Layout(layouts[0].devices, 3, (2, 1)))
    if SMALL[name].n_expert:
        layouts.append(on_devices(1, 1, experts_on_host=True))
        layouts.append(on_devices(1, 1, n_cpu_moe=1))
    return [(name, layout, context) for layout in layouts for context in SMALL_CONTEXTS[:3]]


def cases_on_eight_devices(name: str) -> list[Case]:
    if name not in ("llama", "gemma3", "qwen3moe", "deepseek2", "granitehybrid", "qwen3next", "gemma3n"):
        return []
    layouts = [on_devices(1, 1, 1, 1, 1, 1, 1, 1), on_devices(2, 0, 1, 0, 0, 3, 1, 1)]
    layouts.append(Layout(layouts[0].devices, 4, (1, 0, 1, 0, 1, 1, 0, 1)))
    return [(name, layout, context) for layout in layouts for context in SMALL_CONTEXTS[:2]]


REAL_CASES: list[tuple[Callable[[str], list[Case]], int]] = [
    (cases_on_the_cpu, 0),
    (cases_on_two_devices, 2),
    (cases_on_eight_devices, 8),
]
"""Cases of a model of `SMALL` that is loaded for real, and how many devices they need."""

EVERY_CASES: list[tuple[list[Layout], list[ContextParams], int]] = [
    ([Layout()], CONTEXTS, 0),
    ([on_devices(1, 1), ONE_OF_THREE], CONTEXTS[:3], 2),
]
"""Layouts and contexts of a model of every architecture, and how many devices they need; all are loaded for real."""

WIDE_CASES: list[tuple[Layout, int]] = [(Layout(), 0), (on_devices(1), 1)]


# ---------------------------------------------------------------------- asking


def ask(
    paths: Mapping[str, Path],
    cases: Sequence[Case],
    *,
    devices: int,
    real: bool,
    targets: Mapping[str, str] | None = None,
    adapters: Mapping[str, Sequence[Path]] | None = None,
    mtp: bool = False,
) -> list[Truth]:
    """What llama.cpp says about each case, all in one process. `targets`: which models are drafts, and for whom.

    `adapters`: the LoRA adapters of models. `mtp`: the context is one for the prediction layers.
    Raises Ended when llama.cpp ends the process.
    """
    request = {
        "real": real,
        "devices": devices,
        "cases": [
            {
                "path": str(paths[name]),
                "target": str(paths[targets[name]]) if targets and name in targets else None,
                "adapters": [str(path) for path in (adapters or {}).get(name, ())],
                "mtp": mtp,
                "n_gpu_layers": layout.n_gpu_layers,
                "tensor_split": layout.tensor_split,
                "experts_pattern": experts_pattern(layout),
                "context": asdict(context)
                | {"type_k": KV_TYPES[context.type_k].id, "type_v": KV_TYPES[context.type_v].id},
            }
            for name, layout, context in cases
        ],
    }
    program = Path(__file__).with_name("llama_truth.py")
    try:
        done = subprocess.run(
            [sys.executable, str(program)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    except subprocess.TimeoutExpired as late:
        raise Ended(f"llama.cpp took more than {TIMEOUT_S:.0f} s", _answers(late.stdout or b"")) from None
    answers = _answers(done.stdout)
    if len(answers) < len(cases):
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        asserted = [line[line.index("GGML_ASSERT") :] for line in words if "GGML_ASSERT" in line]
        why = " ".join(asserted[:1] or words[-1:])
        raise Ended(f"llama.cpp ended with {done.returncode}: {why}", answers)
    return answers


def _answers(output: bytes) -> list[Truth]:
    lines = output.decode("utf-8", "replace").splitlines()
    return [json.loads(line.removeprefix("ANSWER ")) for line in lines if line.startswith("ANSWER ")]


class Ended(AssertionError):
    """llama.cpp ended the process over a case; `answers` are about those before it."""

    def __init__(self, why: str, answers: list[Truth]) -> None:
        super().__init__(why)
        self.answers = answers


Ask = Callable[..., list[Truth]]
"""`ask`, or what stands in for it."""


def ask_apart(paths: Mapping[str, Path], cases: Sequence[Case], ask: Ask, **how: Any) -> list[Truth]:
    """`ask`, but where llama.cpp ends the process over a model, its remaining cases are errors and the others go on.

    The cases of a model follow each other.
    """
    answers: list[Truth] = []
    while rest := cases[len(answers) :]:
        try:
            answers += ask(paths, rest, **how)
        except Ended as ended:
            answers += ended.answers
            name = cases[len(answers)][0]
            answers += [{"error": str(ended)} for case in cases[len(answers) :] if case[0] == name]
    return answers


# ---------------------------------------------------------------------- comparing


@dataclass
class Finding:
    """How one architecture compares, over all its cases; each text says where it was seen first, or is empty."""

    failed: str = ""
    """llama.cpp gave no figures."""
    wrong: str = ""
    """Weights, cache, context or output differ."""
    drifted: str = ""
    """The template draws a graph that takes other compute buffers."""
    low: str = ""
    """The bound is below llama.cpp's compute buffers."""
    low_undrawn: str = ""
    """The same, in a case that the template does not draw, so that the bound is what counts in any case."""
    compared: int = 0
    drawn: int = 0

    def outcome(self, row: Row) -> tuple[str, str]:
        """(outcome, why): exact, bounded, or what is in the way: too low, wrong, not asked."""
        if self.failed or not self.compared:
            return "not asked", self.failed or "there is no model of it"
        if self.wrong:
            return "wrong", self.wrong
        if self.drawn and not self.drifted:
            return ("too low", self.low_undrawn) if self.low_undrawn else ("exact", "")
        low = self.low_undrawn or self.low
        if not low and row.leaks:
            low = f"its bound misses a part in some layouts, and the template has drifted: {self.drifted}"
        return ("too low", low) if low else ("bounded", self.drifted)


@dataclass
class Findings:
    """What was found about each architecture so far."""

    of: dict[str, Finding] = field(default_factory=dict)

    def note(self, case: Case, shape: ModelShape, truth: Truth) -> None:
        """Compare one answer with what is predicted, by the template and by the bound."""
        _, layout, context = case
        found = self.of.setdefault(shape.architecture, Finding())
        found.compared += 1
        what = described(case)
        if "error" in truth:
            words = truth["error"].strip().splitlines() or ["it does not say why"]
            found.failed = found.failed or f"{what}: {next((line for line in words if 'error' in line), words[-1])}"
            return
        bound, drawn = bounded_footprint(shape, layout, context), drawn_footprint(shape, layout, context)
        found.wrong = found.wrong or fixed_difference(shape, context, bound, truth, what)
        low = "" if shape.architecture in LOOSE else compute_difference(bound, truth, what, below=True)
        if drawn is None:
            found.low_undrawn = found.low_undrawn or low
            return
        found.drawn += 1
        found.drifted = found.drifted or compute_difference(drawn, truth, what, below=False)
        found.low = found.low or low


def described(case: Case) -> str:
    """The case in a few words: what is not as it is by default."""
    name, layout, context = case
    said = [f"{name} on {len(layout.devices)} devices"]
    for part, usual in ((layout, Layout(layout.devices)), (context, ContextParams())):
        values = ((each.name, getattr(part, each.name)) for each in fields(part))
        said += [f"{name} {value}" for name, value in values if value != getattr(usual, name)]
    return ", ".join(said)


def places(cost: Footprint) -> dict[str, Any]:
    """The parts of a footprint by llama.cpp's names of places."""
    return {f"RPC{i}": device for i, device in enumerate(cost.devices)} | {"host": cost.host}


def fixed_difference(shape: ModelShape, context: ContextParams, cost: Footprint, truth: Truth, what: str) -> str:
    """Where weights, cache, context or output differ from llama.cpp's; empty: nowhere."""
    n_ctx = effective_context(shape, context).n_ctx
    if truth["n_ctx"] != n_ctx:
        return f"n_ctx is {truth['n_ctx']}, not {n_ctx}: {what}"
    if abs(cost.host.output_bytes / 2**20 - truth["output_mib"]) > OUTPUT_ROUNDING_MIB:
        return f"the output takes {truth['output_mib']} MiB, not {cost.host.output_bytes} bytes: {what}"
    for place, ours in places(cost).items():
        theirs = truth["bytes"].get(place, [0, 0, 0])[:2]
        if theirs != [ours.weights_bytes, ours.kv_bytes]:
            return f"weights and cache take {theirs}, not {[ours.weights_bytes, ours.kv_bytes]}: {place} of {what}"
    return ""


def compute_difference(cost: Footprint, truth: Truth, what: str, *, below: bool) -> str:
    """Where compute buffers differ from llama.cpp's, or (`below`) are too small; empty: nowhere."""
    for place, ours in places(cost).items():
        compute = truth["bytes"].get(place, [0, 0, 0])[2]
        if ours.compute_bytes < compute if below else ours.compute_bytes != compute:
            return f"compute takes {compute}, not {ours.compute_bytes}: {place} of {what}"
    return ""


def compare_small(findings: Findings, folder: Path, known: Collection[str], ask: Ask) -> None:
    """The models of gguf_shapes, as far as this llama.cpp knows their architectures."""
    paths = {name: write_model(spec, folder / f"{name}.gguf") for name, spec in SMALL.items() if spec.arch in known}
    shapes = {name: read_shape(path) for name, path in paths.items()}
    for cases_of, devices in REAL_CASES:
        cases = [case for name in paths for case in cases_of(name)]
        for case, truth in zip(cases, ask_apart(paths, cases, ask, devices=devices, real=True), strict=True):
            findings.note(case, shapes[case[0]], truth)


def compare_every(findings: Findings, paths: Mapping[str, Path], ask: Ask) -> None:
    """A small model of each architecture."""
    shapes = {name: read_shape(path) for name, path in paths.items()}
    for layouts, contexts, devices in EVERY_CASES:
        cases: list[Case] = [(name, layout, context) for name in paths for layout in layouts for context in contexts]
        _compare(findings, paths, shapes, cases, ask, devices=devices, real=True)
    cases = [(name, Layout(on_devices(1).devices, 2, (1,)), MANY_SEQUENCES) for name in STREAMS if name in paths]
    _compare(findings, paths, shapes, cases, ask, devices=1, real=True)


def compare_wide(findings: Findings, paths: Mapping[str, Path], ask: Ask) -> None:
    """Models with real widths, in which other moments are the largest; too big to be loaded for real."""
    shapes = {name: read_shape(path) for name, path in paths.items()}
    for layout, devices in WIDE_CASES:
        cases: list[Case] = [
            (name, layout, context)
            for name in paths
            for context in WIDE_CONTEXTS
            # `no_alloc` sees only the first of the graphs that are reserved
            if context.n_seq_max == 1 or not shapes[name].arch.row.alone_too
        ]
        _compare(findings, paths, shapes, cases, ask, devices=devices, real=False)


def _compare(
    findings: Findings,
    paths: Mapping[str, Path],
    shapes: Mapping[str, ModelShape],
    cases: Sequence[Case],
    ask: Ask,
    **how: Any,
) -> None:
    cases = [case for case in cases if may_be_run(shapes[case[0]], *case[1:])]
    targets = {name: target for name, target in TARGETS.items() if target in paths}
    answers = ask_apart(paths, cases, ask, targets=targets, **how) if cases else []
    for case, truth in zip(cases, answers, strict=True):
        findings.note(case, shapes[case[0]], truth)


def outcomes(findings: Findings, made: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """(outcome, why) per architecture that has a row or was asked for, where `made` is what llama.cpp made of each."""
    known = {each["arch"] for each in made}
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(known | set(ROWS)):
        errors = [each["error"] for each in made if each["arch"] == name and "error" in each]
        if name not in known:
            found[name] = "refused", "this release does not know it"
        elif row_of(name).refused:
            found[name] = "refused", row_of(name).refused
        elif name not in ROWS:
            found[name] = "new", "it has no row"
        elif errors:
            found[name] = "not asked", f"no model can be made: {errors[0]}"
        else:
            found[name] = findings.of.get(name, Finding()).outcome(row_of(name))
    return found


def compare_all(folder: Path, ask: Ask) -> dict[str, tuple[str, str]]:
    """(outcome, why) per architecture. Raises RuntimeError or AssertionError where this llama.cpp cannot be asked."""
    every, small, wide = (folder / name for name in ("every", "small", "wide"))
    for each in (every, small, wide):
        each.mkdir(parents=True)
    findings, made = Findings(), every_architecture(every)
    paths, known = paths_of(made), {each["arch"] for each in made}
    [first] = ask(paths, [("llama-dense", on_devices(1, 1), CONTEXTS[0])], devices=2, real=True)
    if "error" in first:
        raise RuntimeError(first["error"])
    print(f"of {len(known)} architectures, {len(paths)} models are made; now they are loaded", flush=True)
    compare_every(findings, paths, ask)
    print("one model of each architecture is compared; now more of them", flush=True)
    compare_small(findings, small, known, ask)
    print("small models are compared; now wide ones", flush=True)
    compare_wide(findings, paths_of(every_architecture(wide, *sorted({*WIDE, *TEMPLATES} & known), wide=True)), ask)
    return outcomes(findings, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        found = compare_all(parser.parse_args().folder, ask)
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"llama.cpp of this release cannot be asked: {error}")
    print("OUTCOMES " + json.dumps({"release": version("llama-cpp-python"), "outcomes": found}), flush=True)


if __name__ == "__main__":
    main()
