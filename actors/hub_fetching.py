"""Fetching a model from a hub into a folder: its parts, and the projector that goes with it.

huggingface_hub does the work. A file that is not whole lies in a hidden folder beside the others, so nobody takes it
for a model. What was cut off goes on where it stopped. Two who fetch the same file wait for each other, and fetch it
once. What arrived is compared with the hub's checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.hub import HubModel, Repository, endpoint, hub_errors
from scheduler.errors import Rejected, Unavailable
from scheduler.units import GIB, MIB, format_bytes

LEFT_BYTES = 1 * GIB
"""Of the disk that stay free."""

_UNFINISHED = Path(".cache", "huggingface", "download")  # in `local_dir`, by huggingface_hub


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
    """The files at `paths`, in `folder_of`. `told`: how many bytes of them have come, again and again.

    Raises Rejected for a disk without room or a folder that cannot be written, Unavailable where the hub does not
    answer or what came is damaged. What came is kept then, and the next call goes on from there.
    """
    from huggingface_hub import hf_hub_download

    folder = folder_of(repository, models)
    _check_room(repository, paths, folder)
    found, done_bytes = [], 0
    for path in paths:
        file = repository.files[path]
        with hub_errors(repository.reference), _counted(told, done_bytes) as bar:
            got = hf_hub_download(
                repository.repo,
                path,
                revision=repository.revision,
                local_dir=folder,
                endpoint=endpoint(),
                tqdm_class=bar,
            )
        _check(Path(got), file.sha256, file.size_bytes)
        done_bytes += file.size_bytes
        told(done_bytes)
        found.append(Path(got))
    return found


def _check_room(repository: Repository, paths: tuple[str, ...], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = 0
        for part in (folder / _UNFINISHED).rglob("*.incomplete"):
            with contextlib.suppress(FileNotFoundError):  # somebody else has just finished it
                unfinished += part.stat().st_size
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise Rejected(f"{folder} cannot be written: {error.strerror or error}") from error
    missing = [repository.files[path].size_bytes for path in paths if not (folder / path).is_file()]
    need_bytes = max(0, sum(missing) - unfinished)
    if missing and need_bytes + LEFT_BYTES > free_bytes:
        raise Rejected(
            f"{repository.reference} needs {format_bytes(need_bytes)} on the disk of {folder}, where "
            f"{format_bytes(free_bytes)} are free and {format_bytes(LEFT_BYTES)} must stay free"
        )


@contextmanager
def _counted(told: Callable[[int], object], before_bytes: int) -> Iterator[Any]:
    """What huggingface_hub takes for a progress bar, and tells how many bytes there are, with those before."""
    from tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "disable": True})
            self._bytes = before_bytes + int(named.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self._bytes += int(n or 0)
            told(self._bytes)

    yield Told


def _check(file: Path, sha256: str, size_bytes: int) -> None:
    """Raises Unavailable, and has deleted the file, where it is not what the hub says."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(4 * MIB):
            digest.update(block)
    if file.stat().st_size == size_bytes and sha256 in ("", digest.hexdigest()):
        return
    file.unlink()
    raise Unavailable(f"{file.name} arrived damaged (its checksum is wrong), and was deleted; fetch it again")
