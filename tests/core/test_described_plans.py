"""Plans for clusters that are only described: the cheapest wins, and a refusal says what would help."""

from __future__ import annotations

from typing import Any

import pytest
from scenario import LARGE, MEDIUM, MOE, SMALL, shape

from scheduler.config import parse_catalogue
from scheduler.errors import Rejected
from scheduler.simulation.described import DescribedCluster, ModelOnDisk
from scheduler.simulation.description import parse_cluster
from scheduler.simulation.planning import DescribedPlan, plan_on
from scheduler.units import GIB

MODELS = {
    "small": SMALL,
    "medium": MEDIUM,
    "large": LARGE,
    "moe": MOE,
    "other": LARGE,
    "third": MEDIUM,
    "fourth": MEDIUM,
}
BIG_CARD, SMALL_CARD = {"name": "RTX 3090"}, {"name": "GTX 1080"}


def cluster(*nodes: dict[str, Any]) -> DescribedCluster:
    described = [{"name": f"box{i}", "ram": "64GiB", **node} for i, node in enumerate(nodes)]
    models = {name: ModelOnDisk(f"/models/{name}.gguf", shape(*dims)) for name, dims in MODELS.items()}
    entries = {name: {"path": model.path} for name, model in models.items()}
    catalogue = parse_catalogue({"defaults": {"n_seq_max": 1}, "models": entries})
    return DescribedCluster(parse_cluster({"nodes": described}), catalogue, models)


def replica(model: str, *gpus: int, **more: Any) -> dict[str, Any]:
    return {"model": model, "file": f"{model}.gguf", "gpus": list(gpus), **more}


def where(plan: DescribedPlan) -> tuple[str, list[str]]:
    assert plan.best is not None, plan.refusal
    return plan.best.placement.tier, [str(device) for device in plan.best.placement.device_ids]


def test_a_model_that_fits_on_one_card_is_put_there() -> None:
    plan = plan_on(cluster({"gpus": [BIG_CARD, SMALL_CARD]}), "medium")
    assert where(plan) == ("one GPU", ["box0/gpu0"])  # much the faster
    assert plan.best is not None and plan.best.evicts == ()
    price = plan.best.price
    assert (price.wait_s, price.release_s, price.regret_s) == (0, 0, 0)
    assert price.total_s == pytest.approx(price.load_s + (price.service_s or 0))
    assert plan.best.tokens_per_s and plan.best.tokens_per_s > 50


def test_of_cards_that_are_nearly_as_fast_the_tightest_fit_is_taken() -> None:
    """So that big cards stay free for big models."""
    cards = [{"total": "24GiB", "bandwidth": "500GB/s"}, {"total": "12GiB", "bandwidth": "480GB/s"}]
    assert where(plan_on(cluster({"gpus": cards}), "medium")) == ("one GPU", ["box0/gpu1"])


@pytest.mark.slow
def test_experts_use_every_card_that_helps() -> None:
    """One card would hold all but the experts; each one more takes some of those."""
    card = {"total": "3GiB", "bandwidth": "500GB/s", "tflops": 20}
    found = [plan_on(cluster({"gpus": [card] * n}), "moe").best for n in (1, 2, 3, 4)]
    one, two = (each.placement for each in found[:2] if each is not None)
    assert one.tier == two.tier == "experts in host RAM" and two.n_spilled_experts < one.n_spilled_experts
    speeds = [each.tokens_per_s or 0 for each in found if each is not None]
    assert speeds == sorted(speeds) and speeds[3] > 1.5 * speeds[0]


def test_experts_that_do_not_all_fit_in_host_ram_need_not() -> None:
    card = {"total": "6GiB", "bandwidth": "500GB/s", "tflops": 20}
    plan = plan_on(cluster({"gpus": [card] * 2, "ram": "8GiB"}), "moe")
    assert where(plan) == ("experts in host RAM", ["box0/gpu0", "box0/gpu1"])


def test_a_free_place_on_more_cards_beats_an_eviction_that_costs_more() -> None:
    card = {"total": "6GiB", "bandwidth": "500GB/s", "tflops": 20}  # half full, each: none has room alone
    there = [replica("third", 0, idle_s=5000), replica("fourth", 1, idle_s=4000)]  # little is regretted
    plan = plan_on(cluster({"gpus": [card] * 2, "replicas": there}), "medium")
    assert where(plan)[0] == "several GPUs" and plan.best is not None and plan.best.evicts == ()
    assert any(other.evicts == ("third",) and other.placement.tier == "one GPU" for other in plan.alternatives)


