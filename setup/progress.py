"""Runs a long command with its output in a log file, and shows that it is alive.

On a terminal one line is redrawn every second; elsewhere (a CI log) a plain line appears every 20 s. Lines hold the
elapsed time and the newest step that the command's own output names, such as ninja's `[52/197]`. When the command
fails, the end of its log is shown with the path of the whole. Standard library only: this runs before anything is
installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

TERMINAL_TICK_S = 1.0
LOG_TICK_S = 20.0
TAIL_LINES = 40
TAIL_BYTES = 1 << 16


class SetupFailed(Exception):
    """Set-up cannot go on; the message names the cause and the way out."""


def run(command: list[str], *, label: str, log: Path, step: str, env: dict[str, str] | None = None) -> None:
    """Runs `command` to its end with all output in `log`. `step` is a regular expression for "where it is now".

    Raises SetupFailed, after showing the end of `log`, when it exits non-zero.
    """
    terminal = sys.stdout.isatty()
    line_start, line_end = ("\r\x1b[K", "") if terminal else ("", "\n")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as sink:
        sink.write(f"$ {' '.join(command)}\n".encode())
        sink.flush()
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    try:
        while not _ended(process, TERMINAL_TICK_S if terminal else LOG_TICK_S):
            print(f"{line_start}{label}: {_clock(started)}  {_latest(step, log)}", end=line_end, flush=True)
    except BaseException:
        process.terminate()
        raise
    print(f"{line_start}{label}: {'failed' if process.returncode else 'done'} after {_clock(started)}", flush=True)
    if process.returncode:
        for line in _tail(log).splitlines()[-TAIL_LINES:]:
            print("  " + line[:400], file=sys.stderr)
        raise SetupFailed(f"{label} failed with exit status {process.returncode}. The whole log: {log}")


def _ended(process: subprocess.Popen[bytes], wait_s: float) -> bool:
    try:
        process.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _latest(step: str, log: Path) -> str:
    found = re.findall(step, _tail(log), re.MULTILINE)
    return str(found[-1]) if found else ""


def _tail(log: Path) -> str:
    with log.open("rb") as source:
        source.seek(0, os.SEEK_END)
        source.seek(max(0, source.tell() - TAIL_BYTES))
        return source.read().decode(errors="replace")


def _clock(started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02d}"
