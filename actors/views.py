"""The core's state in the management API's words. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from actors import records
from scheduler.choice.offer import Offer
from scheduler.choice.placement import Choice
from scheduler.cluster.inventory import Device, Node
from scheduler.cluster.ledger import device_account, host_account
from scheduler.cluster.models import Copy, Model
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.core import SchedulerCore
from scheduler.costs.companions import draft_footprint
from scheduler.costs.paces import Estimate
from scheduler.costs.shape import ModelShape
from scheduler.dispatch import Preview
from scheduler.errors import Rejected
from scheduler.units import DeviceId, ReplicaId

HOST = "host"


def status(
    core: SchedulerCore,
    version: str,
    now: float,
    started_at: float,
    last_notice_seq: int,
    pid_of: Callable[[ReplicaId], int | None],
) -> records.Status:
    """Everything at one moment; `now` and `started_at` on the core's clock."""
    limit = core.policy.max_active_models
    nodes = core.inventory.nodes.values()
    return records.Status(
        version=version,
        uptime_s=now - started_at,
        mode=f"at most {limit} active" if limit and limit > 1 else "single active model" if limit else "shared",
        nodes=[_node(core, node) for node in nodes],
        gpus=[_gpu(core, node, device) for node in nodes for device in node.devices.values()],
        replicas=[_replica(core, replica, now, pid_of) for replica in core.replicas.values()],
        queue=[
            records.QueueEntry(
                request_id=waiting.request_id,
                model=waiting.model,
                waited_s=now - waiting.arrived_at,
                reason=waiting.reason or "earlier requests for this model come first",
            )
            for waiting in sorted(core.queue, key=lambda waiting: waiting.arrived_at)
        ],
        last_notice_seq=last_notice_seq,
    )


def health(core: SchedulerCore, version: str, uptime_s: float) -> records.Health:
    """ "failing" without any machine; "degraded" while a GPU is lost or a machine silent. Names no models."""
    reasons = []
    if not core.inventory.nodes:
        return records.Health(
            status="failing", version=version, uptime_s=uptime_s, reasons=["no machine has joined yet"]
        )
    for node in core.inventory.nodes.values():
        if node.reading is None:
            reasons.append("a machine has not reported yet")
        reasons += [
            "a GPU is lost" for device in node.devices.values() if device.reading and device.reading.lost_reason
        ]
    return records.Health(status="degraded" if reasons else "ok", version=version, uptime_s=uptime_s, reasons=reasons)


def models(core: SchedulerCore) -> list[records.ModelInfo]:
    return [_model(core, model) for _, model in sorted(core.models.by_name.items())]


def load_result(core: SchedulerCore, replica_id: ReplicaId, began: float) -> records.LoadResult:
    """What a load came to; 0 seconds when the replica had been ready before `began`."""
    replica = core.replicas[replica_id]
    return records.LoadResult(
        model=replica.model,
        replica_id=replica_id,
        node=_hostname(core, replica.placement),
        n_ctx=replica.n_ctx,
        load_s=replica.load_s if replica.ready_at >= began else 0.0,
        layout=_layout(core, replica.placement),
    )


def plan(core: SchedulerCore, model: str, found: Preview, now: float) -> records.Plan:
    """The plan in numbers per device, with free bytes before and after."""
    if found.serving is not None:
        replica = found.serving
        return records.Plan(
            model=model,
            verdict="ready",
            tier=replica.placement.tier,
            node=_hostname(core, replica.placement),
            n_ctx=replica.n_ctx,
            n_threads=_threads(core, replica.placement),
            projector=_projector(core, model, replica.placement),
            speed=_speed(core, model, replica.placement),
            reasons=[
                f"{replica.replica_id} is {replica.state.value}, "
                f"{replica.slots - len(replica.leases)} of {replica.slots} slots free",
                *filter(None, (found.reason,)),
            ],
            options=_options(core, model, found.options, now),
        )
    assert found.choice is not None
    return _choice_plan(core, model, found, found.choice, now)