def test_what_is_said_to_help_does() -> None:
    for model, total, ram in (("large", 8, 3), ("moe", 6, 4), ("medium", 2, 3)):
        asked = {"gpus": [{"total": f"{total}GiB", "free": f"{total - 1}GiB"}], "ram": f"{ram}GiB"}
        refusal = plan_on(cluster(asked), model).refusal
        assert refusal is not None
        more = {
            way.split(" more ")[1].split(" ")[0]: float(way.split(" ")[0])
            for way in refusal.would_fit_if
            if "more" in way
        }
        assert set(more) == {"on", "host"} and all("GiB more" in way for way in refusal.would_fit_if if "more" in way)
        gpu = {"total": int((total + more["on"]) * GIB) + 1, "free": int((total - 1 + more["on"]) * GIB) + 1}
        assert plan_on(cluster({**asked, "gpus": [gpu]}), model).refusal is None, (model, more)
        assert plan_on(cluster({**asked, "ram": int((ram + more["host"]) * GIB) + 1}), model).refusal is None, (
            model,
            more,
        )


def test_a_shorter_context_is_named_for_the_machine_as_it_is() -> None:
    """Not as if others used nothing, and nobody were pinned."""
    asked = {"gpus": [{"total": "8GiB", "free": "4GiB"}], "ram": "2600MiB"}
    refusal = plan_on(cluster(asked), "medium", 32768).refusal
    assert refusal is not None
    (n_ctx,) = (int(way.removeprefix("n_ctx <= ")) for way in refusal.would_fit_if if way.startswith("n_ctx"))
    assert plan_on(cluster(asked), "medium", n_ctx).refusal is None
    assert plan_on(cluster(asked), "medium", n_ctx + 1024).refusal is not None


def test_whoever_has_to_be_unpinned_together_is_named_together() -> None:
    pinned = [replica(model, 0, pinned=True) for model in ("third", "fourth", "small")]
    refusal = plan_on(cluster({"gpus": [{"total": "10GiB"}], "ram": "7GiB", "replicas": pinned}), "large").refusal
    assert refusal is not None and "unpin fourth, small, third" in refusal.would_fit_if


@pytest.mark.parametrize("free_gib", [21, 20.5, 20, 17, 12, 11.3])
def test_free_memory_may_be_said_with_replicas_or_without(free_gib: float) -> None:
    """Where it can only be meant with them, it is not taken to be others' that they do not fit beside."""
    gpu = {"total": "24GiB", "free": f"{free_gib}GiB"}
    plan = plan_on(cluster({"gpus": [gpu], "replicas": [replica("large", 0, idle_s=9)]}), "medium")
    assert plan.best is not None and plan.best.evicts == () and where(plan)[0] == "one GPU"


def test_of_models_that_were_used_at_the_same_time_the_one_that_is_back_sooner_goes() -> None:
    for big, small in (("other", "third"), ("large", "fourth")):
        there = [replica(big, 0, idle_s=60), replica(small, 0, idle_s=60)]
        plan = plan_on(cluster({"gpus": [{"total": "16GiB", "bandwidth": "500GB/s"}], "replicas": there}), "medium")
        assert plan.best is not None and plan.best.evicts == (small,)


def test_a_replica_in_host_ram_is_not_what_is_offered_where_a_card_is_free() -> None:
    plan = plan_on(cluster({"gpus": [BIG_CARD], "replicas": [replica("medium", idle_s=5)]}), "medium")
    assert where(plan) == ("one GPU", ["box0/gpu0"]) and plan.best is not None and plan.best.evicts == ()


def test_every_alternative_costs_at_least_as_much() -> None:
    described = cluster({"gpus": [{"name": "RTX 3060"}], "replicas": [replica("third", 0, idle_s=40)]})
    for model in ("fourth", "large", "moe"):
        plan = plan_on(described, model)
        assert plan.best is not None and plan.alternatives
        assert all(other.price.total_s >= plan.best.price.total_s for other in plan.alternatives), model


def test_an_idle_model_makes_room_where_host_ram_would_be_slower() -> None:
    described = cluster({"gpus": [BIG_CARD], "replicas": [replica("other", 0, idle_s=40)]})
    plan = plan_on(described, "large")
    assert where(plan) == ("one GPU", ["box0/gpu0"])
    assert plan.best is not None and plan.best.evicts == ("other",)
    assert plan.best.price.regret_s > 0 and plan.best.price.release_s > 0
    spilled = [other for other in plan.alternatives if not other.evicts]
    assert spilled and min(other.price.total_s for other in spilled) > plan.best.price.total_s


