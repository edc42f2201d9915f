"""llama.cpp's log, captured. Only there it says what it allocated, and why a load failed.

llama.cpp has one log callback per process, so there is one `LlamaLog` per process too. It keeps the last lines, hands
warnings and errors to `logging`, and collects everything said while a `recording()` is open. Lines are stored without
their newline; a continuation (ggml's level 5) is joined to the line that it continues.
Cost: one Python call per log line, which means a few hundred per load and next to none while serving.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import llama_cpp

_WARN, _ERROR, _CONTINUED = 3, 4, 5  # ggml_log_level, ggml.h
_logger = logging.getLogger("arriero.llama")


@dataclass(slots=True)
class LogLine:
    level: int
    text: str


class LlamaLog:
    """The process-wide log. Get it with `llama_log()`; making it installs the callback."""

    def __init__(self) -> None:
        self._last: deque[LogLine] = deque(maxlen=200)
        self._recordings: list[list[LogLine]] = []
        # ctypes keeps no reference to a callback that C holds: losing this attribute would crash the process.
        self.callback = llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        said = text.decode("utf-8", "replace")
        if level == _CONTINUED and self._last:
            self._last[-1].text += said.rstrip("\n")
            return
        line = LogLine(level, said.rstrip("\n"))
        self._last.append(line)
        for recording in self._recordings:
            recording.append(line)
        if level == _ERROR:
            _logger.error("%s", line.text)
        elif level == _WARN:
            _logger.warning("%s", line.text)

    @contextmanager
    def recording(self) -> Iterator[list[LogLine]]:
        """All lines logged inside the block, in order."""
        lines: list[LogLine] = []
        self._recordings.append(lines)
        try:
            yield lines
        finally:
            self._recordings = [other for other in self._recordings if other is not lines]

    def last_errors(self, count: int = 3) -> str:
        """The last `count` warnings and errors as one text, oldest first; "" when there were none."""
        return error_text(self._last, count)


def error_text(lines: Iterator[LogLine] | deque[LogLine] | list[LogLine], count: int = 3) -> str:
    """The last `count` warnings and errors among `lines`, joined with "; "."""
    bad = [line.text.strip() for line in lines if line.level in (_WARN, _ERROR)]
    return "; ".join(bad[-count:])


@cache
def llama_log() -> LlamaLog:
    """The one log of this process, installed at the first call."""
    return LlamaLog()
