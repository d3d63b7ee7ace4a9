"""Sentences about times, schedules, and what a task waits for."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from ..client.wording import span
from ..results import HistoryEntry, LimitKeyState, TaskInfo, TaskStatus

_DAYS: Final = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DAY_NAMES: Final = {name[:3].lower(): number for number, name in enumerate(_DAYS[:7])}
_MACROS: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_EVERY = re.compile(r"\*/(\d{1,2})")


class Reason(NamedTuple):
    """Why a task does not go on at this moment, or where it is."""

    text: str
    since: datetime | None = None
    until: datetime | None = None
    event: str | None = None
    """The event that it waits for."""
    task_id: uuid.UUID | None = None
    """The subtask that it waits for."""


class Limited(NamedTuple):
    """The state of a limit key, or of a queue with a limit."""

    name: str
    """Such as `key 'acme'`."""
    state: LimitKeyState
    opens_at: datetime | None = None
    slots: tuple[int, int] | None = None
    """How many slots are taken, of how many; None if that is not shown."""

    def reason(self, since: datetime | None) -> Reason | None:
        """Return why no task of it starts, None if one may."""
        match self.state:
            case "closed":
                return Reason(f"due, but {self.name} is closed", since, self.opens_at)
            case "full":
                taken = "" if self.slots is None else f": {self.slots[0]:,} of {self.slots[1]:,} are taken"
                return Reason(f"due, waits for a slot of {self.name}{taken}", since)
            case "throttled":
                return Reason(f"due, waits for the rate of {self.name}", since, self.opens_at)
            case "open":
                return None


def reasons(
    task: TaskInfo,
    history: Sequence[HistoryEntry],
    queue: dict[str, Any] | None,
    now: datetime,
    limits: Sequence[Limited] = (),
) -> list[Reason]:
    """Return what an unfinished task waits for, in words.

    `queue` has its `paused_at` and its live `workers`, `limits` the states of the task's limit key and of its queue.
    """
    match task.status:
        case TaskStatus.RUNNING:
            running = Reason(f"runs on worker {task.worker or '(unknown)'}", since=task.started_at)
            steps = [entry for entry in history if entry.kind == "step" and entry.status == "running"]
            return [running, *(Reason(f"in step {entry.name!r}", since=entry.began_at) for entry in steps)]
        case TaskStatus.SLEEPING:
            return [_waiting(entry) for entry in history if _is_wait(entry)] or [Reason(task.waits_for or "a wake-up")]
        case TaskStatus.PENDING:
            return [_pending(task, queue, now, limits)]
        case _:
            return []


def _is_wait(entry: HistoryEntry) -> bool:
    return entry.status == "waiting" and entry.kind not in ("attempt", "child")


def _waiting(entry: HistoryEntry) -> Reason:
    until: Any = entry.detail.get("until")
    since = entry.began_at
    if entry.kind == "event":
        return Reason(f"waits for event {entry.name!r}", since, until, event=entry.name)
    if entry.kind == "join":
        return Reason("waits for a subtask", since, until, task_id=entry.detail.get("task_id"))
    if entry.kind == "sleep":
        return Reason(f"sleeps, {entry.name!r}", since, until)
    return Reason(f"waits for {entry.kind} {entry.name!r}", since, until)


def _pending(task: TaskInfo, queue: dict[str, Any] | None, now: datetime, limits: Sequence[Limited]) -> Reason:
    at = task.available_at
    if queue is not None and queue["paused_at"] is not None:
        return Reason(f"queue {task.queue_name!r} is paused", since=queue["paused_at"])
    if at is not None and at > now:
        if task.failures:
            return Reason(f"retries after failure {task.failures} of {task.max_attempts}", until=at)
        return Reason("waits for its time", since=task.created_at, until=at)
    if queue is not None and not queue["workers"]:
        return Reason(f"due, but no worker serves queue {task.queue_name!r}", since=at)
    if (limited := next((found for one in limits if (found := one.reason(at)) is not None), None)) is not None:
        return limited
    if limits and task.limit_key is not None:
        return Reason(f"due, waits for the turn of key {task.limit_key!r}, or a free slot of a worker", since=at)
    return Reason("due, waits for a free slot of a worker", since=at)


def cron_in_words(expression: str) -> str | None:
    """Return a cron expression in words, or None for one that is read best as it is."""
    parts = _MACROS.get(expression.strip().lower(), expression).split()
    if len(parts) == 6 and parts[0] == "0":
        parts = parts[1:]
    if len(parts) != 5:
        return None
    minute, hour, day, month, weekday = parts
    if month != "*":
        return None
    days = _days(day, weekday)
    if days is None:
        return None
    if hour == "*" and (every := _every(minute)) is not None:
        return f"every {every}{'' if days == 'every day' else f', {days}'}"
    if not minute.isdecimal():
        return None
    if hour == "*":
        return f"every hour at minute {int(minute)}{'' if days == 'every day' else f', {days}'}"
    hours = hour.split(",")
    if not all(each.isdecimal() for each in hours) or len(hours) > 4:
        return None
    return f"{days} at {_listed([f'{int(each):02}:{int(minute):02}' for each in hours])}"


def _every(minute: str) -> str | None:
    if minute == "*":
        return "minute"
    found = _EVERY.fullmatch(minute)
    # Others begin anew with each hour: */45 ticks after 45 minutes, and then after 15.
    return f"{number} minutes" if found is not None and (number := int(found[1])) > 1 and 60 % number == 0 else None


def _days(day: str, weekday: str) -> str | None:
    if day == "*" and weekday == "*":
        return "every day"
    if day == "*":
        return _weekdays(weekday.lower())
    if weekday == "*" and day.isdecimal():
        return f"on day {int(day)} of each month"
    return None


def _weekdays(text: str) -> str | None:
    if text in ("1-5", "mon-fri"):
        return "Monday to Friday"
    if text in ("0,6", "6,0", "6-7", "sat,sun"):
        return "on weekends"
    numbers = [_DAY_NAMES.get(part, int(part) if part.isdecimal() else -1) for part in text.split(",")]
    if not all(0 <= number <= 7 for number in numbers):
        return None
    return f"every {_listed([_DAYS[number] for number in numbers])}"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def duration(seconds: float | None) -> str:
    """Return a duration as it is read best: `4 ms`, `12.3 s`, `2 h 5 min`."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    return span(seconds)
