"""The values that a client returns: ids of spawned tasks, results of tasks, schedules, statistics."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast
from uuid import UUID

from .errors import InvalidConfiguration
from .validation import Duration, integer, seconds, text, timestamp

T_co = TypeVar("T_co", covariant=True)

# The generic classes have no slots: on Python 3.11 `TaskHandle[int](...)` fails for a frozen dataclass with slots.


class TaskStatus(StrEnum):
    """The status of a task."""

    PENDING = "pending"
    """Ready to be claimed, or waiting for `available_at` or for its next attempt."""
    RUNNING = "running"
    """A worker executes it."""
    SLEEPING = "sleeping"
    """Suspended: it waits for a time, an event or a child."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """True for the final statuses: completed, failed and cancelled. Only `retry_task` changes a failed one."""
        return self in (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)


@dataclass(frozen=True)
class SpawnResult(Generic[T_co]):
    """The ids of a spawned task, whose output is a `T`."""

    task_id: UUID
    run_id: UUID
    """The id of the task's latest run: `runs.run_id` once that attempt has ended."""
    attempt: int
    created: bool
    """False if a task with the same idempotency key existed: the ids are those of that task."""


@dataclass(frozen=True)
class TaskHandle(Generic[T_co]):
    """A reference to a task whose output is a `T`. It can be a param, a result or the argument of a step."""

    task_id: UUID


@dataclass(frozen=True)
class Race(Generic[T_co]):
    """The outcome of a race."""

    winner: str
    """The keyword of the wait that was over first."""
    value: T_co
    """The message, the payload or the result of the child; None for a sleep."""


@dataclass(frozen=True, slots=True)
class StreamItem(Generic[T_co]):
    """An item of a stream."""

    position: int
    """Where to go on: `read_stream(..., after=position)` begins behind it."""
    value: T_co = field(repr=False)


@dataclass(frozen=True, slots=True)
class StreamRestart:
    """A notice to a reader that the items it has read after `position` are superseded; new ones follow."""

    position: int


AnyTaskId: TypeAlias = UUID | SpawnResult[Any] | TaskHandle[Any]
"""A task as calls about existing tasks take it: its id, its handle, or the result of its spawn."""


@dataclass(frozen=True, slots=True)
class TaskErrorInfo:
    """Why a task failed."""

    name: str
    """The exception's class name."""
    message: str
    raw: Any = field(default=None, repr=False)
    """The data of a `UserError` as plain JSON, else None."""
    step: str | None = None
    """The step or transaction in which the failure arose; None for one of the task's own code."""


@dataclass(frozen=True)
class TaskPollResult(Generic[T_co]):
    """The status of a task, and its output or error."""

    task_id: UUID
    status: TaskStatus
    output: T_co | None = field(default=None, repr=False)
    """The result of a completed task, typed if the task is registered, else plain JSON. None before that."""
    error: TaskErrorInfo | None = None
    """The failure of a failed task, the time limit that cancelled a task, or the last failure of a task that was
    cancelled otherwise. None if there is none, and until the task has ended."""


