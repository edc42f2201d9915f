"""GGUF models on this node's disks, and how much of each is in the page cache.

A model of several files is one `ModelFile`, named by its first part. Not listed are models with a missing part (a
download in progress), hidden files, and names that are not UTF-8. Adapters and projectors (`mmproj`) are listed as
models are: the scheduler knows which model they come with. mincore(2) says what is in the page cache. It is asked about
at most 64 windows of 1 MiB per file, spread evenly, so that a file of 40 GiB takes a millisecond, as a small one does.
"""

from __future__ import annotations

import ctypes as c
import glob
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from scheduler.cluster.facts import ModelFile
from scheduler.units import MIB

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_WINDOWS, _WINDOW_BYTES = 64, MIB
_PROT_READ, _MAP_SHARED = mmap.PROT_READ, mmap.MAP_SHARED
_MAP_FAILED = c.c_void_p(-1).value

_libc = c.CDLL(None, use_errno=True)
_libc.mmap.restype = c.c_void_p
_libc.mmap.argtypes = (c.c_void_p, c.c_size_t, c.c_int, c.c_int, c.c_int, c.c_long)
_libc.munmap.argtypes = (c.c_void_p, c.c_size_t)
_libc.mincore.argtypes = (c.c_void_p, c.c_size_t, c.c_char_p)


def find_models(model_paths: Iterable[str]) -> tuple[ModelFile, ...]:
    """The models below `model_paths`: folders (searched through and through), files and globs ("~" is home).

    What cannot be read is skipped. A file that is found twice is listed once. In the order of the paths, then by name.
    """
    models: dict[tuple[int, int], ModelFile] = {}
    for path in (found for given in model_paths for found in _gguf_files(given)):
        try:
            model = _model(path) if _is_text(path) else None
            status = path.stat() if model is not None else None
        except OSError:  # it was deleted meanwhile
            continue
        if model is not None and status is not None:
            models.setdefault((status.st_dev, status.st_ino), model)
    return tuple(models.values())


def _is_text(path: Path) -> bool:
    """Whether its name is UTF-8. Other names cannot be sent to anybody."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is the first part of, present or not; a single file is its only part."""
    match = _PART.fullmatch(path.name)
    count = int(match["count"]) if match is not None else 0
    if match is None or not count:
        return (path,)
    return tuple(path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def cached_fraction(path: Path) -> float | None:
    """Share (0..1) of a file in the page cache; None when the kernel does not say.

    For files that one may not write, mincore says that everything is cached (since Linux 5.2). That is no answer.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe would block
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return None
        return _resident_share(fd, status.st_size)
    except OSError:
        return None
    finally:
        os.close(fd)


def _gguf_files(given: str) -> Iterator[Path]:
    expanded = os.path.expanduser(given)  # noqa: PTH111 - a glob, not yet a path
    # An existing name is taken literally, even with brackets in it.
    matches = [expanded] if Path(expanded).exists() else sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207
    for path in map(Path, matches):
        if path.is_dir():
            yield from _below(path)
        elif path.suffix == ".gguf":
            yield path


def _below(folder: Path) -> Iterator[Path]:
    """GGUF files in a folder and below. Links are followed, but no folder is read twice (links may form circles)."""
    seen: set[tuple[int, int]] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        try:
            status = os.stat(at)  # noqa: PTH116 - os.walk gives text
        except OSError:  # it was deleted meanwhile
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(at, name) for name in sorted(names) if name.endswith(".gguf") and not name.startswith("."))


def _model(path: Path) -> ModelFile | None:
    """The model that begins with `path`; None for later parts, incomplete models, pipes and what cannot be read."""
    part = _PART.fullmatch(path.name)
    if part is not None and int(part["number"]) != 1:
        return None
    parts = parts_of(path)
    try:
        statuses = [part.stat() for part in parts]
    except OSError:
        return None
    if not all(stat.S_ISREG(status.st_mode) for status in statuses):
        return None
    sizes = [status.st_size for status in statuses]
    shares = [cached_fraction(part) for part in parts]
    known = [share * size for share, size in zip(shares, sizes, strict=True) if share is not None]
    return ModelFile(
        path=str(path),
        paths=tuple(map(str, parts)),
        size_bytes=sum(sizes),
        modified_at_s=max(status.st_mtime for status in statuses),
        cached_fraction=sum(known) / max(1, sum(sizes)) if len(known) == len(sizes) else None,
    )


def _resident_share(fd: int, size_bytes: int) -> float:
    resident = pages = 0
    for offset, length in _windows(size_bytes):
        address = _libc.mmap(None, length, _PROT_READ, _MAP_SHARED, fd, offset)
        if address == _MAP_FAILED:
            raise OSError(c.get_errno(), "mmap")
        try:
            window = c.create_string_buffer(-(-length // mmap.PAGESIZE))
            if _libc.mincore(address, length, window) != 0:
                raise OSError(c.get_errno(), "mincore")
        finally:
            _libc.munmap(address, length)
        # The lowest bit of each byte tells; the others are reserved.
        resident += sum(page & 1 for page in window.raw)
        pages += len(window)
    return resident / pages if pages else 0.0


def _windows(size_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each window: all of a small file, evenly spread parts of a big one."""
    stride = max(_WINDOW_BYTES, size_bytes // _WINDOWS // mmap.PAGESIZE * mmap.PAGESIZE)
    for offset in range(0, size_bytes, stride):
        yield offset, min(_WINDOW_BYTES, size_bytes - offset)
