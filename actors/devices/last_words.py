"""Why a process died, from the last lines of its error output.

Ray keeps the error output of every process in a file. Its end has the message of a failed ggml assertion, an uncaught
exception or a signal, among the addresses of a backtrace and the output of other programs. Only the lines with such
messages are kept.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

MOST_BYTES = 256 * 1024  # of the file's end: a fatal error lists the stacks of all threads, some 100 bytes a frame
MOST_LINES, MOST_CHARACTERS = 3, 300  # of what is told

_TELLING = re.compile(
    r"GGML_ASSERT|GGML_ABORT|ggml_abort|fatal error|terminate called|what\(\):|Unhandled exception"
    r"|(CUDA|ROCm|HIP|Vulkan|Metal|RPC) error|Remote RPC server crashed|\*\*\* SIG\w+ received|std::bad_alloc"
)
_SIGNAL = re.compile(r"\*\*\* (SIG\w+) received")
_PREFIX = re.compile(r"^\[[\d\-: ,.]+ [A-Z] \d+ \d+\] \S+:\d+: ")  # of Ray's own log lines
_BACKTRACE = re.compile(r"^\s*(#\d+|@|PC:|File \"|/\S+\(\S*\+0x)")
_CONTROL = re.compile(r"[^\x20-\x7e\u00a0-\U0010ffff]+")


def last_words(path: str, below: Path) -> str:
    """Why the process died, in one line, from the end of that file; "" where it does not say.

    Only an ordinary file directly in the folder `below` is read, and no link.
    """
    file = Path(path)
    if not path or file.parent != below:
        return ""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return ""
        end = os.pread(fd, MOST_BYTES, max(0, status.st_size - MOST_BYTES))
    finally:
        os.close(fd)
    return telling(end.decode(errors="replace"))


def telling(text: str) -> str:
    """The last lines of an error output that say why, oldest first, joined with "; "."""
    found: dict[str, None] = {}  # in order, each once
    for line in text.splitlines():
        if _TELLING.search(line) and not _BACKTRACE.match(line):
            plain = _CONTROL.sub(" ", _PREFIX.sub("", line)).strip()[:MOST_CHARACTERS]
            if (signal := _SIGNAL.search(plain)) is not None:
                plain = signal.group(1)
            found.pop(plain, None)
            found[plain] = None
    return "; ".join(list(found)[-MOST_LINES:])
