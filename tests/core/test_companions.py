"""What comes with a model: which files, what they take, where they lie, and what the runner is told of them."""

from __future__ import annotations

import posixpath
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from scenario import MEDIUM, SMALL, Scenario, gpu, shape

from actors.records import ProjectorShare
from actors.views import plan, status
from arriero.cli.observe import where
from arriero.cli.plan import print_plan
from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.cluster.companion_files import NodeFiles, companions_of
from scheduler.cluster.facts import ModelFile
from scheduler.cluster.ledger import device_account, host_account
from scheduler.cluster.models import Models
from scheduler.config import ModelEntry, parse_catalogue
from scheduler.costs.adapter import Adapter, adapted
from scheduler.costs.companions import Companions, accompanied
from scheduler.costs.footprint import footprint
from scheduler.costs.ggml_types import F16
from scheduler.costs.header import Tensor
from scheduler.costs.measurements import load_key
from scheduler.costs.params import ContextParams, Layout
from scheduler.costs.projector import Encoder, Projector
from scheduler.costs.weights import Padded
from scheduler.errors import Rejected
from scheduler.units import GIB, MIB, DeviceId, NodeId

FUN, TERSE, EYES = "/models/fun.gguf", "/lora/terse.gguf", "/models/mmproj-ant-f16.gguf"


def adapter(path: str, rank: int = 64, n_layer: int = SMALL[0], n_embd: int = SMALL[1]) -> Adapter:
    def tensor(half: str, *ne: int) -> Tensor:
        return Tensor(half, F16, ne, 0, 2 * ne[0] * ne[1])

    pair = tensor("a", n_embd, rank), tensor("b", rank, n_embd)
    return Adapter(path, "llama", {f"blk.{il}.attn_q.weight": pair for il in range(n_layer)})


def projector(path: str = EYES, size: int = 500 * MIB) -> Projector:
    return Projector(path, Padded(size, size), ())


def entry(**given: Any) -> dict[str, Any]:
    return {"models": {"ant": {"path": "ant.gguf", **given}}}


def model(path: str) -> ModelFile:
    return ModelFile(path, (path,), 1, 1.0)


# ---------------------------------------------------------------------- which files


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["llava-7b.Q4_K_M.gguf", "mmproj-model-f16.gguf"], "mmproj-model-f16.gguf"),
        (["llava-7b-Q4_K_M.gguf", "llava-7b-IQ3_XXS.gguf", "mmproj-BF16.gguf"], "mmproj-BF16.gguf"),
        (["llava-7b-Q8_0.gguf", "other.gguf", "mmproj-f16.gguf"], None),
        (["llava-7b-Q8_0.gguf", "other.gguf", "llava-7b-mmproj-f16.gguf"], "llava-7b-mmproj-f16.gguf"),
        (["other.gguf", "llava-7b-mmproj-f16.gguf"], None),
        (["llava-7b-Q8_0.gguf", "mmproj-a.gguf", "mmproj-f16.gguf"], None),
        (["llava-7b-Q8_0.gguf"], None),
    ],
)
def test_a_projector_is_found_where_it_belongs_to_the_model(names: list[str], found: str | None) -> None:
    files = [model(f"/m/{name}") for name in names] + [model("/elsewhere/mmproj-f16.gguf")]
    came = companions_of(None, files[0], NodeFiles(files))
    assert came.mmproj_path == (f"/m/{found}" if found else "")
    assert companions_of(ModelEntry(path="x", mmproj="none"), files[0], NodeFiles(files)).mmproj is None


