"""The records of a task that a run begins with: its checkpoints by key, and the waits that are still open."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import NamedTuple

from ..ids import is_part


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

    __slots__ = ("_entries", "_unseen_waits", "_unused", "_waits")

    def __init__(
        self, entries: dict[uuid.UUID, Entry] | None = None, waits: Iterable[tuple[uuid.UUID, datetime | None]] = ()
    ) -> None:
        self._entries = entries or {}
        self._waits = dict(waits)
        self._unseen_waits = set(self._waits)
        self._unused: Counter[tuple[str, str]] | None = None

    def take(self, key: uuid.UUID) -> Entry | None:
        """Remove and return the checkpoint under this key, if one is recorded."""
        if not self._entries:
            return None
        entry = self._entries.pop(key, None)
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
