"""What a claim says about a run."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, NamedTuple


class Claimed(NamedTuple):
    """What a claim says about a run, in the order of the statement's columns."""

    task_id: uuid.UUID
    run_id: uuid.UUID
    queue_name: str
    priority: int
    available_at: datetime
    task_name: str
    params: str | None
    headers: str | None
    attempt: int
    fence: int
    cancel_at: datetime | None
    now: datetime

    @property
    def key(self) -> tuple[uuid.UUID, int]:
        """What no other run has."""
        return self.task_id, self.fence

    @property
    def log_fields(self) -> dict[str, Any]:
        """Which run a line in the log is about, as attributes of its record."""
        return {
            "task_id": str(self.task_id),
            "task_name": self.task_name,
            "run_id": str(self.run_id),
            "attempt": self.attempt,
            "queue_name": self.queue_name,
        }

    @property
    def fresh(self) -> bool:
        """Whether nothing can have been recorded yet: nobody had it before."""
        return self.fence == 1
