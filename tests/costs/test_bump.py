"""What a release must hold to pass, with a llama.cpp that says what the tests want, and what `make bump` writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison import CONTEXTS, Case, Ended, Finding, Findings, Truth, ask_apart, on_devices, outcomes, places
from gguf_shapes import SMALL, write_model

from scheduler.costs import checked
from scheduler.costs.checked import CHECKED, CHECKED_BUILD, release, verdict
from scheduler.costs.families import KNOWN, ROWS
from scheduler.costs.footprint import (
    bounded_footprint,
    computes_exactly,
    drawn_footprint,
    effective_context,
    footprint,
    is_verified,
)
from scheduler.costs.graph.templates import DRAWINGS, TEMPLATES
from scheduler.costs.params import Layout
from scheduler.costs.shape import ModelShape, read_shape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "setup"))
import bump  # noqa: E402

Change = Callable[[dict[str, list[int]]], object]
NAMES = ("llama", "gemma3", "xverse")  # the last has no template
CASES: list[Case] = [(name, layout, CONTEXTS[0]) for name in NAMES for layout in (Layout(), on_devices(1, 1))]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    specs = {**SMALL, "xverse": replace(SMALL["llama"], arch="xverse")}
    return {name: write_model(specs[name], folder / f"{name}.gguf", vocabulary=False) for name in NAMES}


@pytest.fixture(scope="module")
def shapes(paths: dict[str, Path]) -> dict[str, ModelShape]:
    return {name: read_shape(path) for name, path in paths.items()}


def says(shape: ModelShape, case: Case, change: Change) -> Truth:
    """What a llama.cpp would say that does what is predicted, but for a change."""
    _, layout, context = case
    cost = drawn_footprint(shape, layout, context) or bounded_footprint(shape, layout, context)
    allocated = {place: [part.weights_bytes, part.kv_bytes, part.compute_bytes] for place, part in places(cost).items()}
    change(allocated)
    n_ctx = effective_context(shape, context).n_ctx
    return {"bytes": allocated, "n_ctx": n_ctx, "output_mib": cost.host.output_bytes / 2**20}


def found(shapes: Mapping[str, ModelShape], name: str, change: Change) -> dict[str, tuple[str, str]]:
    """The outcomes where llama.cpp does something else with one model."""
    findings = Findings()
    for case in CASES:
        shape = shapes[case[0]]
        findings.note(case, shape, says(shape, case, change if case[0] == name else lambda _: None))
    return outcomes(findings, [{"arch": shape.architecture, "path": "made"} for shape in shapes.values()])


def more(kind: int, n_bytes: int) -> Change:
    """More weights (0), cache (1) or compute buffers (2) on the host."""

    def change(allocated: dict[str, list[int]]) -> None:
        allocated["host"][kind] += n_bytes

    return change


@pytest.mark.parametrize(
    ("name", "change", "outcome"),
    [
        ("llama", more(2, 0), "exact"),
        ("llama", more(2, 32), "bounded"),
        ("llama", more(2, -32), "bounded"),
        ("llama", more(2, 1 << 30), "too low"),
        ("llama", more(1, 32), "wrong"),
        ("llama", more(0, -32), "wrong"),
        ("gemma3", more(2, 32), "bounded"),
        ("xverse", more(2, -32), "bounded"),
        ("xverse", more(2, 32), "too low"),
    ],
)
def test_drift_falls_to_the_bound_and_a_bound_that_is_too_low_does_not_pass(
    name: str, change: Change, outcome: str, shapes: dict[str, ModelShape]
) -> None:
    result = found(shapes, name, change)
    usual = {"llama": "exact", "gemma3": "exact", "xverse": "bounded"}
    assert {each: result[each][0] for each in usual} == {**usual, name: outcome}
    assert result["qwen3"] == ("refused", "this release does not know it")
    if outcome in ("too low", "wrong"):
        assert f"host of {name}" in result[name][1]
        with pytest.raises(bump.Blocked, match=rf'(?s)\n{name} is {outcome}: .*ASK_FIRST="{name}"'):
            bump.settled({name: result[name]}, ())
        assert bump.settled(result, [name]) == {each: what for each, (what, _) in result.items() if each != name}


def test_one_device_that_drifted_is_enough(shapes: dict[str, ModelShape]) -> None:
    def change(allocated: dict[str, list[int]]) -> None:
        if "RPC1" in allocated:
            allocated["RPC1"][2] += 32

    outcome, why = found(shapes, "llama", change)["llama"]
    assert outcome == "bounded" and "RPC1 of llama" in why


def test_the_bound_counts_where_the_template_draws_nothing() -> None:
    """Models that are drawn make no architecture exact of which another model takes more than its bound."""
    row = ROWS["llama"]
    assert Finding(compared=2, drawn=1).outcome(row) == ("exact", "")
    assert Finding(compared=2, drawn=1, low_undrawn="there").outcome(row) == ("too low", "there")
    assert Finding(compared=2, drawn=1, low="drawn, so nobody asks the bound").outcome(row) == ("exact", "")
    assert Finding().outcome(row)[0] == "not asked"


def test_drift_of_an_architecture_whose_bound_leaks_does_not_pass() -> None:
    found = Finding(compared=2, drawn=2, drifted="there")
    assert found.outcome(ROWS["llama"]) == ("bounded", "there")
    assert found.outcome(ROWS["deepseek2"])[0] == "too low"
    assert Finding(compared=2, drawn=2).outcome(ROWS["deepseek2"]) == ("exact", "")


def test_a_process_that_ends_costs_the_answers_about_one_model(paths: dict[str, Path]) -> None:
    def ask(_: object, cases: Sequence[Case], **how: Any) -> list[Truth]:
        asked.append(len(cases))
        answers = []
        for name, layout, _ in cases:
            if name == "gemma3" and layout.devices:
                raise Ended("llama.cpp ended with -6", answers)
            answers.append({"name": name, "devices": len(layout.devices)})
        return answers

    asked: list[int] = []
    third = ("gemma3", on_devices(1, 1), CONTEXTS[1])
    cases = [*CASES[:4], third, *CASES[4:]]
    answers = ask_apart(paths, cases, ask)
    ended = {"error": "llama.cpp ended with -6"}
    assert [answer.get("name") for answer in answers] == ["llama", "llama", "gemma3", None, None, "xverse", "xverse"]
    assert answers[3:5] == [ended, ended]
    assert asked == [7, 2]


def test_what_gives_no_figures_does_not_pass(shapes: dict[str, ModelShape]) -> None:
    findings = Findings()
    for case in CASES:
        shape = shapes[case[0]]
        findings.note(case, shape, {"error": "no"} if case[0] == "llama" else says(shape, case, lambda _: None))
    made = [{"arch": name, "path": "made"} for name in ("llama", "gemma3", "qwen3")]
    made += [{"arch": "xverse", "error": "unlikely"}, {"arch": "clip", "error": "no model"}, {"arch": "brand-new"}]
    result = {name: outcome for name, (outcome, _) in outcomes(findings, made).items()}
    assert {result[name] for name in ("llama", "qwen3", "xverse")} == {"not asked"}
    assert (result["gemma3"], result["clip"], result["brand-new"]) == ("exact", "refused", "new")
    with pytest.raises(bump.Blocked, match="3 architectures do not hold"):
        bump.settled(outcomes(findings, made), ())
    assert "brand-new" not in bump.settled(outcomes(findings, made), ["llama", "qwen3", "xverse"])


def test_nobody_is_asked_about_what_passes() -> None:
    with pytest.raises(bump.Blocked, match="not in the way: llama"):
        bump.settled({"llama": ("exact", "")}, ["llama"])


@pytest.mark.parametrize(
    ("said", "exact", "verified"),
    [("exact", True, True), ("bounded", False, True), ("refused", False, False), (None, False, False)],
)
def test_what_checked_json_says_decides(
    said: str | None, exact: bool, verified: bool, shapes: dict[str, ModelShape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked, "CHECKED", {"9.8.7": {"llama": said} if said else {}})
    shape, (_, layout, context) = shapes["llama"], CASES[0]
    assert computes_exactly(shape, "9.8.7+cuda") is exact
    assert is_verified(shape, "9.8.7+cuda") is verified
    drawn, bound = drawn_footprint(shape, layout, context), bounded_footprint(shape, layout, context)
    assert drawn != bound
    assert footprint(shape, layout, context, "9.8.7+cuda") == (drawn if exact else bound)
    assert verdict("llama", "9.8.6") is None and verdict("llama", "") is None


def test_every_row_names_a_template_that_there_is_and_every_template_is_used() -> None:
    assert {row.template for row in ROWS.values() if row.template} == set(DRAWINGS)
    assert {name for name in TEMPLATES if not ROWS[name].is_known} == set()
    assert all((row.family == "by interval") == bool(row.interval) for row in ROWS.values())
    assert all(row.template for row in ROWS.values() if row.settles or row.grows or row.gathers or row.alone_too)


def test_what_comes_with_arriero_was_checked() -> None:
    """And is the newest that was."""
    pin = (ROOT / "requirements" / "llama.txt").read_text()
    assert f"llama-cpp-python=={CHECKED_BUILD} " in pin
    assert max(map(release, CHECKED)) == release(CHECKED_BUILD)
    assert {name for name, said in CHECKED[CHECKED_BUILD].items() if said == "exact"} <= set(TEMPLATES)
    assert set(CHECKED[CHECKED_BUILD]) <= set(ROWS) and len(KNOWN & set(CHECKED[CHECKED_BUILD])) > 140


def test_the_page_lists_what_holds_for_the_release_that_comes_with_arriero() -> None:
    text = bump.PAGE.read_text()
    assert bump.page(text, CHECKED_BUILD, CHECKED[CHECKED_BUILD]) == text
    drifted = bump.page(text, "9.8.7", {**CHECKED[CHECKED_BUILD], "llama": "bounded", "gemma3": "refused"})
    assert "llama-cpp-python 9.8.7" in drifted and CHECKED_BUILD not in drifted
    assert "| `gemma3` | llama.cpp does not know it |" in drifted
    assert "`llama`" in drifted.partition("<!-- bounded -->")[2]


def test_what_is_written_is_in_order() -> None:
    text = bump.checked_text({"0.3.10": {"qwen3": "exact", "llama": "bounded"}, "0.3.9": {}})
    assert list(json.loads(text)) == ["0.3.9", "0.3.10"] and text.index("llama") < text.index("qwen3")
    assert bump.checked_text(CHECKED) == checked.PATH.read_text()
    pin = bump.pinned("# why\nllama-cpp-python==0.3.36 \\\n    --hash=sha256:" + "0" * 64 + "\n", "0.4.0", "a" * 64)
    assert pin == "# why\nllama-cpp-python==0.4.0 \\\n    --hash=sha256:" + "a" * 64 + "\n"
    before, now = {"llama": "exact", "t5": "exact", "plm": "refused"}, {"llama": "bounded", "t5": "bounded"}
    assert bump.changes(before, now) == ["exact -> bounded (2): llama t5", "refused -> asked first (1): plm"]
    assert bump.changes(before, before) == []


class Release:
    """Stands in for a build and its comparison, in a tree of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outcomes = {name: (said, "") for name, said in CHECKED[CHECKED_BUILD].items()}
        self.files = {name: folder / name for name in ("checked.json", "llama.txt", "architectures.md")}
        for name, (path, place) in zip(
            self.files, ((checked.PATH, "PATH"), (bump.LLAMA, "LLAMA"), (bump.PAGE, "PAGE")), strict=True
        ):
            self.files[name].write_text(path.read_text())
            monkeypatch.setattr(bump, place, self.files[name])
        monkeypatch.setattr(bump, "build_apart", lambda *_: "b" * 64)
        monkeypatch.setattr(bump, "compare", lambda *_: self.outcomes)

    def texts(self) -> list[str]:
        return [path.read_text() for path in self.files.values()]


