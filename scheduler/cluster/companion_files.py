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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def companions_of(entry: ModelEntry | None, file: ModelFile, files: Sequence[ModelFile]) -> CompanionFiles:
    """The companion files of the model in `file`, among all `files` of its node."""
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
    """The file that drafts tokens for the model in `file`. Raises LookupError."""
    if entry.spec_type == "draft-mtp":
        return file
    if entry.model_draft is None or entry.spec_type == "none":
        return None
    return _named("model_draft", entry.model_draft, file, files)


def _named(what: str, pattern: str, file: ModelFile, files: Iterable[ModelFile]) -> ModelFile:
    """The file that `pattern` names: the one in the model's folder, or else the only match. Raises LookupError."""
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
    """The projector that belongs to the model, if the catalogue does not name one."""
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
    """The words of the file's name that name the model."""
    stem = PART.sub("", posixpath.basename(file.path).removesuffix(".gguf")).lower()
    return frozenset(word for word in re.split(r"[-_.]", stem) if word and not _NO_NAME.fullmatch(word))
