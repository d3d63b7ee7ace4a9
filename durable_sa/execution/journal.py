"""What a run finds recorded from before: its checkpoints by key, and the waits that are still open."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import NamedTuple

from ..ids import is_part

logger = logging.getLogger("durable_sa")


class Entry(NamedTuple):
    """One checkpoint."""

    kind: str
    name: str
    status: str
    value: str | None
    child_task_id: uuid.UUID | None = None
    left_behind: bool = False
    """The value was too much to load with the others and is read when it is asked for."""


class Journal:
    """The checkpoints of one task, each handed out once, since each call of a task has a key of its own."""

    __slots__ = ("_entries", "_unused", "_waits")

    def __init__(
        self, entries: dict[uuid.UUID, Entry] | None = None, waits: Iterable[tuple[uuid.UUID, datetime | None]] = ()
    ) -> None:
        self._entries = entries or {}
        self._waits = dict(waits)
        self._unused: Counter[tuple[str, str]] | None = None

    def take(self, key: uuid.UUID) -> Entry | None:
        """The checkpoint under this key, if there is one."""
        if not self._entries:
            return None
        entry = self._entries.pop(key, None)
        if entry is not None and self._unused is not None and not is_part(key):
            self._unused[entry.kind, entry.name] -= 1
        return entry

    @property
    def waiting(self) -> bool:
        """Whether waits are stored that were not over when the run began."""
        return bool(self._waits)

    def wait(self, key: uuid.UUID) -> tuple[bool, datetime | None]:
        """Whether a wait was stored before, and when it is over; None if it has no end."""
        return key in self._waits, self._waits.get(key)

    def holds_other(self, kind: str, name: str) -> bool:
        """Whether something of this name is recorded that this replay has not asked for (yet)."""
        if not self._entries:
            return False
        if self._unused is None:
            self._unused = Counter((entry.kind, entry.name) for entry in self._whole())
        return self._unused[kind, name] > 0

    def unused_names(self) -> list[str]:
        """Names of the calls that are recorded and were never made again."""
        return sorted({entry.name for entry in self._whole()}) if self._entries else []

    def _whole(self) -> Iterator[Entry]:
        """Without the parts of steps, whose results stand for them."""
        return (entry for key, entry in self._entries.items() if not is_part(key))


EMPTY_JOURNAL = Journal()
"""Of a run that is the first of its task."""
