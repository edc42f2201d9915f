"""The scheduler itself: events in, commands out, and nothing else changes its state.

`handle` is synchronous and does no I/O; the actor around it stamps the time, carries the commands out and posts what
came of them. Slow work is two events (started, then ready or failed). Invariants after every event: the ledger
balances, no replica with a lease is stopping, every request that arrived has been granted, refused or is in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scheduler import commands as cmd
from scheduler import events as ev
from scheduler.choice.admission import Admission
from scheduler.choice.price import Prices
from scheduler.choice.speeds import Speeds
from scheduler.choice.workload import Workload
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.leases import Ending
from scheduler.cluster.models import Files, Model, Models
from scheduler.cluster.queue import RequestQueue, Waiting
from scheduler.cluster.replica import Replica, ReplicaState
from scheduler.config import Catalogue
from scheduler.costs.measurements import Measurements, Record
from scheduler.costs.paces import Pace, Paces
from scheduler.dispatch import Dispatch, Preview
from scheduler.errors import Rejected, Unavailable
from scheduler.failures import Failures
from scheduler.fleet import Fleet
from scheduler.outbox import Outbox
from scheduler.units import LeaseId, RequestId, format_bytes


class SchedulerCore:
    """All of the scheduler's state. `tag` makes replica ids unique across restarts; `records` outlived the last."""

    def __init__(self, catalogue: Catalogue, tag: str = "", records: Sequence[Record] = ()) -> None:
        self.catalogue = catalogue
        self.policy = catalogue.policy
        self.inventory = Inventory()
        self.models = Models(catalogue)
        self.measurements = Measurements(records)
        self.queue = RequestQueue(self.policy)
        self._out = Outbox()
        self.fleet = Fleet(catalogue, self.inventory, self.models, self.measurements, self._out, tag)
        self.replicas = self.fleet.replicas
        self.ledger = self.fleet.ledger
        self.rooms = self.fleet.rooms
        self.speeds = Speeds(self.inventory, Paces(records))
        self.prices = Prices(self.speeds, self.models, self.replicas, self.policy)
        self._admission = Admission(catalogue, self.inventory, self.models, self.measurements)
        self._dispatch = Dispatch(
            self.queue, self.fleet, self._admission, self.inventory, self.models, self._out, self.prices
        )
        self._failures = Failures(self.fleet, self.models, self._dispatch, self._out)
        every = (catalogue.defaults, *catalogue.models.values())
        self._some_expire = any(params.keep_alive_s is not None for params in every)
        self._now = 0.0

    # ------------------------------------------------------------------ in and out

    def handle(self, event: ev.Event, now: float) -> list[cmd.Command]:
        """Take one event at time `now` (seconds, never going back); return the commands to carry out, in order.

        Raises UnknownModel, and changes nothing, for an unload or a pin of a model that does not exist.
        """
        self._now = now
        match event:
            case ev.NodeJoined():
                self._node_joined(event)
            case ev.NodeSampled():
                self._node_sampled(event)
            case ev.NodeLost():
                self._node_lost(event)
            case ev.DeviceSampled():
                self._device_sampled(event)
            case ev.ShapeRead():
                self._shape_read(event)
            case ev.RequestArrived():
                self._request_arrived(event)
            case ev.RequestCancelled():
                self._request_cancelled(event)
            case ev.LeaseReleased():
                self._lease_released(event)
            case ev.LeasesRenewed():
                self.fleet.leases.renew(event.lease_ids, now)
            case ev.ClientsLost():
                self._clients_lost()
            case ev.ReplicaStarted():
                self._replica_started(event)
            case ev.ReplicaProgressed():
                if event.replica_id in self.replicas:
                    self.replicas[event.replica_id].progress = event.fraction
            case ev.ReplicaReady():
                self._replica_ready(event)
            case ev.ReplicaFailed():
                self._failures.failed(event, self._now)
            case ev.ReplicaDied():
                self._failures.died(event, self._now)
            case ev.ReplicaVouched():
                if event.replica_id in self.replicas:
                    self.replicas[event.replica_id].doubted = False
                    self.fleet.suspects.forget(event.replica_id)
                    self._dispatch.look_at(self.replicas[event.replica_id].model)
            case ev.ReplicaGone():
                self._replica_gone(event)
            case ev.ReplicaAdopted():
                self._replica_adopted(event)
            case ev.ReadAheadEnded():
                self._dispatch.read_ahead_ended(event.node_id)
            case ev.UnloadAsked():
                self._unload(event)
            case ev.PinAsked():
                self._pin(event)
            case ev.KeepAliveAsked():
                self._keep_alive(event)
            case ev.Ticked():
                self._tick()
        self._dispatch.serve(now)
        return self._out.take()

    def plan(self, model_name: str, n_ctx: int | None, now: float) -> Preview:
        """What would be done for a request now, without doing it.

        Raises UnknownModel, InvalidGGUF, Rejected or Unavailable as the request itself would be refused.
        """
        model, waiting = self.models.find(model_name), _load(model_name, n_ctx, now)
        waiting.deadline_at, waiting.priority = now + self.policy.deadline_s, self._priority(model, None)
        return self._dispatch.plan(model, waiting, now)

    def workload(self, model_name: str, n_ctx: int | None, now: float) -> Workload | None:
        """What such a request needs; None while headers or machines have not been read. Raises as `plan`."""
        return self._admission.workload(self.models.find(model_name), _load(model_name, n_ctx, now), now)

    def busy(self, model_name: str, n_ctx: int | None, now: float) -> Replica | None:
        """A replica that is loaded and holds so many tokens, when all such are busy: to load has no need to wait."""
        return self._dispatch.busy(_load(model_name, n_ctx, now))

    # ------------------------------------------------------------------ machines and files

    def _node_joined(self, event: ev.NodeJoined) -> None:
        facts = event.facts
        if facts.node_id in self.inventory.nodes:
            return
        labels = {**facts.labels, **self.catalogue.labels.get(facts.hostname, {})}
        facts = replace(facts, labels=labels)
        self.inventory.join(facts, self._now)
        self.fleet.open_accounts(self.inventory.nodes[facts.node_id])
        self._dispatch.look_again()
        gpus = ", ".join(f"{d.label} {d.product} {format_bytes(d.total_bytes)}" for d in facts.devices) or "no GPU"
        ram = format_bytes(facts.memory_total_bytes)
        self._out.announce("node_joined", f"{facts.hostname} joined: {gpus}; {ram} RAM, {facts.physical_cores} cores")

    def _node_sampled(self, event: ev.NodeSampled) -> None:
        node_id = event.reading.node_id
        before = self.inventory.nodes.get(node_id)
        was_silent = before is not None and before.silent
        node = self.inventory.sample_node(event.reading, self._now)
        if node is None:
            return
        self.rooms.attribute_host(node, self._now)
        if was_silent:
            self._dispatch.look_again()
        changes = self.models.update(node_id, event.reading.files)
        for files in changes.unread:
            self._out.post(cmd.ReadShape(node_id, *files))
        for name in changes.incomplete:
            why = self.models.by_name[name].copies[node_id].invalid
            self._out.announce("model_invalid", f"{name}: {why}", name)
        for replica in self.replicas.on_node(node_id) if changes.changed else ():
            if replica.model in changes.changed:
                message = f"{replica.model}'s file has changed; the loaded replica stops when its requests have ended"
                self._out.announce("model_changed", message, replica=replica)
                self.fleet.retire(replica, "its file has changed")
        if changes.unread:
            self._dispatch.look_again()

    def _node_lost(self, event: ev.NodeLost) -> None:
        node = self.inventory.leave(event.node_id)
        if node is not None:
            self.models.update(event.node_id, ())
            self.fleet.lose_node(node)
            self._dispatch.read_ahead_ended(event.node_id)
            self._dispatch.look_again()
            self._out.announce("node_lost", f"{node.facts.hostname} is lost: {event.reason}")

    def _device_sampled(self, event: ev.DeviceSampled) -> None:
        before = self.inventory.device(event.reading.device_id)
        trouble, foreign_bytes = (before.trouble, before.foreign_bytes) if before else ("", 0)
        device = self.inventory.sample_device(event.reading, self._now)
        if device is None:
            return
        self.rooms.attribute_device(device, self._now)
        self.fleet.charges.learn_overhead(device)
        if (device.trouble, device.foreign_bytes) != (trouble, foreign_bytes):
            self._dispatch.look_again()
        label = self.inventory.label(device.facts.device_id)
        reason = event.reading.lost_reason
        if reason and device.trouble != trouble:
            self._out.announce("gpu_lost", f"{label} cannot be used: {reason}")
            for replica in self.replicas.on_node(device.facts.node_id):
                if device.facts.device_id in replica.placement.device_ids:
                    self.fleet.abandon(replica, f"{label} was lost: {reason}")

    def _shape_read(self, event: ev.ShapeRead) -> None:
        self._dispatch.look_again()
        files = Files(event.path, event.adapters, event.mmproj, event.draft)
        for model in self.models.shaped(event.node_id, files, event.shape, event.invalid, event.trouble):
            if why := model.copies[event.node_id].invalid:
                self._out.announce("model_invalid", f"{model.name}: {why}", model.name)
            elif model.shape is not None and not model.history.pauses:
                model.history.extra_bytes = self.measurements.extra_bytes(model.shape)

    # ------------------------------------------------------------------ requests and leases

    def _request_arrived(self, event: ev.RequestArrived) -> None:
        deadline_s = self.policy.deadline_s if event.deadline_s is None else event.deadline_s
        waiting = Waiting(event.request_id, event.model, event.kind, event.n_ctx, self._now, self._now + deadline_s)
        try:
            model = self.models.find(event.model)
            waiting.priority = self._priority(model, event.priority)
            waiting.key, waiting.prefix, waiting.fingerprint = event.key, event.prefix, event.fingerprint
            self._admission.check(model, waiting)
            if verdict := self.fleet.suspects.verdict(event.model, event.fingerprint, self._now):
                raise verdict
            displaced = self.queue.add(waiting)
            if displaced is not None:
                self._out.post(cmd.RefuseRequest(displaced.request_id, self.queue.full()))
            self._dispatch.arrived(waiting)
        except (Rejected, Unavailable) as error:
            self._out.post(cmd.RefuseRequest(event.request_id, error))

    def _priority(self, model: Model, asked: int | None) -> int:
        """The model's, or what the request asks for as far as it may."""
        own = self.models.priority(model)
        return own if asked is None else min(asked, max(own, self.policy.request_priority_max))

    def _request_cancelled(self, event: ev.RequestCancelled) -> None:
        if self.queue.remove(event.request_id) is None:
            for lease in self.fleet.leases.of_request(event.request_id):
                self._release_lease(lease.lease_id, "left")

    def _lease_released(self, event: ev.LeaseReleased) -> None:
        """Whoever holds a lease sees a replica fail before anybody else: its next request must not go there too."""
        replica = self._release_lease(event.lease_id, event.ending)
        if replica is not None and event.pace is not None:
            self._learn_speed(replica, event.pace)
        if replica is not None and event.ending == "failed" and not replica.doubted:
            replica.doubted = True
            self._out.post(cmd.CheckReplica(replica.replica_id))

    def _learn_speed(self, replica: Replica, pace: Pace) -> None:
        model = self.models.by_name.get(replica.model)
        if model is not None and model.shape is not None and replica.placement.node_id in self.inventory.nodes:
            for record in self.speeds.answered(model.shape, replica, pace):
                self._out.remember(record)

    def _release_lease(self, lease_id: LeaseId, ending: Ending) -> Replica | None:
        released = self._dispatch.release(lease_id, ending, self._now)
        if released is None:
            return None
        replica, lease = released
        if ending == "served" and lease.answers and replica.model in self.models.by_name:
            model = self.models.by_name[replica.model]
            model.history.served()
            model.service.took(self._now - lease.granted_at)
        return replica

    def _clients_lost(self) -> None:
        for waiting in list(self.queue):
            self._dispatch.refusals.refuse(
                waiting, Unavailable("the gateway was restarted; try again", retry_after_s=1.0)
            )
        for lease in self.fleet.leases.all():
            self._dispatch.reclaim(lease, self._now)

    def _pin(self, event: ev.PinAsked) -> None:
        model = self.models.find(event.model)
        model.pinned_by_client = False
        if model.pinned == event.pinned:
            return
        model.pinned = event.pinned
        what = "is pinned: it is never evicted" if event.pinned else "is no longer pinned"
        self._out.announce("model_pinned", f"{model.name} {what}", model.name)
        self._dispatch.look_again()

    def _keep_alive(self, event: ev.KeepAliveAsked) -> None:
        """As in Ollama: a negative one pins the model, and a duration takes that back. What the catalogue pins, or
        somebody by name, stays pinned."""
        model = self.models.find(event.model)
        if event.keep_alive_s < 0:
            if not model.pinned:
                self._pin(ev.PinAsked(event.model, True))
                model.pinned_by_client = True
            return
        if model.pinned_by_client:
            self._pin(ev.PinAsked(event.model, False))
        if model.keep_alive_s == event.keep_alive_s:
            return
        model.keep_alive_s = event.keep_alive_s
        self._some_expire = True
        message = f"{model.name} will be stopped after {event.keep_alive_s:.0f} s without requests"
        self._out.announce("model_keep_alive", message, model.name)

    def _unload(self, event: ev.UnloadAsked) -> None:
        """Whoever waits for the model is refused: it would be loaded again at once."""
        name = event.model
        replicas = self.replicas.of_model(name)
        if event.unless_wanted:
            if self.models.find(name).pinned_by_client:
                self._pin(ev.PinAsked(name, False))
            replicas = [replica for replica in replicas if replica.idle]
            if not replicas or self.queue.of_model(name) or self.models.find(name).pinned:
                return
        if name in self.models.by_name or not replicas:
            self.models.find(name).dismissed = True
        for waiting in self.queue.of_model(name):
            self._dispatch.refusals.refuse(
                waiting, Unavailable(f"{name} was unloaded on request", retry_after_s=1.0, model=name)
            )
        for replica in replicas:
            self._out.announce("unload_asked", f"{name} will be unloaded when its requests have ended", replica=replica)
            self.fleet.retire(replica, "unloaded on request")
        self._dispatch.look_again()

    # ------------------------------------------------------------------ replicas

    def _replica_started(self, event: ev.ReplicaStarted) -> None:
        replica = self.replicas.get(event.replica_id)
        if replica is not None:
            replica.pid = event.pid

    def _replica_ready(self, event: ev.ReplicaReady) -> None:
        replica = self.replicas.get(event.replica_id)
        if replica is None or replica.state is not ReplicaState.LOADING:
            return  # stopped meanwhile; its ReplicaGone is on the way
        if event.n_ctx < replica.n_ctx:
            message = f"it loaded with {event.n_ctx} tokens of context per slot instead of {replica.n_ctx}"
            self._failures.failed(ev.ReplicaFailed(event.replica_id, "failed", message), self._now)
            return
        self.fleet.ready(replica, event, self._now)
        model = self.models.by_name.get(replica.model)
        if model is not None and model.shape is not None:
            for record in self.speeds.loaded(model.shape, replica, event.load_s):
                self._out.remember(record)
        self._dispatch.look_again()

    def _replica_gone(self, event: ev.ReplicaGone) -> None:
        replica = self.replicas.get(event.replica_id)
        if replica is None or replica.state is ReplicaState.PENDING:
            return
        self._failures.died(ev.ReplicaDied(event.replica_id, "its process is gone", by_itself=False), self._now)
        self.fleet.gone(replica, self._now)
        self._dispatch.look_again()
        self._out.announce("replica_gone", f"{replica.model} has freed its memory", replica=replica)

    def _replica_adopted(self, event: ev.ReplicaAdopted) -> None:
        node_id = event.placement.node_id
        if event.replica_id in self.replicas:
            return
        if node_id not in self.inventory.nodes or not self.fleet.adopt(event, self._now):
            self._out.post(cmd.StopReplica(event.replica_id, node_id, "there is no longer room for it"))
        self._dispatch.look_again()

    # ------------------------------------------------------------------ time

    def _tick(self) -> None:
        nodes, devices = self.inventory.age(self._now)
        for node in nodes:
            self._dispatch.look_again()
            self.rooms.changed(node.facts.node_id)
            self._out.announce("node_silent", f"no new models on {node.facts.hostname}: {node.trouble}")
        for device in devices:
            self._dispatch.look_again()
            self.rooms.changed(device.facts.node_id)
            label = self.inventory.label(device.facts.device_id)
            self._out.announce("gpu_silent", f"no new models on {label}: {device.trouble}")
        for lease in self.fleet.leases.expired(self._now):
            message = f"the lease of request {lease.request_id} was not renewed in time"
            self._out.announce("lease_expired", message, replica=self.replicas[lease.replica_id])
            self._dispatch.reclaim(lease, self._now)
        self._dispatch.time_passes(self._now)
        for replica in self.replicas.in_state(ReplicaState.READY) if self._some_expire else ():
            self._stop_if_idle_too_long(replica)

    def _stop_if_idle_too_long(self, replica: Replica) -> None:
        model = self.models.by_name.get(replica.model)
        if model is None or not replica.idle or self._dispatch.is_protected(replica):
            return
        keep_alive_s = self.models.keep_alive_s(model)
        idle_s = self._now - replica.last_used_at
        if keep_alive_s is not None and idle_s >= keep_alive_s and self.queue.head(model.name) is None:
            self._out.announce("replica_idle", f"{replica.model} was idle for {idle_s:.0f} s", replica=replica)
            self.fleet.stop(replica, "idle")


def _load(model_name: str, n_ctx: int | None, now: float) -> Waiting:
    """A request for the model itself, not for an answer of it."""
    return Waiting(RequestId(""), model_name, "load", n_ctx, now, now)
