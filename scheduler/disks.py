"""The machines' disks: which model files are read ahead into the page cache."""

from __future__ import annotations

from scheduler import commands as cmd
from scheduler.cluster.inventory import Inventory
from scheduler.cluster.models import Copy, Model
from scheduler.outbox import Outbox
from scheduler.units import NodeId

READ_AGAIN_S = 120.0  # readings take a while to show what is in the page cache
CACHED = 0.9  # from this share in the page cache on, a file need not be read ahead


class Disks:
    """One file is read ahead on each machine, and none while a model is loaded there: the load needs the disk."""

    def __init__(self, inventory: Inventory, outbox: Outbox) -> None:
        self._inventory = inventory
        self._out = outbox
        self._ahead: dict[NodeId, str] = {}  # paths
        self._read_at: dict[tuple[NodeId, str], float] = {}

    def read(self, model: Model, now: float) -> None:
        """On every machine that has the model's file, an idle disk, and room in the page cache."""
        self._read_at = {what: at for what, at in self._read_at.items() if now - at < READ_AGAIN_S}
        for node_id, copy in model.copies.items():
            lately = (node_id, copy.file.path) in self._read_at
            if node_id not in self._ahead and not lately and self._fits_in_cache(node_id, copy):
                self._ahead[node_id] = copy.file.path
                self._read_at[node_id, copy.file.path] = now
                self._out.post(cmd.ReadAhead(node_id, copy.file.path))

    def _fits_in_cache(self, node_id: NodeId, copy: Copy) -> bool:
        node = self._inventory.nodes.get(node_id)
        if node is None or node.reading is None or copy.file.cached_fraction is None:
            return False
        missing = (1 - copy.file.cached_fraction) * copy.file.size_bytes
        return copy.file.cached_fraction < CACHED and missing <= node.reading.memory_available_bytes / 2

    def stop(self, node_id: NodeId) -> None:
        """A load there needs the disk."""
        if node_id in self._ahead:
            self._out.post(cmd.StopReadAhead(node_id, self._ahead[node_id]))

    def ended(self, node_id: NodeId) -> None:
        self._ahead.pop(node_id, None)