def _speed(core: SchedulerCore, name: str, placement: Placement) -> records.PlanSpeed | None:
    model = core.models.by_name.get(name)
    copy = model.copies.get(placement.node_id) if model else None
    if model is None or model.shape is None or copy is None:
        return None
    found = core.speeds.predict(model.shape, placement, copy.file.cached_fraction)
    return records.PlanSpeed(answer=_rate(found.answer), prompt=_rate(found.prompt), load=_duration(found.load))


def _rate(estimate: Estimate | None) -> records.PlanPace | None:
    if estimate is None or estimate.seconds <= 0:
        return None
    return records.PlanPace(per_s=1 / estimate.seconds, error=estimate.error, samples=estimate.samples)


def _duration(estimate: Estimate) -> records.PlanPace:
    return records.PlanPace(seconds=estimate.seconds, error=estimate.error, samples=estimate.samples)


def _cost(core: SchedulerCore, name: str, offer: Offer, now: float) -> records.PlanCost | None:
    model = core.models.by_name.get(name)
    if model is None or model.shape is None:
        return None
    price = core.prices.of(model.shape, name, offer.placement, offer.victims, now)
    return records.PlanCost(
        wait=price.wait_s,
        release=price.release_s,
        load=price.load_s,
        service=price.service_s,
        regret=price.regret_s,
        total=price.total_s,
    )


def _options(core: SchedulerCore, name: str, offers: Sequence[Offer], now: float) -> list[records.PlanOption]:
    model, options = core.models.by_name.get(name), []
    for offer in offers:
        placement, cost = offer.placement, _cost(core, name, offer, now)
        if cost is not None and model is not None and model.shape is not None:
            options.append(
                records.PlanOption(
                    tier=placement.tier,
                    node=_hostname(core, placement),
                    shares=_layout(core, placement),
                    evicts=[core.replicas[victim].model for victim in sorted(offer.victims)],
                    cost_s=cost,
                    tokens_per_s=core.prices.tokens_per_s(model.shape, name, placement),
                )
            )
    return options


def _choice_plan(core: SchedulerCore, model: str, found: Preview, choice: Choice, now: float) -> records.Plan:
    placement = choice.placement
    shares = []
    if placement is not None:
        before = core.rooms.now(placement.node_id)
        after = core.rooms.without(placement.node_id, choice.victims)
        for share in _layout(core, placement):
            device_id = next((d for d in placement.device_ids if _label(core, d) == share.device), None)
            free = before.host_bytes if device_id is None else before.devices[device_id]
            later = after.host_bytes if device_id is None else after.devices[device_id]
            shares.append(
                records.PlanShare(
                    device=share.device,
                    layers=share.layers,
                    bytes=share.bytes,
                    free_before_bytes=max(0, free),
                    free_after_bytes=max(0, later - share.bytes),
                )
            )
    victims = [core.replicas[victim] for victim in sorted(choice.victims)]
    return records.Plan(
        model=model,
        # Memory that is on its way back needs no decision; nothing to wait for is in the way for good.
        verdict="blocked" if choice.verdict == "wait" and placement is None and not found.reason else choice.verdict,
        tier=placement.tier if placement else None,
        node=_hostname(core, placement) if placement else None,
        shares=shares,
        draft=_draft(core, model, placement) if placement else None,
        projector=_projector(core, model, placement) if placement else None,
        victims=[
            records.PlanVictim(
                replica_id=victim.replica_id,
                model=victim.model,
                idle_s=now - victim.last_used_at,
                frees=_reserved(core, victim),
            )
            for victim in victims
        ],
        n_ctx=placement.context.n_ctx_slot if placement else None,
        n_threads=_threads(core, placement) if placement else None,
        speed=_speed(core, model, placement) if placement else None,
        reasons=[*filter(None, (found.reason,)), *map(str, choice.rejections)],
        would_fit_if=list(choice.would_fit_if),
        cost_s=_cost(core, model, choice.offer, now) if choice.offer else None,
        options=_options(core, model, found.options, now),
        rejected=[records.RejectedCandidate(tier=r.tier, reason=f"{r.where}: {r.reason}") for r in choice.rejections],
    )


