"""The saved states of a replica: which are looked for, and which are made while it serves.

At the end all that slots hold is saved (`Engine.park`). Before that it is only what several requests began with and no
slot would hold any longer. To copy it out of the cache is work of the engine's thread, and all answers wait meanwhile.
So while others are under way, a copy takes `MOST_COPY_S` at the most, and all copies a tenth of the time. The rest is
done by a thread of its own: the checksum, the file, the room on the disk. Until then the copy is in RAM, which is
filled several times as fast as a file's pages. It is not booked: it is made where a GiB more is free, one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from actors.devices.host import memory_available_bytes
from actors.serving.generation import TELLING_TOKENS
from actors.serving.model import Adapters
from actors.serving.protocol import LoadSpec
from actors.serving.saved_states import SavedStates, origin_of, states_folder
from actors.serving.slot import Slot
from actors.serving.state_files import Bytes
from actors.serving.states import SavedState, Speeds
from scheduler.units import GIB

MOST_SETS = 64
"""Of adapters with scales, whose folders of saved states are remembered."""

MOST_COPY_S = 0.1
"""That answers under way wait for a copy. A pause of that length is about the shortest that a reader notices."""

REST = 9
"""Times as long as a copy took, no other is made while answers are under way."""

MOST_LOADS_S = 0.5
"""That answers under way wait for the states of one source that are loaded, one after the other. Then it is a tenth of
the time. Four chats of 4,000 tokens that come back together take 0.04 to 0.07 s (decision 031)."""

SHORT_LOAD_S = 0.25
"""Of a load that is always worth it: else its tokens are read, and others wait for that much longer in all."""

LEFT_BYTES = 1 * GIB
"""Of the machine's RAM that stay free while a state is in it: for about as long as a disk takes to write it."""

Write = Callable[[Bytes], bool]


class Keeper:
    """Of one replica. `find` may be called from any thread, `close` when the engine's thread has ended; all else
    belongs to that."""

    def __init__(self, spec: LoadSpec, *, can_cut: bool, root: Path | None = None) -> None:
        """`can_cut`: the model's memory can be cut anywhere. `root`: where states lie, if not in the user's folder."""
        self._spec = spec
        self._can_cut = can_cut
        self._root = root
        self._states: dict[Adapters, SavedStates] = {}
        self._speeds = Speeds()
        self._read_tokens, self._read_s = 0, 0.0
        self._completing: Thread | None = None
        self._rest_until_s = 0.0
        self._loaded_at_s = 0.0  # for the last time, while others waited
        self._loads_paid_s: dict[str, float] = {}  # by source: when its loads have been a tenth of the time

    @property
    def tokens_read_per_s(self) -> float:
        """How fast the model reads prompts; 0: none was long enough to tell."""
        return self._read_tokens / self._read_s if self._read_s else 0.0

    def was_read(self, n_tokens: int, seconds: float) -> None:
        """So many tokens of prompts, in one turn. A few say little of many."""
        if n_tokens < TELLING_TOKENS:
            return
        self._read_tokens, self._read_s = self._read_tokens + n_tokens, self._read_s + seconds

    def find(self, prompt: Sequence[int], n_known: int, adapters: Adapters) -> SavedState | None:
        """A state that spares a good part of the prompt, read from the disk. `n_known`: tokens that are there."""
        states = self._of(adapters)
        return states.find(prompt, n_known) if states is not None else None

    def would_keep(self, tokens: Sequence[int], adapters: Adapters, state_bytes: int, *, others_run: bool) -> bool:
        """Whether to save what was read of `tokens`, about so many bytes. `others_run`: answers would wait for it."""
        states = self._of(adapters)
        if states is None or (self._completing is not None and self._completing.is_alive()):
            return False
        copy_s = self._speeds.copying.seconds(state_bytes)
        if memory_available_bytes() < state_bytes + LEFT_BYTES:
            return False
        if others_run and (copy_s > MOST_COPY_S or time.perf_counter() < self._rest_until_s):
            return False
        return states.pays(tokens, state_bytes, self.tokens_read_per_s, in_ram=True)

    def keep(self, slot: Slot, state_bytes: int, write: Write, told: Callable[[Adapters], object]) -> None:
        """Saves all that `slot` holds. Another thread completes the file, and tells then that there is one."""
        states, began_s, adapters = self._of(slot.adapters), time.perf_counter(), slot.adapters
        if states is None:
            return
        part = states.begin(
            slot.tokens, slot.checkpoints, state_bytes, self.tokens_read_per_s, slot.source, in_ram=True
        )
        if part is None:
            return
        was_written = write(part.memory)
        now_s = time.perf_counter()
        self._rest_until_s = now_s + REST * (now_s - began_s)
        if not was_written:
            part.discard()
            return
        self._speeds.copying.took(state_bytes, now_s - began_s)

        def complete() -> None:
            if states.complete(part):
                told(adapters)

        self._completing = Thread(target=complete, name="saving", daemon=True)
        self._completing.start()

    def may_load(self, source: str, state_bytes: int) -> bool:
        """Whether to load a state of so many bytes for `source`, although answers under way wait for it.

        A short load is always worth it. But such loads take half of the time at the most.
        """
        now_s, load_s = time.perf_counter(), self._speeds.loading.seconds(state_bytes)
        if load_s <= min(SHORT_LOAD_S, now_s - self._loaded_at_s):
            return True
        owed_s = max(0.0, self._loads_paid_s.get(source, now_s) - now_s)
        return owed_s + (1 + REST) * load_s <= (1 + REST) * MOST_LOADS_S

    def load(self, load: Callable[[], bool], source: str, state_bytes: int, *, others_run: bool) -> bool:
        """Has a state loaded into the cache. False where that fails. `others_run`: answers under way wait for it."""
        began_s = time.perf_counter()
        was_loaded = load()
        now_s = time.perf_counter()
        if was_loaded:
            self._speeds.loading.took(state_bytes, now_s - began_s)
        if not others_run:
            return was_loaded
        self._loaded_at_s = now_s
        paid_s = max(self._loads_paid_s.get(source, began_s), began_s) + (1 + REST) * (now_s - began_s)
        owing = {other: until_s for other, until_s in self._loads_paid_s.items() if until_s > now_s}
        self._loads_paid_s = {**owing, source: paid_s}
        return was_loaded

    def park(self, slot: Slot, state_bytes: int, write: Write) -> bool:
        """Saves all that `slot` holds, to the end. False where it was not, or was not worth it."""
        states = self._of(slot.adapters)
        return states is not None and states.save(
            slot.tokens, slot.checkpoints, state_bytes, write, self.tokens_read_per_s, slot.source
        )

    def close(self) -> None:
        """Waits for the file that is being completed."""
        if self._completing is not None:
            self._completing.join()

    def _of(self, adapters: Adapters) -> SavedStates | None:
        """What is on disk of conversations with these adapters."""
        if adapters not in self._states:
            if len(self._states) >= MOST_SETS:
                self._states.clear()
            try:
                origin, root = origin_of(self._spec, adapters), self._root or states_folder()
            except (OSError, RuntimeError):  # the file was deleted after it was loaded, or there is no home folder
                return None
            self._states[adapters] = SavedStates(
                root, origin, self._spec.saved_state_bytes, self._speeds, can_cut=self._can_cut
            )
        return self._states.get(adapters)
