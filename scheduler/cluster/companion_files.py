"""The files of a node that come with a model: LoRA adapters and a draft that the catalogue names, and a projector.

A file with `mmproj` in its name is a projector, not a model. If the catalogue does not name it, it may belong to a
model in its folder. It must be the only projector there, and the names must agree: all words of its name, except words
such as f16 or model, are in the model's name. If it has no other words, it belongs to the folder's models if these are
one model, in one or several quantisations.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from scheduler.cluster.facts import ModelFile
from scheduler.config import NO_MMPROJ, ModelEntry

PART = re.compile(r"-\d{5}-of-\d{5}$")
_NO_NAME = re.compile(r"mmproj|model|ud|b?fp?16|fp?32|i?q\d+|mxfp4|\d|k|x{0,2}[sml]|nl")
"""Words of a file's name that do not name the model: the kind of file, and its type (q4_k_m is three words)."""


@dataclass(frozen=True, slots=True)
class CompanionFiles:
    """The files that are loaded with a model. `draft`: the source of drafted tokens; for prediction layers, the model's
    own file. `missing`: why the files cannot be used, or empty."""

    adapters: tuple[ModelFile, ...] = ()
    mmproj: ModelFile | None = None
    draft: ModelFile | None = None
    missing: str = ""

    @property
    def adapter_paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.adapters)

    @property
    def mmproj_path(self) -> str:
        return self.mmproj.path if self.mmproj else ""

    @property
    def draft_path(self) -> str:
        return self.draft.path if self.draft else ""


ALONE = CompanionFiles()


def matches(path: str, pattern: str) -> bool:
    """Whether the catalogue path `pattern` matches `path`: as the file itself, as a glob, or as the end of a path."""
    relative = re.sub(r"^(\./|~/)", "", pattern)
    return path == pattern or fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{relative}")


def is_projector(path: str) -> bool:
    return "mmproj" in posixpath.basename(path).lower()


@dataclass
class _Folder:
    projectors: list[ModelFile] = field(default_factory=list)
    models: list[ModelFile] = field(default_factory=list)

    @cached_property
    def names(self) -> set[frozenset[str]]:
        """The words that name each of the models."""
        return {_words(each) for each in self.models}


class NodeFiles:
    """All files of a node, by folder: who looks beside a model must not go through all of them for each model."""

    def __init__(self, files: Sequence[ModelFile]) -> None:
        self.all = files
        self._folders: dict[str, _Folder] = {}
        for file in files:
            folder = self._folders.setdefault(_folder(file), _Folder())
            (folder.projectors if is_projector(file.path) else folder.models).append(file)

    def projector_beside(self, file: ModelFile) -> ModelFile | None:
        """The projector that belongs to the model, if the catalogue does not name one."""
        folder = self._folders.get(_folder(file), _Folder())
        if len(folder.projectors) != 1:
            return None
        name, wanted = _words(file), _words(folder.projectors[0])
        belongs = wanted <= name if wanted else folder.names <= {name}
        return folder.projectors[0] if belongs else None


def companions_of(entry: ModelEntry | None, file: ModelFile, files: NodeFiles) -> CompanionFiles:
    """The companion files of the model in `file`, which is one of its node's `files`."""
    try:
        adapters = tuple(
            _named(f"adapter {name}", adapter.path, file, files)
            for name, adapter in (entry.adapters if entry else {}).items()
        )
        wanted, draft = (entry.mmproj, _draft(entry, file, files)) if entry else (None, None)
        if wanted is None:
            return CompanionFiles(adapters, files.projector_beside(file), draft)
        mmproj = None if wanted == NO_MMPROJ else _named("mmproj", wanted, file, files)
        return CompanionFiles(adapters, mmproj, draft)
    except LookupError as error:
        return CompanionFiles(missing=str(error.args[0]))


def _draft(entry: ModelEntry, file: ModelFile, files: NodeFiles) -> ModelFile | None:
    """The file that drafts tokens for the model in `file`. Raises LookupError."""
    if entry.spec_type == "draft-mtp":
        return file
    if entry.model_draft is None or entry.spec_type == "none":
        return None
    return _named("model_draft", entry.model_draft, file, files)


def _named(what: str, pattern: str, file: ModelFile, files: NodeFiles) -> ModelFile:
    """The file that `pattern` names: the one in the model's folder, or else the only match. Raises LookupError."""
    found = [each for each in files.all if matches(each.path, pattern)]
    found = [each for each in found if _folder(each) == _folder(file)] or found
    if not found:
        raise LookupError(f"{what}: no file {pattern} on this machine; put it there, or correct the catalogue")
    if len(found) > 1:
        raise LookupError(
            f"{what}: {pattern} is {len(found)} files, such as {found[0].path} and {found[1].path}; name one of them"
        )
    return found[0]


def _folder(file: ModelFile) -> str:
    return posixpath.dirname(file.path)


def _words(file: ModelFile) -> frozenset[str]:
    """The words of the file's name that name the model."""
    stem = PART.sub("", posixpath.basename(file.path).removesuffix(".gguf")).lower()
    return frozenset(word for word in re.split(r"[-_.]", stem) if word and not _NO_NAME.fullmatch(word))
