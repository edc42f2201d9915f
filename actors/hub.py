"""Models in a repository of the Hugging Face hub, and what their headers say, before anything is fetched.

`hf:org/repo:Q4_K_M` names a model by its quantisation, `hf:org/repo/file.gguf` by its file; `hf:org/repo@revision` is
another revision than main. Only headers are read, by ranges: some MiB of a file of any size. HF_ENDPOINT names another
hub than huggingface.co, HF_TOKEN (or `hf auth login`) gives access to private and gated repositories.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from scheduler.costs.header import Header, header_of
from scheduler.costs.shape import ModelShape, read_shape
from scheduler.errors import Rejected, Unavailable
from scheduler.units import MIB

PREFIX = "hf:"
DEFAULT_QUANTIZATION = "Q4_K_M"  # as in llama.cpp's `-hf`
BLOCK_BYTES = 4 * MIB
"""That are asked for at once. A guess: a vocabulary of 150,000 tokens and its merges take some MiB."""
TIMEOUT_S = 30.0  # without a byte

_REFERENCE = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(:(?P<quantization>[\w.-]+)|/(?P<file>.+\.gguf))?", re.ASCII
)
_QUANTIZATION = re.compile(
    r"(?<![A-Z0-9])(UD-)?(I?Q\d+(_[A-Z0-9]+)*|TQ\d_\d|MXFP4(_MOE)?|NVFP4|BF16|F16|F32)(?![A-Z0-9])", re.IGNORECASE
)
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def is_on_a_hub(name: str) -> bool:
    """Whether `name` is that of a model in a repository."""
    return name.startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model in a repository. `paths`: of its parts there; `missing`: of parts that are not there."""

    quantization: str
    paths: tuple[str, ...]
    file_bytes: int
    missing: tuple[str, ...] = ()


class HubFile(NamedTuple):
    """`sha256`: of its content; "" where the hub does not say it, as of small files."""

    size_bytes: int
    sha256: str