def test_experts_in_host_ram_give_way_to_layers_on_the_card_when_that_is_faster() -> None:
    """13.6 GiB of which 12.4 are experts: a card of 12 GiB holds most layers, if it is emptied first."""
    described = cluster({"gpus": [{"name": "RTX 3060"}], "replicas": [replica("third", 0, idle_s=40)]})
    plan = plan_on(described, "moe")
    assert where(plan)[0] == "some layers in host RAM"
    assert plan.best is not None and plan.best.evicts == ("third",)
    assert any(other.placement.tier == "experts in host RAM" for other in plan.alternatives)


def test_the_model_that_was_used_longest_ago_is_the_cheapest_victim() -> None:
    cards = [{"total": "4GiB", "bandwidth": "900GB/s"}] * 2
    replicas = [replica("medium", 0, idle_s=10), replica("third", 1, idle_s=300)]
    plan = plan_on(cluster({"gpus": cards, "disk_read": "3GB/s", "replicas": replicas}), "fourth")
    assert plan.best is not None and plan.best.evicts == ("third",)


def test_a_busy_model_is_waited_for_or_passed_by_as_it_pays() -> None:
    busy = cluster({"gpus": [BIG_CARD], "replicas": [replica("other", 0, busy=True)]})
    plan = plan_on(busy, "large")
    assert plan.best is not None
    assert plan.best.evicts == ("other",) and plan.best.price.wait_s > 0


def test_a_busy_replica_is_busy_however_long_ago_it_began() -> None:
    for idle_s in (0, 100, 5000):
        busy = cluster({"gpus": [BIG_CARD], "replicas": [replica("other", 0, busy=True, idle_s=idle_s)]})
        waits = [each.price.wait_s for each in [plan_on(busy, "large").best] if each and each.evicts]
        assert waits and min(waits) > 0, idle_s
        served = plan_on(busy, "other").best
        assert served is not None and served.price.wait_s > 0, "its only slot is taken"


def test_beside_a_busy_replica_another_one_is_an_alternative() -> None:
    cards = {"gpus": [{"total": "8GiB"}, {"total": "8GiB"}]}
    plan = plan_on(cluster({**cards, "replicas": [replica("medium", 0, busy=True)]}), "medium")
    assert plan.best is not None and plan.best.price.wait_s > 0 and plan.best.price.load_s == 0
    (second,) = plan.alternatives
    assert second.placement.device_ids[0].endswith("gpu1") and second.price.load_s > 0 and not second.evicts
    idle = plan_on(cluster({**cards, "replicas": [replica("medium", 0)]}), "medium")
    assert not idle.alternatives


def test_what_is_loaded_serves_at_the_price_of_its_service() -> None:
    plan = plan_on(cluster({"gpus": [BIG_CARD], "replicas": [replica("medium", 0)]}), "medium")
    assert plan.best is not None and plan.best.price.load_s == 0 and plan.best.price.service_s
    assert plan.alternatives == ()


def test_a_faster_disk_and_a_faster_card_are_cheaper() -> None:
    slow, fast = (
        plan_on(cluster({"gpus": [{**BIG_CARD, **card}], "disk_read": disk}), "medium").best
        for card, disk in (({"bandwidth": "300GB/s"}, "500MB/s"), ({"bandwidth": "900GB/s"}, "5GB/s"))
    )
    assert slow is not None and fast is not None
    assert slow.price.load_s > 5 * fast.price.load_s - 2
    assert (slow.price.service_s or 0) > 2 * (fast.price.service_s or 0)


def test_what_others_use_is_left_to_them() -> None:
    assert where(plan_on(cluster({"gpus": [{"name": "RTX 3090", "free": "2GiB"}, SMALL_CARD]}), "medium"))[1] == [
        "box0/gpu1"
    ]


@pytest.mark.parametrize("free", ["17.5GiB", "23GiB"])
def test_free_memory_may_be_told_with_or_without_replicas(free: str) -> None:
    """The replica takes some 3.4 GiB: 17.5 GiB free show it, 23 GiB free do not."""
    described = cluster({"gpus": [{"name": "RTX 3090", "free": free}], "replicas": [replica("medium", 0)]})
    (node,) = described.core.inventory.nodes.values()
    (device,) = node.devices.values()
    booked = sum(described.core.replicas["medium-1"].placement.device_bytes)  # type: ignore[index]
    foreign = 24 * GIB - int(float(free[:-3]) * GIB) - (booked if free == "17.5GiB" else 0)
    assert device.foreign_bytes == pytest.approx(foreign, abs=4 << 20)


