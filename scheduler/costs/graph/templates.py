"""Templates of graphs by name, and which architecture is drawn by which.

They follow the graphs of llama.cpp, which change with its releases: `checked` knows with which of them a template was
compared, and whether it still held. On a machine with any other release every architecture gets the bound.
"""

from __future__ import annotations

from scheduler.costs.checked import CHECKED_BUILD
from scheduler.costs.families import ROWS
from scheduler.costs.graph.blocks import Template
from scheduler.costs.graph.models.codec import CODEC
from scheduler.costs.graph.models.decoders import DECODERS
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

__all__ = ["CHECKED_BUILD", "DRAWINGS", "TEMPLATES"]

DRAWINGS: dict[str, Template] = {
    **DECODERS, **LATENT, **RECURRENT, **ENCODERS, **GEMMA,
    **RWKV, **SPARSE, **HYPER, **MINIMAX, **PLAMO, **QWEN4, **GLM5, **T5, **CODEC, **LOOPED, **TOKENS,
}  # fmt: skip
"""By the name that rows call them by (`Row.template`)."""

TEMPLATES = {name: DRAWINGS[row.template] for name, row in ROWS.items() if row.template}
"""By architecture."""