class Repository:
    """The repository that `reference` names. Its list of files is read when it is first asked for."""

    def __init__(self, reference: str) -> None:
        """Raises Rejected for what is no reference."""
        found = _REFERENCE.fullmatch(reference)
        if found is None:
            raise Rejected(
                f"{reference!r} names no model on a hub: write hf:org/repo:Q4_K_M, or hf:org/repo/file.gguf, "
                "with @revision behind the repository for another one than main"
            )
        self.reference = reference
        self.repo: str = found["repo"]
        self.revision: str | None = found["revision"]
        self._quantization: str | None = found["quantization"]
        self._file: str | None = found["file"]

    @property
    def names_one(self) -> bool:
        """Whether the reference is that of one model."""
        return self._quantization is not None or self._file is not None

    @cached_property
    def files(self) -> dict[str, HubFile]:
        """All GGUF files, by their paths. Raises Rejected and Unavailable."""
        from huggingface_hub import HfApi, RepoFile  # 0.4 s, which others need not wait for

        with hub_errors(self.reference):
            listed = HfApi(endpoint=endpoint()).list_repo_tree(self.repo, recursive=True, revision=self.revision)
            return {
                each.path: HubFile(each.size, each.lfs.sha256 if each.lfs else "")
                for each in listed
                if isinstance(each, RepoFile) and _is_harmless(each.path)
            }

    @cached_property
    def models(self) -> tuple[HubModel, ...]:
        """The smallest first. Projectors are none. Raises as `files`."""
        files = {path: file.size_bytes for path, file in self.files.items() if not _is_projector(path)}
        return tuple(sorted(_models_of(files), key=lambda model: (model.file_bytes, model.paths)))

    def projector(self) -> str | None:
        """The path of a projector that goes with the models: in 16 bits, if there is one of several."""
        found = sorted(filter(_is_projector, self.files), key=lambda path: (quantization_of(path) != "F16", path))
        return found[0] if found else None

    def chosen(self) -> HubModel:
        """The model that is named, or Q4_K_M, or the only one. Raises Rejected, with the names that there are."""
        if self._file is not None:
            found = [model for model in self.models if self._file in model.paths]
        else:
            wanted = (self._quantization or DEFAULT_QUANTIZATION).upper()
            found = [model for model in self.models if model.quantization == wanted]
            if not found and self._quantization is None and len(self.models) == 1:
                found = [*self.models]
        if len(found) == 1:
            return found[0]
        if found:
            files = ", ".join(f"{PREFIX}{self._origin}/{model.paths[0]}" for model in found)
            raise Rejected(f"{self.reference} may be one of several files; name one: {files}")
        there = ", ".join(dict.fromkeys(model.quantization or model.paths[0] for model in self.models))
        raise Rejected(f"there is no {self.reference}; {self.repo} has {there or 'no GGUF files'}")

    def read_shape(self, model: HubModel) -> ModelShape:
        """What its headers say. Raises InvalidGGUF, Rejected where a part is missing, and Unavailable."""
        if model.missing:
            raise Rejected(f"{self.reference}: the repository lacks {', '.join(model.missing)}")
        with hub_errors(self.reference):
            return read_shape(Path(f"{PREFIX}{self._origin}", model.paths[0]), self._header)

    @property
    def _origin(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def _header(self, path: Path) -> Header:
        from huggingface_hub import hf_hub_url

        inside = str(path).removeprefix(f"{PREFIX}{self._origin}/")
        url = hf_hub_url(self.repo, inside, revision=self.revision, endpoint=endpoint())
        with FileFarAway(url) as file:
            return header_of(cast(BinaryIO, file), str(path), file.size_bytes)


class FileFarAway(RawIOBase):
    """A file behind `url`, of which only what is read is fetched. Raises OSError, and httpx2's errors."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = self._begin = 0
        self._block = b""
        self.size_bytes = 0
        self._fetch(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Only from the beginning."""
        assert whence == os.SEEK_SET
        self._position = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, and at least one before the end."""
        at = self._position - self._begin
        if not 0 <= at < len(self._block) and self._position < self.size_bytes:
            self._fetch(self._position)
            at = 0
        data = self._block[at : at + size]
        self._position += len(data)
        return data

    def _fetch(self, start: int) -> None:
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        last = start + BLOCK_BYTES - 1
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self._url, headers=headers, timeout=TIMEOUT_S) as response:
            hf_raise_for_status(response)
            told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or told is None or int(told[1]) != start:
                raise OSError(f"{response.url.host} does not give parts of a file")  # the whole may be 40 GiB
            block = bytearray()
            for piece in response.iter_bytes():
                block += piece
                if len(block) > BLOCK_BYTES:
                    raise OSError(f"{response.url.host} sends more than it was asked for")
        self._begin, self._block, self.size_bytes = start, bytes(block), int(told[3])


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What went wrong at the hub with what `name` says, in one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise Rejected(f"{name} is gated: accept its terms on its page, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise _not_shown(name) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise Rejected(f"{name}: the repository has no such revision or file") from error
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise _not_shown(name) from error
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise Unavailable(f"{name} cannot be read from {endpoint() or 'huggingface.co'}: {said}") from error


def _not_shown(name: str) -> Rejected:
    return Rejected(f"{name}: no such repository, or it is private: check the name, or set HF_TOKEN")


def endpoint() -> str | None:
    """The hub's address; None: huggingface.co."""
    return os.environ.get("HF_ENDPOINT") or None


def _is_harmless(path: str) -> bool:
    """Whether it is a GGUF file inside the repository. A hub could tell anything."""
    parts = path.split("/")
    return path.endswith(".gguf") and not any(part in ("", ".", "..") for part in parts)


def _is_projector(path: str) -> bool:
    return "mmproj" in Path(path).name.lower()


def _models_of(files: dict[str, int]) -> Iterable[HubModel]:
    """The models among the files of a repository, by their paths and sizes."""
    parts: defaultdict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for path, size in files.items():
        stem = path.removesuffix(".gguf")
        part = _PART.fullmatch(stem)
        if part is None:
            yield HubModel(quantization_of(path), (path,), size)
        else:
            parts[part["stem"], int(part["count"])][int(part["number"])] = path
    for (stem, count), there in parts.items():
        expected = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, min(count, 1000) + 1)]
        missing = tuple(path for path in expected if path not in files)
        paths = tuple(there[number] for number in sorted(there))
        yield HubModel(quantization_of(stem), paths, sum(files[path] for path in paths), missing)


def quantization_of(path: str) -> str:
    """What a file's name says of its quantisation, in capitals ("Q4_K_M"); "" if it says nothing."""
    name = _PART.sub(r"\g<stem>", Path(path).name.removesuffix(".gguf"))
    found = [each.group() for each in _QUANTIZATION.finditer(name)]
    return found[-1].upper() if found else ""
