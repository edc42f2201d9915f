"""Takes Arriero to another release of llama-cpp-python: `make bump VERSION=x.y.z` calls this, in `.venv`.

The release is built apart, in build/, for the CPU. tests/costs/comparison.py then has it load models of every
architecture, and what came out is written to scheduler/costs/checked.json: what drifted falls to the bound by that
alone. Weights or a cache that differ, a bound that is too low, and an architecture that gave no figures are in the way:
nothing is written, until somebody says that llama.cpp shall be asked before it loads such a model (ASK_FIRST="name …").
A release that is newer than all before it also becomes the pin, and docs/architectures.md lists what holds for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from environment import LLAMA, PYTHON, ROOT
from llama_build import build_apart, looking_into
from progress import SetupFailed, run

from scheduler.costs.checked import CHECKED, CHECKED_BUILD, PATH, Checked, Verdict, release
from scheduler.costs.families import ROWS, row_of

PAGE = ROOT / "docs" / "architectures.md"
COMPARISON = ROOT / "tests" / "costs" / "comparison.py"
ASKED_FIRST = "asked first"

Outcomes = Mapping[str, tuple[str, str]]
"""(outcome, why) per architecture, as tests/costs/comparison.py finds them."""


class Blocked(SetupFailed):
    """Something does not hold under the release, and nobody has said that llama.cpp shall be asked about it."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Check another release of llama-cpp-python, and take it.")
    parser.add_argument("version")
    parser.add_argument("--ask-first", default="", help="architectures that llama.cpp is asked about before a load")
    asked = parser.parse_args()
    try:
        bump(asked.version, asked.ask_first.split())
    except SetupFailed as failure:
        print(f"\nThe bump stopped. {failure}", file=sys.stderr)
        return 1
    return 0


def bump(version: str, ask_first: Collection[str]) -> None:
    """Builds, compares, and writes what came out. Raises SetupFailed."""
    if not re.fullmatch(r"\d+(\.\d+)+", version):
        raise SetupFailed(f"{version!r} is no release, such as {CHECKED_BUILD}: make bump VERSION={CHECKED_BUILD}")
    folder = ROOT / "build" / f"llama-cpp-python-{version}"
    started = time.monotonic()
    digest = build_apart(PYTHON, version, folder)
    built = time.monotonic()
    verdicts = settled(compare(version, folder), ask_first)
    compared = time.monotonic()
    print(f"Built in {built - started:.0f} s, compared in {compared - built:.0f} s.")
    print("\n".join(changes(CHECKED[CHECKED_BUILD], verdicts)) or f"All is as it was with {CHECKED_BUILD}.")
    is_newest = release(version) >= release(CHECKED_BUILD)
    PATH.write_text(checked_text({**json.loads(PATH.read_text()), version: verdicts}))
    if is_newest:
        LLAMA.write_text(pinned(LLAMA.read_text(), version, digest))
        PAGE.write_text(page(PAGE.read_text(), version, verdicts))
        print(f"Arriero comes with {version} from now on. Next: make setup, make test, then commit.")


def compare(version: str, folder: Path) -> Outcomes:
    """What the comparison says under the release in `folder`. Raises SetupFailed when it cannot be asked."""
    log = folder / "comparison.log"
    with tempfile.TemporaryDirectory(prefix="arriero-bump-") as models:
        command = [str(PYTHON), str(COMPARISON), str(Path(models) / "models")]
        run(command, label="comparison", log=log, step=r"^.*; now .*", env=looking_into(folder / "site"))
    line = next(line for line in log.read_text().splitlines() if line.startswith("OUTCOMES "))
    said = json.loads(line.removeprefix("OUTCOMES "))
    if said["release"] != version:
        raise SetupFailed(f"{said['release']} was compared, not {version}; remove {os.path.relpath(folder)}, and again")
    return {name: (outcome, why) for name, (outcome, why) in said["outcomes"].items()}