def test_cards_of_laptops_are_not_taken_for_those_of_desktops() -> None:
    with pytest.raises(Rejected, match="'RTX 4090 Laptop GPU' is not a known card"):
        cluster({"gpus": [{"name": "RTX 4090 Laptop GPU"}]})


# ---------------------------------------------------------------------- refusals


def test_a_refusal_names_numbers_and_what_would_help() -> None:
    plan = plan_on(cluster({"gpus": [SMALL_CARD], "ram": "6GiB"}), "large")
    assert plan.best is None and plan.refusal is not None
    assert any("GiB" in reason for reason in plan.refusal.reasons)
    ways = plan.refusal.would_fit_if
    more = [way for way in ways if "more" in way]
    assert len(more) == 2 and any("gpu0" in way for way in more) and any("host RAM" in way for way in more)


def together(plan: DescribedPlan) -> list[str]:
    assert plan.refusal is not None
    return [reason for reason in plan.refusal.reasons if "span machines" in reason]


def test_machines_that_would_hold_it_together_are_counted_and_said_to_be_no_place() -> None:
    """Weights and cache of the model take 11.8 GiB, its driver and buffers 0.6 GiB and more on each card."""
    nodes = [{"gpus": [{"total": size}], "ram": "2500MiB"} for size in ("3GiB", "8GiB", "7GiB", "2GiB")]
    [reason] = together(plan_on(cluster(*nodes), "large"))
    assert reason == (
        "several machines (box1, box2): its 11.8 GiB would fit over 2 machines together, "
        "but a model does not span machines yet"
    )
    assert "over 3 machines" in together(plan_on(cluster(*nodes[:2], nodes[0]), "large"))[0]
    assert not together(plan_on(cluster(nodes[1], nodes[3]), "large"))
    assert not together(plan_on(cluster({"gpus": [{"total": "8GiB"}, {"total": "3GiB"}], "ram": "3GiB"}), "large"))


def test_host_ram_of_several_machines_counts_where_a_model_may_spill() -> None:
    nodes = [{"gpus": [{"total": "2GiB"}], "ram": "11GiB"}] * 2
    [reason] = together(plan_on(cluster(*nodes), "large"))
    assert "over 2 machines" in reason


def test_the_missing_memory_that_is_named_is_enough_and_hardly_more() -> None:
    missing = plan_on(cluster({"gpus": [{"total": "8GiB"}], "ram": "6GiB"}), "large").refusal
    assert missing is not None
    gib = next(float(way.split(" GiB")[0]) for way in missing.would_fit_if if "gpu0" in way)
    enough, too_little = (
        plan_on(cluster({"gpus": [{"total": f"{8 + gib + more}GiB"}], "ram": "6GiB"}), "large") for more in (0.1, -0.2)
    )
    assert enough.best is not None and too_little.best is None


def test_pinned_models_that_are_in_the_way_are_named() -> None:
    described = cluster({"gpus": [{"total": "16GiB"}], "ram": "5GiB", "replicas": [replica("other", 0, pinned=True)]})
    plan = plan_on(described, "large")
    assert plan.refusal is not None and "unpin other" in plan.refusal.would_fit_if
    assert described.core.models.find("other").pinned, "it was only tried"


def test_a_context_that_no_card_holds_is_answered_with_one_that_fits() -> None:
    plan = plan_on(cluster({"gpus": [{"total": "14GiB"}], "ram": "3GiB"}), "large", 32768)
    assert plan.refusal is not None
    way = next(way for way in plan.refusal.would_fit_if if way.startswith("n_ctx <= "))
    assert plan_on(cluster({"gpus": [{"total": "14GiB"}], "ram": "3GiB"}), "large", int(way.split()[-1])).best


def test_more_context_than_was_trained_is_refused_with_the_limit() -> None:
    plan = plan_on(cluster({"gpus": [BIG_CARD]}), "small", 99999)
    assert plan.refusal is not None and plan.refusal.would_fit_if == ("n_ctx <= 32768",)


def test_a_replica_that_cannot_lie_where_it_is_said_to_is_an_error() -> None:
    with pytest.raises(Rejected, match="does not fit where it is said to be"):
        cluster({"gpus": [{"total": "1GiB"}], "ram": "4GiB", "replicas": [replica("large", 0)]})
    with pytest.raises(Rejected, match="there is no such model"):
        cluster({"gpus": [BIG_CARD], "replicas": [replica("nobody", 0)]})
    with pytest.raises(Rejected, match="the cluster has no room"):
        cluster({"gpus": [{"total": "16GiB"}], "replicas": [replica("other", 0), replica("large", 0)]})
