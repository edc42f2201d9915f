"""Which dimensions of an embedding may be left out.

Models that are trained for it (Matryoshka) have the most important ones first. Cut vectors of others are nearly
useless, and look like any. GGUF files do not tell these models apart, so the catalogue does.
"""

from __future__ import annotations

from actors.serving.protocol import LoadSpec
from scheduler.errors import Rejected


def refuse_cut(spec: LoadSpec, n_embd: int, dimensions: int) -> None:
    """Raises Rejected unless the model's vectors, of `n_embd` dimensions, may be cut to so many."""
    sizes = spec.matryoshka_dimensions
    if dimensions > n_embd:
        raise Rejected(f"dimensions is {dimensions}; vectors of {spec.model} have {n_embd}")
    if dimensions == n_embd or sizes == "any" or dimensions in sizes:
        return
    if sizes:
        known = ", ".join(map(str, sorted({size for size in sizes if size < n_embd} | {n_embd})))
        raise Rejected(f"dimensions is {dimensions}; vectors of {spec.model} can have {known}. Ask for one of these")
    raise Rejected(
        f"dimensions is {dimensions}; vectors of {spec.model} have {n_embd}, and the catalogue does not say that they "
        "may be cut. Leave dimensions out; or, for a model trained for it (Matryoshka), set matryoshka_dimensions"
    )
