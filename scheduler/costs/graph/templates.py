"""Which architectures have a template of their graph.

Checked against the llama.cpp of llama-cpp-python 0.3.36: tests/costs/test_against_llama_cpp.py compares each
with real loads of the installed library and so names the ones that drifted after a version bump.
"""

from __future__ import annotations

from scheduler.costs.graph.blocks import Template
from scheduler.costs.graph.models.decoders import COUNTING, DECODERS
from scheduler.costs.graph.models.latent import LATENT
from scheduler.costs.graph.models.recurrent import RECURRENT

TEMPLATES: dict[str, Template] = {**DECODERS, **LATENT, **RECURRENT}

SETTLING = frozenset(DECODERS) - COUNTING
"""Where results leave the same holes after every like layer, so that three of them stand for a long row."""
