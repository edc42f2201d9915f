"""Pictures and sounds on real models: what libmtmd's own helper would say, from the cache too, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from mtmd_baseline import answer_of
from picture_files import bmp, gif, jpeg_head, of_xcode, png, png_of, wav, webp, webp_head
from projector_files import write_as_qwen2vl, write_gemma3, write_llava, write_qwen2vl, write_ultravox
from sound_files import flac, flac_bomb, mp3

from actors.devices.virtual import create_virtual_gpus, read_virtual_gpu, start_device_process
from actors.serving import media_files, native
from actors.serving.engine import Engine
from actors.serving.keeping import Keeper
from actors.serving.protocol import Chunk, GenerateRequest, LoadDevice, Sampling, content_of, deltas_of
from actors.serving.sampling import build_sampler
from scheduler.errors import Rejected
from scheduler.units import MIB, NodeId

pytestmark = pytest.mark.llama

KINDS = ("llava", "gemma3", "qwen2vl", "ultravox", "window")
EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
N_UBATCH = 64
SOUNDS = (b"RIFF", b"ID3", b"fLaC", b"\xff\xfb")


@pytest.fixture(scope="session")
def files(sample: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """`files(kind)`: a model and its projector."""
    folder = tmp_path_factory.mktemp("projectors")
    llama = sample("llama", "f32")

    def write(kind: str) -> tuple[Path, Path]:
        model, mmproj = llama, folder / f"mmproj-{kind}.gguf"
        match kind:
            case "llava":
                write_llava(mmproj, 128)
            case "gemma3":
                write_gemma3(mmproj, 128)
            case "qwen2vl":
                model = write_as_qwen2vl(folder / "qwen2vl.gguf", llama)
                write_qwen2vl(mmproj, 128)
            case "window":
                model = sample("gemma3", "f32", sliding_window=64)
                write_gemma3(mmproj, 128)
            case _:
                write_ultravox(mmproj, 128)
        return model, mmproj

    return write


@pytest.fixture(scope="module")
def seeing(files: Any, spec: Any) -> Iterator[Callable[..., Engine]]:
    """`seeing(kind)`: an engine with eyes (or ears), one for all tests."""
    engines: dict[str, Engine] = {}
    with contextlib.ExitStack() as held:

        def load(kind: str) -> Engine:
            if kind not in engines:
                model, mmproj = files(kind)
                n_seq_max = 1 if kind == "window" else 2
                wanted = spec(
                    model, n_ctx=1024, n_ubatch=N_UBATCH, n_seq_max=n_seq_max, kv_unified=n_seq_max > 1, **EXACT
                )
                engines[kind] = held.enter_context(contextlib.closing(Engine(replace(wanted, mmproj=str(mmproj)))))
            return engines[kind]

        yield load


def message(*parts: str | bytes, role: str = "user") -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "audio" if _is_sound(part) else "image", "data": b64encode(part).decode()}
        for part in parts
    ]
    return {"role": role, "content": content}


def _is_sound(file: bytes) -> bool:
    return file.startswith(SOUNDS) and file[8:12] != b"WEBP"


def ask(*messages: dict[str, Any], max_tokens: int = 24, **given: Any) -> GenerateRequest:
    content = {name: given.pop(name) for name in ("json_schema",) if name in given}
    return GenerateRequest(
        content_of(messages=messages, **content),
        lease_id="r",
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0),
        **given,
    )


def told(engine: Engine, request: GenerateRequest) -> tuple[str, Chunk]:
    chunks = list(engine.generate(request))
    return "".join(chunk.text for chunk in chunks), chunks[-1]


def rendered(engine: Engine, *messages: dict[str, Any]) -> str:
    """The prompt, with libmtmd's marker for every file."""
    asked = GenerateRequest(content_of(examine={"apply_template": {"messages": messages}}))
    prompt = json.loads(told(engine, asked)[0])["prompt"]
    return re.sub(r"<__media_\w+__>", "<__media__>", prompt)


def two(kind: str) -> tuple[bytes, bytes]:
    if kind == "ultravox":
        return wav(440), wav(3000, 35)
    return png(1), png(2, 90, 70) if kind == "qwen2vl" else png(2)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_as_libmtmds_own_helper_does(kind: str, seeing: Any, files: Any) -> None:
    engine = seeing(kind)
    for shown in (two(kind), two(kind)[::-1]):
        chat = message("What is on the left, ", shown[0], " and what here: ", shown[1], " Tell me!")
        wanted = answer_of(*files(kind), rendered(engine, chat), shown, 24, n_ubatch=N_UBATCH)
        assert told(engine, ask(chat))[0] == wanted and len(wanted) > 30
        assert told(engine, ask(chat))[0] == wanted  # out of the cache