def test_named_files_are_found_beside_the_model_first() -> None:
    ant, *others = files = [model(path) for path in ("/m/ant.gguf", "/m/fun.gguf", "/n/fun.gguf", "/n/eyes.gguf")]
    named = ModelEntry(path="ant.gguf", adapters={"fun": {"path": "fun.gguf"}}, mmproj="/n/ey*.gguf")  # type: ignore[dict-item]
    came = companions_of(named, ant, NodeFiles(files))
    assert (came.adapters, came.mmproj, came.missing) == ((others[0],), others[2], "")
    assert "adapter fun: no file fun.gguf" in companions_of(named, ant, NodeFiles([ant])).missing
    missing = companions_of(named, model("/o/ant.gguf"), NodeFiles(files)).missing
    assert "fun.gguf is 2 files, such as /m/fun.gguf and /n/fun.gguf" in missing


def test_a_long_list_of_files_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of its files: with a thousand files that stops the scheduler for a second."""
    files = tuple(model(f"/m/{number}/ant-{number}.gguf") for number in range(300))
    seen: Counter[str] = Counter()
    dirname = posixpath.dirname

    def noted(path: str) -> str:
        seen[path] += 1
        return dirname(path)

    monkeypatch.setattr(posixpath, "dirname", noted)
    Models(parse_catalogue({})).update(NodeId("here"), files)
    assert len(seen) == 300
    assert max(seen.values()) <= 3


def test_files_that_come_with_a_model_are_no_models() -> None:
    s = Scenario(
        [gpu("8GiB")],
        {"ant": SMALL},
        catalogue=entry(adapters={"fun": "fun.gguf", "terse": {"path": TERSE, "scale": 0.5}}),
        companions={FUN: adapter(FUN), TERSE: adapter(TERSE), EYES: projector()},
    )
    assert list(s.core.models.by_name) == ["ant"]
    (read,) = (c for c in s.log if isinstance(c, cmd.ReadShape))
    assert read == cmd.ReadShape(NodeId("box"), "/models/ant.gguf", (FUN, TERSE), EYES)


def test_a_model_that_an_entry_names_is_no_adapter() -> None:
    models = {"ant": {"path": "ant.gguf"}, "bee": {"path": "b*.gguf", "adapters": {"any": "*.gguf"}}}
    s = Scenario([gpu("8GiB")], {"ant": SMALL, "bee": SMALL}, catalogue={"models": models})
    assert s.core.models.by_name["ant"].copies and not s.core.models.by_name["bee"].copies


def test_a_missing_adapter_is_told_and_read_once_it_is_there() -> None:
    s = Scenario([gpu("8GiB")], {"ant": SMALL}, catalogue=entry(adapters={"fun": "fun.gguf"}))
    s.ask("ant")
    (refusal,) = s.refusals.values()
    assert "adapter fun: no file fun.gguf on this machine" in refusal.error.message
    assert any(isinstance(c, cmd.Announce) and c.kind == "model_invalid" for c in s.log)
    s.companions[FUN] = adapter(FUN)
    s.report_node()
    s.ask("ant")
    assert s.started[-1].adapters == (("fun", FUN, 1.0),)


def test_a_changed_adapter_is_read_again_and_its_replica_goes() -> None:
    s = Scenario(
        [gpu("8GiB")], {"ant": SMALL}, catalogue=entry(adapters={"fun": "fun.gguf"}), companions={FUN: adapter(FUN)}
    )
    s.done(s.ask("ant"))
    before = s.core.models.by_name["ant"].shape
    s.companions[FUN] = adapter(FUN, rank=128)
    s.file_age["fun"] = 2.0
    s.report_node()
    after = s.core.models.by_name["ant"].shape
    assert before and after and after.weights_bytes > before.weights_bytes
    assert [stop.reason for stop in s.stopped] == ["its file has changed"]


def test_an_answer_about_other_files_is_not_taken() -> None:
    s = Scenario([gpu("8GiB")], {"ant": SMALL}, catalogue=entry(adapters={"fun": FUN}), companions={FUN: adapter(FUN)})
    known = s.core.models.by_name["ant"].shape
    s.send(ev.ShapeRead(NodeId("box"), "/models/ant.gguf", shape(*MEDIUM)))
    assert s.core.models.by_name["ant"].shape is known


# ---------------------------------------------------------------------- what they take, and where


def test_two_names_of_one_file_are_two_models() -> None:
    models = {"plain": {"path": "ant.gguf"}, "fun": {"path": "ant.gguf", "adapters": {"fun": FUN}}}
    s = Scenario([gpu("8GiB")], {"ant": SMALL}, catalogue={"models": models}, companions={FUN: adapter(FUN)})
    for name in models:
        s.ask(name)
    plain, fun = s.started
    assert (plain.adapters, fun.adapters) == ((), (("fun", FUN, 1.0),))
    assert fun.placement.device_bytes[0] - plain.placement.device_bytes[0] >= 2 * 2 * 64 * 1024 * SMALL[0]


def test_a_plan_for_a_name_is_that_for_the_files() -> None:
    adapters = [adapter(FUN), adapter(TERSE, rank=8)]
    s = Scenario(
        [gpu("8GiB")],
        {"ant": SMALL},
        catalogue=entry(adapters={"fun": FUN, "terse": TERSE}),
        companions={each.path: each for each in adapters},
    )
    s.ask("ant")
    placement = s.started[0].placement
    given = adapted(shape(*SMALL), adapters)
    (there,) = footprint(given, placement.layout, placement.context, s.llama_build).devices
    assert placement.device_bytes == (there.total_bytes,)


def test_the_projector_lies_on_the_first_device_and_is_booked() -> None:
    s = Scenario([gpu("2GiB")], {"ant": SMALL}, companions={EYES: projector()})
    s.ask("ant")
    (start,) = s.started
    placement, account = start.placement, device_account(DeviceId("id-gpu0"))
    assert (start.mmproj, placement.mmproj_on_device, placement.mmproj_bytes) == (EYES, True, 500 * MIB)
    plain = Scenario([gpu("2GiB")], {"ant": SMALL})
    plain.ask("ant")
    assert placement.device_bytes[0] == plain.started[0].placement.device_bytes[0] + 500 * MIB
    booked = s.core.ledger.amount(start.replica_id, account)
    assert booked >= s.report(start).devices[0].total_bytes + 500 * MIB  # also once it is loaded


def test_the_projector_needs_room_on_the_card() -> None:
    cards = [gpu("750MiB"), gpu("750MiB", "gpu1")]
    needs_two = Scenario(cards, {"ant": SMALL}, companions={EYES: projector()}, catalogue={"defaults": {"n_ctx": 2048}})
    needs_two.ask("ant")
    (start,) = needs_two.started
    assert len(start.placement.device_ids) == 2 and start.placement.overhead_bytes == (500 * MIB, 0)
    small = Scenario(
        [gpu("1GiB")],
        {"ant": SMALL},
        companions={EYES: projector(size=2 * GIB)},
        catalogue={"defaults": {"spill": False}},
    )
    small.ask("ant")
    (refusal,) = small.refusals.values()
    assert not small.started and "GiB" in refusal.error.message


def test_without_a_card_the_projector_lies_in_host_ram() -> None:
    s, plain = (Scenario((), {"ant": SMALL}, companions=companions) for companions in ({EYES: projector()}, {}))
    s.ask("ant")
    plain.ask("ant")
    placement, before = s.started[0].placement, plain.started[0].placement
    assert (placement.mmproj_on_device, placement.mmproj_bytes) == (False, 500 * MIB)
    for name in ("host_bytes", "host_outside_bytes", "host_resting_bytes"):
        assert getattr(placement, name) - getattr(before, name) == 500 * MIB
    account, start = host_account(NodeId("box")), s.started[0]
    booked = s.core.ledger.amount(start.replica_id, account)
    assert booked - plain.core.ledger.amount(plain.started[0].replica_id, account) == 500 * MIB


@pytest.mark.parametrize(("cards", "place"), [(["2GiB"], "gpu0"), ([], "host")])
def test_plans_and_the_status_say_where_the_projector_is(
    cards: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    s, plain = (
        Scenario([gpu(size) for size in cards], {"ant": SMALL}, companions=companions)
        for companions in ({EYES: projector()}, {})
    )
    expected = ProjectorShare(path=EYES, device=place, bytes=500 * MIB)
    said = "in host RAM" if place == "host" else "on gpu0"
    before = plan(s.core, "ant", s.core.plan("ant", None, s.now), s.now)
    assert (before.verdict, before.projector) == ("free", expected)
    (share,) = [each for each in before.shares if each.device == place]
    assert share.bytes > expected.bytes
    print_plan(before)
    assert f"of that, the projector {EYES} takes 500.0 MiB {said}" in capsys.readouterr().out
    for each in (s, plain):
        each.ask("ant")
    after = plan(s.core, "ant", s.core.plan("ant", None, s.now), s.now)
    assert (after.verdict, after.projector) == ("ready", expected)
    print_plan(after)
    assert f"its projector {EYES} takes 500.0 MiB {said}" in capsys.readouterr().out
    replicas = [status(each.core, "1", each.now, 0.0, 0, lambda _: None).replicas[0] for each in (s, plain)]
    assert [replica.projector for replica in replicas] == [expected, None]
    assert where(replicas[0]).endswith(f", projector {said}") and "projector" not in where(replicas[1])
    assert plan(plain.core, "ant", plain.core.plan("ant", None, plain.now), plain.now).projector is None


def test_what_was_measured_is_not_that_of_another_company() -> None:
    plain = shape(*SMALL)
    shapes = [
        accompanied(plain, companions)
        for companions in (
            Companions(),
            Companions((adapter(FUN),)),
            Companions((adapter(FUN, rank=8),)),
            Companions(projector=projector()),
            Companions(projector=projector(size=MIB)),
            Companions((adapter(FUN),), projector()),
        )
    ]
    keys = {load_key(each, Layout(), ContextParams(), "build") for each in shapes}
    assert len(keys) == len(shapes)


def test_a_projector_is_no_overhead_of_the_card() -> None:
    s = Scenario([gpu("8GiB", kind="cuda")], {"ant": SMALL}, companions={EYES: projector()}, tells_processes=True)
    s.now += 5
    request = s.ask("ant")
    s.now += 5
    s.done(request)
    s.read_devices()
    (device,) = s.core.inventory.nodes[NodeId("box")].devices.values()
    assert s.core.measurements.overhead_bytes(device.facts.product, s.llama_build) is None
    (replica,) = s.core.replicas.values()
    what = s.core.models.by_name["ant"].shape, replica.placement.layout, replica.placement.context, s.llama_build
    measured = s.core.measurements.load(*what)  # type: ignore[arg-type]
    assert measured and measured.outside_bytes[0] <= replica.placement.overhead_bytes[0] - 500 * MIB


# ---------------------------------------------------------------------- the catalogue


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"adapters": {"a b": "x.gguf"}}, "adapter name 'a b' may hold letters"),
        ({"adapters": {"a": {"path": "x.gguf", "scal": 1}}}, "did you mean scale"),
        ({"adapters": {"a": {"path": "x.gguf", "scale": 17}}}, "less than or equal to 16"),
        ({"adapters": {"a": {"path": "x.gguf", "scale": float("nan")}}}, "scale"),
        ({"adapters": {"a": {"scale": 1}}}, "models.ant.adapters.a.path: Field required"),
        ({"adapters": {"a": ""}}, "at least 1 character"),
        ({"mmproj": ""}, "at least 1 character"),
        ({"matryoshka_dimensions": []}, "at least 1 item"),
        ({"matryoshka_dimensions": [64, 0]}, "greater than or equal to 1"),
        ({"matryoshka_dimensions": 64}, "should be 'any'"),
    ],
)
def test_wrong_companions_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Rejected, match=words):
        parse_catalogue(entry(**given))


@pytest.mark.parametrize(("given", "told"), [([64, 32], (64, 32)), ("any", "any"), (None, ())])
def test_the_runner_is_told_what_the_catalogue_says_of_the_model(given: Any, told: Any) -> None:
    said = {"chat_template": "{{ messages }}", "matryoshka_dimensions": given}
    s = Scenario([gpu("8GiB")], {"ant": SMALL}, catalogue=entry(**said))
    s.ask("ant")
    (start,) = s.started
    assert (start.chat_template, start.matryoshka_dimensions) == ("{{ messages }}", told)
    unnamed = Scenario([gpu("8GiB")], {"ant": SMALL})
    unnamed.ask("ant")
    assert (unnamed.started[0].chat_template, unnamed.started[0].matryoshka_dimensions) == ("", ())


def test_a_catalogue_that_was_parsed_can_be_parsed_again() -> None:
    catalogue = parse_catalogue(entry(adapters={"fun": "fun.gguf"}, mmproj="none"))
    assert parse_catalogue(catalogue.model_dump()) == catalogue
    assert catalogue.models["ant"].companion_paths == ("fun.gguf",)
    assert replace(Companions(), mtp=True) != Companions()


def eyes(kind: str = "qwen2vl_merger", path: str = EYES) -> Projector:
    """With one encoder of images, of which only the kind counts here."""
    encoder = Encoder(
        kind, False, heads=4, width=64, q=64, k=64, is_fused=False, feed_forward=256, merge=2, positions=92 * 92,
        raw=3 * (46 * 28) ** 2, patching=0, patching_once=0, has_window=False, projected=256, projection_steps=2,
        stacked=1, deep_layers=0, deep_width=0, kept=0, resampled=0,
    )  # fmt: skip
    return Projector(path, Padded(MIB, MIB), (encoder,))


def test_larger_pictures_are_booked_and_the_runner_is_told() -> None:
    needs, told = [], []
    for given in ({}, {"image_max_tokens": 4200, "image_min_tokens": 9}, {"image_max_tokens": 100}):
        s = Scenario([gpu("8GiB")], {"ant": SMALL}, catalogue=entry(**given), companions={EYES: eyes()})
        s.ask("ant")
        context = s.started[-1].placement.context
        needs.append(s.started[-1].placement.mmproj_bytes)
        told.append((context.image_min_tokens, context.image_max_tokens))
    assert told == [(0, 0), (9, 64 * 64), (0, 100)]
    assert needs[1] > 1.5 * needs[0] and needs[2] == needs[0]


@pytest.mark.parametrize(
    ("given", "companions", "words"),
    [
        ({"image_max_tokens": 4096}, {}, "there is no projector: name one as mmproj"),
        ({"image_max_tokens": 4096}, {EYES: eyes("mlp")}, "kind mlp has a fixed image size in its file"),
        ({"image_min_tokens": 4096}, {EYES: eyes()}, "image_min_tokens is 4096, but images have at most 2116 tokens"),
        ({"image_max_tokens": 4096}, {EYES: projector()}, "the projector takes no images"),
    ],
)
def test_pictures_that_a_projector_cannot_make_are_told(
    given: dict[str, int], companions: dict[str, Any], words: str
) -> None:
    s = Scenario([gpu("8GiB")], {"ant": SMALL}, catalogue=entry(**given), companions=companions)
    s.ask("ant")
    (refusal,) = s.refusals.values()
    assert words in refusal.error.message and "leave out image_min_tokens" in refusal.error.message
    assert any(isinstance(c, cmd.Announce) and c.kind == "model_invalid" and words in c.message for c in s.log)


def test_fewest_tokens_are_no_more_than_most() -> None:
    with pytest.raises(Rejected, match="image_min_tokens 50 is more than image_max_tokens 49"):
        parse_catalogue(entry(image_min_tokens=50, image_max_tokens=60))
