"""A durable wait, while the code of a run is blocked on it."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from datetime import datetime

from .writes import Stored, WaitSpec


@dataclass(slots=True, eq=False)
class PendingWait:
    """A durable wait that user code is blocked on."""

    future: asyncio.Future[Stored]
    key: uuid.UUID
    kind: str
    name: str
    event_name: str | None = None
    child_task_id: uuid.UUID | None = None
    due_at: datetime | None = None
    delay: float | None = None
    called_at: float = 0.0
    registered: bool = False

    def spec(self) -> WaitSpec:
        """The wait as it is stored now; time that has passed since the call is taken off."""
        delay = None
        if self.due_at is None and self.delay is not None:
            delay = max(0.0, self.delay - (time.monotonic() - self.called_at))
        return WaitSpec(self.key, self.kind, self.name, self.event_name, self.child_task_id, self.due_at, delay)
