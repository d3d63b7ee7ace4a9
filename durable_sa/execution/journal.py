"""The records of a task that a run begins with: its checkpoints by key, and the waits that are still open."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import NamedTuple

from ..ids import family, is_part, without_family


class Entry(NamedTuple):
    """One checkpoint."""

    kind: str
    name: str
    status: str
    value: str | None
    child_task_id: uuid.UUID | None = None
    left_behind: bool = False
    """The value was too large to load with the others, and is read when it is used."""


class Journal:
    """The checkpoints of one task. Each is handed out once, because each call of a task has a key of its own."""

    __slots__ = ("_asked", "_entries", "_first_keys", "_passed", "_racing", "_unseen_waits", "_unused", "_waits")

    def __init__(
        self,
        entries: dict[uuid.UUID, Entry] | None = None,
        waits: Iterable[tuple[uuid.UUID, datetime | None]] = (),
        racing: Collection[uuid.UUID] = (),
    ) -> None:
        """Keep the checkpoints by key, the stored waits with their deadlines, and the keys of those in races."""
        self._entries = entries or {}
        self._racing = racing
        self._waits = dict(waits)
        self._unseen_waits = set(self._waits)
        self._unused: Counter[tuple[str, str]] | None = None
        self._asked: set[uuid.UUID] = set()
        """Keys of the calls that the code has made, awaited or not."""
        self._passed: dict[bytes, set[uuid.UUID]] | None = None
        """By family the recorded keys of calls that the code has not made."""
        self._first_keys: dict[bytes, uuid.UUID] | None = None

    def ask(self, key: uuid.UUID) -> None:
        """Note that the code has made the call of this key."""
        if self._entries:
            self._asked.add(key)
            if self._passed is not None:
                self._passed.get(family(key), set()).discard(key)

    def passes_over(self, key: uuid.UUID) -> bool:
        """Return whether a call is recorded with other arguments than this step, and the code has not made it.

        That call has the same kind and name, and was made in the same branch. A branch makes its calls in their order,
        so this one stands where that one did. Calls of other branches may come later.
        """
        if not self._entries:
            return False
        if self._passed is None:
            self._passed = {}
            for recorded, entry in self._entries.items():
                if entry.kind in ("step", "transaction") and recorded not in self._asked and not is_part(recorded):
                    self._passed.setdefault(family(recorded), set()).add(recorded)
        return bool(self._passed.get(family(key)))

    def _key_without_family(self, key: uuid.UUID) -> uuid.UUID | None:
        """Return the key under which the call of `key` was recorded before keys had families."""
        if self._first_keys is None:
            self._first_keys = {without_family(recorded): recorded for recorded in self._entries}
        return self._first_keys.get(without_family(key))

    def take(self, key: uuid.UUID) -> Entry | None:
        """Remove and return the checkpoint under this key, if one is recorded."""
        if not self._entries:
            return None
        entry = self._entries.pop(key, None)
        if entry is None and (first := self._key_without_family(key)) is not None:
            entry = self._entries.pop(first, None)
        if entry is not None and self._unused is not None and not is_part(key):
            self._unused[entry.kind, entry.name] -= 1
        return entry

    @property
    def waiting(self) -> bool:
        """True if waits are stored that were not over when the run began."""
        return bool(self._waits)

    def wait(self, key: uuid.UUID) -> tuple[bool, datetime | None]:
        """Return whether a wait is stored, and the time at which it ends; None if it has no time limit."""
        self._unseen_waits.discard(key)
        return key in self._waits, self._waits.get(key)

    def receives(self, key: uuid.UUID) -> bool:
        """Return whether a wait is stored by which a message is received as soon as it is sent."""
        return key in self._waits and key not in self._racing

    @property
    def used_up(self) -> bool:
        """True once the replay has come to all calls that are recorded, and to all waits that are stored."""
        return not self._unseen_waits and not (self._entries and any(True for _ in self._calls()))

    def knows(self, key: uuid.UUID) -> bool:
        """Return whether a call is recorded that this replay has not used yet, or its wait stored."""
        return key in self._entries or key in self._waits

    @property
    def empty(self) -> bool:
        """True if nothing is recorded that this replay has not used yet."""
        return not self._entries and not self._waits

    def holds_other(self, kind: str, name: str) -> bool:
        """Return whether a checkpoint of this name is recorded that this replay has not used (yet)."""
        if not self._entries:
            return False
        if self._unused is None:
            self._unused = Counter((entry.kind, entry.name) for entry in self._calls())
        return self._unused[kind, name] > 0

    def unused_names(self) -> list[str]:
        """Return the names of calls that are recorded and that this replay has not made."""
        return sorted({entry.name for entry in self._calls()}) if self._entries else []

    def _calls(self) -> Iterator[Entry]:
        """Return the checkpoints without those of calls inside a step, whose result stands for them."""
        return (entry for key, entry in self._entries.items() if not is_part(key))


EMPTY_JOURNAL = Journal()
"""The journal of a task's first run."""
