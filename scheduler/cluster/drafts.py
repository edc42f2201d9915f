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
    if not _takes_back(shape, context):
        if spec_type == "ngram-simple":
            return context
        raise Rejected(f"{name} has {_why_not(shape)}", model=name)
    guesses = most_drafted(spec_type, params.spec_draft_n_max)
    n_outputs_max = context.n_outputs_max and min(context.n_batch, context.n_seq_max + guesses)
    return replace(context, spec_type=spec_type, n_outputs_max=n_outputs_max)


def _spec_type(entry: ModelEntry | None, params: ModelParams) -> SpecType:
    """The value of the model's own entry, or else the catalogue's default."""
    own = entry.spec_type if entry else None
    if entry and entry.model_draft and own is None:
        own = "draft-simple"
    return own or params.spec_type or "none"


def _why_not(shape: ModelShape) -> str:
    """Why rejected tokens cannot be removed from its cache, and the way out."""
    if shape.is_recurrent:
        return "a recurrent state, which cannot drop rejected tokens: leave out model_draft and spec_type"
    return "a sliding window, which cannot drop rejected tokens: set swa_full: true, or leave out its draft"


def _takes_back(shape: ModelShape, context: ContextParams) -> bool:
    """Whether tokens can be removed from its cache: not from a recurrent state, nor from a sliding window."""
    has_windows = shape.arch.n_swa > 0 and not context.swa_full
    return not has_windows and not any(layer.is_recurrent for layer in shape.arch.layers)
