"""Programs that run beside a test: one line in, one line out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCE_ROOT = Path(__file__).parents[2]


class Program:
    """A Python program with pipes; `end` kills it."""

    def __init__(self, source: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=SOURCE_ROOT,
            env={**os.environ, **(environment or {})},
        )

    def line(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        answer = self.process.stdout.readline()
        assert answer, self.process.stderr.read()
        return answer

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
