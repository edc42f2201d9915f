"""What a model has read of conversations, on disk: so they survive its eviction, and go on without being read again.

A *state* is what llama.cpp keeps of a sequence (`llama_state_seq_get_data`). One file holds one state, with its tokens
and checkpoints. Files lie in a folder that is named by their *origin*: all that must be equal for a state to be of use.
New files lie in the page cache, which is RAM that the kernel gives back when somebody needs it. So no budget of RAM is
booked for them. Their bytes on disk have a limit, which sources share: whoever holds most loses what he used longest
ago. A file's name says whose it is, by a hash.
Files and folders are private to the user. What is on disk is what was said, in the model's own terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from actors.devices.files import parts_of
from actors.serving.model import Adapters
from actors.serving.pieces import folded
from actors.serving.protocol import LoadSpec
from actors.serving.slot import common_prefix
from actors.serving.state_files import Bytes, Glance, Part, glance, read_state
from actors.serving.states import Checkpoint, SavedState, Speeds, drop

ABANDONED_S = 3600.0
"""A file that is still incomplete after this time belongs to a process that has ended."""

MOST_FILES = 512
"""For each prompt, all of one origin are compared with it: 7 ms for 500, 116 for 20,000. So each counts as at least so
many parts of the bytes that there may be."""

_HASHED_BYTES = 1 << 20  # of the model's file: its header

log = logging.getLogger(__name__)


def states_folder() -> Path:
    """Where this user's states lie on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arriero" / "states"


