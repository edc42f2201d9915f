"""Sets up the choice for a model's request: what is known of machines, replicas, speeds and wishes at that moment."""

from __future__ import annotations

from scheduler.choice.admission import Admission
from scheduler.choice.appraiser import Appraiser, protection
from scheduler.choice.placement import Chooser
from scheduler.choice.price import Prices
from scheduler.choice.shortlist import shortlist
from scheduler.choice.situation import Situation
from scheduler.choice.snapshot import Snapshot
from scheduler.choice.workload import Workload
from scheduler.cluster.free_memory import STAYING
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.models import Model, Models
from scheduler.cluster.queue import Waiting
from scheduler.cluster.replica import Replica
from scheduler.fleet import Fleet
from scheduler.units import NodeId, ReplicaId


class Choosers:
    """Reads everything, changes nothing."""

    def __init__(
        self, fleet: Fleet, admission: Admission, inventory: Inventory, models: Models, prices: Prices
    ) -> None:
        self.admission = admission
        self.prices = prices
        self._fleet = fleet
        self._inventory = inventory
        self._models = models

    def of(self, model: Model, waiting: Waiting, workload: Workload, now: float) -> Chooser:
        snapshot = Snapshot(self._fleet.rooms, self._fleet.replicas, self._kept_apart(model))
        allowed = [node for node in self.admission.nodes(model) if workload.wishes.allow(node)]
        near = self._near(model, allowed)
        chooser = self._chooser(model, waiting, workload, near, snapshot, now)
        if len(near) < len(allowed) and not chooser.ever_fits():  # not there, whoever were evicted
            return self._chooser(model, waiting, workload, allowed, snapshot, now)
        return chooser

    def _chooser(
        self, model: Model, waiting: Waiting, workload: Workload, nodes: list[Node], snapshot: Snapshot, now: float
    ) -> Chooser:
        n_ctx = self.admission.least_n_ctx(waiting)
        outgrown = (
            r.replica_id
            for r in self._fleet.replicas.of_model(model.name)
            if r.idle and not r.retiring and r.drain_for in ("", model.name) and r.n_ctx < n_ctx
        )
        return Chooser(
            Situation(
                workload=workload,
                nodes=self._shortlist(model, workload, nodes, snapshot),
                every_node=nodes,
                inventory=self._inventory,
                snapshot=snapshot,
                replicas=self._fleet.replicas,
                appraiser=Appraiser(workload, nodes, self.prices, self._models, now),
                policy=self._fleet.policy,
                now=now,
                waited_s=now - waiting.arrived_at,
                outgrown=frozenset(outgrown),
                may_evict=model.history.may_evict,
            )
        )

    def _shortlist(self, model: Model, workload: Workload, nodes: list[Node], snapshot: Snapshot) -> list[Node]:
        if self._fleet.policy.max_active_models is not None:
            return nodes

        def cached(node_id: NodeId) -> float:
            return model.copies[node_id].file.cached_fraction or 0.0

        return shortlist(workload, nodes, snapshot, self.protection, cached)

    def protection(self, replica: Replica) -> str:
        """Why it is never evicted, or ""."""
        return protection(replica, self._models, self.prices)

    def _near(self, model: Model, nodes: list[Node]) -> list[Node]:
        """Those of `nodes` on which the models are that this one shall be near to, as far as they are loaded."""
        for name in self._models.params(model).near or ():
            there = {r.placement.node_id for r in self._fleet.replicas.of_model(name) if r.state in STAYING}
            nodes = [node for node in nodes if node.facts.node_id in there] or nodes  # the file may not be there
        return nodes

    def _kept_apart(self, model: Model) -> frozenset[ReplicaId]:
        """Replicas that share no GPU with the model, by its own wish or by theirs."""
        apart = set(self._models.params(model).not_with or ()) | self._models.kept_away_by(model.name)
        return frozenset(r.replica_id for name in apart for r in self._fleet.replicas.of_model(name))
