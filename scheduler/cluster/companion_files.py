"""Which files of a node come with a model there: LoRA adapters and a draft that the catalogue names, and a projector.

A file whose name holds `mmproj` is a projector, and no model. One that nobody named belongs to a model in its folder if
it is the only projector there, and if their names agree: without words such as f16 or model, those of the projector are
among the model's. A projector that has no other words belongs to the folder's models if they are one model, in one or
several quantisations.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scheduler.cluster.facts import ModelFile
from scheduler.config import NO_MMPROJ, ModelEntry

PART = re.compile(r"-\d{5}-of-\d{5}$")
_NO_NAME = re.compile(r"mmproj|model|ud|b?fp?16|fp?32|i?q\d+|mxfp4|\d|k|x{0,2}[sml]|nl")
"""Words of a file's name that do not say which model it is: what it is, and its type (q4_k_m is three words)."""


@dataclass(frozen=True, slots=True)
class CompanionFiles:
    """What is loaded with a model. `draft`: what guesses its next tokens; the model's own file where its prediction
    layers do. `missing`: why that cannot be, or empty."""

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
    """A catalogue path matches the file itself, as a glob, or relative to any folder."""
    relative = re.sub(r"^(\./|~/)", "", pattern)
    return path == pattern or fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{relative}")


def is_projector(path: str) -> bool:
    return "mmproj" in posixpath.basename(path).lower()


def companions_of(entry: ModelEntry | None, file: ModelFile, files: Sequence[ModelFile]) -> CompanionFiles:
    """Of the model in `file`, among all `files` of its node."""
    try:
        adapters = tuple(
            _named(f"adapter {name}", adapter.path, file, files)
            for name, adapter in (entry.adapters if entry else {}).items()
        )
        wanted, draft = (entry.mmproj, _draft(entry, file, files)) if entry else (None, None)
        if wanted is None:
            return CompanionFiles(adapters, _beside(file, files), draft)
        mmproj = None if wanted == NO_MMPROJ else _named("mmproj", wanted, file, files)
        return CompanionFiles(adapters, mmproj, draft)
    except LookupError as error:
        return CompanionFiles(missing=str(error.args[0]))


def _draft(entry: ModelEntry, file: ModelFile, files: Sequence[ModelFile]) -> ModelFile | None:
    """What guesses for the model in `file`. Raises LookupError."""
    if entry.spec_type == "draft-mtp":
        return file
    if entry.model_draft is None or entry.spec_type == "none":
        return None
    return _named("model_draft", entry.model_draft, file, files)


def _named(what: str, pattern: str, file: ModelFile, files: Iterable[ModelFile]) -> ModelFile:
    """The file that `pattern` names: one in the model's folder, or else the only one. Raises LookupError."""
    found = [each for each in files if matches(each.path, pattern)]
    found = [each for each in found if _folder(each) == _folder(file)] or found
    if not found:
        raise LookupError(f"{what}: no file {pattern} on this machine; put it there, or correct the catalogue")
    if len(found) > 1:
        raise LookupError(
            f"{what}: {pattern} is {len(found)} files, such as {found[0].path} and {found[1].path}; name one of them"
        )
    return found[0]


def _beside(file: ModelFile, files: Iterable[ModelFile]) -> ModelFile | None:
    """The projector that belongs to the model although nobody named it."""
    here = [each for each in files if _folder(each) == _folder(file)]
    projectors = [each for each in here if is_projector(each.path)]
    if len(projectors) != 1:
        return None
    name, wanted = _words(file), _words(projectors[0])
    if wanted:
        return projectors[0] if wanted <= name else None
    return projectors[0] if all(_words(each) == name for each in here if not is_projector(each.path)) else None


def _folder(file: ModelFile) -> str:
    return posixpath.dirname(file.path)


def _words(file: ModelFile) -> frozenset[str]:
    """Those of its name that say which model it is."""
    stem = PART.sub("", posixpath.basename(file.path).removesuffix(".gguf")).lower()
    return frozenset(word for word in re.split(r"[-_.]", stem) if word and not _NO_NAME.fullmatch(word))