def origin_of(spec: LoadSpec, adapters: Adapters = ()) -> str:
    """A digest of the model's files, of its projector and the adapters that are used, and of all parameters that a
    state depends on. Raises OSError."""
    context = spec.context
    parts = [
        [_file(str(part)) for part in parts_of(Path(spec.path))], version("llama-cpp-python"),
        context.type_k, context.type_v, context.flash_attn, context.swa_full,
        context.n_ctx_slot,  # by which LongRoPE chooses its factors
        context.n_seq_max, context.kv_unified,
        [(_file(spec.adapters[number].path), scale) for number, scale in adapters],
        _file(spec.mmproj) if spec.mmproj else None,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _file(path: str) -> tuple[str, int, int]:
    """What tells a file from others, without reading all of it."""
    with open(path, "rb") as file:  # noqa: PTH123 - a glance at its header
        facts = os.fstat(file.fileno())
        return hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest(), facts.st_size, facts.st_mtime_ns


def gain_s(n_tokens: int, tokens_per_s: float, moving_s: float) -> float:
    """Seconds that are saved when a state is moved for so long instead of `n_tokens` being read."""
    return n_tokens / tokens_per_s - moving_s if tokens_per_s > 0 else 0.0


class SavedStates:
    """Those of one origin. `find` may be called from any thread; `begin` and `save` by one at a time."""

    def __init__(
        self, root: Path, origin: str, most_bytes: int, speeds: Speeds | None = None, *, can_cut: bool = True
    ) -> None:
        """`most_bytes`: of the files of all origins under `root`. `can_cut`: a state serves all that begins as it does;
        else only what begins with one of its checkpoints, or with all of it."""
        self._root = root
        self._folder = root / origin
        self._most_bytes = most_bytes
        self._speeds = speeds or Speeds()
        self._can_cut = can_cut
        self._seen_ns = 0
        self._files: dict[Path, Glance] = {}

    def find(self, prompt: Sequence[int], n_known: int) -> SavedState | None:
        """The state that spares most of the prompt, if that is worth it. `n_known`: tokens that are there anyway."""
        try:
            return self._find(prompt, n_known)
        except OSError as error:  # of the folder: it is no request's fault
            log.warning("saved conversations cannot be looked for: %s", error)
            return None

    def _find(self, prompt: Sequence[int], n_known: int) -> SavedState | None:
        best: tuple[float, Path] | None = None
        self._look()
        wanted = folded(prompt[:-1])  # the last one is read in any case
        for path, known in self._files.items():
            spared = self._usable(known.tokens, known.ends, common_prefix(known.tokens, wanted)) - n_known
            gain = gain_s(spared, known.tokens_per_s, self._speeds.restoring_s(known.state_bytes))
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, path
        return self._read(best[1]) if best else None

    def _usable(self, tokens: Sequence[int], ends: Sequence[int], common: int) -> int:
        """How much of `common` leading tokens a state can be set back to."""
        if self._can_cut or common == len(tokens):
            return common
        return max((end for end in ends if end <= common), default=0)

    def begin(
        self,
        tokens: Sequence[int],
        checkpoints: Sequence[Checkpoint],
        state_bytes: int,
        tokens_per_s: float,
        source: str,
        *,
        in_ram: bool = False,
    ) -> Part | None:
        """A file for a state of `state_bytes`; `complete` it. `in_ram`: see `Part`. None where it cannot
        be saved, or where it does not pay."""
        if not self.pays(tokens, state_bytes, tokens_per_s, in_ram=in_ram):
            return None
        name = hashlib.sha256(folded(tokens).tobytes()).hexdigest()[:32]
        whose = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            path = self._folder / f"{name}-{whose}.state"
            return Part(path, tokens, checkpoints, state_bytes, tokens_per_s, in_ram=in_ram)
        except OSError as error:  # the disk is full, or not ours to write to
            log.warning("a conversation was not saved: %s", error)
            return None

    def pays(self, tokens: Sequence[int], state_bytes: int, tokens_per_s: float, *, in_ram: bool = False) -> bool:
        """Whether to save and load such a state takes less time than to read again what no known file has. Nobody waits
        until what is copied to RAM is written."""
        held = folded(tokens)
        usable = (
            self._usable(each.tokens, each.ends, common_prefix(each.tokens, held)) for each in self._files.values()
        )
        saving = self._speeds.copying if in_ram else self._speeds.saving
        moving_s = saving.seconds(state_bytes) + self._speeds.restoring_s(state_bytes)
        return gain_s(len(tokens) - max(usable, default=0), tokens_per_s, moving_s) > 0

    def complete(self, part: Part) -> bool:
        """The state is in its memory. False where it could not be kept."""
        try:
            if not self._make_room(part):
                return False
            part.finish()
            self._look()
        except OSError as error:
            log.warning("a conversation was not saved: %s", error)
            return False
        finally:
            part.discard()
        self._drop_beginnings(part)
        return True

    def save(
        self,
        tokens: Sequence[int],
        checkpoints: Sequence[Checkpoint],
        state_bytes: int,
        write: Callable[[Bytes], bool],
        tokens_per_s: float,
        source: str = "",
    ) -> bool:
        """All at once: a state that `write` puts into the memory that it is given. False where it was not saved."""
        with contextlib.suppress(OSError):
            self._look()
        began_s = time.perf_counter()
        part = self.begin(tokens, checkpoints, state_bytes, tokens_per_s, source)
        if part is None:
            return False
        if not write(part.memory):
            part.discard()
            return False
        self._speeds.saving.took(state_bytes, time.perf_counter() - began_s)
        return self.complete(part)

    # ------------------------------------------------------------------ files

    def _look(self) -> None:
        """Which files are there; looked up again when the folder has changed. Raises OSError."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            self._files = {}
            return
        if changed_ns == self._seen_ns:
            return
        found = {}
        for path in self._folder.glob("*.state"):
            try:
                known = self._files.get(path) or glance(path)
            except OSError:  # it is gone, or cannot be read now
                continue
            if known is not None:
                found[path] = known
            else:
                drop(path)
        self._files, self._seen_ns = found, changed_ns

    def _read(self, path: Path) -> SavedState | None:
        """A file's state; None, and the file is gone, if it is damaged."""
        began_s = time.perf_counter()
        try:
            saved = read_state(path)
        except FileNotFoundError:  # it made room for others
            return None
        except (ValueError, struct.error) as error:
            log.warning("%s: %s", path, error)
            drop(path)
            return None
        self._speeds.reading.took(len(saved.state), time.perf_counter() - began_s)
        with contextlib.suppress(OSError):
            os.utime(path)
        return saved

    def _make_room(self, part: Part) -> bool:
        """Whether the files of all origins keep to their limit, those under way too, after some had to go. Whoever
        holds most loses what he used longest ago."""
        files: list[tuple[float, int, Path]] = []
        least = self._most_bytes // MOST_FILES  # that a file counts
        held = Counter(
            {_owner(part.path): max(least, part.n_bytes) if part.in_ram else 0}
        )  # else it is among the files
        for path in self._root.glob("*/*"):
            with contextlib.suppress(OSError):  # another runner has deleted it
                facts = path.stat()
                size = max(least, facts.st_size)
                if path.suffix == ".state":
                    files.append((facts.st_mtime, size, path))
                elif time.time() - facts.st_mtime > ABANDONED_S:
                    path.unlink()
                    continue
                held[_owner(path)] += size
        files.sort()
        victims: list[Path] = []
        while held.total() > self._most_bytes:
            most = max(held.values())
            oldest = next((each for each in files if held[_owner(each[2])] == most), None)
            if oldest is None:  # what is under way is more than anybody else holds
                return False
            files.remove(oldest)
            _, size, path = oldest
            held[_owner(path)] -= size
            victims.append(path)
        for path in victims:
            path.unlink(missing_ok=True)
            if path.parent != self._folder:
                with contextlib.suppress(OSError):  # others are in it
                    path.parent.rmdir()
        return True

    def _drop_beginnings(self, new: Part) -> None:
        """Files that serve nothing that the new one does not serve are of no more use."""
        made = self._files.get(new.path)
        for path, shorter in self._files.items():
            count = len(shorter.tokens)
            is_beginning = path != new.path and new.tokens[:count] == shorter.tokens
            if is_beginning and made is not None and self._usable(made.tokens, made.ends, count) == count:
                with contextlib.suppress(OSError):
                    path.unlink()


def _owner(path: Path) -> str:
    """Whose state a file is, by the hash in its name."""
    return path.stem.rpartition("-")[2]
