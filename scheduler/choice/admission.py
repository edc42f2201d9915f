"""Turns a request into a workload: checks what the request asks of the model, and whether enough is known to decide.

Raises errors of the request (`Rejected`) and of the model (`InvalidGGUF`, `Unavailable`). Free memory is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.choice.workload import Wishes, Workload
from scheduler.cluster.inventory import Inventory, Node
from scheduler.cluster.models import Model, Models
from scheduler.cluster.queue import Waiting
from scheduler.config import Catalogue
from scheduler.costs.measurements import Measurements
from scheduler.costs.params import ContextParams
from scheduler.costs.shape import ModelShape
from scheduler.errors import InvalidGGUF, Rejected, Unavailable

MOST_NEEDS = 1024  # workloads that are remembered, with what was computed for them


class Admission:
    """Reads inventory and models. Changes neither."""

    def __init__(self, catalogue: Catalogue, inventory: Inventory, models: Models, measurements: Measurements) -> None:
        self._measurements = measurements
        self._reserves = catalogue.reserves
        self._inventory = inventory
        self._models = models
        self._least_n_ctx: dict[str, tuple[ModelShape, int]] = {}
        self._needs: dict[tuple[str, int | None], tuple[tuple[ModelShape, int, int, int], Workload]] = {}

    def check(self, model: Model, waiting: Waiting) -> None:
        """Raise Rejected if the model cannot do what is asked. Nothing is raised before its header has been read."""
        if model.shape is not None:
            self._context(model, model.shape, waiting)

    def least_n_ctx(self, waiting: Waiting) -> int:
        """Tokens that a slot must hold for the request; 0 while the model's default is not known."""
        model = self._models.by_name.get(waiting.model)
        if waiting.n_ctx is not None or model is None or model.shape is None:
            return waiting.n_ctx or 0
        known = self._least_n_ctx.get(model.name)
        if known is None or known[0] is not model.shape:
            known = self._least_n_ctx[model.name] = model.shape, self._default_n_ctx(model, model.shape)
        return known[1]

    def _default_n_ctx(self, model: Model, shape: ModelShape) -> int:
        context = self._models.context(model, shape, None)
        contexts = context, *self._models.alternatives(model, shape, None)
        return min(each.n_ctx_slot for each in contexts)

    def workload(self, model: Model, waiting: Waiting, now: float) -> Workload | None:
        """The workload of the request. None while headers or machines have not been read yet.

        Raises Rejected for what the model cannot do, InvalidGGUF for a broken file, and Unavailable while the model is
        paused after failures or when no machine has the file.
        """
        if model.copies and model.invalid:
            raise InvalidGGUF(f"{model.name}: {model.invalid}", model=model.name)
        history = model.history
        if now < history.retry_at:
            wait_s = history.retry_at - now
            raise Unavailable(
                f"{model.name} failed to load repeatedly, last: {history.last_failure}; next try in {wait_s:.0f} s",
                retry_after_s=wait_s,
                model=model.name,
            )
        if not model.copies and self._inventory.complete:
            where = model.entry.path if model.entry else model.name
            raise Unavailable(f"{model.name}: no machine has a file {where}", retry_after_s=10.0, model=model.name)
        shape = model.shape
        if shape is None or not any(True for _ in self._nodes(model)):
            return None
        context = self._context(model, shape, waiting)
        facts = shape, history.extra_bytes, self._measurements.changes, self._inventory.changes
        known = self._needs.get((model.name, waiting.n_ctx))
        if known is None or known[0] != facts or known[1].context != context:
            if len(self._needs) >= MOST_NEEDS:
                self._needs.clear()
            known = self._needs[model.name, waiting.n_ctx] = facts, self._workload(model, shape, context, waiting.n_ctx)
        return known[1]

    def _workload(self, model: Model, shape: ModelShape, context: ContextParams, n_ctx: int | None) -> Workload:
        params = self._models.params(model)
        return Workload(
            model=model.name,
            shape=shape,
            context=context,
            reserves=self._reserves,
            use_mmap=params.use_mmap is not False,
            use_extra_bufts=bool(params.use_extra_bufts),
            extra_bytes=model.history.extra_bytes,
            measurements=self._measurements,
            wishes=Wishes(
                spill=params.spill is not False,
                max_gpus=params.max_gpus,
                gpus=params.gpus or (),
                nodes=params.nodes or (),
                labels=tuple(sorted((params.labels or {}).items())),
                min_tokens_per_s=params.min_tokens_per_s or 0.0,
            ),
            alternatives=self._models.alternatives(model, shape, n_ctx),
            longest_n_ctx=self._models.longest(model, shape, context),
            rounded_n_ctx=self._models.rounded(shape, context, n_ctx),
        )

    def nodes(self, model: Model) -> list[Node]:
        """Nodes with the same file. A copy of another size is another model, even under the same name."""
        return list(self._nodes(model))

    def _nodes(self, model: Model) -> Iterator[Node]:
        size_bytes = None
        for node_id, copy in model.copies.items():
            if copy.shape is None:
                continue
            size_bytes = copy.file.size_bytes if size_bytes is None else size_bytes
            node = self._inventory.nodes.get(node_id)
            if copy.file.size_bytes == size_bytes and node is not None and node.known:
                yield node

    def final(self, model: Model) -> bool:
        """Whether all machines and headers are known. Only then can the decision be that there is no place."""
        return self._inventory.complete and not model.undecided

    def why_not_yet(self, model: Model) -> str:
        """What is still missing for a decision about the model."""
        if not self._inventory.nodes:
            return "no machine has joined yet"
        trouble = next((copy.trouble for copy in model.copies.values() if copy.trouble), "")
        return (
            f"its header could not be read, trying again: {trouble}"
            if trouble
            else "reading its header and the machines"
        )

    def _context(self, model: Model, shape: ModelShape, waiting: Waiting) -> ContextParams:
        context = self._models.context(model, shape, waiting.n_ctx)
        if waiting.kind == "embed" and not context.embeddings:
            raise Rejected(
                f"{model.name} is not an embedding model; set embeddings: true for it in the catalogue",
                model=model.name,
            )
        if waiting.kind == "generate" and shape.is_embedding_only:
            raise Rejected(f"{model.name} is an embedding model: it answers /v1/embeddings only", model=model.name)
        return context
