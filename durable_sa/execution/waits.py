"""Durable waits: pending in a run, as they are stored, and what they come to."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

logger = logging.getLogger("durable_sa")

_MAX_WARNED = 1000
_warned: set[str] = set()
"""Names of events whose waiters in another queue were logged."""
MESSAGE_WAITS = frozenset({"message", "race message"})
"""Kinds of waits for a message: one that receives it, and one in a race, which only wakes the task."""


class Stored(NamedTuple):
    """The checkpoint that the database holds under a key, which may be that of an earlier run."""

    status: str
    value: str | None
    child_task_id: uuid.UUID | None = None


class WaitSpec(NamedTuple):
    """A wait as it is stored. It ends at `due_at`, or `delay` seconds after it is stored, or without a time limit."""

    key: uuid.UUID
    kind: str
    name: str
    event_name: str | None
    child_task_id: uuid.UUID | None
    due_at: datetime | None
    delay: float | None


@dataclass(slots=True, eq=False)
class PendingWait:
    """A durable wait that user code is blocked on."""

    key: uuid.UUID
    kind: str
    name: str
    event_name: str | None = None
    child_task_id: uuid.UUID | None = None
    due_at: datetime | None = None
    delay: float | None = None
    """Seconds from the call on."""
    future: asyncio.Future[Stored] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    called_at: float = 0.0
    """The time of the call, by `time.monotonic`."""
    registered: bool = False
    """True once it is stored, or about to be."""

    def spec(self) -> WaitSpec:
        """Return the wait as it is stored now, without the seconds that have passed since the call."""
        delay = None
        if self.due_at is None and self.delay is not None:
            delay = max(0.0, self.delay - (time.monotonic() - self.called_at))
        return WaitSpec(self.key, self.kind, self.name, self.event_name, self.child_task_id, self.due_at, delay)


def warn_of_waiters_elsewhere(name: str, queue_name: str, elsewhere: str) -> None:
    """Log once for each name that tasks wait for the event in another queue."""
    if name in _warned:
        return
    if len(_warned) >= _MAX_WARNED:
        _warned.clear()
    _warned.add(name)
    logger.warning(
        "event %r was emitted into queue %r, where no task waits for it, while one waits for it in queue %r; "
        "each queue has events of its own: name the queue with queue_name=",
        name,
        queue_name,
        elsewhere,
    )
