"""What comes with a model: LoRA adapters, a multimodal projector, a draft model, its own prediction layers.

Adapters and prediction layers change the model itself; the rest lies beside it, each with a footprint of its own
(`companion_footprints`). A model that was `accompanied` says of itself with what it is loaded. A projector
and a draft go whole to the first device of the layout, or to host RAM where there is none, as llama.cpp's own programs
do it. What a draft and prediction layers take is a part of a replica's buffers, because llama.cpp reports it
(`draft_footprint`); what a projector takes is not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from scheduler.costs.adapter import Adapter, adapted
from scheduler.costs.footprint import bounded_footprint, effective_context, footprint, mtp_footprint, with_mtp
from scheduler.costs.host import HostMemory, host_memory
from scheduler.costs.params import ContextParams, DeviceBytes, Footprint, HostBytes, Layout
from scheduler.costs.projector import Projector
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected

_NOTHING = Footprint((), HostBytes())
_MOST_OTHER_TOKENS = 128
"""By which vocabularies may differ in length (`SPEC_VOCAB_MAX_SIZE_DIFFERENCE`, common/speculative.cpp)."""


@dataclass(frozen=True, slots=True)
class Companions:
    """What a model is loaded with. `mtp`: its prediction layers are loaded, and run in a context of their own."""

    adapters: tuple[Adapter, ...] = ()
    projector: Projector | None = None
    draft: ModelShape | None = None
    mtp: bool = False


def accompanied(shape: ModelShape, companions: Companions) -> ModelShape:
    """`shape` with what changes it, and with what lies beside it. Raises Rejected for adapters or a draft that do not
    fit, or where nothing can predict."""
    changed = adapted(with_mtp(shape) if companions.mtp else shape, companions.adapters)
    projector, draft = companions.projector, companions.draft
    if draft is not None:
        check_draft(shape, draft)
    if projector is None and draft is None:
        return replace(changed, runs_predictor=True) if companions.mtp else changed
    digest = hashlib.blake2b(changed.fingerprint.encode(), digest_size=16)
    if projector is not None:
        digest.update(repr((projector.weights, projector.encoders)).encode())
    if draft is not None:
        digest.update(f"guessed for by {draft.fingerprint}".encode())
    fingerprint = digest.hexdigest()
    return replace(changed, projector=projector, draft=draft, runs_predictor=companions.mtp, fingerprint=fingerprint)


def check_draft(shape: ModelShape, draft: ModelShape) -> None:
    """Raises Rejected for a draft that cannot guess for `shape`. Whether all tokens are the same, llama.cpp says when
    it loads them."""
    theirs, ours = draft.vocabulary, shape.vocabulary
    way_out = "name a smaller model of the same family in model_draft, or leave it out"
    if theirs.model != ours.model or abs(draft.n_vocab - shape.n_vocab) > _MOST_OTHER_TOKENS:
        raise Rejected(
            f"the draft {draft.paths[0]} has another vocabulary ({theirs.model}, {draft.n_vocab} tokens) than its "
            f"model ({ours.model}, {shape.n_vocab} tokens); {way_out}"
        )
    if draft.is_recurrent:
        raise Rejected(f"the draft {draft.paths[0]} has a recurrent state: it cannot drop rejected tokens; {way_out}")
    if draft.is_embedding_only or draft.arch.row.family == "draft":
        raise Rejected(
            f"the draft {draft.paths[0]} is a {draft.architecture} model, which generates no text by itself; {way_out}"
        )


def draft_context(context: ContextParams) -> ContextParams:
    """Of the draft of a model in `context`: as long, for as many slots. Its windows are kept whole, because wrong
    guesses are cut off it; of its rows only the last of a slot has logits."""
    return replace(
        context,
        type_k="f16",
        type_v="f16",
        swa_full=True,
        embeddings=False,
        n_outputs_max=context.n_seq_max,
        n_rs_seq=0,
        spec_type="none",
    )


def mtp_context(context: ContextParams) -> ContextParams:
    """Of the prediction layers of a model in `context`."""
    return replace(draft_context(context), type_k=context.type_k, type_v=context.type_v)


def draft_footprint(shape: ModelShape, layout: Layout, context: ContextParams, build: str) -> Footprint | None:
    """Bytes of the draft, or of the context of the prediction layers, beside `shape` in `layout`; None where nothing
    guesses but the text itself. `build` "": a bound. Raises Rejected as `footprint`."""
    if context.spec_type == "draft-mtp" and shape.runs_predictor:
        return _with_activations(shape, mtp_footprint(shape, layout, mtp_context(context)), layout, context)
    if context.spec_type == "draft-simple" and shape.draft is not None:
        where, own = draft_layout(layout), draft_context(context)
        cost = footprint(shape.draft, where, own, build) if build else bounded_footprint(shape.draft, where, own)
        return _spread(cost, layout)
    return None


def _with_activations(shape: ModelShape, cost: Footprint, layout: Layout, context: ContextParams) -> Footprint:
    """With what the model's own graph takes more, on the device of the output: its last layer computes every token for
    the prediction layers, and not only those that have logits. Small models (glm4moe) took up to 2.3 times as much.
    That none takes more than the bound on top is an assumption."""
    bound = bounded_footprint(shape, layout, context)
    devices = [DeviceBytes() for _ in layout.devices]
    if devices:
        devices[-1] = DeviceBytes(compute_bytes=bound.devices[-1].compute_bytes)
    return cost + Footprint(tuple(devices), HostBytes(compute_bytes=bound.host.compute_bytes))


def _spread(cost: Footprint, layout: Layout) -> Footprint:
    """What lies on the first device of `layout`, or on none of them."""
    others = (DeviceBytes(),) * (len(layout.devices) - len(cost.devices))
    return Footprint((*cost.devices, *others), cost.host)


def companion_footprints(
    shape: ModelShape, companions: Companions, layout: Layout, context: ContextParams, build: str
) -> dict[str, Footprint]:
    """Bytes of what lies beside the model, per device of `layout`, by name: mtp, draft, mmproj.

    Raises Rejected as `footprint`.
    """
    found: dict[str, Footprint] = {}
    if companions.mtp:
        found["mtp"] = mtp_footprint(shape, layout, mtp_context(context))
    if companions.draft is not None:
        found["draft"] = _spread(
            footprint(companions.draft, draft_layout(layout), draft_context(context), build), layout
        )
    if companions.projector is not None:
        found["mmproj"] = projector_footprint(companions.projector, layout, context)
    return found


NO_HOST = HostMemory(0, 0, 0, 0, 0, 0, 0, 0, 0)


def draft_host(shape: ModelShape, layout: Layout, context: ContextParams, *, n_threads: int) -> HostMemory:
    """What guesses for `shape` takes of the process besides llama.cpp's buffers: its vocabulary and tables, and what
    loading it takes for a moment. Raises Rejected as `footprint`."""
    if context.spec_type == "draft-mtp" and shape.runs_predictor:
        tables = host_memory(shape, layout, context, _NOTHING, process_bytes=0).tables_bytes
        size = effective_context(shape, context)
        kept = 4 * shape.arch.n_embd_out * (size.n_batch + 3 * size.n_outputs)  # activations of a batch, copied
        return replace(NO_HOST, tables_bytes=tables, growing_bytes=kept + _sampling_bytes(shape, context))
    if context.spec_type != "draft-simple" or shape.draft is None:
        return NO_HOST
    where, own = draft_layout(layout), draft_context(context)
    host = host_memory(shape.draft, where, own, _NOTHING, use_mmap=False, process_bytes=0, n_threads=n_threads)
    return replace(host, growing_bytes=host.growing_bytes + _sampling_bytes(shape.draft, context))


def _sampling_bytes(shape: ModelShape, context: ContextParams) -> int:
    """Each sequence has a sampler with candidates of its own (`common_sampler`)."""
    return 16 * shape.n_vocab * context.n_seq_max


def draft_layout(layout: Layout) -> Layout:
    """Where the draft of a model in `layout` lies: it sees no other device."""
    return Layout(layout.devices[:1], -1, (1.0,)) if is_on_device(layout) else Layout()


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