def likely(engine: Engine, *parts: str | bytes) -> list[tuple[int, float]]:
    """Tokens and their likelihoods, which nothing hides that a model is told."""
    chunks = list(engine.generate(ask(message(*parts), max_tokens=4, n_probs=1)))
    return [(each.token, round(each.logprob or 0, 3)) for chunk in chunks for each in chunk.likelihoods]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_changes_the_answer_and_so_does_its_place(kind: str, seeing: Any) -> None:
    engine, (one, other) = seeing(kind), two(kind)
    answers = [
        likely(engine, *parts)
        for parts in (("a ", one, "?"), ("a ", other, "?"), ("a ", one, other, "?"), ("a ", other, one, "?"))
    ]
    assert all(answers[i] != answers[j] for i in range(4) for j in range(i))
    assert likely(engine, "a ", one, "?") == answers[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_seen_is_found_again(kind: str, seeing: Any) -> None:
    engine, (one, other) = seeing(kind), two(kind)
    _, plain = told(engine, ask(message("Once more: ", " or ", " it?")))
    _, first = told(engine, ask(message("Once more: ", one, " or ", other, " it?")))
    n_seen = first.prompt_tokens - plain.prompt_tokens
    assert n_seen >= {"ultravox": 75 * 3}.get(kind, 16 * 2) - 4  # texts are cut elsewhere
    _, again = told(engine, ask(message("Once more: ", one, " or ", other, " it?")))
    assert again.prompt_tokens == first.prompt_tokens
    assert first.prompt_tokens - 5 <= again.cached_tokens < first.prompt_tokens
    if kind != "window":  # a window has dropped what an earlier cut needs
        _, half = told(engine, ask(message("Once more: ", one, " or ", one, " it?")))
        assert plain.prompt_tokens // 2 + n_seen // 4 < half.cached_tokens < first.prompt_tokens - 16


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_seen_outlives_its_model(
    kind: str, files: Any, spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Keeper, "tokens_read_per_s", 100.0)
    (model, mmproj), (one, other) = files(kind), two(kind)
    wanted = replace(
        spec(model, n_ctx=1024, n_ubatch=N_UBATCH, **EXACT), mmproj=str(mmproj), saved_state_bytes=64 * MIB
    )
    chat = message("What is on the left, ", one, " and what here: ", other, " Tell me!")
    changed = message("What is on the left, ", other, " and what here: ", one, " Tell me!")
    with contextlib.closing(Engine(wanted)) as engine:
        said, first = told(engine, ask(chat))
        assert engine.park() == 1
    with contextlib.closing(Engine(wanted)) as engine:
        encoded, encode = [], engine._model.encode
        monkeypatch.setattr(engine._model, "encode", lambda medium: encoded.append(medium) or encode(medium))
        again, last = told(engine, ask(chat))
        assert again == said and not encoded and first.prompt_tokens - 5 <= last.cached_tokens < first.prompt_tokens
        turned, last = told(engine, ask(changed))
        assert encoded and last.cached_tokens < first.prompt_tokens // 2
    with contextlib.closing(Engine(replace(wanted, saved_state_bytes=0))) as engine:
        assert told(engine, ask(changed))[0] == turned


@pytest.mark.parametrize("kind", ["llava", "qwen2vl"])
def test_a_text_after_a_picture_has_its_own_place_in_the_slot(kind: str, seeing: Any) -> None:
    engine = seeing(kind)
    chat = [message("Look: ", png(5), " What?")]
    said, _ = told(engine, ask(*chat))
    chat += [{"role": "assistant", "content": said}, message("And this? ", png(6), " Well?")]
    whole, last = told(engine, ask(*chat))
    assert last.cached_tokens > 16
    told(engine, ask(message("Something else")))
    told(engine, ask(message("And else")))
    fresh, _ = told(engine, ask(*chat))
    assert whole == fresh


def test_several_answers_see_one_picture(seeing: Any) -> None:
    engine = seeing("llava")
    wanted, _ = told(engine, ask(message("What ", png(3), " is it?")))
    chunks = list(engine.generate(ask(message("What ", png(3), " is it?"), n=3)))
    assert ["".join(c.text for c in chunks if c.index == i) for i in range(3)] == [wanted] * 3


def large(kind: str) -> tuple[bytes, ...]:
    """More tokens than a micro-batch has, and both dimensions of a position matter."""
    match kind:
        case "qwen2vl":
            return png(1, 28 * 11, 28 * 7), png(2, 28 * 5, 28 * 16)
        case "ultravox":
            return wav(440, 40), wav(3000, 2)
        case _:
            return png(1), png(2)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2vl", "ultravox"])
def test_pictures_that_are_read_in_pieces_beside_others_are_seen_as_by_libmtmds_helper(
    kind: str, files: Any, spec: Any
) -> None:
    model, mmproj = files(kind)
    n_ubatch = 16 if kind == "gemma3" else 13
    loaded = spec(model, n_ctx=1024, n_ubatch=n_ubatch, n_seq_max=3, kv_unified=True, **EXACT)
    chats = [message("What is on the left, ", *large(kind), " Tell me!"), message("And ", large(kind)[0], " here?")]
    with contextlib.closing(Engine(replace(loaded, mmproj=str(mmproj)))) as engine:
        shown = [large(kind), large(kind)[:1]]
        prompts = [rendered(engine, chat) for chat in chats]
        wanted = [answer_of(model, mmproj, prompts[at], shown[at], 24, n_ubatch=64) for at in (0, 1)]
        answers = ["", "", ""]

        def say(number: int) -> None:
            request = ask(chats[number]) if number < 2 else ask(message("Tell me a story"), max_tokens=300)
            answers[number] = told(engine, request)[0]

        threads = [Thread(target=say, args=(number,)) for number in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[:2] == wanted and answers[2]


@pytest.mark.parametrize("kind", ["llava", "qwen2vl"])
def test_who_leaves_in_the_midst_of_a_picture_leaves_a_slot_that_can_be_used(
    kind: str, files: Any, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mmproj = files(kind)
    loaded = replace(spec(model, n_ctx=1024, n_ubatch=7, n_seq_max=1, **EXACT), mmproj=str(mmproj))
    with contextlib.closing(Engine(loaded)) as engine:
        chat = message("What is on the left, ", *large(kind), " Tell me!")
        decode, begun = engine._model.decode_media, list[int]()

        def leave_after_the_second(pieces: Any) -> int:
            code = decode(pieces)
            begun.append(pieces[0].position)
            if len(begun) == 2:
                engine.cancel("leaver")
            return int(code)

        monkeypatch.setattr(engine._model, "decode_media", leave_after_the_second)
        assert list(engine.generate(replace(ask(chat), lease_id="leaver"))) == [] and len(begun) == 2
        text, last = told(engine, ask(chat))
        assert last.cached_tokens == begun[0] == begun[1], "the text before it"
        assert text == answer_of(model, mmproj, rendered(engine, chat), large(kind), 24, n_ubatch=64)


@pytest.mark.parametrize("frames", [1, 2])
def test_a_webp_is_seen_as_the_same_png_is(frames: int, seeing: Any) -> None:
    engine = seeing("llava")
    text, last = told(engine, ask(message("What is ", png(3), "?")))
    again, same = told(engine, ask(message("What is ", webp(3, frames), "?")))
    assert (again, same.prompt_tokens) == (text, last.prompt_tokens)


@pytest.mark.parametrize("quality", [0, 80])
def test_the_size_of_a_webp_is_in_its_header(quality: int) -> None:
    file = webp(1, quality=quality)
    assert media_files.size_of(0, file) == media_files.picture(0, file)[0] == (60, 50)


def test_several_answers_with_a_grammar_open_their_picture_once(seeing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, opened = seeing("llava"), []
    look = engine._model.eyes.picture
    monkeypatch.setattr(engine._model.eyes, "picture", lambda *given: opened.append(given) or look(*given))
    request = ask(message("What ", png(3), " is it?"), json_schema={"type": "object"}, max_tokens=200, n=2)
    texts = ["", ""]
    for chunk in engine.generate(request):
        texts[chunk.index] += "".join(delta.content for delta in deltas_of(chunk))
    assert len(opened) == 1
    assert [text.lstrip()[:1] for text in texts] == ["{", "{"], texts


def test_an_answer_about_a_picture_may_follow_a_schema(seeing: Any) -> None:
    request = ask(message("What ", png(3), " is it?"), json_schema={"type": "object"}, max_tokens=200)
    chunks = list(seeing("llava").generate(request))
    assert "".join(delta.content for chunk in chunks for delta in deltas_of(chunk)).lstrip().startswith("{")


def test_samplers_that_look_back_see_the_text_only(seeing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    monkeypatch.setattr(native, "build_sampler", lambda *given: prompts.append(given[3]) or build_sampler(*given))
    request = ask(message("What ", png(3), " is it?"))
    request = replace(request, sampling=Sampling(temperature=0, repeat_penalty=1.3, dry_multiplier=0.8))
    _, last = told(seeing("llava"), request)
    assert last.completion_tokens == 24
    assert len(prompts[0]) == last.prompt_tokens - 16 and min(prompts[0]) >= 0


MARKERS = "<__media__> <image> [IMG]"


def test_a_clients_text_makes_no_picture(seeing: Any) -> None:
    engine = seeing("llava")
    _, plain = told(engine, ask(message(MARKERS)))
    _, seen = told(engine, ask(message(MARKERS, png(1), "?")))
    assert plain.prompt_tokens < 100 and 16 <= seen.prompt_tokens - plain.prompt_tokens <= 18


BOMB = png_of(1, 1, b"\0" * 400_000_000)
BROKEN = png(1)[:500]


@pytest.mark.parametrize(
    ("kind", "parts", "named"),
    [
        ("llava", ["x", b"hello"], "file 1 of the messages must be a PNG, JPEG, WebP, GIF or BMP"),
        ("llava", ["x", b"RIFF\1\1\1\1WEBPVP8 "], "it is a broken WebP"),
        ("llava", ["x", webp(1)[:500], "y"], "picture 1 is a broken WebP"),
        ("llava", ["x", webp_head(5000, 5000), "y"], "5000 x 5000 pixels; at most 16777216"),
        ("llava", ["x", png(1), BROKEN, "y"], "picture 2 is broken"),
        ("llava", ["x", of_xcode(1, 20_000), "y"], "it is a broken PNG"),
        ("llava", ["x", png_of(5000, 5000, b""), "y"], "5000 x 5000 pixels; at most 16777216"),
        ("llava", ["x", png_of(0, 7, b""), "y"], "0 x 7 pixels"),
        ("llava", ["x", jpeg_head(65000, 65000), "y"], "65000 x 65000"),
        ("llava", ["x", gif(65000, 65000), "y"], "65000 x 65000"),
        ("llava", ["x", *[png_of(4000, 4000, b"")] * 5, "y"], "80000000 pixels together; at most 67108864"),
        ("llava", ["x", *[png(1)] * 101, "y"], "more than 100 files"),
        ("llava", ["x", *[png(1)] * 99, "y"], "prompt is 1[0-9]{3} tokens; the slot holds 1024"),
        ("llava", ["x", b"\x89PNG\r\n\x1a\n" + b"x" * 21_000_000, "y"], "at most 20.0 MiB"),
        ("llava", ["x", BOMB, "y"], "broken|memory|computing"),
        ("llava", ["x", wav(440)], "this model does not take sounds"),
        ("ultravox", ["x", png(1)], "this model does not take images"),
        ("ultravox", ["x", b"ID3\3" + b"x" * 900, "y"], "sound 1 is a broken MP3"),
        ("ultravox", ["x", b"RIFF" + b"x" * 900, "y"], "must be an MP3, a FLAC, or a WAV"),
        ("ultravox", ["x", mp3(1), flac(440)[:60], "y"], "sound 2 is a broken FLAC"),
        ("ultravox", ["x", flac_bomb(300_000), "y"], "longer than 600.0 s"),
        ("ultravox", ["x", flac_bomb(300_000, 655_350), "y"], "longer than 600.0 s|more than 5 s of computing"),
        ("ultravox", ["x", flac(440), *[mp3(1)] * 20, "y"], "longer than 0.0 s"),
        ("ultravox", ["x", wav(440)[:44], "y"], "it has no samples"),
        ("ultravox", ["x", wav(440, 601, 8000, 1, 1), "y"], "601.0 s long"),
        ("ultravox", ["x", *[wav(440, 0.1, 8000, 1, 1)] * 21, "y"], "counts as at least 30 s"),
        ("llava", ["x", png(1, 1, 20_000), "y"], "a side may have at most 16384"),
    ],
)
def test_what_cannot_be_seen_is_refused_with_the_numbers(kind: str, parts: Any, named: str, seeing: Any) -> None:
    engine = seeing(kind)
    with pytest.raises(Rejected, match=named) as refused:
        list(engine.generate(ask(message(*parts))))
    assert len(refused.value.message) < 400
    assert told(engine, ask(message("Where is the salt?")))[0]  # and nobody else noticed


def test_a_model_without_a_projector_names_the_way_out(seeing: Any, engine: Any, sample: Any) -> None:
    plain = engine(sample("llama"))
    for parts in (["x", png(1)], ["x", wav(440)]):
        with pytest.raises(Rejected, match="give it a projector for them: mmproj in the catalogue"):
            list(plain.generate(ask(message(*parts))))
    assert told(plain, ask(message("a ", "b")))[0]


def test_a_file_that_is_no_base64_is_refused(seeing: Any) -> None:
    chat = {"role": "user", "content": [{"type": "image", "data": "(-:"}]}
    with pytest.raises(Rejected, match="file 1 of the messages is not base64"):
        list(seeing("llava").generate(ask(chat)))


@pytest.mark.parametrize("file", [bmp(40, 30), png(1, 1, 1), png(1, 1, 3000), png_of(8, 8, bytes(8 * 65), 16, 6)])
@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2vl"])
def test_strange_shapes_are_seen(kind: str, file: bytes, seeing: Any) -> None:
    assert told(seeing(kind), ask(message("x", file, "y"), max_tokens=2))[1].completion_tokens == 2


@pytest.mark.parametrize("seconds", [1 / 16000, 2 / 16000, 0.05, 30 + 1 / 16000])
def test_a_sound_of_any_length_is_heard(seconds: float, seeing: Any) -> None:
    """libmtmd ends the process over a single sample."""
    file = wav(440, seconds, 16000, 2, 1)
    assert told(seeing("ultravox"), ask(message("x", file, "y"), max_tokens=2))[1].completion_tokens == 2


@pytest.mark.parametrize("file", [flac(440, 0.3), flac(440, 31, 8000, 1), mp3(0.01), mp3(31)])
def test_compressed_sounds_are_heard(file: bytes, seeing: Any) -> None:
    plain = told(seeing("ultravox"), ask(message("x", "y"), max_tokens=2))[1]
    heard = told(seeing("ultravox"), ask(message("x", file, "y"), max_tokens=2))[1]
    assert heard.completion_tokens == 2 and heard.prompt_tokens - plain.prompt_tokens >= 75 - 4


def test_ten_minutes_of_music_fit_their_child(seeing: Any) -> None:
    """They are more tokens than the slot has, so only the preparer hears them."""
    for file in (mp3(599), flac_bomb(400)):
        with pytest.raises(Rejected, match=r"prompt is .* tokens; the slot holds 1024"):
            list(seeing("ultravox").generate(ask(message("x", file, "y"))))


def test_a_large_picture_fits_its_childs_memory(seeing: Any) -> None:
    """The costliest kind: 16 bits, four channels."""
    large = png_of(4096, 4096, b"\0" * (4096 * (1 + 8 * 4096)), 16, 6)
    assert told(seeing("llava"), ask(message("x", large, "y"), max_tokens=2))[1].completion_tokens == 2


def test_a_picture_that_must_be_read_at_once_needs_a_large_micro_batch(files: Any, spec: Any) -> None:
    model, mmproj = files("gemma3")
    loaded = replace(spec(model, n_ctx=1024, n_ubatch=8, **EXACT), mmproj=str(mmproj))
    with (
        contextlib.closing(Engine(loaded)) as engine,
        pytest.raises(Rejected, match="16 tokens, which this model must read at once, but its n_ubatch is 8"),
    ):
        list(engine.generate(ask(message("x", png(1), "y"))))


def test_a_projector_on_a_device_sees_the_same(files: Any, spec: Any, seeing: Any, tmp_path: Path) -> None:
    model, mmproj = files("llava")
    chat = message("What is ", png(1), "?")
    (gpu,) = create_virtual_gpus(NodeId("here"), (32 * MIB,), tmp_path / "gpus")
    device = LoadDevice(gpu.device_id, "rpc", 0, gpu.state_path, gpu.total_bytes)
    used_bytes = []
    for more in ({}, {"mmproj": str(mmproj), "mmproj_on_device": True}):
        loaded = spec(model, n_ctx=1024, n_ubatch=N_UBATCH, devices=(device,), n_gpu_layers=-1, **EXACT)
        with (
            contextlib.closing(start_device_process(gpu.state_path, gpu.total_bytes)) as process,
            contextlib.closing(Engine(replace(loaded, **more), [process.endpoint])) as engine,
        ):
            used_bytes.append(read_virtual_gpu(gpu).used_bytes)
            if more:
                assert told(engine, ask(chat))[0] == told(seeing("llava"), ask(chat))[0]
    assert used_bytes[1] - used_bytes[0] >= mmproj.stat().st_size // 2
