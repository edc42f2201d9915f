"""All replicas, from the decision to load one until its memory is back, with their bookings and their cores.

Nobody else changes a replica's state or the ledger. Invariants after every call: the ledger balances; a replica's entry
is promised while it is pending, held while it loads or is ready, releasing while it stops; nothing is stopped under a
lease; the threads of loading and ready replicas never exceed their node's cores.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.charges import Charges
from scheduler.choice.explain import describe_placement
from scheduler.choice.layouts import fits
from scheduler.choice.placement import Choice
from scheduler.cluster.free_memory import NO_LIMIT, SETTLING_S, Rooms
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.leases import Leases
from scheduler.cluster.ledger import ACTIVE, Ledger, device_account, host_account
from scheduler.cluster.models import Files, Model, Models
from scheduler.cluster.replica import Placement, Replica, ReplicaState
from scheduler.cluster.replicas import Replicas
from scheduler.cluster.suspects import Suspects
from scheduler.config import Catalogue
from scheduler.costs.footprint import is_verified
from scheduler.costs.measurements import Measurements
from scheduler.costs.params import most_drafted
from scheduler.errors import InvariantBroken
from scheduler.outbox import Outbox
from scheduler.units import ReplicaId


class Fleet:
    """Commands go to the outbox. `tag` makes ids unique across restarts."""

    def __init__(
        self,
        catalogue: Catalogue,
        inventory: Inventory,
        models: Models,
        measurements: Measurements,
        outbox: Outbox,
        tag: str,
    ) -> None:
        self.replicas = Replicas()
        self.ledger = Ledger()
        self.ledger.open(ACTIVE, catalogue.policy.max_active_models or NO_LIMIT)
        self.rooms = Rooms(inventory, self.ledger, self.replicas, catalogue.policy, catalogue.reserves)
        self.charges = Charges(self.ledger, self.rooms, self.replicas, inventory, models, measurements, outbox)
        self.leases = Leases(catalogue.policy.lease_ttl_s, tag)
        self.suspects = Suspects()
        self._catalogue = catalogue
        self.policy = catalogue.policy
        self._inventory = inventory
        self._models = models
        self._measurements = measurements
        self._out = outbox
        self._tag = tag
        self._serial = 0
        self._retiring: dict[ReplicaId, Replica] = {}

    # ------------------------------------------------------------------ accounts

    def open_accounts(self, node: Node) -> None:
        facts = node.facts
        self.ledger.open(host_account(facts.node_id), facts.memory_total_bytes)
        for device in facts.devices:
            self.ledger.open(device_account(device.device_id), device.total_bytes)

    def lose_node(self, node: Node) -> None:
        """Its replicas are gone with it; there is nothing left to stop."""
        node_id = node.facts.node_id
        for replica in self.replicas.on_node(node_id):
            self.leases.drop(replica)
            self.forget(replica)
        self.rooms.changed(node_id)
        self.ledger.close(host_account(node_id))
        for device_id in node.devices:
            self.ledger.close(device_account(device_id))

    # ------------------------------------------------------------------ pending

    def place(self, model: Model, choice: Choice, now: float) -> Replica:
        """Carry a choice out: stop its victims, promise their room to a new replica, start it if the room is there."""
        placement = choice.placement
        if placement is None:
            raise InvariantBroken(f"{model.name} would be loaded without a place")
        victims = [self.replicas[victim] for victim in sorted(choice.victims)]
        victims.sort(key=lambda victim: victim.last_used_at)
        for victim in victims:
            idle_s = now - victim.last_used_at
            message = f"{victim.model} (idle {idle_s:.0f} s) is evicted for {model.name}"
            self._out.announce("replica_evicted", message, replica=victim)
            self.stop(victim, f"evicted for {model.name}")
        self._serial += 1
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", model.name)
        file = model.copies[placement.node_id].file
        replica = self._new(ReplicaId(f"{slug}-{self._tag}{self._serial}"), model.name, file.path, placement, now)
        replica.cached_fraction = file.cached_fraction or 0.0
        freed = [(victim.model, now - victim.last_used_at) for victim in victims]
        words = describe_placement(placement, model.name, freed, self._inventory)
        self._out.announce("placed", words, replica=replica, tier=placement.tier)
        replica.waits_for = frozenset(
            r.replica_id
            for r in self.replicas.in_state(ReplicaState.STOPPING)
            if self.policy.max_active_models or r.placement.node_id == placement.node_id
        )
        self.ledger.promise(replica.replica_id, self.charges.predicted(replica))
        self.rooms.changed(placement.node_id)
        return replica

    def start_pending(self, waiting_for: Callable[[str], int], now: float) -> None:
        """Start pending replicas whose room is really there; give up those that nobody waits for (`waiting_for` counts
        a model's requests), and those whose room did not come `release_timeout_s` after the last one stopping for it
        was gone."""
        for replica in self.replicas.in_state(ReplicaState.PENDING):
            wanted = replica.kept or replica.preloaded or replica.supersedes in self.replicas
            if not wanted and not waiting_for(replica.model):
                self.forget(replica)
            elif fits(replica.placement, self.rooms.to_start(replica)):
                self._start(replica)
            elif replica.waits_for:
                continue
            elif replica.room_since is None:
                replica.room_since = now
            elif now - replica.room_since >= self.policy.release_timeout_s:
                self._out.announce(
                    "room_lost", f"other programs took the memory freed for {replica.model}", replica=replica
                )
                self.forget(replica)

    # ------------------------------------------------------------------ loading

    def _start(self, replica: Replica) -> None:
        self.ledger.hold(replica.replica_id)
        self._become(replica, ReplicaState.LOADING)
        model = self._models.by_name.get(replica.model)
        params = self._models.params(model) if model else self._catalogue.defaults
        copy = model.copies.get(replica.placement.node_id) if model else None
        entry = model.entry if model else None
        files = copy.files if copy else Files(replica.path)
        self._out.post(
            cmd.StartReplica(
                replica_id=replica.replica_id,
                model=replica.model,
                path=replica.path,
                placement=replica.placement,
                use_mmap=params.use_mmap is not False,
                use_extra_bufts=bool(params.use_extra_bufts),
                preflight=self._asks_first(model, replica),
                chat_template=params.chat_template or "",
                adapters=tuple(
                    (name, path, adapter.scale)
                    for (name, adapter), path in zip(
                        entry.adapters.items() if entry else (), files.adapters, strict=False
                    )
                ),
                mmproj=files.mmproj if replica.placement.mmproj_bytes else "",
                matryoshka_dimensions=(entry.matryoshka_dimensions if entry else None) or (),
                draft=(
                    files.draft if replica.placement.context.spec_type == "draft-simple" else "",
                    most_drafted(
                        replica.placement.context.spec_type,
                        params.spec_draft_n_max,
                        copies_states=replica.placement.context.n_rs_seq > 0,
                    ),
                    params.spec_draft_p_min or 0.0,
                ),
            )
        )

    def _asks_first(self, model: Model | None, replica: Replica) -> bool:
        """Whether llama.cpp is asked before this load: never twice for the same."""
        if self.policy.preflight == "never" or model is None or model.shape is None:
            return False
        if model.shape.adapter_weights:  # llama.cpp counts adapters only when it computes with them
            return False
        placement = replica.placement
        if not placement.device_ids:  # host RAM that was misjudged is no failed load
            return False
        build = self._inventory.nodes[placement.node_id].facts.llama_build
        if self._measurements.load(model.shape, placement.layout, placement.context, build) is not None:
            return False
        shapes = (model.shape, *((model.shape.draft,) if model.shape.draft else ()))
        return self.policy.preflight == "always" or not all(is_verified(shape, build) for shape in shapes)

    def ready(self, replica: Replica, event: ev.ReplicaReady, now: float) -> None:
        """Loaded. Books what the load really took instead of what was predicted."""
        self._become(replica, ReplicaState.READY)
        replica.ready_at = replica.last_used_at = now
        self.replicas.used(replica)
        replica.load_s, replica.pid, replica.n_ctx, replica.progress = event.load_s, event.pid, event.n_ctx, 1.0
        self.charges.settle(replica, event)
        slower = self.replicas.get(replica.supersedes) if replica.supersedes else None
        if slower is not None and slower.state is ReplicaState.READY:
            self.retire(slower, f"{replica.model} moved to {replica.placement.tier}")
        self._out.announce(
            "replica_ready",
            f"{replica.model} is ready after {event.load_s:.1f} s",
            replica=replica,
            buffers=self.charges.predicted_and_true(replica, event.buffers),
        )

    def adopt(self, event: ev.ReplicaAdopted, now: float) -> bool:
        """Take a runner into the books that outlived a restart; False when they have no room for it."""
        replica = self._new(event.replica_id, event.model, event.path, event.placement, now)
        replica.pid = event.ready.pid
        try:
            self.ledger.promise(replica.replica_id, self.charges.adopted(replica, event.ready))
            self.ledger.hold(replica.replica_id)
        except InvariantBroken:
            if self.ledger.state(replica.replica_id) is not None:
                self.ledger.release(replica.replica_id)
            self.replicas.remove(replica)
            self.rooms.changed(replica.placement.node_id)
            return False
        self._become(replica, ReplicaState.LOADING)
        self._out.announce("replica_adopted", f"{event.model} is still loaded", replica=replica)
        self.ready(replica, event.ready, now)
        self.leases.adopt(event.lease_ids, replica, now)
        replica.ready_at = now - SETTLING_S  # long loaded: the readings at hand show all of it
        self.charges.attribute(event.placement, now)
        return True

    # ------------------------------------------------------------------ ending

    def retire(self, replica: Replica, reason: str) -> None:
        """Stop the replica at once, or as soon as its requests have ended."""
        if replica.busy:
            replica.retiring = reason
            self._retiring[replica.replica_id] = replica
        elif replica.state is ReplicaState.READY:
            self.stop(replica, reason)
        else:
            self.abandon(replica, reason)

    @property
    def is_settled(self) -> bool:
        """Nobody waits for room, or is to be stopped when idle."""
        return not self._retiring and not self.replicas.in_state(ReplicaState.PENDING)

    def stop_retired(self) -> None:
        """Stop whoever is to go, and is idle by now."""
        for replica in [r for r in self._retiring.values() if r.idle]:
            self.stop(replica, replica.retiring)

    def abandon(self, replica: Replica, reason: str) -> None:
        """Stop a replica that can or shall serve no longer, leases or not."""
        self.leases.drop(replica)
        if replica.state is ReplicaState.PENDING:
            self.forget(replica)
        elif replica.state is not ReplicaState.STOPPING:
            self.stop(replica, reason, works=False)

    def stop(self, replica: Replica, reason: str, *, works: bool = True) -> None:
        """`works`: as far as is known."""
        if replica.leases:
            raise InvariantBroken(f"{replica.replica_id} would be stopped under {len(replica.leases)} leases")
        saves = works and replica.state is ReplicaState.READY and replica.last_used_at > replica.ready_at
        self._become(replica, ReplicaState.STOPPING)
        self.ledger.releasing(replica.replica_id)
        self._out.post(cmd.StopReplica(replica.replica_id, replica.placement.node_id, reason, saves))

    def gone(self, replica: Replica, now: float) -> None:
        """Its process has ended, and everything was read again since: what is in use now is not its own."""
        self.forget(replica)
        self.charges.attribute(replica.placement, now)

    def forget(self, replica: Replica) -> None:
        """Its memory is back, or was never taken."""
        self.ledger.release(replica.replica_id)
        self.replicas.remove(replica)
        self._retiring.pop(replica.replica_id, None)
        self.suspects.forget(replica.replica_id)
        self.rooms.changed(replica.placement.node_id)
        for other in self.replicas.in_state(ReplicaState.PENDING):
            other.waits_for -= {replica.replica_id}

    # ------------------------------------------------------------------ bookings

    def _new(self, replica_id: ReplicaId, model: str, path: str, placement: Placement, now: float) -> Replica:
        context = placement.context
        replica = Replica(
            replica_id=replica_id,
            model=model,
            path=path,
            placement=placement,
            slots=context.n_seq_max,
            n_ctx=context.n_ctx_slot,
            created_at=now,
            last_used_at=now,
        )
        self.replicas.add(replica)
        self.rooms.changed(placement.node_id)
        return replica

    def _become(self, replica: Replica, state: ReplicaState) -> None:
        self.replicas.become(replica, state)
        self.rooms.changed(replica.placement.node_id)
