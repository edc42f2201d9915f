"""What replicas are booked with: what is predicted for a load, what the load really took, and what is learned of it.

Amounts are bytes per account of the ledger. Every method that changes a booking says so to the rooms.
"""

from __future__ import annotations

import contextlib

from scheduler import events as ev
from scheduler.cluster.free_memory import Rooms
from scheduler.cluster.inventory import Device, Inventory
from scheduler.cluster.ledger import ACTIVE, AccountId, Ledger, device_account, host_account
from scheduler.cluster.models import Model, Models
from scheduler.cluster.replica import Placement, Replica
from scheduler.cluster.replicas import Replicas
from scheduler.costs.measurements import ROUNDING_BYTES, Measurements, load_key
from scheduler.costs.params import Footprint
from scheduler.errors import InvariantBroken
from scheduler.outbox import Outbox
from scheduler.units import format_bytes


class Charges:
    """Belongs to the fleet."""

    def __init__(
        self,
        ledger: Ledger,
        rooms: Rooms,
        replicas: Replicas,
        inventory: Inventory,
        models: Models,
        measurements: Measurements,
        outbox: Outbox,
    ) -> None:
        self._ledger = ledger
        self._rooms = rooms
        self._replicas = replicas
        self._inventory = inventory
        self._models = models
        self._measurements = measurements
        self._out = outbox

    # ------------------------------------------------------------------ predicted, measured

    def predicted(self, replica: Replica) -> dict[AccountId, int]:
        """What is booked for a load before it happens."""
        placement = replica.placement
        amounts = {host_account(placement.node_id): placement.host_bytes, ACTIVE: 1}
        for device_id, need in zip(placement.device_ids, placement.device_bytes, strict=True):
            amounts[device_account(device_id)] = need
        return amounts

    def _measured(self, placement: Placement, event: ev.ReplicaReady) -> dict[AccountId, int]:
        """What the load took, with what llama.cpp does not report."""
        host_bytes = event.buffers.host.total_bytes + placement.host_outside_bytes
        if placement.host_mapped_bytes:  # llama.cpp reports the mapped span, tensors on GPUs in between included
            host_bytes = min(host_bytes, placement.host_bytes)
        amounts = {host_account(placement.node_id): host_bytes}
        for device_id, share, overhead in zip(
            placement.device_ids, event.buffers.devices, placement.overhead_bytes, strict=True
        ):
            amounts[device_account(device_id)] = share.total_bytes + overhead
        return amounts

    def predicted_and_true(self, replica: Replica, measured: Footprint) -> dict[str, tuple[int, int]]:
        """Bytes of llama.cpp's buffers as predicted and as reported, per device."""
        placement = replica.placement
        shares = zip(placement.device_ids, placement.device_bytes, placement.overhead_bytes, strict=True)
        return {
            self._inventory.label(device_id): (need - overhead, truth.total_bytes)
            for (device_id, need, overhead), truth in zip(shares, measured.devices, strict=True)
        }

    def adopted(self, replica: Replica, event: ev.ReplicaReady) -> dict[AccountId, int]:
        """What is booked for a replica that outlived a restart."""
        predicted, measured = self.predicted(replica), self._measured(replica.placement, event)
        kept = {each: _to_book(replica.placement, predicted[each], amount) for each, amount in measured.items()}
        return predicted | kept

    def settle(self, replica: Replica, event: ev.ReplicaReady) -> None:
        """Book what a load really took instead of what was predicted, and learn it."""
        replica.measured = event.buffers
        self._learn(replica)
        for account, amount in self._measured(replica.placement, event).items():
            self._rebook(replica, account, amount)

    def _rebook(self, replica: Replica, account: AccountId, amount: int) -> None:
        predicted = self._ledger.amount(replica.replica_id, account)
        if amount > predicted + ROUNDING_BYTES:
            self._out.announce(
                "footprint_exceeded",
                f"{replica.model} took {format_bytes(amount)} on {account}; {format_bytes(predicted)} were predicted",
                replica=replica,
            )
        # What the books have no room for cannot be booked; live readings show it as foreign, which is as good.
        with contextlib.suppress(InvariantBroken):
            self._ledger.rebook(replica.replica_id, account, _to_book(replica.placement, predicted, amount))
            self._rooms.changed(replica.placement.node_id)

    def attribute(self, placement: Placement, now: float) -> None:
        """Work out anew how much of the node and of these devices others use."""
        self._rooms.attribute_host(self._inventory.nodes[placement.node_id], now)
        for device_id in placement.device_ids:
            device = self._inventory.device(device_id)
            if device is not None:
                self._rooms.attribute_device(device, now)

    # ------------------------------------------------------------------ learned

    def _learn(self, replica: Replica, times: int = 1) -> None:
        """Remember what the load took, for the next time and after a restart."""
        model, placement = self._models.by_name.get(replica.model), replica.placement
        if model is None or model.shape is None or replica.measured is None:
            return
        build = self._inventory.nodes[placement.node_id].facts.llama_build
        what = model.shape, placement.layout, placement.context, build
        replica.load_key = load_key(*what)
        self._out.remember(self._measurements.loaded(*what, replica.measured, times=times))

    def learn_prediction(self, replica: Replica, buffers: Footprint) -> None:
        """Remember what llama.cpp would have allocated, so that the next plan is made with it."""
        replica.measured = buffers
        self._learn(replica, times=0)

    def remember_extra(self, model: Model) -> None:
        """Keep what the model is given on top of its prediction, also when that is nothing any more."""
        if model.shape is not None:
            self._out.remember(self._measurements.missed(model.shape, model.history.extra_bytes))

    def learn_overhead(self, device: Device) -> None:
        """From a new reading: what replicas that have served hold on a CUDA device besides llama.cpp's buffers."""
        reading, facts = device.reading, device.facts
        if reading is None or reading.processes is None or facts.kind != "cuda":
            return
        build = self._inventory.nodes[facts.node_id].facts.llama_build
        here = self._replicas.on_node(facts.node_id)
        for replica in [r for r in here if facts.device_id in r.placement.device_ids]:
            seen, served = reading.processes.get(replica.pid, 0), replica.last_used_at > replica.ready_at
            if seen and served and replica.measured is not None and replica.load_key is not None:
                index = replica.placement.device_ids.index(facts.device_id)
                beside = replica.placement.mmproj_bytes if replica.placement.mmproj_on_device and not index else 0
                outside = max(0, seen - replica.measured.devices[index].total_bytes - beside)
                self._out.remember(self._measurements.held(replica.load_key, index, outside))
                if not beside:  # how much of it is the projector's is known as a bound only
                    self._out.remember(self._measurements.lost(facts.product, build, outside))


def _to_book(placement: Placement, predicted: int, measured: int) -> int:
    """What is kept for a loaded replica: what was measured, to the report's rounding, unless less was predicted; all
    that was predicted where buffers have yet to grow."""
    most = measured + ROUNDING_BYTES
    if measured <= predicted + ROUNDING_BYTES:
        return predicted if placement.grows else min(predicted, most)
    return most
