"""What commands read of a model's file: its shape, from this machine's disk or from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.errors import Rejected

if TYPE_CHECKING:
    from scheduler.costs.shape import ModelShape


def read_model(file: Path) -> ModelShape:
    """The shape of the model in `file` (hf:org/repo:Q4_K_M: in a repository). Raises Rejected when it cannot be read,
    InvalidGGUF when it is no model, and Unavailable when a hub does not answer."""
    from actors.hub import Repository, is_on_a_hub
    from scheduler.costs.shape import read_shape

    if is_on_a_hub(str(file)):
        repository = Repository(str(file))
        return repository.read_shape(repository.chosen())
    try:
        return read_shape(file)
    except OSError as error:
        raise Rejected(f"{file}: {error.strerror or error}") from None
