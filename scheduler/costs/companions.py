"""What comes with a model: LoRA adapters, a multimodal projector, a draft model, its own prediction layers.

Adapters and prediction layers change the model itself (`accompanied`); the rest lies beside it, each with a footprint
of its own (`companion_footprints`). A projector and a draft go whole to the first device of the layout, or to host RAM
where there is none, as llama.cpp's own programs do it.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.costs.adapter import Adapter, adapted
from scheduler.costs.footprint import footprint, mtp_footprint, with_mtp
from scheduler.costs.params import ContextParams, DeviceBytes, Footprint, HostBytes, Layout
from scheduler.costs.projector import Projector
from scheduler.costs.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Companions:
    """What a model is loaded with. `mtp`: its prediction layers are loaded, and run in a context of their own."""

    adapters: tuple[Adapter, ...] = ()
    projector: Projector | None = None
    draft: ModelShape | None = None
    mtp: bool = False


def accompanied(shape: ModelShape, companions: Companions) -> ModelShape:
    """`shape` with what changes it. Raises Rejected for adapters that do not fit, or where nothing can predict."""
    return adapted(with_mtp(shape) if companions.mtp else shape, companions.adapters)


def companion_footprints(
    shape: ModelShape, companions: Companions, layout: Layout, context: ContextParams, build: str
) -> dict[str, Footprint]:
    """Bytes of what lies beside the model, per device of `layout`, by name: mtp, draft, mmproj.

    Raises Rejected as `footprint`.
    """
    found: dict[str, Footprint] = {}
    on_device = _on_device(layout)
    if companions.mtp:
        found["mtp"] = mtp_footprint(shape, layout, context)
    if companions.draft is not None:
        found["draft"] = footprint(companions.draft, draft_layout(layout), context, build)
    if companions.projector is not None:
        found["mmproj"] = _projector_footprint(companions.projector, layout, on_device, context)
    return found


def draft_layout(layout: Layout) -> Layout:
    """Where the draft of a model in `layout` lies."""
    shares = (1.0,) + (0.0,) * (len(layout.devices) - 1) if layout.devices else ()
    return Layout(layout.devices, -1 if _on_device(layout) else 0, shares)


def _on_device(layout: Layout) -> bool:
    return bool(layout.devices) and layout.n_gpu_layers != 0


def _projector_footprint(projector: Projector, layout: Layout, on_device: bool, context: ContextParams) -> Footprint:
    flash_attn = context.flash_attn == "on"
    nothing = tuple(DeviceBytes() for _ in layout.devices)
    if not on_device:
        return Footprint(nothing, projector.on_host(flash_attn=flash_attn))
    first = projector.on_device(layout.devices[0].kind, flash_attn=flash_attn)
    beside = projector.beside_device(flash_attn=flash_attn)
    return Footprint((first, *nothing[1:]), HostBytes(compute_bytes=beside.compute_bytes))
