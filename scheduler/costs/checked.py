"""Which releases of llama-cpp-python the rows and templates were compared with, and how each architecture came out.

checked.json lies beside this file, and `make bump` writes it ({build: {architecture: verdict}}). exact: every buffer of
every load was equal to the byte. bounded: weights, cache and output were, and compute buffers never above the bound.
refused: this release cannot run it. An architecture that a build does not list did not pass: it gets the bound, and
llama.cpp is asked before it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Verdict = Literal["exact", "bounded", "refused"]
Checked = Mapping[str, Mapping[str, Verdict]]

PATH = Path(__file__).with_name("checked.json")

CHECKED: Checked = json.loads(PATH.read_text())


def release(build: str) -> tuple[int, ...]:
    """The number of a release, in an order in which the newest is the largest."""
    return tuple(int(part) for part in build.split("."))


CHECKED_BUILD = max(CHECKED, key=release)
"""The newest of them, which comes with Arriero."""


def verdict(architecture: str, build: str) -> Verdict | None:
    """How `architecture` came out of the comparison with this build ("0.3.36+cpu"; "": not known); None: not at all."""
    return CHECKED.get(build.partition("+")[0], {}).get(architecture)
