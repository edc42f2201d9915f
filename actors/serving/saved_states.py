"""What a model has read of conversations, on disk: so they survive its eviction, and go on without being read again.

A *state* is what llama.cpp keeps of a sequence (`llama_state_seq_get_data`). One file holds one state, with its tokens
and checkpoints. Files lie in a folder that is named by their *origin*: all that must be equal for a state to be of use.
New files lie in the page cache, which is RAM that the kernel gives back when somebody needs it. So no budget of RAM is
booked for them; their bytes on disk have a limit, and the files that were used longest ago go first.
A file is written under another name first, and has a checksum: an incomplete or damaged one is never loaded.
Files and folders are private to the user. What is on disk is what was said, in the model's own terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actors.serving.model import Adapters
from actors.serving.protocol import LoadSpec
from actors.serving.slots import common_prefix
from actors.serving.states import Checkpoint, SavedState, drop

Bytes = npt.NDArray[np.uint8]

BYTES_PER_S = 500e6
"""At which a state is taken to be written, and to be read: that of a SATA SSD. Within the page cache it is more."""

ABANDONED_S = 3600.0
"""A file that is still incomplete after this time belongs to a process that has ended."""

_HEAD = struct.Struct("<8sIIQf")  # magic, tokens, checkpoints, bytes of the state, tokens/s
_CHECKSUM = struct.Struct("<I")  # of all else
_FIRST = _HEAD.size + _CHECKSUM.size  # where the tokens begin
_CHECKPOINT = struct.Struct("<IQ")  # tokens, bytes
_MAGIC = b"arriero1"
_HASHED_BYTES = 1 << 20  # of the model's file: its header

log = logging.getLogger(__name__)


def states_folder() -> Path:
    """Where this user's states lie on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arriero" / "states"


