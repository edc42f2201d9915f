"""The sample models: reproducible files that llama.cpp runs, with text that rounding does not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.sample_models import SAMPLES, Shape, write_sample_model
from scheduler.costs.shape import read_shape
from scheduler.units import MIB


def test_equal_arguments_write_equal_files_and_seeds_differ(tmp_path: Path) -> None:
    files = [
        write_sample_model(tmp_path / name / "m.gguf", "llama", seed=seed, n_layer=1, n_embd=64)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
        if not (tmp_path / name).mkdir()
    ]
    first, second, other = (path.read_bytes() for path in files)
    assert first == second
    assert first != other


def test_an_unknown_size_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="n_layers"):
        write_sample_model(tmp_path / "m.gguf", "llama", n_layers=2)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_has_models_for_every_kind_of_place() -> None:
    assert len({sample.kind for sample in SAMPLES.values()}) >= 3
    assert {"qwen3moe", "gemma3"} <= {sample.kind for sample in SAMPLES.values()}
    assert len({sample.shape for sample in SAMPLES.values()}) == len(SAMPLES)


@pytest.mark.parametrize("kind", sorted({sample.kind for sample in SAMPLES.values()}))
def test_headers_say_what_was_asked_for(kind: Any, sample: Callable[..., Path]) -> None:
    shape = read_shape(str(sample(kind)))
    assert shape.architecture == kind
    assert shape.n_layer_all == 4
    assert shape.n_embd == 128
    assert shape.has_chat_template
    assert shape.known_architecture


def test_sizes_are_those_of_the_shape(tmp_path: Path) -> None:
    path = write_sample_model(tmp_path / "m.gguf", "llama", n_layer=6)
    per_layer = (
        4 * Shape().n_embd * 64 * 3 + 3 * Shape().n_embd * Shape().n_ff
    )  # attention with 4 heads and 2, feed-forward
    assert path.stat().st_size == pytest.approx(2 * 6 * per_layer, abs=MIB)
