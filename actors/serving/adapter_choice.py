"""Which LoRA adapters a request is answered with."""

from __future__ import annotations

from collections.abc import Sequence

from actors.serving.model import Adapters
from actors.serving.protocol import LoadAdapter
from scheduler.errors import Rejected


def chosen_adapters(
    model: str, adapters: Sequence[LoadAdapter], asked: Sequence[tuple[int | str, float]] | None
) -> Adapters:
    """What `asked` means: of an adapter that is named twice, the last scale; of one that is not named, 0. Nothing
    asked (None, or an empty list, as in llama-server): the catalogue's scales.

    Raises Rejected for an adapter that `model` does not have.
    """
    scales = {number: adapter.scale for number, adapter in enumerate(adapters)}
    if asked:
        numbers = {adapter.name: number for number, adapter in enumerate(adapters)}
        scales = {}
        for which, scale in asked:
            number = numbers.get(which) if isinstance(which, str) else which
            if number is None or not 0 <= number < len(adapters):
                raise Rejected(f"lora: {model} has no adapter {which!r}; {_known(adapters)}", param="lora")
            scales[number] = scale
    return tuple(sorted((number, scale) for number, scale in scales.items() if scale))


def _known(adapters: Sequence[LoadAdapter]) -> str:
    if not adapters:
        return "it has none: name them under adapters in the catalogue"
    return "it has " + ", ".join(f"{number} ({adapter.name})" for number, adapter in enumerate(adapters))