def origin_of(spec: LoadSpec, adapters: Adapters = ()) -> str:
    """A digest of the model's file, of the adapters that are used, and of all parameters that a state depends on.
    Raises OSError."""
    context = spec.context
    parts = [
        _file(spec.path), version("llama-cpp-python"),
        context.type_k, context.type_v, context.flash_attn, context.swa_full,
        context.n_ctx_slot,  # by which LongRoPE chooses its factors
        context.n_seq_max, context.kv_unified,
        [(_file(spec.adapters[number].path), scale) for number, scale in adapters],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _file(path: str) -> tuple[str, int, int]:
    """What tells a file from others, without reading all of it."""
    with open(path, "rb") as file:  # noqa: PTH123 - a glance at its header
        facts = os.fstat(file.fileno())
        return hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest(), facts.st_size, facts.st_mtime_ns


def gain_s(n_tokens: int, tokens_per_s: float, state_bytes: int) -> float:
    """Seconds that are saved when a state is loaded instead of `n_tokens` being read."""
    return n_tokens / tokens_per_s - state_bytes / BYTES_PER_S if tokens_per_s > 0 else 0.0


class SavedStates:
    """Those of one origin. `find` may be called from any thread; `save` by one at a time."""

    def __init__(self, root: Path, origin: str, most_bytes: int) -> None:
        """`most_bytes`: of the files of all origins under `root`."""
        self._root = root
        self._folder = root / origin
        self._most_bytes = most_bytes
        self._seen_ns = 0
        self._tokens: dict[Path, tuple[array[int], float, int]] = {}  # what it read, how fast, bytes of the state

    def find(self, prompt: Sequence[int], n_known: int) -> SavedState | None:
        """The state that spares most of the prompt, if that is worth it. `n_known`: tokens that are there anyway."""
        try:
            return self._find(prompt, n_known)
        except OSError as error:  # of the folder: it is no request's fault
            log.warning("saved conversations cannot be looked for: %s", error)
            return None

    def _find(self, prompt: Sequence[int], n_known: int) -> SavedState | None:
        best: tuple[float, Path] | None = None
        wanted = array("i", prompt)
        for path, (tokens, tokens_per_s, state_bytes) in self._index().items():
            common = common_prefix(tokens, wanted)
            gain = gain_s(common - n_known, tokens_per_s, state_bytes)
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, path
        return self._read(best[1]) if best else None

    def save(
        self,
        tokens: Sequence[int],
        checkpoints: Sequence[Checkpoint],
        state_bytes: int,
        write: Callable[[Bytes], bool],
        tokens_per_s: float,
    ) -> bool:
        """Saves a state of `state_bytes`, which `write` puts into the memory that it is given. False where it cannot be
        saved, or where it is not worth it: reading again what no other file has takes less time than saving and loading
        it."""
        held = array("i", tokens)
        known = max((common_prefix(others, held) for others, _, _ in self._index().values()), default=0)
        if gain_s(len(tokens) - known, tokens_per_s, 2 * state_bytes) <= 0:
            return False
        path = self._folder / f"{hashlib.sha256(held.tobytes()).hexdigest()[:32]}.state"
        table = b"".join(_CHECKPOINT.pack(each.n_tokens, len(each.state)) for each in checkpoints)
        head = _HEAD.pack(_MAGIC, len(held), len(checkpoints), state_bytes, tokens_per_s)
        smaller = b"".join([held.tobytes(), table, *(each.state.tobytes() for each in checkpoints)])
        begins = _FIRST + len(smaller)
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not self._make_room(begins + state_bytes):
                return False
            part = path.with_suffix(f".{os.getpid()}")
            try:
                with _mapped(part, begins + state_bytes) as pages:
                    pages[_FIRST:begins] = smaller
                    memory = np.frombuffer(pages, np.uint8)
                    written = write(memory[begins:])
                    checksum = zlib.crc32(memory[_FIRST:].data, zlib.crc32(head))
                    del memory  # or the pages could not be given back
                    pages[:_FIRST] = head + _CHECKSUM.pack(checksum)
                if not written:
                    return False
                part.rename(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:  # the disk is full, or not ours to write to
            log.warning("a conversation was not saved: %s", error)
            return False
        self._drop_beginnings(path, held)
        return True

    # ------------------------------------------------------------------ files

    def _index(self) -> dict[Path, tuple[array[int], float, int]]:
        """The files that are there; looked up again when the folder has changed."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except OSError:
            return {}
        if changed_ns != self._seen_ns:
            found = {}
            for path in self._folder.glob("*.state"):
                try:
                    known = self._tokens.get(path) or _glance(path)
                except OSError:  # it is gone, or cannot be read now
                    continue
                if known is not None:
                    found[path] = known
                else:
                    drop(path)
            self._tokens, self._seen_ns = found, changed_ns
        return self._tokens

    def _read(self, path: Path) -> SavedState | None:
        """A file's state, which stays in the file until it is used; None, and the file is gone, if it is damaged."""
        try:
            with path.open("rb") as file:
                pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            _, n_tokens, n_checkpoints, state_bytes, tokens_per_s = _HEAD.unpack_from(pages)
            memory = np.frombuffer(pages, np.uint8)
            checksum = zlib.crc32(memory[_FIRST:].data, zlib.crc32(pages[: _HEAD.size]))
            if _CHECKSUM.unpack_from(pages, _HEAD.size) != (checksum,):
                raise ValueError("its checksum is wrong")
            at = _FIRST + 4 * n_tokens
            tokens = memory[_FIRST:at].view(np.int32).tolist()
            sizes = list(_CHECKPOINT.iter_unpack(pages[at : at + n_checkpoints * _CHECKPOINT.size]))
            at += n_checkpoints * _CHECKPOINT.size
            checkpoints = []
            for of_tokens, count in sizes:
                checkpoints.append(Checkpoint(of_tokens, memory[at : at + count].copy()))
                at += count
            with contextlib.suppress(OSError):
                os.utime(path)
            return SavedState(tokens, checkpoints, memory[at : at + state_bytes], tokens_per_s, path)
        except FileNotFoundError:  # it made room for others
            return None
        except (ValueError, struct.error) as error:
            log.warning("%s: %s", path, error)
            drop(path)
            return None

    def _make_room(self, wanted_bytes: int) -> bool:
        """Whether the files of all origins leave room for so many bytes, without those that were used longest ago."""
        files: list[tuple[float, int, Path]] = []
        for path in self._root.glob("*/*"):
            with contextlib.suppress(OSError):  # another runner has deleted it
                facts = path.stat()
                if path.suffix != ".state" and time.time() - facts.st_mtime > ABANDONED_S:
                    path.unlink()
                else:
                    files.append((facts.st_mtime, facts.st_size, path))
        there = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if there + wanted_bytes <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            there -= size
            if path.parent != self._folder:
                with contextlib.suppress(OSError):  # others are in it
                    path.parent.rmdir()
        return there + wanted_bytes <= self._most_bytes

    def _drop_beginnings(self, new: Path, tokens: array[int]) -> None:
        """Files whose tokens are the beginning of those in `new` are of no more use."""
        for path, (shorter, _, _) in self._index().items():
            if path != new and tokens[: len(shorter)] == shorter:
                with contextlib.suppress(OSError):
                    path.unlink()


def _glance(path: Path) -> tuple[array[int], float, int] | None:
    """A file's tokens, how fast they were read, and the bytes of the state; None for what cannot be one."""
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            magic, n_tokens, _, state_bytes, tokens_per_s = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC or _FIRST + 4 * n_tokens + state_bytes > n_bytes:
                return None
            file.seek(_FIRST)
            return array("i", file.read(4 * n_tokens)), tokens_per_s, state_bytes
    except (ValueError, struct.error):
        return None


@contextlib.contextmanager
def _mapped(path: Path, n_bytes: int) -> Iterator[mmap.mmap]:
    """A new file of so many bytes, as memory. They are set aside at once: on a full disk, writing to memory would end
    the process. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
        pages = mmap.mmap(descriptor, n_bytes)
    finally:
        os.close(descriptor)
    with pages:
        yield pages
