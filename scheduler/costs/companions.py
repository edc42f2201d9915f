"""What comes with a model: LoRA adapters, a multimodal projector, a draft model, its own prediction layers.

Adapters and prediction layers change the model itself; the rest lies beside it, each with a footprint of its own
(`companion_footprints`). A model that was `accompanied` says of itself with which projector it is loaded. A projector
and a draft go whole to the first device of the layout, or to host RAM where there is none, as llama.cpp's own programs
do it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

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
    """`shape` with what changes it, and with its projector. Raises Rejected for adapters that do not fit, or where
    nothing can predict."""
    changed = adapted(with_mtp(shape) if companions.mtp else shape, companions.adapters)
    projector = companions.projector
    if projector is None:
        return changed
    digest = hashlib.blake2b(changed.fingerprint.encode(), digest_size=16)
    digest.update(repr((projector.weights, projector.encoders)).encode())
    return replace(changed, projector=projector, fingerprint=digest.hexdigest())


def companion_footprints(
    shape: ModelShape, companions: Companions, layout: Layout, context: ContextParams, build: str
) -> dict[str, Footprint]:
    """Bytes of what lies beside the model, per device of `layout`, by name: mtp, draft, mmproj.

    Raises Rejected as `footprint`.
    """
    found: dict[str, Footprint] = {}
    if companions.mtp:
        found["mtp"] = mtp_footprint(shape, layout, context)
    if companions.draft is not None:
        found["draft"] = footprint(companions.draft, draft_layout(layout), context, build)
    if companions.projector is not None:
        found["mmproj"] = projector_footprint(companions.projector, layout, context)
    return found


def draft_layout(layout: Layout) -> Layout:
    """Where the draft of a model in `layout` lies."""
    shares = (1.0,) + (0.0,) * (len(layout.devices) - 1) if layout.devices else ()
    return Layout(layout.devices, -1 if is_on_device(layout) else 0, shares)


def is_on_device(layout: Layout) -> bool:
    """Whether a projector and a draft lie on the first device; else they lie in host RAM."""
    return bool(layout.devices) and layout.n_gpu_layers != 0


def projector_footprint(projector: Projector, layout: Layout, context: ContextParams) -> Footprint:
    """Bytes of the projector beside a model in `layout`."""
    flash_attn = context.flash_attn == "on"
    projector = projector.taking(context.image_max_tokens)
    nothing = tuple(DeviceBytes() for _ in layout.devices)
    if not is_on_device(layout):
        return Footprint(nothing, projector.on_host(flash_attn=flash_attn))
    first = projector.on_device(layout.devices[0].kind, flash_attn=flash_attn)
    beside = projector.beside_device(flash_attn=flash_attn)
    return Footprint((first, *nothing[1:]), HostBytes(compute_bytes=beside.compute_bytes))