def _draft(core: SchedulerCore, name: str, placement: Placement) -> records.PlanDraft | None:
    """What guesses for a replica there."""
    copy = core.models.by_name[name].copies.get(placement.node_id)
    if copy is None or copy.shape is None:
        return None
    build = core.inventory.nodes[placement.node_id].facts.llama_build
    taken = draft_footprint(copy.shape, placement.layout, placement.context, build)
    if taken is None:
        return None
    labels = [_label(core, device_id) for device_id in placement.device_ids]
    found = dict(zip(labels, (device.total_bytes for device in taken.devices), strict=True))
    return records.PlanDraft(path=copy.companions.draft_path, bytes=found | {HOST: taken.host.total_bytes})


def _projector(core: SchedulerCore, name: str, placement: Placement) -> records.ProjectorShare | None:
    """Where the model's projector is, or would be. No path: the file has left since."""
    if not placement.mmproj_bytes:
        return None
    model = core.models.by_name.get(name)
    copy = model.copies.get(placement.node_id) if model else None
    return records.ProjectorShare(
        path=copy.companions.mmproj_path if copy else "",
        device=_label(core, placement.device_ids[0]) if placement.mmproj_on_device else HOST,
        bytes=placement.mmproj_bytes,
    )


def _threads(core: SchedulerCore, placement: Placement) -> int:
    """With how many threads a replica there computes on the CPU, while no other does."""
    return core.inventory.nodes[placement.node_id].facts.physical_cores if placement.computes_on_cpu else 1


def _node(core: SchedulerCore, node: Node) -> records.NodeStatus:
    facts = node.facts
    return records.NodeStatus(
        node_id=facts.node_id,
        hostname=facts.hostname,
        address=facts.address,
        memory_total_bytes=facts.memory_total_bytes,
        memory_available_bytes=node.reading.memory_available_bytes if node.reading else 0,
        memory_reserved_bytes=core.ledger.booked(host_account(facts.node_id), "held", "releasing"),
        physical_cores=facts.physical_cores,
        state="ready" if node.known else "joining",
    )


def _gpu(core: SchedulerCore, node: Node, device: Device) -> records.GpuStatus:
    facts, reading = device.facts, device.reading
    return records.GpuStatus(
        device_id=facts.device_id,
        node_id=facts.node_id,
        label=_label(core, facts.device_id),
        product=facts.product,
        kind=facts.kind,
        total_bytes=facts.total_bytes,
        free_bytes=reading.free_bytes if reading else 0,
        used_bytes=reading.used_bytes if reading else 0,
        booked_bytes=core.ledger.booked(device_account(facts.device_id), "held", "releasing"),
        foreign_bytes=device.foreign_bytes,
        utilisation=reading.utilisation if reading else None,
        temperature_c=reading.temperature_c if reading else None,
        state="unread" if reading is None else "lost" if reading.lost_reason else "ok",
        reason=reading.lost_reason if reading else "",
    )


def _replica(
    core: SchedulerCore, replica: Replica, now: float, pid_of: Callable[[ReplicaId], int | None]
) -> records.ReplicaStatus:
    model = core.models.by_name.get(replica.model)
    pinned = bool(model and model.pinned)
    keep_alive_s = core.models.keep_alive_s(model) if model else None
    ready = replica.state is ReplicaState.READY
    idle_s = now - replica.last_used_at if ready and not replica.busy else None
    measured = {}
    if replica.measured is not None:
        shares = zip(replica.placement.device_ids, replica.measured.devices, strict=True)
        measured = {_label(core, device_id): share.total_bytes for device_id, share in shares}
        measured[HOST] = replica.measured.host.total_bytes
    return records.ReplicaStatus(
        replica_id=replica.replica_id,
        model=replica.model,
        state="draining" if ready and not replica.open else replica.state.value,
        node=_hostname(core, replica.placement),
        layout=_layout(core, replica.placement),
        projector=_projector(core, replica.model, replica.placement),
        n_gpu_layers=replica.placement.layout.n_gpu_layers,
        experts_on_host=replica.placement.layout.spills_experts,
        n_ctx=replica.n_ctx,
        slots=replica.slots,
        active=len(replica.leases),
        n_threads=_threads(core, replica.placement),
        reserved_bytes=_reserved(core, replica),
        measured_bytes=measured,
        pinned=pinned,
        idle_s=idle_s,
        expires_in_s=max(0.0, keep_alive_s - idle_s)
        if keep_alive_s is not None and idle_s is not None and not pinned
        else None,
        loading=replica.progress if replica.state is ReplicaState.LOADING else None,
        pid=pid_of(replica.replica_id),
    )


