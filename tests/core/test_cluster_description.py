"""Descriptions of clusters: defaults, known cards, and errors that name the key and the way out."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.errors import Rejected
from scheduler.simulation.cards import known_card
from scheduler.simulation.description import parse_cluster
from scheduler.units import GIB, parse_rate


def gpu(**keys: Any) -> Any:
    return parse_cluster({"nodes": [{"name": "a", "gpus": [keys]}]}).nodes[0].gpus[0]


@pytest.mark.parametrize("name", ["RTX 3090", "NVIDIA GeForce RTX 3090", "rtx3090", "GeForce RTX 3090"])
def test_a_known_card_needs_only_its_name(name: str) -> None:
    card = gpu(name=name)
    assert (card.total_bytes, card.rates.bytes_per_s) == (24 * GIB, 936e9)


@pytest.mark.parametrize(
    ("name", "gib", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, 2039e9),
        ("A100-SXM4-40GB", 40, 1555e9),
        ("NVIDIA H100 80GB HBM3", 80, 3350e9),
        ("Tesla V100-SXM2-32GB", 32, 900e9),
        ("NVIDIA RTX 6000 Ada Generation", 48, 960e9),
        ("NVIDIA GeForce RTX 4060 Ti 16GB", 16, 288e9),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, 1792e9),
    ],
)
def test_a_driver_s_names_are_known(name: str, gib: int, bandwidth: float) -> None:
    card = gpu(name=name)
    assert (card.total_bytes, card.rates.bytes_per_s) == (gib * GIB, bandwidth)


def test_what_is_said_goes_before_the_table() -> None:
    card = gpu(name="RTX 3090", total="20GiB", bandwidth="500GB/s", tflops=10)
    assert (card.total_bytes, card.rates.bytes_per_s, card.rates.flops) == (20 * GIB, 500e9, 10e12)


def test_cards_of_several_sizes_are_told_apart() -> None:
    known = {name: known_card(name) for name in ("RTX 3080", "RTX 3080 Ti", "RTX 3090", "NVIDIA A100 40GB", "A100")}
    assert all(known.values()) and len({card.rates for card in known.values() if card}) == len(known)
    assert known_card("Voodoo 2") is None


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (None, "a mapping with the key nodes"),
        ({}, "nodes: Field required"),
        ({"nodes": []}, "nodes"),
        ({"nodes": [{"name": "a", "gpu": []}]}, "unknown key nodes.0.gpu; did you mean gpus?"),
        ({"nodes": [{"name": "a", "gpus": [{"name": "RTX 3090", "zzz": 1}]}]}, "known keys: bandwidth, free, kind"),
        ({"nodes": [{"name": "a", "gpus": [{"name": "Voodoo"}]}]}, "'Voodoo' is not a known card: give its total"),
        ({"nodes": [{"name": "a", "gpus": [{"total": "1GiB", "free": "2GiB"}]}]}, "but the GPU has only"),
        ({"nodes": [{"name": "a", "ram": "lots"}]}, "'lots' is not a size"),
        ({"nodes": [{"name": "a", "disk_read": "3GB"}]}, "'3GB' is not a rate"),
        ({"nodes": [{"name": "a", "ram": None}]}, "None is not a size"),
        ({"nodes": [{"name": "a", "ram": [1]}]}, "[1] is not a size"),
        ({"nodes": [{"name": "a", "ram": True}]}, "True is not a size"),
        ({"nodes": [{"name": "a", "ram": "9" * 400 + "GiB"}]}, "is more than any machine has"),
        ({"nodes": [{"name": "a", "disk_read": 10**400}]}, "is not a possible rate"),
        ({"nodes": [{"name": "a", "disk_read": 1e-300}]}, "is not a possible rate"),
        ({"nodes": [{"name": "a", "gpus": [{"total": 0}]}]}, "a GPU of 0 bytes is too small"),
        ({"nodes": [{"name": "a", "gpus": [{"total": 24.5}]}]}, "24.5 is not a size"),
        ({"nodes": [{"name": "a"}, {"name": "a"}]}, "two machines have the same name"),
        (
            {"nodes": [{"name": "a", "replicas": [{"model": "m", "file": "m.gguf", "gpus": [0]}]}]},
            "replica m is on GPUs [0]; a has 0, counted from 0",
        ),
    ],
)
def test_mistakes_are_named_with_the_way_out(data: Any, error: str) -> None:
    with pytest.raises(Rejected) as found:
        parse_cluster(data, "spec.yaml")
    assert found.value.message.startswith("spec.yaml: ") and error in found.value.message


@pytest.mark.parametrize(("text", "rate"), [("936GB/s", 936e9), ("1 GiB/s", GIB), ("500 MB / sec", 500e6), (5, 5.0)])
def test_rates_are_read(text: Any, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "3GB", "fast", "0MB/s", "-1GB/s", float("nan"), True])
def test_what_is_no_rate_is_refused(text: Any) -> None:
    with pytest.raises(ValueError):
        parse_rate(text)
