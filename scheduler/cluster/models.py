"""The models that can be requested: their names, their files on each node, and the contents of their headers.

Names come from the catalogue's entries, then from the files themselves (the file name without `.gguf` and without
`-00001-of-00005`). A second file of the same name gets its folder in front ("folder/name"). Projectors, and adapters
that an entry names, are not models: they come with a model (`companion_files`).
"""

from __future__ import annotations

import difflib
import posixpath
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from heapq import nlargest
from math import inf
from typing import NamedTuple

from scheduler.cluster.companion_files import (
    ALONE,
    PART,
    CompanionFiles,
    NodeFiles,
    companions_of,
    is_projector,
    matches,
)
from scheduler.cluster.drafts import with_drafts
from scheduler.cluster.facts import ModelFile
from scheduler.cluster.history import LoadHistory, Popularity, ServiceTime
from scheduler.config import Catalogue, ModelEntry, ModelParams
from scheduler.costs.params import ContextParams
from scheduler.costs.shape import ModelShape
from scheduler.errors import Rejected, UnknownModel
from scheduler.units import NodeId

DEFAULT_SLOT_CONTEXT = 8192
AUTO_SLOTS = 4  # llama-server's default
_COMPARED, _CANDIDATES = 32, 8  # characters of a name, and names


class Files(NamedTuple):
    """Paths of the files that are loaded together."""

    path: str
    adapters: tuple[str, ...] = ()
    mmproj: str = ""
    draft: str = ""


@dataclass(slots=True)
class Copy:
    """The model's file on one node, and the files that come with it there. `shape` is None until their headers have
    been read. `invalid` says why they can never be read.

    `trouble` says why the last try to read them failed. It is tried again.
    """

    file: ModelFile
    companions: CompanionFiles = ALONE
    shape: ModelShape | None = None
    invalid: str = ""
    trouble: str = ""
    being_read: bool = True

    @property
    def undecided(self) -> bool:
        return self.shape is None and not self.invalid

    @property
    def files(self) -> Files:
        came = self.companions
        return Files(self.file.path, came.adapter_paths, came.mmproj_path, came.draft_path)

    def is_of(self, file: ModelFile, companions: CompanionFiles) -> bool:
        """Whether it is the copy in these files, as they are now."""
        known = (self.file, *self.companions.adapters, self.companions.mmproj, self.companions.draft)
        there = (file, *companions.adapters, companions.mmproj, companions.draft)
        same = list(map(_identity, known)) == list(map(_identity, there))
        return same and self.companions.missing == companions.missing


@dataclass(slots=True)
class Model:
    """The model of one name, with its copies on all nodes."""

    name: str
    entry: ModelEntry | None = None
    pinned: bool = False
    pinned_by_client: bool = False  # by a negative keep_alive; a later one reverses this
    keep_alive_s: float | None = None  # set by a client, instead of the catalogue's
    copies: dict[NodeId, Copy] = field(default_factory=dict)
    history: LoadHistory = field(default_factory=LoadHistory)
    popularity: Popularity = field(default_factory=Popularity)
    spread_looked_at: float = -inf  # when a second replica was last considered
    dismissed: bool = False  # unloaded by hand: not kept loaded until the next request
    service: ServiceTime = field(default_factory=ServiceTime)
    shape: ModelShape | None = None  # of the first copy whose header has been read, with a projector if any has one

    def copies_changed(self) -> None:
        shapes = [copy.shape for copy in self.copies.values() if copy.shape is not None]
        self.shape = next((shape for shape in shapes if shape.projector), next(iter(shapes), None))

    @property
    def invalid(self) -> str:
        """Why no copy is usable, or empty."""
        if any(not copy.invalid for copy in self.copies.values()):
            return ""
        return next((copy.invalid for copy in self.copies.values()), "")

    @property
    def undecided(self) -> bool:
        """Some copy's header has not been read yet."""
        return any(copy.undecided for copy in self.copies.values())


@dataclass(slots=True)
class FileChanges:
    """`unread`: files whose headers have to be read. `changed`: models with a file that has changed. `incomplete`:
    models with a missing file."""

    unread: dict[Files, None] = field(default_factory=dict)  # in order
    changed: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)

    def read(self, files: Files) -> None:
        self.unread[files] = None


