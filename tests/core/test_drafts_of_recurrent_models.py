"""Drafts in the plans of models with recurrent states, and those that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scenario import MEDIUM, shape

from scheduler.cluster.drafts import with_drafts
from scheduler.config import ModelEntry, ModelParams
from scheduler.costs.companions import draft_context, mtp_context
from scheduler.costs.footprint import with_mtp
from scheduler.costs.params import ContextParams
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected

CONTEXT = ContextParams(n_seq_max=2, n_outputs_max=2)
SIMPLE, MTP = ModelEntry(path="m.gguf", model_draft="d.gguf"), ModelEntry(path="m.gguf", spec_type="draft-mtp")
NGRAMS = ModelEntry(path="m.gguf", spec_type="ngram-simple")


def model(architecture: str, **layer: int | bool) -> ModelShape:
    """The medium one as another architecture, its first layer changed."""
    plain = shape(*MEDIUM)
    layers = (replace(plain.arch.layers[0], **layer), *plain.arch.layers[1:])  # type: ignore[arg-type]
    return replace(plain, arch=replace(plain.arch, name=architecture, layers=layers))


@pytest.mark.parametrize(
    ("entry", "n_max", "n_copies"), [(SIMPLE, None, 3), (SIMPLE, 7, 7), (MTP, None, 3), (MTP, 1, 1), (NGRAMS, 7, 0)]
)
def test_there_is_a_copy_for_each_guess(entry: ModelEntry, n_max: int | None, n_copies: int) -> None:
    params = ModelParams(spec_draft_n_max=n_max)
    context = with_drafts(CONTEXT, model("qwen35", is_recurrent=True), "m", entry, params)
    assert (context.n_rs_seq, context.n_outputs_max) == (n_copies, 2 + n_copies)
    assert draft_context(context).n_rs_seq == mtp_context(context).n_rs_seq == 0
    assert with_drafts(CONTEXT, model("llama"), "m", entry, params).n_rs_seq == 0


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            model("qwen3next", is_recurrent=True),
            "llama.cpp keeps no copies of it for qwen3next models. Leave out model_draft",
        ),
        (model("mamba", is_recurrent=True), "m has a recurrent state, which cannot drop rejected tokens"),
        (
            model("deepseek4", compression=4),
            "compressed keys, which cannot drop rejected tokens: leave out",
        ),
    ],
)
def test_what_has_no_copies_is_refused(refused: ModelShape, words: str) -> None:
    for entry in (SIMPLE, MTP):
        with pytest.raises(Rejected, match=words):
            with_drafts(CONTEXT, refused, "m", entry, ModelParams())
    assert with_drafts(CONTEXT, refused, "m", NGRAMS, ModelParams()) == CONTEXT


def test_several_prediction_layers_are_refused_where_llama_cpp_ends_the_process() -> None:
    plain = model("glm4moe")
    three = replace(plain, arch=replace(plain.arch, predictors=plain.arch.layers[-3:]), predictor=object())  # type: ignore[arg-type]
    with pytest.raises(Rejected, match=r"this glm4moe model has 3 prediction layers, and llama\.cpp runs a single one"):
        with_mtp(three)
