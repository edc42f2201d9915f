"""Fetching a model from a hub into a folder: its parts, and the projector that goes with it.

A file that is not whole lies in a hidden folder beside the others, so nobody takes it for a model. It is continued
where it stopped. Two who fetch the same file wait for each other, and fetch it once. It gets its name when its checksum
is that of the hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from actors.hub import BLOCK_BYTES, FileFarAway, HubModel, Repository, endpoint, hub_errors
from scheduler.errors import ArrieroError, Rejected, Unavailable
from scheduler.units import GIB, MIB, format_bytes

LEFT_BYTES = 1 * GIB
"""Of the disk that stay free."""

UNFINISHED = ".unfinished"
"""The hidden folder."""


def folder_of(repository: Repository, models: Path) -> Path:
    """Where the files of a repository lie below the folder `models`. Files of two repositories may have one name."""
    return models / repository.repo


def files_of(repository: Repository, model: HubModel, *, projector: bool = True) -> tuple[str, ...]:
    """The paths of all that is fetched for `model`. Raises Rejected where a part is missing."""
    if model.missing:
        raise Rejected(f"{repository.reference}: the repository lacks {', '.join(model.missing)}")
    beside = repository.projector() if projector else None
    return (*model.paths, *((beside,) if beside else ()))


def fetch(repository: Repository, paths: tuple[str, ...], models: Path, told: Callable[[int], object]) -> list[Path]:
    """The files at `paths`, in `folder_of`. `told`: how many bytes of them are there, again and again.

    Raises Rejected for a disk without room or a folder that cannot be written, Unavailable where the hub does not
    answer or what came is damaged. What came is kept, unless it is damaged, and the next call goes on from there.
    """
    folder = folder_of(repository, models)
    _check_room(repository, paths, folder)
    done_bytes = 0
    for path in paths:
        _fetch_file(repository, path, folder, lambda count, before=done_bytes: told(before + count))  # type: ignore[misc]
        done_bytes += repository.files[path].size_bytes
        told(done_bytes)
    return [folder / path for path in paths]


def _fetch_file(repository: Repository, path: str, folder: Path, told: Callable[[int], object]) -> None:
    from filelock import FileLock  # huggingface_hub brings it

    file, target, part = repository.files[path], folder / path, _part_of(repository, path, folder)
    try:
        for parent in (part.parent, target.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{part}.lock"):
            if _is_there(target, file.size_bytes):
                return
            with part.open("ab") as opened:
                _continue(repository, path, opened, told)
            _check(part, path, file.sha256, file.size_bytes)
            part.replace(target)
    except OSError as error:
        raise Rejected(f"{target} cannot be written: {error.strerror or error}") from error


def _continue(repository: Repository, path: str, opened: BinaryIO, told: Callable[[int], object]) -> None:
    """Adds what is missing. Raises OSError for what the disk refuses, else as `hub_errors` does."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    size_bytes = repository.files[path].size_bytes
    url = hf_hub_url(repository.repo, path, revision=repository.revision, endpoint=endpoint())
    writing = _Written(opened)
    try:
        with hub_errors(repository.reference):
            if not opened.tell() and size_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:  # it begins no such file
                with FileFarAway(url) as far:
                    writing.write(far.read(BLOCK_BYTES))
            if opened.tell() < size_bytes:
                http_get(
                    url,
                    writing,  # type: ignore[arg-type]
                    resume_size=opened.tell(),
                    headers=build_hf_headers(),
                    expected_size=size_bytes,
                    tqdm_class=_counting(told),
                )
    except ArrieroError:
        if writing.error is not None:
            raise writing.error from None
        raise


class _Written:
    """A file that remembers what went wrong with it. Else a full disk would look like a fault of the hub."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _part_of(repository: Repository, path: str, folder: Path) -> Path:
    """Where a file lies until it is whole."""
    name = hashlib.sha256(f"{path} {repository.files[path]}".encode()).hexdigest()[:16]
    return folder / UNFINISHED / f"{name}.part"


def _is_there(target: Path, size_bytes: int) -> bool:
    return target.is_file() and target.stat().st_size == size_bytes


def _check_room(repository: Repository, paths: tuple[str, ...], folder: Path) -> None:
    need_bytes = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            size_bytes, part = repository.files[path].size_bytes, _part_of(repository, path, folder)
            if not _is_there(folder / path, size_bytes):
                need_bytes += size_bytes
                with contextlib.suppress(FileNotFoundError):  # nothing came yet, or somebody else has just finished it
                    need_bytes -= min(size_bytes, part.stat().st_size)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise Rejected(f"{folder} cannot be written: {error.strerror or error}") from error
    if need_bytes and need_bytes + LEFT_BYTES > free_bytes:
        raise Rejected(
            f"{repository.reference} needs {format_bytes(need_bytes)} on the disk of {folder}, where "
            f"{format_bytes(free_bytes)} are free and {format_bytes(LEFT_BYTES)} must stay free"
        )


def _counting(told: Callable[[int], object]) -> Any:
    """What huggingface_hub takes for a progress bar, and tells how many bytes there are."""
    from tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "disable": True})
            self._bytes = int(named.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self._bytes += int(n or 0)
            told(self._bytes)

    return Told


def _check(part: Path, path: str, sha256: str, size_bytes: int) -> None:
    """Raises Unavailable, and has deleted what came, where it is not what the hub says."""
    digest = hashlib.sha256()
    with part.open("rb") as opened:
        while block := opened.read(4 * MIB):
            digest.update(block)
    if part.stat().st_size == size_bytes and sha256 in ("", digest.hexdigest()):
        return
    part.unlink()
    raise Unavailable(f"{path} arrived damaged (its checksum is wrong), and was deleted; fetch it again")
