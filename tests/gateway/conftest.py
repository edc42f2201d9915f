"""One gateway for the whole folder, one backend per test; and no test may leave a lease behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gateway_fakes import FakeBackend, Stage, serve


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    with serve(stage) as stage.url:
        yield stage


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    backend = FakeBackend()
    yield backend
    backend.wait_for("release", len(backend.saw("lease")))


@pytest.fixture
def url(stage: Stage, backend: FakeBackend) -> str:
    stage.backend = backend
    return stage.url


@pytest.fixture(scope="session")
def real_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The URL of a gateway over real models, and its backend: `real_models.Served`."""
    from real_models import serving_models  # only where it is used: it loads llama.cpp

    with serving_models(tmp_path_factory.mktemp("models")) as served:
        yield served
