"""Programs that the tests of devices run beside themselves end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from beside import Program


@pytest.fixture
def beside() -> Iterator[Callable[..., Program]]:
    """Start programs; they are killed at the end of the test."""
    programs: list[Program] = []

    def start(*arguments: object, **options: object) -> Program:
        programs.append(Program(*arguments, **options))  # type: ignore[arg-type]
        return programs[-1]

    yield start
    for program in programs:
        program.end()