class Models:
    """All models by name, updated with the files that nodes report."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._params: dict[str, ModelParams] = {}  # by name; entries and defaults never change
        self._kept_away_by: dict[str, frozenset[str]] = {}
        self._claimed: dict[NodeId, dict[str, list[str]]] = {}  # names by path
        self._reported: dict[NodeId, tuple[ModelFile, ...]] = {}
        self._contexts: dict[str, tuple[ModelShape, ContextParams]] = {}  # the default ones
        self._entries: dict[str, tuple[str, ...]] = {}  # names of matching entries by path; used every second
        entries = catalogue.models.values()
        self._adapter_paths = [adapter.path for entry in entries for adapter in entry.adapters.values()]
        self._plain_paths = [entry.path for entry in entries if not set("*?[") & set(entry.path)]
        self.by_name: dict[str, Model] = {
            name: Model(name, entry, pinned=entry.pinned) for name, entry in catalogue.models.items()
        }

    @property
    def some_are_kept(self) -> bool:
        """Whether any model must always be loaded (min_replicas)."""
        return any(params.min_replicas for params in (self._catalogue.defaults, *self._catalogue.models.values()))

    def find(self, name: str) -> Model:
        """The model of this name. Raises UnknownModel, which suggests the most similar name."""
        model = self.by_name.get(name)
        if model is None:
            close = _nearest(name, self.by_name)
            known = f"did you mean {close!r}?" if close else "`arriero models` lists the known ones"
            raise UnknownModel(f"no model named {name!r}; {known}", model=name)
        return model

    def params(self, model: Model) -> ModelParams:
        """The model's own parameters over the catalogue's defaults."""
        if model.name not in self._params:
            self._params[model.name] = self._own_params(model)
        return self._params[model.name]

    def keep_alive_s(self, model: Model) -> float | None:
        """The idle seconds after which it is stopped; None: it is not stopped."""
        return self.params(model).keep_alive_s if model.keep_alive_s is None else model.keep_alive_s

    def kept_away_by(self, name: str) -> frozenset[str]:
        """Models whose entries say that they must not share a GPU with this one."""
        if name not in self._kept_away_by:
            by_default = self._catalogue.defaults.not_with or ()
            entries = self._catalogue.models.items()
            self._kept_away_by[name] = frozenset(
                other for other, each in entries if name in (by_default if each.not_with is None else each.not_with)
            )
        return self._kept_away_by[name]

    def priority(self, model: Model) -> int:
        return self.params(model).priority or 0

    def _own_params(self, model: Model) -> ModelParams:
        own = {key: getattr(model.entry, key) for key in ModelParams.model_fields} if model.entry else {}
        chosen = {key: value for key, value in own.items() if value is not None}
        return self._catalogue.defaults.model_copy(update=chosen)

    def context(self, model: Model, shape: ModelShape, n_ctx_slot: int | None) -> ContextParams:
        """Context parameters for a replica with `n_ctx_slot` tokens per slot (None: the model's default).

        Raises Rejected if the model was not trained for such a long context.
        """
        if n_ctx_slot is not None:
            return self._context(model, shape, n_ctx_slot)
        known = self._contexts.get(model.name)
        if known is None or known[0] is not shape:
            known = self._contexts[model.name] = shape, self._context(model, shape, None)
        return known[1]

    def _context(self, model: Model, shape: ModelShape, n_ctx_slot: int | None) -> ContextParams:
        context = self._plain_context(model, shape, n_ctx_slot)
        return context.for_whole_sequences() if shape.is_embedding_only else context

    def _plain_context(self, model: Model, shape: ModelShape, n_ctx_slot: int | None) -> ContextParams:
        params = self.params(model)
        if isinstance(params.n_seq_max, int):
            return self._context_of_slots(model, shape, n_ctx_slot, params.n_seq_max, bool(params.kv_unified))
        alone = self._context_of_slots(model, shape, n_ctx_slot, 1, bool(params.kv_unified))
        if params.kv_unified is False:
            return alone
        shared = self._context_of_slots(model, shape, n_ctx_slot, AUTO_SLOTS, True)
        return shared if _takes_no_more(shape, shared, alone) else alone

    def _context_of_slots(
        self, model: Model, shape: ModelShape, n_ctx_slot: int | None, slots: int, kv_unified: bool
    ) -> ContextParams:
        params = self.params(model)
        divided = 1 if kv_unified else slots
        trained = shape.n_ctx_train or DEFAULT_SLOT_CONTEXT
        if n_ctx_slot is not None and n_ctx_slot > trained:
            raise Rejected(
                f"{model.name} was trained for {trained} tokens of context; {n_ctx_slot} were asked for",
                model=model.name,
            )
        said = params.n_ctx if isinstance(params.n_ctx, int) else None
        if n_ctx_slot is not None:
            n_ctx = max(n_ctx_slot * divided, said or 0)
        else:
            n_ctx = said or min(trained, DEFAULT_SLOT_CONTEXT) * divided
        embeddings = shape.is_embedding_only if params.embeddings is None else params.embeddings
        n_batch = params.n_batch or 2048
        context = ContextParams(
            n_ctx=n_ctx,
            n_seq_max=slots,
            n_batch=n_batch,
            n_ubatch=min(params.n_ubatch or 512, n_batch),
            type_k=params.type_k or "f16",
            type_v=params.type_v or "f16",
            flash_attn=params.flash_attn or "on",
            kv_unified=kv_unified,
            swa_full=bool(params.swa_full),
            embeddings=embeddings,
            # One row per slot is all that is ever sampled; embeddings make every token an output.
            n_outputs_max=0 if embeddings or shape.is_embedding_only else slots,
            image_min_tokens=model.entry.image_min_tokens or 0 if model.entry else 0,
            image_max_tokens=model.entry.image_max_tokens or 0 if model.entry else 0,
        )
        return with_drafts(context, shape, model.name, model.entry, params)

    def alternatives(self, model: Model, shape: ModelShape, n_ctx_slot: int | None) -> tuple[ContextParams, ...]:
        """Other contexts that the catalogue allows for the same request, best first. Raises as `context`."""
        context, found = self._plain_context(model, shape, n_ctx_slot), []
        for other in self.params(model).alternatives or ():
            changes = other.model_dump(exclude_none=True)
            if n_ctx_slot is not None:  # the requested length must fit
                changes["n_ctx"] = max(changes.get("n_ctx", 0), n_ctx_slot * context.n_streams)
            found.append(replace(context, **changes))
        return tuple(each.for_whole_sequences() if shape.is_embedding_only else each for each in found)

    def longest(self, model: Model, shape: ModelShape, context: ContextParams) -> int:
        """The largest context of all slots that the model may get if GPUs have room; 0: only what it needs."""
        return self._trained(shape, context) if self.params(model).n_ctx == "auto" else 0

    def rounded(self, shape: ModelShape, context: ContextParams, n_ctx_slot: int | None) -> int:
        """The largest context of all slots that a request for this many tokens may get if there is room: the next power
        of two. So requests for longer and longer contexts load the model only a few times, not each time."""
        if n_ctx_slot is None:
            return 0
        return min(1 << (context.n_ctx - 1).bit_length(), self._trained(shape, context))

    @staticmethod
    def _trained(shape: ModelShape, context: ContextParams) -> int:
        return (shape.n_ctx_train or 0) * context.n_streams

    def update(self, node_id: NodeId, files: tuple[ModelFile, ...]) -> FileChanges:
        """Store a node's list of files. Returns what to read (new, changed or unreadable before), and what changed."""
        changes = FileChanges()
        if files == self._reported.get(node_id):
            return changes
        for path in self._claimed.get(node_id, {}).keys() - {file.path for file in files}:
            self._entries.pop(path, None)
        claimed: dict[str, ModelFile] = {}
        for file in files:
            for name in () if self._is_companion(file) else self._names(file, claimed):
                claimed[name] = file
        paths: dict[str, list[str]] = {}
        for name, file in claimed.items():
            paths.setdefault(file.path, []).append(name)
        self._claimed[node_id] = paths
        all_files = NodeFiles(files)
        for name, file in claimed.items():
            model = self.by_name.setdefault(name, Model(name))
            known, companions = model.copies.get(node_id), companions_of(model.entry, file, all_files)
            if known is None or not known.is_of(file, companions):
                copy = Copy(file, companions, invalid=companions.missing)
                model.copies[node_id] = copy
                model.copies_changed()
                model.history = LoadHistory()
                if known is not None:
                    changes.changed.append(name)
                if companions.missing:
                    copy.being_read = False
                    changes.incomplete.append(name)
                else:
                    changes.read(copy.files)
            else:
                known.file = file
                if known.undecided and not known.being_read:
                    known.being_read = True
                    changes.read(known.files)
        copies = [model.copies[node_id] for name in claimed if node_id in (model := self.by_name[name]).copies]
        self._reported.pop(node_id, None)
        if not files:
            del self._claimed[node_id]
        if files and not any(copy.undecided for copy in copies):  # else something is left to do
            self._reported[node_id] = files
        for name, gone in [(name, model) for name, model in self.by_name.items() if name not in claimed]:
            if gone.copies.pop(node_id, None) is None:
                continue
            if not gone.copies and gone.entry is None:
                del self.by_name[name]
            gone.copies_changed()
        return changes

    def shaped(
        self, node_id: NodeId, files: Files, shape: ModelShape | None, invalid: str = "", trouble: str = ""
    ) -> list[Model]:
        """Store the contents of headers, or why they could not be read. Returns the models of these files."""
        found = []
        for name in self._claimed.get(node_id, {}).get(files.path, ()):
            model = self.by_name.get(name)
            copy = model.copies.get(node_id) if model else None
            if model is not None and copy is not None and copy.files == files and not copy.companions.missing:
                why = invalid or (_unsuited(model.entry, shape) if shape is not None else "")
                copy.shape, copy.invalid, copy.trouble, copy.being_read = None if why else shape, why, trouble, False
                model.copies_changed()
                found.append(model)
        return found

    def _is_companion(self, file: ModelFile) -> bool:
        """Whether the file is a projector or an adapter. A glob may match adapters and models: a file that an entry
        names as its model is a model."""
        if is_projector(file.path):
            return True
        is_adapter = any(matches(file.path, path) for path in self._adapter_paths)
        return is_adapter and not any(matches(file.path, path) for path in self._plain_paths)

    def _names(self, file: ModelFile, taken: dict[str, ModelFile]) -> list[str]:
        if file.path not in self._entries:
            matching = (name for name, entry in self._catalogue.models.items() if matches(file.path, entry.path))
            self._entries[file.path] = tuple(matching)
        entries = [name for name in self._entries[file.path] if name not in taken]
        if entries:
            return entries
        stem = PART.sub("", posixpath.basename(file.path).removesuffix(".gguf"))
        folder = posixpath.dirname(file.path)
        while (stem in self._catalogue.models or stem in taken) and folder.strip("/"):
            stem = f"{posixpath.basename(folder)}/{stem}"
            folder = posixpath.dirname(folder)
        return [stem] if stem not in taken else []


def _identity(file: ModelFile | None) -> tuple[str, int, float] | None:
    return (file.path, file.size_bytes, file.modified_at_s) if file else None


def _unsuited(entry: ModelEntry | None, shape: ModelShape) -> str:
    """Why the catalogue's limits for pictures cannot be met, or empty."""
    least, most = (entry.image_min_tokens or 0, entry.image_max_tokens or 0) if entry else (0, 0)
    if not least and not most:
        return ""
    why = shape.projector.unsuited(least, most) if shape.projector else "there is no projector: name one as mmproj"
    return f"{why} (or leave out image_min_tokens and image_max_tokens)" if why else ""


def _takes_no_more(shape: ModelShape, shared: ContextParams, alone: ContextParams) -> bool:
    """Whether the cache of `shared` is no larger. False if llama.cpp does not accept it."""
    try:
        return shape.cache_bytes(shared) <= shape.cache_bytes(alone)
    except Rejected:
        return False


def _nearest(name: str, known: Collection[str]) -> str:
    """The known name that is most similar to `name`, or "". Clients may send any names, at any rate. So difflib
    compares only the beginnings of the few names that share most letters. This takes less than a millisecond."""
    letters = Counter(name[:_COMPARED].lower())
    alike = nlargest(_CANDIDATES, known, key=lambda each: (letters & Counter(each[:_COMPARED].lower())).total())
    by_beginning = {each[:_COMPARED]: each for each in alike}
    close = difflib.get_close_matches(name[:_COMPARED], by_beginning, n=1, cutoff=0.5)
    return by_beginning[close[0]] if close else ""
