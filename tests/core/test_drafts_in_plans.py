"""What guesses next tokens for a model: which file, what it takes and where, and what the runner is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from scenario import MEDIUM, SMALL, Scenario, gpu, shape

from actors.views import plan as as_record
from arriero.cli.plan import print_plan
from scheduler import commands as cmd
from scheduler.cluster.companion_files import NodeFiles, companions_of
from scheduler.cluster.facts import ModelFile
from scheduler.config import ModelEntry, parse_catalogue
from scheduler.costs.companions import Companions, accompanied, draft_context, draft_layout
from scheduler.costs.footprint import footprint
from scheduler.costs.measurements import load_key
from scheduler.costs.params import MOST_DRAFTED, ContextParams, DeviceSpec, Layout
from scheduler.errors import Rejected
from scheduler.units import MIB, NodeId

BOTH = {"ant": MEDIUM, "bee": SMALL}


def entry(**given: Any) -> dict[str, Any]:
    return {"models": {"ant": {"path": "ant.gguf", **given}}}


def files(*paths: str) -> list[ModelFile]:
    return [ModelFile(path, (path,), 1, 1.0) for path in paths]


def scenario(cards: Any = None, **given: Any) -> Scenario:
    return Scenario([gpu("8GiB")] if cards is None else cards, BOTH, catalogue=entry(**given))


# ---------------------------------------------------------------------- which file


def test_a_draft_is_found_as_other_companions_are() -> None:
    ant, bee = files("/m/ant.gguf", "/n/bee.gguf")
    named = ModelEntry(path="ant.gguf", model_draft="bee.gguf")
    assert companions_of(named, ant, NodeFiles([ant, bee])).draft == bee
    assert "model_draft: no file bee.gguf on this machine" in companions_of(named, ant, NodeFiles([ant])).missing
    twice = [ant, bee, *files("/o/bee.gguf")]
    assert (
        "model_draft: bee.gguf is 2 files, such as /n/bee.gguf and /o/bee.gguf"
        in companions_of(named, ant, NodeFiles(twice)).missing
    )
    off = ModelEntry(path="ant.gguf", model_draft="bee.gguf", spec_type="none")
    assert companions_of(off, ant, NodeFiles([ant])) == companions_of(
        ModelEntry(path="ant.gguf"), ant, NodeFiles([ant])
    )
    assert companions_of(ModelEntry(path="ant.gguf", spec_type="draft-mtp"), ant, NodeFiles([ant])).draft == ant


def test_a_draft_is_a_model_too() -> None:
    s = scenario(model_draft="bee.gguf")
    assert sorted(s.core.models.by_name) == ["ant", "bee"]
    reads = {c.path: c.draft for c in s.log if isinstance(c, cmd.ReadShape)}
    assert reads == {"/models/ant.gguf": "/models/bee.gguf", "/models/bee.gguf": ""}


def test_a_missing_draft_is_told() -> None:
    s = Scenario([gpu("8GiB")], {"ant": MEDIUM}, catalogue=entry(model_draft="bee.gguf"))
    s.ask("ant")
    (refusal,) = s.refusals.values()
    assert (
        "model_draft: no file bee.gguf on this machine; put it there, or correct the catalogue" in refusal.error.message
    )


# ---------------------------------------------------------------------- what it takes, and where


def test_the_draft_lies_on_the_first_device_and_is_booked() -> None:
    with_it, without = scenario(model_draft="bee.gguf", spec_draft_n_max=4, spec_draft_p_min=0.5), scenario()
    for s in (with_it, without):
        s.ask("ant")
    (start,), (plain,) = with_it.started, without.started
    assert start.draft == ("/models/bee.gguf", 4, 0.5)
    context = start.placement.context
    assert (context.spec_type, context.n_outputs_max) == ("draft-simple", context.n_seq_max + 4)
    layout = start.placement.layout
    (draft,) = footprint(shape(*SMALL), draft_layout(layout), draft_context(context), with_it.llama_build).devices
    assert draft.weights_bytes > 200 << 20 and draft.kv_bytes and draft.compute_bytes
    more = start.placement.device_bytes[0] - plain.placement.device_bytes[0]
    assert draft.total_bytes <= more < draft.total_bytes + (4 << 20)  # and rows of logits
    assert start.placement.overhead_bytes == plain.placement.overhead_bytes  # llama.cpp reports it
    assert start.placement.host_bytes > plain.placement.host_bytes


def test_a_draft_needs_room_on_the_first_card() -> None:
    """The model alone fits on the card; with its draft it needs both, or host RAM."""
    alone = scenario(n_ctx=2048)
    alone.ask("ant")
    enough = f"{alone.started[0].placement.device_bytes[0] // MIB + 64}MiB"
    for cards, count in (([gpu(enough)], 0), ([gpu(enough), gpu(enough, "gpu1")], 2)):
        together = scenario(cards, n_ctx=2048, model_draft="bee.gguf", spill=False)
        together.ask("ant")
        assert [len(start.placement.device_ids) for start in together.started] == ([count] if count else [])
    alone = scenario([gpu(enough)], n_ctx=2048, spill=False)
    alone.ask("ant")
    assert len(alone.started) == 1


def test_without_a_card_the_draft_lies_in_host_ram() -> None:
    with_it, without = scenario((), model_draft="bee.gguf"), scenario(())
    for s in (with_it, without):
        s.ask("ant")
    more = with_it.started[0].placement.host_bytes - without.started[0].placement.host_bytes
    assert more > shape(*SMALL).weights_bytes


def test_what_was_measured_without_a_draft_says_nothing_of_a_load_with_one() -> None:
    plain, draft = shape(*MEDIUM), shape(*SMALL)
    shapes = [accompanied(plain, each) for each in (Companions(), Companions(draft=draft), Companions(draft=plain))]
    assert len({load_key(each, Layout(), ContextParams(), "build") for each in shapes}) == len(shapes)


def test_a_plan_tells_of_the_draft(capsys: pytest.CaptureFixture[str]) -> None:
    s = scenario(model_draft="bee.gguf")
    told = as_record(s.core, "ant", s.core.plan("ant", None, s.now), s.now)
    assert told.draft is not None and told.draft.path == "/models/bee.gguf"
    assert told.draft.bytes["gpu0"] > 200 << 20
    print_plan(told)
    assert "of that, the draft /models/bee.gguf takes" in capsys.readouterr().out
    plain = scenario()
    assert as_record(plain.core, "ant", plain.core.plan("ant", None, plain.now), plain.now).draft is None


def test_layers_go_where_the_draft_leaves_room() -> None:
    layout = Layout((DeviceSpec("gpu0", "rpc"), DeviceSpec("gpu1", "rpc")), 5, (2.0, 3.0))
    assert draft_layout(layout) == Layout((DeviceSpec("gpu0", "rpc"),), -1, (1.0,))
    assert draft_layout(Layout((DeviceSpec("gpu0", "rpc"),), 0)) == Layout()


# ---------------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("draft", "words"),
    [
        (
            shape(*SMALL, n_vocab=32200),
            r"another vocabulary \(, 32200 tokens\) than its model \(, 32000 tokens\); name a",
        ),
        (shape(*SMALL, n_vocab=32100), ""),
    ],
)
def test_a_draft_with_another_vocabulary_is_refused(draft: Any, words: str) -> None:
    if not words:
        assert accompanied(shape(*MEDIUM), Companions(draft=draft)).draft is draft
        return
    with pytest.raises(Rejected, match=words):
        accompanied(shape(*MEDIUM), Companions(draft=draft))


def test_prediction_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(Rejected, match=r"no prediction layers that llama\.cpp can run: leave out draft-mtp"):
        accompanied(shape(*SMALL), Companions(mtp=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"spec_type": "draft-simple"}, "draft-simple needs a smaller model with the same vocabulary: set model_draft"),
        ({"spec_type": "draft-mtp", "model_draft": "b.gguf"}, "spec_type draft-mtp uses no model_draft"),
        ({"spec_type": "ngram-simple", "model_draft": "b.gguf"}, "spec_type ngram-simple uses no model_draft"),
        ({"model_draft": ""}, "at least 1 character"),
        ({"model_draft": "b.gguf", "spec_draft_n_max": 0}, "greater than or equal to 1"),
        ({"model_draft": "b.gguf", "spec_draft_n_max": MOST_DRAFTED + 1}, "less than or equal to 15"),
        ({"model_draft": "b.gguf", "spec_draft_p_min": 1.5}, "less than or equal to 1"),
    ],
)
def test_wrong_drafts_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Rejected, match=words):
        parse_catalogue(entry(**given))


def test_a_draft_is_for_one_model() -> None:
    for kind in ("draft-simple", "draft-mtp"):
        with pytest.raises(Rejected, match=f"spec_type {kind} is for single models"):
            parse_catalogue({"defaults": {"spec_type": kind}})


def test_an_entry_with_a_draft_goes_before_the_defaults() -> None:
    catalogue = {"defaults": {"spec_type": "ngram-simple"}, **entry(model_draft="bee.gguf")}
    s = Scenario([gpu("8GiB")], BOTH, catalogue=catalogue)
    for name in BOTH:
        s.ask(name)
    assert [start.placement.context.spec_type for start in s.started] == ["draft-simple", "ngram-simple"]
    assert s.started[1].draft[0] == ""
    assert NodeId("box") in s.core.inventory.nodes
