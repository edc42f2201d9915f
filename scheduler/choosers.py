"""Sets up the choice for a model's request: what is known of machines, replicas, speeds and wishes at that moment."""

from __future__ import annotations

from scheduler.choice.admission import Admission
from scheduler.choice.appraiser import Appraiser, protection
from scheduler.choice.need import Need
from scheduler.choice.outlook import Outlook
from scheduler.choice.placement import Chooser
from scheduler.choice.price import Prices
from scheduler.choice.queue import Waiting
from scheduler.choice.room import STAYING
from scheduler.choice.shortlist import shortlist
from scheduler.choice.situation import Situation
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.models import Model, Models
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

    def of(self, model: Model, waiting: Waiting, need: Need, now: float) -> Chooser:
        outlook = Outlook(self._fleet.rooms, self._fleet.replicas, self._kept_apart(model))
        allowed = [node for node in self.admission.nodes(model) if need.wishes.allow(node)]
        near = self._near(model, allowed)
        chooser = self._chooser(model, waiting, need, near, outlook, now)
        if len(near) < len(allowed) and not chooser.ever_fits():  # not there, whoever were evicted
            return self._chooser(model, waiting, need, allowed, outlook, now)
        return chooser

    def _chooser(
        self, model: Model, waiting: Waiting, need: Need, nodes: list[Node], outlook: Outlook, now: float
    ) -> Chooser:
        n_ctx = self.admission.least_n_ctx(waiting)
        outgrown = (
            r.replica_id
            for r in self._fleet.replicas.of_model(model.name)
            if r.idle and not r.retiring and r.drain_for in ("", model.name) and r.n_ctx < n_ctx
        )
        return Chooser(
            Situation(
                need=need,
                nodes=self._shortlist(model, need, nodes, outlook),
                every_node=nodes,
                inventory=self._inventory,
                outlook=outlook,
                replicas=self._fleet.replicas,
                appraiser=Appraiser(need, nodes, self.prices, self._models, now),
                policy=self._fleet.policy,
                now=now,
                waited_s=now - waiting.arrived_at,
                outgrown=frozenset(outgrown),
                may_evict=model.history.may_evict,
            )
        )

    def _shortlist(self, model: Model, need: Need, nodes: list[Node], outlook: Outlook) -> list[Node]:
        if self._fleet.policy.max_active_models is not None:
            return nodes

        def cached(node_id: NodeId) -> float:
            return model.copies[node_id].file.cached_fraction or 0.0

        return shortlist(need, nodes, outlook, self.protection, cached)

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
