"""What the client gives back: ids of what was spawned, results of tasks, schedules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar
from uuid import UUID

T_co = TypeVar("T_co", covariant=True)

# The generic ones have no slots: on Python 3.11 `TaskHandle[int](...)` fails for a frozen dataclass that has.


class TaskStatus(StrEnum):
    """Where a task stands."""

    PENDING = "pending"
    """Ready to be claimed, or waiting for `available_at` or for its next attempt."""
    RUNNING = "running"
    """A worker has it."""
    SLEEPING = "sleeping"
    """Suspended: it waits for a time, an event or a child."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether nothing more happens by itself: completed, failed or cancelled."""
        return self in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)


@dataclass(frozen=True)
class SpawnResult(Generic[T_co]):
    """The ids of a spawned task, whose output is a `T`."""

    task_id: UUID
    run_id: UUID
    """The id of the task's latest run: `runs.run_id` once that attempt has ended."""
    attempt: int
    created: bool
    """False where a task with the same idempotency key was there before: then these are its ids."""


@dataclass(frozen=True)
class TaskHandle(Generic[T_co]):
    """Names a task whose output is a `T`. A plain value: it can be a param, a result or the argument of a step."""

    task_id: UUID


@dataclass(frozen=True, slots=True)
class TaskErrorInfo:
    """Why a task failed."""

    name: str
    """The exception's class name."""
    message: str
    raw: Any = field(default=None, repr=False)
    """The data of a `UserError` as plain JSON, else None."""


@dataclass(frozen=True)
class TaskPollResult(Generic[T_co]):
    """How a task stands, and what came of it."""

    task_id: UUID
    status: TaskStatus
    output: T_co | None = field(default=None, repr=False)
    """The result of a completed task, typed where the task is known, else plain JSON. None before that."""
    error: TaskErrorInfo | None = None
    """Why a failed task failed, or which limit on time has cancelled it; for a task that was cancelled otherwise, its
    last failure before. None where there was none, and as long as it has not ended."""


@dataclass(frozen=True, slots=True)
class ScheduleInfo:
    """A schedule as it is stored."""

    name: str
    task_name: str
    cron_expression: str
    timezone: str
    """IANA name of the zone in which the expression is read."""
    params: Any = field(repr=False)
    """Plain JSON."""
    spawn_options: Mapping[str, Any] = field(repr=False)
    """The options each spawn gets, as plain JSON."""
    metadata: Mapping[str, Any] = field(repr=False)
    backend: Literal["worker", "pg_cron"]
    pgcron_job_name: str | None
    """The job's name in `cron.job`. None for the worker backend."""
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class ScheduleFilter:
    """Which schedules to list: those that match everything that is given."""

    task_name: str | None = None
    metadata: Mapping[str, Any] | None = None
    """Entries that the schedule's metadata must contain."""


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """How a queue stands: the numbers of its tasks, counted at one moment."""

    queue_name: str
    paused: bool
    ready: int
    """Due, and claimed by nobody; while the queue is paused they wait for that."""
    scheduled: int
    """Due later, asleep, or waiting for an event or a child."""
    running: int
    failed: int
    """Ended so, and not yet deleted after their retention."""
    oldest_ready: timedelta | None
    """How long the oldest of those that are ready has been due. None where there is none."""
