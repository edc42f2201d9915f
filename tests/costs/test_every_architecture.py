"""Every architecture that the installed llama.cpp knows: a small model of each, made by llama.cpp, loaded for real.

Weights, caches, states and outputs have to be equal to the byte, compute buffers never below, and equal where a
template draws the graph. docs/architectures.md says the same in words, and is held to it here.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_file import U32, Gguf
from test_against_llama_cpp import Case, ask, compare, on_devices

from scheduler.costs.families import CACHELESS, DRAFTS, KNOWN, UNUSABLE
from scheduler.costs.footprint import computes_exactly, footprint
from scheduler.costs.graph.templates import CHECKED_BUILD, TEMPLATES
from scheduler.costs.header import read_header
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import InvalidGGUF, Rejected

pytestmark = pytest.mark.llama

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
CONTEXTS = [
    ContextParams(n_ctx=1024),
    ContextParams(n_ctx=3000, n_seq_max=3, flash_attn="off"),
    ContextParams(n_ctx=2048, n_seq_max=4, n_ubatch=64, kv_unified=True),
    ContextParams(n_ctx=2048, n_ubatch=1024, swa_full=True, embeddings=True),
    ContextParams(n_ctx=512, type_k="bf16", type_v="bf16"),
    ContextParams(n_ctx=1024, type_k="q8_0", type_v="q8_0"),
]
ONE_OF_THREE = Layout(on_devices(1, 1).devices, 3, (2, 1))
TARGETS = {"eagle3-dense": "llama-dense", "gemma4-assistant-dense": "gemma4-dense", "dflash-dense": "llama-dense"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each architecture: its model's path, or why there is none."""
    program = Path(__file__).with_name("every_architecture.py")
    folder = tmp_path_factory.mktemp("architectures")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=170, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def paths(made: list[dict[str, Any]]) -> dict[str, Path]:
    return {Path(each["path"]).stem: Path(each["path"]) for each in made if "path" in each}


@pytest.fixture(scope="module")
def shapes(paths: dict[str, Path]) -> dict[str, ModelShape]:
    return {name: read_shape(path) for name, path in paths.items()}


def test_llama_cpp_knows_no_architecture_that_we_do_not(made: list[dict[str, Any]]) -> None:
    names = {each["arch"] for each in made}
    assert names - KNOWN == {"clip", "gptj"}
    assert names >= KNOWN | set(UNUSABLE)
    assert {each["arch"] for each in made if "error" in each} == {"clip", "gptj"}
    assert len(names) > 150


def test_every_template_draws_a_model(shapes: dict[str, ModelShape]) -> None:
    """Whose buffers the tests below then compare."""
    assert {shape.architecture for shape in shapes.values() if computes_exactly(shape, CHECKED_BUILD)} == set(TEMPLATES)


def may_be_run(shape: ModelShape, layout: Layout, context: ContextParams) -> bool:
    """False where we say that llama.cpp refuses, or ends the process."""
    try:
        footprint(shape, layout, context, CHECKED_BUILD)
    except Rejected:
        return False
    return True


@pytest.mark.parametrize(
    ("layouts", "contexts", "devices"),
    [([Layout()], CONTEXTS, 0), ([on_devices(1, 1), ONE_OF_THREE], CONTEXTS[:3], 2)],
    ids=["on the CPU", "on two devices"],
)
def test_every_architecture_takes_what_is_predicted(
    layouts: list[Layout],
    contexts: list[ContextParams],
    devices: int,
    paths: dict[str, Path],
    shapes: dict[str, ModelShape],
) -> None:
    cases: list[Case] = [
        (name, layout, context)
        for name in paths
        for layout in layouts
        for context in contexts
        if may_be_run(shapes[name], layout, context)
    ]
    assert {name for name, _, _ in cases} >= {name for name, shape in shapes.items() if shape.architecture != "plm"}
    answers = ask(paths, cases, devices=devices, real=True, targets=TARGETS)
    for case, truth in zip(cases, answers, strict=True):
        shape = shapes[case[0]]
        # gemma4-assistant copies the cache of its target, wherever that may lie
        bounded = "any" if shape.architecture == "gemma4-assistant" else "not below"
        compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else bounded)


