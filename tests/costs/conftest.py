"""Shapes by name: small models of each architecture, written as header-only files once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_shapes import GOLDEN, SMALL, write_model

from scheduler.costs.shape import ModelShape, read_shape


@pytest.fixture(scope="session")
def shape_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelShape]:
    """The shape of a model of gguf_shapes, by name; files are written without vocabulary, so this is quick."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes: dict[str, ModelShape] = {}

    def shape(name: str) -> ModelShape:
        if name not in shapes:
            spec = (GOLDEN | SMALL)[name]
            shapes[name] = read_shape(write_model(spec, folder / f"{name}.gguf", vocabulary=False))
        return shapes[name]

    return shape


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of all `SMALL` models, with vocabularies, so that llama.cpp loads them."""
    folder = tmp_path_factory.mktemp("small")
    return {name: write_model(spec, folder / f"{name}.gguf") for name, spec in SMALL.items()}
