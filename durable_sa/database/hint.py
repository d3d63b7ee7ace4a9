"""The value of a wake-up hint, and the channel that hints are sent on."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from ..models import SCHEMA

MAX_RECEIVERS = 50
"""Tasks with new messages that a hint names; they take a quarter of a payload. Workers look for more by themselves."""
MAX_PAYLOAD = 7000
"""Bytes of a NOTIFY payload; Postgres allows 8,000."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def channel_name(schema: str) -> str:
    """Return the channel of a schema's hints, within the 63 bytes of an identifier."""
    if schema == SCHEMA:
        return "durable"
    return f"durable_{hashlib.blake2b(schema.encode(), digest_size=10).hexdigest()}"


@dataclass(slots=True)
class Hint:
    """A hint at work for workers. It says what may be worth a look, never what to do."""

    lanes: dict[tuple[str, int], datetime] = field(default_factory=dict[tuple[str, int], datetime])
    """Queue and priority of tasks, each with the earliest time at which one of them is claimable."""
    events: bool = False
    """True if events were emitted."""
    cancelled: bool = False
    """True if tasks that were running have been cancelled or deleted."""
    timers: bool = False
    """True if something new is due at a given time: a deadline of a task, a tick of a schedule."""
    receivers: set[uuid.UUID] = field(default_factory=set[uuid.UUID])
    """Tasks to which messages were sent."""
    messages: bool = False
    """True if messages were sent to other tasks, too."""
    tasks: int = 0
    """The number of tasks in the lanes. Known only in the process that made the hint; it is not sent."""

    def __bool__(self) -> bool:
        return bool(self.lanes) or self.events or self.cancelled or self.timers or bool(self.receivers) or self.messages

    def add_receivers(self, task_ids: Iterable[uuid.UUID]) -> Hint:
        """Add tasks to which messages were sent."""
        self.receivers.update(task_ids)
        if len(self.receivers) > MAX_RECEIVERS:
            self.receivers.clear()
            self.messages = True
        return self

    def add(self, queue_name: str, priority: int, available_at: datetime | None, *, tasks: int = 1) -> None:
        """Add tasks of a lane, the first of which is claimable at `available_at`, or none of them if that is None."""
        if available_at is None:
            return
        self.tasks += tasks
        known = self.lanes.get((queue_name, priority))
        if known is None or available_at < known:
            self.lanes[queue_name, priority] = available_at

    def add_rows(self, rows: Iterable[Row[Any]]) -> Hint:
        """Add tasks as a statement returned them: queue_name, priority, available_at."""
        for row in rows:
            self.add(row.queue_name, row.priority, row.available_at)
        return self

    def add_follow_ups(self, rows: Iterable[Row[Any]]) -> Hint:
        """Add the follow-ups of tasks that a statement has ended."""
        for row in rows:
            self.add(row.follow_up_queue, row.follow_up_priority, row.follow_up_at)
        return self

    def merge(self, other: Hint) -> None:
        """Add all of another hint."""
        tasks = self.tasks + other.tasks
        for (queue_name, priority), available_at in other.lanes.items():
            self.add(queue_name, priority, available_at)
        self.tasks = tasks
        self.events |= other.events
        self.cancelled |= other.cancelled
        self.timers |= other.timers
        self.messages |= other.messages
        self.add_receivers(other.receivers)

    def clear(self) -> None:
        """Remove all, because it has been sent."""
        self.lanes.clear()
        self.receivers.clear()
        self.events = self.cancelled = self.timers = self.messages = False
        self.tasks = 0

    def encode(self) -> str:
        """Encode the hint as a NOTIFY payload. With too many lanes to name it names none: workers then scan all."""
        lanes = [
            [queue_name, priority, int((available_at - _EPOCH).total_seconds() * 1_000_000)]
            for (queue_name, priority), available_at in self.lanes.items()
        ]
        flags: list[object] = [int(self.events), int(self.cancelled), int(self.timers)]
        # Only where there are messages, because workers of earlier versions take a longer payload for an unknown one.
        if self.receivers or self.messages:
            flags += [[task_id.hex for task_id in self.receivers], int(self.messages)]
        text = json.dumps([lanes, *flags], separators=(",", ":"))
        if len(text) > MAX_PAYLOAD:
            text = json.dumps([None, *flags], separators=(",", ":"))
        return text

    @classmethod
    def decode(cls, payload: str) -> Hint | None:
        """Decode a payload; None if all lanes are worth a look, or the payload is not one of ours."""
        try:
            lanes, events, cancelled, timers, *more = json.loads(payload)
            if lanes is None:
                return None
            hint = cls(events=bool(events), cancelled=bool(cancelled), timers=bool(timers))
            if more:
                receivers, messages = more
                hint.messages = bool(messages)
                hint.add_receivers(uuid.UUID(task_id) for task_id in receivers)
            for queue_name, priority, micros in lanes:
                hint.add(str(queue_name), int(priority), datetime.fromtimestamp(int(micros) / 1_000_000, UTC))
            return hint
        except (ValueError, TypeError, AttributeError, OverflowError, OSError):
            return None