@pytest.fixture
def candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    return Release(tmp_path, monkeypatch)


def test_a_newer_release_becomes_the_pin(candidate: Release, capsys: pytest.CaptureFixture[str]) -> None:
    candidate.outcomes["t5"] = "bounded", "drifted"
    bump.bump("99.0.0", ())
    assert "exact -> bounded (1): t5" in capsys.readouterr().out
    written = json.loads(candidate.files["checked.json"].read_text())
    assert written["99.0.0"] == {**CHECKED[CHECKED_BUILD], "t5": "bounded"}
    assert {build: written[build] for build in CHECKED} == CHECKED
    assert "==99.0.0 " in candidate.files["llama.txt"].read_text()
    assert "llama-cpp-python 99.0.0" in candidate.files["architectures.md"].read_text()


def test_an_older_release_is_only_noted(candidate: Release) -> None:
    _, *others = candidate.texts()
    bump.bump("0.0.1", ())
    assert json.loads(candidate.files["checked.json"].read_text())["0.0.1"] == CHECKED[CHECKED_BUILD]
    assert candidate.texts()[1:] == others


def test_a_bound_that_is_too_low_leaves_everything_as_it_was_until_llama_cpp_shall_be_asked(candidate: Release) -> None:
    before = candidate.texts()
    candidate.outcomes["llama"] = "too low", "compute takes 2, not 1"
    with pytest.raises(bump.Blocked, match="compute takes 2, not 1"):
        bump.bump("99.0.0", ())
    assert candidate.texts() == before
    bump.bump("99.0.0", ["llama"])
    assert "llama" not in json.loads(candidate.files["checked.json"].read_text())["99.0.0"]