def _model(core: SchedulerCore, model: Model) -> records.ModelInfo:
    shape = model.shape
    n_ctx = None
    reason = model.invalid
    if shape is not None:
        try:
            context = core.models.context(model, shape, None)
            n_ctx = context.n_ctx_slot
        except Rejected as error:
            reason = error.message
    first = next(iter(model.copies.values()), None)
    return records.ModelInfo(
        name=model.name,
        state="invalid" if model.invalid else "available" if shape else "unknown",
        path=first.file.path if first else (model.entry.path if model.entry else ""),
        nodes=sorted(core.inventory.nodes[n].facts.hostname for n in model.copies if n in core.inventory.nodes),
        architecture=shape.architecture if shape else None,
        quantization=shape.quantization if shape else None,
        size_bytes=first.file.size_bytes if first else None,
        n_ctx_train=shape.n_ctx_train if shape else None,
        n_ctx=n_ctx,
        modified_at_s=first.file.modified_at_s if first else None,
        pinned=model.pinned,
        replicas=[r.replica_id for r in core.replicas.values() if r.model == model.name],
        reason=reason or ("" if first else "no node has the file"),
        adapters=_adapters(model, first),
        mmproj=first.companions.mmproj_path if first else "",
        draft=first.companions.draft_path if first else "",
        takes=_takes(shape),
        embeds_only=shape is not None and shape.is_embedding_only,
    )


def _takes(shape: ModelShape | None) -> list[Literal["images", "sounds"]]:
    """What its projector has encoders for."""
    encoders = shape.projector.encoders if shape is not None and shape.projector is not None else ()
    names: dict[bool, Literal["images", "sounds"]] = {False: "images", True: "sounds"}
    there = {encoder.is_audio for encoder in encoders}
    return [name for is_audio, name in names.items() if is_audio in there]


def _adapters(model: Model, copy: Copy | None) -> list[records.AdapterInfo]:
    named = model.entry.adapters.items() if model.entry else ()
    paths = copy.companions.adapter_paths if copy else ()
    return [
        records.AdapterInfo(name=name, scale=entry.scale, path=paths[number] if number < len(paths) else "")
        for number, (name, entry) in enumerate(named)
    ]


def _layout(core: SchedulerCore, placement: Placement) -> list[records.LayoutShare]:
    shares = [
        records.LayoutShare(device=_label(core, device_id), layers=layers, bytes=count)
        for device_id, layers, count in zip(placement.device_ids, placement.layers, placement.device_bytes, strict=True)
    ]
    on_host = placement.n_layers - placement.layout.n_gpu_layers
    return [*shares, records.LayoutShare(device=HOST, layers=on_host, bytes=placement.host_bytes)]


def _reserved(core: SchedulerCore, replica: Replica) -> dict[str, int]:
    placement = replica.placement
    reserved = {
        _label(core, device_id): core.ledger.amount(replica.replica_id, device_account(device_id))
        for device_id in placement.device_ids
    }
    reserved[HOST] = core.ledger.amount(replica.replica_id, host_account(placement.node_id))
    return reserved


def _label(core: SchedulerCore, device_id: DeviceId) -> str:
    """The name that the catalogue's reserves use too: "gpu0", or "box1/gpu0" when there are several nodes."""
    device = core.inventory.device(device_id)
    if device is None:
        return str(device_id)
    facts = device.facts
    several = len(core.inventory.nodes) > 1
    return f"{core.inventory.nodes[facts.node_id].facts.hostname}/{facts.label}" if several else facts.label


def _hostname(core: SchedulerCore, placement: Placement) -> str:
    node = core.inventory.nodes.get(placement.node_id)
    return node.facts.hostname if node else str(placement.node_id)
