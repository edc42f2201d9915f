"""Whether tokens are drafted for a model (speculative decoding), and from which source."""

from __future__ import annotations

from dataclasses import replace

from scheduler.config import ModelEntry, ModelParams
from scheduler.costs.params import ContextParams, SpecType, most_drafted
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected


def with_drafts(
    context: ContextParams, shape: ModelShape, name: str, entry: ModelEntry | None, params: ModelParams
) -> ContextParams:
    """`context` with room for drafts, if the catalogue wants them. Raises Rejected if a draft cannot be used."""
    spec_type = _spec_type(entry, params)
    if spec_type == "none" or shape.is_embedding_only:
        return context
    why_not = _why_not(shape, context)
    if spec_type == "ngram-simple" and (why_not or shape.is_recurrent):
        return context
    if why_not:
        raise Rejected(f"{name} has {why_not}", model=name)
    guesses = most_drafted(spec_type, params.spec_draft_n_max, copies_states=shape.is_recurrent)
    n_outputs_max = context.n_outputs_max and min(context.n_batch, context.n_seq_max + guesses)
    n_rs_seq = guesses if shape.is_recurrent else 0
    return replace(context, spec_type=spec_type, n_outputs_max=n_outputs_max, n_rs_seq=n_rs_seq)


def _spec_type(entry: ModelEntry | None, params: ModelParams) -> SpecType:
    """The value of the model's own entry, or else the catalogue's default."""
    own = entry.spec_type if entry else None
    if entry and entry.model_draft and own is None:
        own = "draft-simple"
    return own or params.spec_type or "none"


def _why_not(shape: ModelShape, context: ContextParams) -> str:
    """Why rejected tokens cannot be removed from its memory, and the way out; empty: they can."""
    if shape.is_recurrent and not shape.arch.row.copies_states:
        return (
            f"a recurrent state, which cannot drop rejected tokens: llama.cpp keeps no copies of it for "
            f"{shape.architecture} models. Leave out model_draft and spec_type"
        )
    if any(layer.compression for layer in shape.arch.layers):
        return "a cache of compressed keys, which cannot drop rejected tokens: leave out model_draft and spec_type"
    if _has_windows(shape, context):
        return "a sliding window, which cannot drop rejected tokens: set swa_full: true, or leave out its draft"
    return ""


def _has_windows(shape: ModelShape, context: ContextParams) -> bool:
    return shape.arch.n_swa > 0 and not context.swa_full