def settled(outcomes: Outcomes, ask_first: Collection[str]) -> dict[str, Verdict]:
    """The verdict on each architecture, without those that llama.cpp is asked about first.

    Raises Blocked where an architecture did not pass and is not in `ask_first`, or is there and passed.
    """
    verdicts: dict[str, Verdict] = {}
    in_the_way = {}
    for name, (outcome, why) in outcomes.items():
        match outcome:
            case "exact" | "bounded" | "refused":
                verdicts[name] = outcome
            case "new":
                print(f"{name} is new: it gets the general rules, and llama.cpp is asked first, until it has a row.")
            case _:
                in_the_way[name] = f"{name} is {outcome}: {why}"
    needless = sorted(set(ask_first) - set(in_the_way))
    if needless:
        raise Blocked(f"ASK_FIRST names what is not in the way: {' '.join(needless)}.")
    unsaid = [name for name in in_the_way if name not in ask_first]
    if unsaid:
        reasons = "\n".join(in_the_way[name] for name in unsaid)
        raise Blocked(
            f"{len(unsaid)} architectures do not hold under this release:\n{reasons}\nCorrect the rules, or have "
            f'llama.cpp asked before each load of them: ASK_FIRST="{" ".join(in_the_way)}". Nothing was written.'
        )
    return verdicts


def changes(before: Mapping[str, Verdict], now: Mapping[str, Verdict]) -> list[str]:
    """One line per kind of change: `exact -> bounded (2): qwen3 t5`."""
    moved: dict[str, list[str]] = {}
    for name in sorted({*before, *now}):
        was, became = before.get(name, ASKED_FIRST), now.get(name, ASKED_FIRST)
        if was != became:
            moved.setdefault(f"{was} -> {became}", []).append(name)
    return [f"{kind} ({len(names)}): {' '.join(names)}" for kind, names in sorted(moved.items())]


def checked_text(checked: Checked) -> str:
    """checked.json, releases and names in order."""
    ordered = {build: dict(sorted(checked[build].items())) for build in sorted(checked, key=release)}
    return json.dumps(ordered, indent=1) + "\n"


def pinned(text: str, version: str, digest: str) -> str:
    """The requirements file `text` with this release of llama-cpp-python instead of the one in it."""
    text = re.sub(r"(?<=llama-cpp-python==)[\w.]+", version, text)
    return re.sub(r"(?<=--hash=sha256:)[0-9a-f]{64}", digest, text)


def page(text: str, build: str, verdicts: Mapping[str, Verdict]) -> str:
    """docs/architectures.md with the lists between its markers (`<!-- exact -->`) as `verdicts` has them."""
    drafts = {name for name, row in ROWS.items() if row.family == "draft"}
    refused = sorted(name for name, verdict in verdicts.items() if verdict == "refused")
    reasons = [f"| `{name}` | {row_of(name).refused or 'llama.cpp does not know it'} |" for name in refused]
    lists = {
        "exact": _names(name for name, verdict in verdicts.items() if verdict == "exact"),
        "bounded": _names(name for name, verdict in verdicts.items() if verdict == "bounded" and name not in drafts),
        "beside": _names(name for name in drafts if verdicts.get(name) == "bounded"),
        ASKED_FIRST: _names(set(ROWS) - set(verdicts)),
        "refused": "\n".join(["| architecture | why |", "|---|---|", *reasons]),
    }
    for title, names in lists.items():
        before, marker, rest = text.partition(f"<!-- {title} -->\n")
        _, end, after = rest.partition("\n<!-- end -->")
        if not marker or not end:
            raise SetupFailed(f"docs/architectures.md has no list {title!r}")
        text = before + marker + names + end + after
    return re.sub(r"(?<=llama-cpp-python )\d+(\.\d+)+", build, text)


def _names(names: Iterable[str]) -> str:
    quoted = " ".join(f"`{name}`" for name in sorted(names))
    return textwrap.fill(quoted, 120, break_long_words=False, break_on_hyphens=False) or "none"


if __name__ == "__main__":
    sys.exit(main())
