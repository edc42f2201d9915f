"""Models and reference answers for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from service import Reference, write_llama

from arriero.sample_models import write_sample_model


@pytest.fixture(scope="module", autouse=True)
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one module's models took, or ran out of, or were told, is not remembered in the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alba, bruma and cumbre: small llamas; duna: a mixture of experts; yunta: a llama twice as large."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("alba", "bruma", "cumbre"), start=1):
        write_llama(folder / f"{name}.gguf", seed=seed)
    write_sample_model(folder / "duna.gguf", "qwen3moe", seed=4, n_layer=4)
    write_llama(folder / "yunta.gguf", seed=5, n_layer=18)
    return folder


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    process = Reference()
    yield process
    process.close()
