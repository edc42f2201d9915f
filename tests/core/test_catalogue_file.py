"""The catalogue: spellings, defaults over models, and errors that suggest the right key."""

from __future__ import annotations

import pytest
import yaml

from scheduler.cluster.facts import ModelFile
from scheduler.cluster.models import Models
from scheduler.config import Catalogue, parse_catalogue
from scheduler.errors import Rejected
from scheduler.units import GIB, MIB, NodeId, format_bytes, parse_bytes


def parse(text: str) -> Catalogue:
    return parse_catalogue(yaml.safe_load(text), "home.yaml")


def refusal(text: str) -> str:
    with pytest.raises(Rejected) as refused:
        parse(text)
    return refused.value.message


def test_nothing_at_all_is_a_catalogue() -> None:
    assert parse("") == Catalogue()


def test_sizes_and_yaml_booleans() -> None:
    catalogue = parse("reserves: {host_bytes: 4GiB, gpu_bytes: 512 MiB}\ndefaults: {flash_attn: off}")
    assert (catalogue.reserves.host_bytes, catalogue.reserves.gpu_bytes) == (4 * GIB, 512 * MIB)
    assert catalogue.defaults.flash_attn == "off"
    assert parse("defaults: {flash_attn: on}").defaults.flash_attn == "on"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("polcy: {}", "unknown key polcy; did you mean policy?"),
        ("policy: {min_residency: 3}", "unknown key policy.min_residency; did you mean min_residency_s?"),
        ("models: {a: {path: x.gguf, n_ctxx: 3}}", "unknown key models.a.n_ctxx; did you mean n_ctx?"),
        ("server: {zzz: 1}", "unknown key server.zzz; known keys: api_key, api_keys, host, media_hosts, ollama_"),
        ("server: {media_hosts: ['*.example.org']}", "'*.example.org' is not a host; write its name"),
        ("defaults: {n_ctx: many}", "defaults.n_ctx"),
        ("defaults: {flash_attn: maybe}", "'on' or 'off'"),
        ("reserves: {host_bytes: 3 apples}", "write bytes as 512, 96MiB, 1.5GiB or 8GB"),
        ("reserves: {host_bytes: -3}", "negative"),
        ("models: {a: {}}", "models.a.path: Field required"),
        ("models: {'a b': {path: x}}", "model name 'a b' may hold letters"),
        ("models: {'a:latest': {path: x}}", "model name 'a:latest': leave out :latest, which Ollama's clients add"),
        ("[1, 2]", "a catalogue is a mapping with keys such as models and policy, not list"),
        ("policy: {max_active_models: 0}", "policy.max_active_models"),
        ("server: {api_key: short}", "server.api_key"),
        ("server: {api_keys: {ann: long-enough, ben: long-enough}}", "ann and ben have the same key"),
        ("server: {api_keys: {unnamed: long-enough}}", "'unnamed' is the name of api_key"),
        ("models: {a: {path: x, min_replicas: 3, max_replicas: 2}}", "a: min_replicas 3 is more than max_replicas 2"),
        ("{defaults: {max_replicas: 1}, models: {a: {path: x, min_replicas: 2}}}", "a: min_replicas 2 is more than"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith("home.yaml: ") and words in message


def test_the_key_without_a_name_has_one_where_the_cluster_is_shared() -> None:
    alone = parse("server: {api_key: long-enough}").server
    shared = parse("server: {api_key: long-enough, api_keys: {ann: another-one}}").server
    assert alone.keys == {"": "long-enough"}  # nobody to be fair to
    assert shared.keys == {"unnamed": "long-enough", "ann": "another-one"}


def test_every_mistake_is_named_at_once() -> None:
    message = refusal("polcy: {}\nservr: {}")
    assert "polcy" in message and "servr" in message


def test_a_catalogue_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Catalogue().policy = None  # type: ignore[misc, assignment]


@pytest.mark.parametrize(
    ("text", "count"),
    [("512", 512), ("96MiB", 96 * MIB), ("1.5GiB", 3 * GIB // 2), ("8GB", 8 * 10**9), (" 2 k ", 2048), (7, 7)],
)
def test_sizes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "1.5.5GiB", "4 parsecs", -1])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 96 * MIB, 9 * GIB, 2**41)] == [
        "0 B", "1023 B", "1.5 KiB", "96.0 MiB", "9.0 GiB", "2.0 TiB"
    ]  # fmt: skip


# ---------------------------------------------------------------------- names


def names(*paths: str, catalogue: str = "") -> dict[str, str]:
    """Path by model name for files that one node reports."""
    models = Models(parse(catalogue))
    models.update(NodeId("box"), tuple(ModelFile(path, (path,), 1, 0.0) for path in paths))
    return {name: copy.file.path for name, model in models.by_name.items() for copy in model.copies.values()}


def test_files_name_themselves() -> None:
    assert names("/m/qwen3-8b.gguf", "/m/large-00001-of-00003.gguf") == {
        "qwen3-8b": "/m/qwen3-8b.gguf",
        "large": "/m/large-00001-of-00003.gguf",
    }


def test_namesakes_take_their_folders_in_front() -> None:
    assert list(names("/m/a/x.gguf", "/m/b/x.gguf", "/n/b/x.gguf")) == ["x", "b/x", "n/b/x"]


@pytest.mark.parametrize("pattern", ["/m/q8/qwen.gguf", "qwen.gguf", "./qwen.gguf", "~/q8/qwen.gguf", "*/q8/*.gguf"])
def test_the_catalogue_s_paths(pattern: str) -> None:
    assert names("/m/q8/qwen.gguf", catalogue=f"models: {{house: {{path: '{pattern}'}}}}") == {
        "house": "/m/q8/qwen.gguf"
    }


def test_a_path_with_brackets_is_itself() -> None:
    assert "house" in names("/m/[x].gguf", catalogue="models: {house: {path: '/m/[x].gguf'}}")


def test_two_names_for_one_file() -> None:
    found = names("/m/x.gguf", catalogue="models: {short: {path: x.gguf, n_ctx: 512}, long: {path: x.gguf}}")
    assert found == {"short": "/m/x.gguf", "long": "/m/x.gguf"}


def test_a_pattern_takes_the_first_file_and_leaves_the_others_their_names() -> None:
    found = names("/m/x-q4.gguf", "/m/x-q8.gguf", catalogue="models: {x: {path: 'x-*.gguf'}}")
    assert found == {"x": "/m/x-q4.gguf", "x-q8": "/m/x-q8.gguf"}


def test_a_file_does_not_take_a_name_of_the_catalogue() -> None:
    found = names("/m/x.gguf", catalogue="models: {x: {path: /else/y.gguf}}")
    assert found == {"m/x": "/m/x.gguf"}


def test_own_parameters_over_defaults() -> None:
    models = Models(parse("defaults: {n_ctx: 4096, n_seq_max: 2}\nmodels: {a: {path: a.gguf, n_ctx: 8192}}"))
    params = models.params(models.by_name["a"])
    assert (params.n_ctx, params.n_seq_max) == (8192, 2)
