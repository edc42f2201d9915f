"""Which architectures have a template of their graph.

They hold for the releases that they were checked with: tests/costs/test_against_llama_cpp.py compares each with real
loads of the installed library, and so names the ones that drifted after a version bump. On a machine with any other
release every architecture gets the bound.
"""

from __future__ import annotations

from scheduler.costs.graph.blocks import Template
from scheduler.costs.graph.models.codec import CODEC
from scheduler.costs.graph.models.decoders import COUNTING, DECODERS
from scheduler.costs.graph.models.encoders import ENCODERS
from scheduler.costs.graph.models.gemma import GEMMA
from scheduler.costs.graph.models.glm5 import GLM5
from scheduler.costs.graph.models.hyper import HYPER
from scheduler.costs.graph.models.latent import LATENT
from scheduler.costs.graph.models.looped import LOOPED
from scheduler.costs.graph.models.minimax import MINIMAX
from scheduler.costs.graph.models.plamo import PLAMO
from scheduler.costs.graph.models.qwen4 import QWEN4
from scheduler.costs.graph.models.recurrent import RECURRENT
from scheduler.costs.graph.models.rwkv import RWKV
from scheduler.costs.graph.models.sparse import SPARSE
from scheduler.costs.graph.models.t5 import T5
from scheduler.costs.graph.models.tokens import TOKENS

CHECKED_BUILD = "0.3.36"
CHECKED_WITH = frozenset({CHECKED_BUILD})
"""Releases of llama-cpp-python; the newest of them comes with Arriero."""

TEMPLATES: dict[str, Template] = {
    **DECODERS, **LATENT, **RECURRENT, **ENCODERS, **GEMMA,
    **RWKV, **SPARSE, **HYPER, **MINIMAX, **PLAMO, **QWEN4, **GLM5, **T5, **CODEC, **LOOPED, **TOKENS,
}  # fmt: skip

GROWING = frozenset({"minimax-m3"})
"""Whose compute buffers grow while they serve, as more of the cache is in use."""

SETTLING = frozenset(DECODERS) - COUNTING
"""Where results leave the same holes after every like layer, so that three of them stand for a long row."""


def are_checked(build: str) -> bool:
    """Whether the templates were checked with this build of llama-cpp-python ("0.3.36+cpu"; "": not known)."""
    return build.partition("+")[0] in CHECKED_WITH