def id_of(task: UUID | SpawnResult[Any] | TaskHandle[Any]) -> UUID:
    """Return the id of a task.

    Raises:
        TypeError: the object names no task.
    """
    if isinstance(task, SpawnResult | TaskHandle):
        return task.task_id
    if isinstance(task, UUID):  # pyright: ignore[reportUnnecessaryIsInstance]
        return task
    try:
        return UUID(str(task))
    except ValueError:
        what = repr(task[:80]) if isinstance(task, str) else type(task).__name__
        raise TypeError(f"a task is named by its UUID, a SpawnResult or a TaskHandle, not {what}") from None


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """A filter of tasks. A task matches if it matches all fields that are set; an empty filter matches every task.

    Raises:
        InvalidConfiguration: a time without a zone, a state that does not exist, or another value that matches nothing.
    """

    task_name: str | None = None
    queue_name: str | None = None
    """None: the tasks of all queues."""
    state: TaskStatus | str | Collection[TaskStatus | str] | None = None
    """A status, or several of them."""
    key: str | None = None
    """The idempotency key, or the unique key."""
    limit_key: str | None = None
    error_name: str | None = None
    """The class name of the last failure, also of one after which the task is retried."""
    spawned_after: datetime | None = None
    """Spawned at this time or later."""
    spawned_before: datetime | None = None
    ended_after: datetime | None = None
    """Ended, however it did, at this time or later."""
    ended_before: datetime | None = None
    running_longer_than: Duration | None = None
    """The time for which the current attempt has run, in seconds or as a `timedelta`."""
    parent: UUID | SpawnResult[Any] | TaskHandle[Any] | None = None
    """The task that has spawned it as a subtask."""
    version: int | None = None

    def __post_init__(self) -> None:
        for name in ("task_name", "queue_name", "key", "limit_key", "error_name"):
            if (value := getattr(self, name)) is not None:
                text(value, name)
        for name in ("spawned_after", "spawned_before", "ended_after", "ended_before"):
            if (moment := getattr(self, name)) is not None:
                object.__setattr__(self, name, timestamp(moment, name))
        if self.running_longer_than is not None:
            seconds(self.running_longer_than, "running_longer_than")
        if self.parent is not None:
            object.__setattr__(self, "parent", id_of(self.parent))
        if self.version is not None:
            integer(self.version, "version", minimum=1, maximum=2**31 - 1)
        if self.state is not None:
            given = cast("object", self.state)
            several = isinstance(given, Iterable) and not isinstance(given, str)
            states = tuple(_status(state) for state in (self.state if several else [self.state]))
            if not states:
                raise InvalidConfiguration("state", "it names no state", "Leave it out for tasks in any state.")
            object.__setattr__(self, "state", states if several else states[0])

    @property
    def states(self) -> tuple[TaskStatus, ...]:
        """The statuses of `state`; none if it is not set."""
        match self.state:
            case None:
                return ()
            case TaskStatus():
                return (self.state,)
            case _:
                return tuple(TaskStatus(state) for state in self.state)


def _status(state: object) -> TaskStatus:
    try:
        return TaskStatus(cast(str, state))
    except ValueError:
        shown = repr(state[:80]) if isinstance(state, str) else f"an object of type {type(state).__name__}"
        raise InvalidConfiguration("state", f"{shown} is none of {', '.join(TaskStatus)}") from None


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task as it was when it was read."""

    task_id: UUID
    task_name: str
    version: int | None
    queue_name: str
    status: TaskStatus
    attempt: int
    """The number of attempts that have begun."""
    key: str | None
    """The idempotency key, or the unique key."""
    limit_key: str | None
    parent_task_id: UUID | None
    created_at: datetime
    available_at: datetime | None
    """The time from which on it may be claimed. None while it waits for something that has no time."""
    first_started_at: datetime | None
    finished_at: datetime | None
    error: TaskErrorInfo | None
    """The last failure, also one after which the task is retried. Its message is without values unless they were
    asked for."""
    waits_for: str | None
    """The events, messages, subtasks and sleeps that a suspended task waits for, such as `event 'paid:17'`."""
    started_at: datetime | None = None
    """The start of the current or last attempt."""
    worker: str | None = None
    """The label of the worker that runs it."""
    priority: int = 0
    failures: int = 0
    """The failures of its own code since it was spawned or retried by hand."""
    max_attempts: int = 1
    """The number of failures at which it has failed."""
    lost_workers: int = 0
    """The workers that were lost in a row while they ran it; from two on it runs alone."""
    params: Any = field(default=None, repr=False)
    """Plain JSON. This and the following are None unless payloads were asked for."""
    headers: Mapping[str, Any] | None = field(default=None, repr=False)
    output: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One part of a task's history: an attempt, or a call of the task's code with its record."""

    kind: str
    """`attempt`, `step`, `transaction`, `try` (a failed try of a step), `child`, `event`, `join`, `sleep`, `emit`,
    `message` (one that was received), `send`, `race` or `value`."""
    name: str
    """The name of the call; empty for an attempt, and for calls that have none."""
    status: str
    """`completed`, `failed`, `cancelled` or `timeout`; `running` or `waiting` for what has not ended; and that of the
    subtask for a `child`."""
    attempt: int
    """The number of the attempt in which it ended, or goes on; 0 if it happened before the first."""
    began_at: datetime | None
    """None for calls that take no time, and for those that an earlier version has recorded."""
    ended_at: datetime | None
    """None for what has not ended."""
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """More about it, as far as it is known: `error` (a `TaskErrorInfo`), `traceback` and `worker` of an attempt;
    `task_id` and `task_name` of a subtask; `message_id` of a message; `winner` of a race; `until` of a wait. If
    payloads were asked for, `value`, and the `arguments` of a step, a transaction, a failed try, or the step in which
    an attempt failed: a dict of `args`, `kwargs`, and `cut`, which is True if they are longer than the 100 characters
    that are kept."""

    @property
    def duration(self) -> timedelta | None:
        """The time that it took; None if it has not ended, or if its beginning is not known."""
        return None if self.began_at is None or self.ended_at is None else self.ended_at - self.began_at


