"""Whether a model's next tokens are guessed, and where the guesses come from."""

from __future__ import annotations

from dataclasses import replace

from scheduler.config import ModelEntry, ModelParams
from scheduler.costs.params import ContextParams, SpecType, most_drafted
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected


def with_drafts(
    context: ContextParams, shape: ModelShape, name: str, entry: ModelEntry | None, params: ModelParams
) -> ContextParams:
    """`context` with room for guesses, if the catalogue wants them. Raises Rejected where a draft cannot be used."""
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
    """What the model's own entry says goes before the catalogue's defaults."""
    own = entry.spec_type if entry else None
    if entry and entry.model_draft and own is None:
        own = "draft-simple"
    return own or params.spec_type or "none"


def _why_not(shape: ModelShape) -> str:
    """Why its guesses cannot be taken back, and the way out."""
    if shape.is_recurrent:
        return "a recurrent state, which forgets no wrong guesses: leave out model_draft and spec_type"
    return "a sliding window, which forgets no wrong guesses: set swa_full: true, or leave out its draft"


def _takes_back(shape: ModelShape, context: ContextParams) -> bool:
    """Whether tokens can be taken out of its cache again: not of a recurrent state, nor of a sliding window."""
    has_windows = shape.arch.n_swa > 0 and not context.swa_full
    return not has_windows and not any(layer.is_recurrent for layer in shape.arch.layers)