def test_deepseek4_that_lacks_the_tensors_of_its_prediction_layer_has_none(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    """llama.cpp then runs the last layer as it does the others; so do converters that leave prediction layers out."""
    path = with_key(paths["deepseek4-moe"], "deepseek4.nextn_predict_layers", 1, tmp_path / "deepseek4-nextn.gguf")
    shape = read_shape(path)
    layout = Layout(on_devices(1).devices, 2, (1,))
    cases: list[Case] = [(path.stem, layout, context) for context in CONTEXTS[:3]]
    for case, truth in zip(cases, ask({path.stem: path}, cases, devices=1, real=True), strict=True):
        compare(case, shape, truth, "equal")


def test_many_sequences_over_host_and_device(paths: dict[str, Path], shapes: dict[str, ModelShape]) -> None:
    """From 32 on, llama.cpp may do without fused sums of residual streams."""
    context = ContextParams(n_ctx=40 * 256, n_seq_max=40, n_ubatch=128)
    names = ("deepseek4-moe", "glm5-next-moe", "qwen4exp-moe", "hy_v4-moe")
    cases: list[Case] = [(name, Layout(on_devices(1).devices, 2, (1,)), context) for name in names]
    for case, truth in zip(cases, ask(paths, cases, devices=1, real=True), strict=True):
        compare(case, shapes[case[0]], truth, "equal")


def with_key(model: Path, key: str, value: int, path: Path) -> Path:
    """A copy of `model` with one more key in its metadata."""
    header = read_header(model)
    pair = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", U32, value)
    with model.open("rb") as source, path.open("wb") as copy:
        start, rest = source.read(24), source.read(header.header_bytes - 24)
        copy.write(start[:16] + struct.pack("<Q", len(header.metadata) + 1) + pair + rest)
        end = -(-copy.tell() // header.alignment) * header.alignment
        copy.truncate(end + header.file_bytes - header.data_offset)
    return path


WIDE = "llama phi2 phi3 command-r gemma2 qwen3moe laguna bailingmoe qwen3tts mimo2 deepseek4 rwkv7".split()
"""Templates whose results lie in several places by turns, and bounds that were once too low for wide models."""


def test_wide_models_take_what_is_predicted(tmp_path: Path) -> None:
    """In models with real widths other moments are the largest than in small ones."""
    program = Path(__file__).with_name("every_architecture.py")
    done = subprocess.run(
        [sys.executable, program, "--wide", tmp_path, *WIDE], capture_output=True, text=True, timeout=170, check=True
    )
    files = [Path(json.loads(line)["path"]) for line in done.stdout.splitlines()]
    paths = {path.stem: path for path in files}
    shapes = {name: read_shape(path) for name, path in paths.items()}
    contexts = [
        ContextParams(n_ctx=4096),
        ContextParams(n_ctx=16384, n_seq_max=4),
        ContextParams(n_ctx=8192, n_ubatch=2048),
        ContextParams(n_ctx=8192, flash_attn="off"),
    ]
    for devices, layout in ((0, Layout()), (1, on_devices(1))):
        cases: list[Case] = [
            (name, layout, c) for name in paths for c in contexts if may_be_run(shapes[name], layout, c)
        ]
        for case, truth in zip(cases, ask(paths, cases, devices=devices, real=False), strict=True):
            shape = shapes[case[0]]
            compare(case, shape, truth, "equal" if computes_exactly(shape, CHECKED_BUILD) else "not below")


def section(title: str) -> set[str]:
    """The architectures that the page names under a heading."""
    text = PAGE.read_text()
    body = re.split(r"^## ", text.split(f"\n## {title}\n")[1], maxsplit=1, flags=re.M)[0]
    return set(re.findall(r"`([a-z0-9_.-]+)`", body))


def test_the_page_lists_every_architecture_once() -> None:
    assert section("All exact") == set(TEMPLATES)
    assert section("Compute bounded") == KNOWN - set(TEMPLATES) - set(UNUSABLE) - DRAFTS
    assert section("Only beside another model") == DRAFTS
    assert section("Refused") == set(UNUSABLE)
    assert CACHELESS <= KNOWN


def test_what_cannot_be_run_is_refused_with_the_reason(tmp_path: Path, paths: dict[str, Path]) -> None:
    projector = Gguf()
    projector.set("general.architecture", "clip")
    projector.tensors = [("v.patch_embd.weight", (14, 14, 3, 64), "f16")]
    with pytest.raises(InvalidGGUF, match="give it as mmproj"):
        read_shape(projector.write(tmp_path / "mmproj.gguf"))
    with pytest.raises(Rejected, match="ends the process"):
        footprint(read_shape(paths["plm-dense"]), Layout(), ContextParams(), CHECKED_BUILD)