@dataclass(frozen=True)
class Page(Generic[T_co]):
    """A page of a list."""

    items: list[T_co]
    next: str | None = None
    """To be given as `after` for the next page. None: this is the last one."""


@dataclass(frozen=True, slots=True)
class BulkResult:
    """The numbers of tasks in a bulk operation."""

    matched: int
    """The tasks that the filter matched: all that were done or skipped."""
    done: int
    skipped: int
    """Tasks that were left as they are: the operation does not apply to them, or it was a dry run."""


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """A task that has failed or was cancelled: the params of a follow-up."""

    task_id: UUID
    task_name: str
    queue_name: str
    params: Any = field(repr=False)
    """The params of the task as plain JSON."""
    status: TaskStatus
    """`failed` or `cancelled`."""
    error: TaskErrorInfo | None = None
    """The failure, the time limit that cancelled the task, or the last failure of one that was cancelled otherwise."""
    truncated: bool = False
    """True if the params are left out, because they do not fit beside the error."""


@dataclass(frozen=True, slots=True)
class ScheduleInfo:
    """A stored schedule."""

    name: str
    task_name: str
    cron_expression: str
    timezone: str
    """IANA name of the time zone of the expression."""
    params: Any = field(repr=False)
    """Plain JSON."""
    spawn_options: Mapping[str, Any] = field(repr=False)
    """The options of each spawn, as plain JSON."""
    metadata: Mapping[str, Any] = field(repr=False)
    backend: Literal["worker", "pg_cron"]
    pgcron_job_name: str | None
    """The job's name in `cron.job`. None for the worker backend."""
    created_at: datetime
    updated_at: datetime
    queue_name: str = "default"
    """The queue to which the schedule belongs, and into which it spawns."""


@dataclass(frozen=True, slots=True)
class ScheduleFilter:
    """A filter of schedules. A schedule matches if it matches all fields that are set."""

    task_name: str | None = None
    metadata: Mapping[str, Any] | None = None
    """Entries that the schedule's metadata must contain."""
    queue_name: str | None = None
    """None: the schedules of all queues."""


LimitKeyState: TypeAlias = Literal["open", "full", "throttled", "closed"]
"""The state of a limit key; of several that are true of it, the first of closed, full, throttled."""


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """The numbers of a queue's tasks, all counted at the same moment."""

    queue_name: str
    paused: bool
    ready: int
    """Due and not claimed. While the queue is paused they stay so."""
    scheduled: int
    """Due later, asleep, or waiting for an event or a child."""
    running: int
    failed: int
    """Failed, and not yet deleted after their retention."""
    oldest_ready: timedelta | None
    """The time for which the oldest ready task has been due. None if no task is ready."""
    limit_keys: Mapping[LimitKeyState, int] = field(default_factory=dict[LimitKeyState, int])
    """How many of its limit keys are open, full, throttled or closed. Empty for a queue without limits."""


@dataclass(frozen=True, slots=True)
class LimitKeyInfo:
    """The state of a limit key."""

    key: str | None
    """None for the tasks of the queue that have no key."""
    state: LimitKeyState
    """`full`: its tasks hold all slots; `throttled`: its rate allows no start yet; `closed`: until `opens_at`."""
    running: int
    """Slots that its tasks hold."""
    waiting: int
    """Its tasks that are due and not claimed, counted up to 1,000."""
    opens_at: datetime | None
    """When a closed key opens, or a throttled one has its next start. None otherwise."""
