"""Why llama.cpp did not load a model: its last error messages, and the kind of failure that they mean."""

from __future__ import annotations

from actors.serving.journal import LogLine, error_text
from actors.serving.protocol import LoadFailed
from scheduler.events import FailureKind

_OUT_OF_MEMORY = ("failed to allocate", "unable to allocate", "out of memory", "failed to reserve", "cannot allocate")
_INVALID_MODEL = (
    "gguf_init",
    "error loading model",
    "failed to open",
    "failed to load model from",
    "not found",
    "invalid",
    "corrupt",
)


def load_failed(what: str, lines: list[LogLine]) -> LoadFailed:
    """`what`, with llama.cpp's last error messages, which also decide its kind."""
    reason = error_text(lines)
    lower = reason.lower()
    kind: FailureKind = "failed"
    if any(sign in lower for sign in _OUT_OF_MEMORY):
        kind = "out_of_memory"
    elif any(sign in lower for sign in _INVALID_MODEL):
        kind = "invalid_model"
    return LoadFailed(kind, f"{what}: {reason or 'it gave no reason'}")
