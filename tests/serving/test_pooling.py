"""Every way to make one vector of a text: the model's file names it, and the vectors are llama-cpp-python's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.serving.engine import Engine
from actors.serving.protocol import EmbedRequest, content_of
from scheduler.errors import Rejected

pytestmark = pytest.mark.llama

TEXTS = ("the salt", "a bell " * 20, "two blankets and some rope", "maize")
PRECISE = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`model(pooling, causal=…)`. Not causal: every token sees the whole text, as in most models that embed."""
    import gguf

    from arriero import sample_models

    add_parameters = sample_models._add_parameters

    def write(pooling: str, *, causal: bool) -> Path:
        def with_pooling(writer: Any, *rest: Any) -> None:
            add_parameters(writer, *rest)
            writer.add_causal_attention(causal)
            writer.add_pooling_type(gguf.PoolingType[pooling])

        monkeypatch.setattr(sample_models, "_add_parameters", with_pooling)
        sizes = {"n_layer": 2, "n_embd": 128}
        return sample_models.write_sample_model(tmp_path / "m.gguf", "llama", precision="f32", **sizes)

    return write


@pytest.mark.parametrize(
    ("pooling", "causal"),
    [("NONE", True), ("MEAN", False), ("CLS", False), ("LAST", False), ("LAST", True)],
)
def test_vectors_are_those_of_llama_cpp_python(pooling: str, causal: bool, model: Any, spec: Any) -> None:
    """Of several texts in one batch."""
    import llama_cpp

    path = model(pooling, causal=causal)
    exact: Any = {"type_k": 0, "type_v": 0, "flash_attn": False}
    with closing(llama_cpp.Llama(str(path), n_ctx=512, embedding=True, verbose=False, **exact)) as other:
        expected = [np.array(other.embed(text, normalize=False)) for text in TEXTS]
    assert all(each.ndim == (2 if pooling == "NONE" else 1) for each in expected)
    wanted = [each.sum(axis=0) if each.ndim == 2 else each for each in expected]
    wanted = [each / np.linalg.norm(each) for each in wanted]
    assert all(abs(np.dot(wanted[0], each)) < 0.999 for each in wanted[1:]), "else the test could not fail"
    together = {"n_seq_max": 4, "kv_unified": True, "n_ubatch": 512, "n_batch": 512}
    with closing(Engine(spec(path, n_ctx=1024, embeddings=True, **together, **PRECISE))) as engine:
        embedded = engine.embed(EmbedRequest(content_of(inputs=TEXTS), "r"))
    for mine, theirs in zip(embedded, wanted, strict=True):
        np.testing.assert_allclose(mine.vector, theirs, atol=1e-5)


def test_a_text_that_must_be_read_whole_is_not_cut(model: Any, spec: Any) -> None:
    """Without pooling, such a text must fit one micro-batch, which a row of logits for each token makes small."""
    path = model("NONE", causal=False)
    with closing(Engine(spec(path, n_ctx=1024, n_ubatch=128, embeddings=True))) as engine:
        assert len(engine.embed(EmbedRequest(content_of(inputs=["the salt"]), "r"))) == 1
        with pytest.raises(Rejected, match="input 1 is 141 tokens; at most 128 can be embedded at once"):
            engine.embed(EmbedRequest(content_of(inputs=TEXTS), "r"))
