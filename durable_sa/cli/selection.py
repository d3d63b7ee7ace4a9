"""Which tasks a command is about: filters, and tasks named by their ids or keys."""

from __future__ import annotations

import difflib
import shlex
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy import func, select

from .. import TaskFilter, TaskInfo, TaskRow, TaskStatus
from ..errors import TaskNotFound
from ..statements import inspection
from ..statements.reading import Where, matching
from .arguments import duration, moment
from .completion import complete_queues, complete_tasks
from .invocation import FAILED, Invocation, fail

_SHOWN = 10

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The id of the task, or its key.", show_default=False)]
TaskNames = Annotated[
    list[str] | None, typer.Argument(metavar="TASK", help="Ids of tasks, or their keys.", show_default=False)
]
Queue = Annotated[
    str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="Only tasks in this queue.")
]
States = Annotated[
    list[TaskStatus] | None, typer.Option("--state", "-s", help="Only tasks in this state; may be repeated.")
]
Name = Annotated[
    str | None, typer.Option("--name", "-n", autocompletion=complete_tasks, help="Only tasks of this name.")
]
ErrorName = Annotated[
    str | None,
    typer.Option("--error", "-e", metavar="CLASS", help="Only tasks whose last failure is of this exception class."),
]
Key = Annotated[str | None, typer.Option(help="Only tasks with this key.")]
LimitKey = Annotated[str | None, typer.Option(help="Only tasks with this limit key.")]
Parent = Annotated[str | None, typer.Option(metavar="TASK", help="Only subtasks of this task.")]


def _time(help_text: str) -> Any:
    return typer.Option(parser=moment, metavar="WHEN", help=help_text)


Since = Annotated[
    Any,
    _time(
        "Only tasks that have ended, or of unfinished ones were spawned, since: 12h for 12 hours ago, or "
        "2026-01-31T08:00Z."
    ),
]
Until = Annotated[Any, _time("Only tasks that have ended, or were spawned, before.")]
SpawnedAfter = Annotated[Any, _time("Only tasks that were spawned since.")]
SpawnedBefore = Annotated[Any, _time("Only tasks that were spawned before.")]
EndedAfter = Annotated[Any, _time("Only tasks that have ended since.")]
EndedBefore = Annotated[Any, _time("Only tasks that have ended before.")]
RunningLongerThan = Annotated[
    timedelta | None,
    typer.Option(
        parser=duration,
        metavar="DURATION",
        help="Only tasks whose current attempt has run for longer.",
        show_default=False,
    ),
]


class Filters(NamedTuple):
    """The conditions that select tasks."""

    queue_name: str | None = None
    states: tuple[TaskStatus, ...] = ()
    name: str | None = None
    error: str | None = None
    key: str | None = None
    limit_key: str | None = None
    parent: str | None = None
    since: datetime | timedelta | None = None
    until: datetime | timedelta | None = None
    spawned_after: datetime | timedelta | None = None
    spawned_before: datetime | timedelta | None = None
    ended_after: datetime | timedelta | None = None
    ended_before: datetime | timedelta | None = None
    running_longer_than: timedelta | None = None

    @property
    def anything(self) -> bool:
        """True if there is any condition."""
        return self != Filters()

    def among(self, states: Iterable[TaskStatus]) -> Filters:
        """Restrict the filters to these states, unless they name states themselves."""
        return self._replace(states=self.states or tuple(states))

    async def where(self, invocation: Invocation) -> Where:
        """Return the tasks that match all conditions.

        Raises:
            QueueNotFound: there is no queue of the name that is given.
            typer.Exit: there is no task that is the parent.
        """
        if self.queue_name is not None:
            await invocation.durable.require_queue(self.queue_name)
        chosen = TaskFilter(
            task_name=self.name,
            queue_name=self.queue_name,
            state=self.states or None,
            key=self.key,
            limit_key=self.limit_key,
            error_name=self.error,
            spawned_after=_moment(self.spawned_after),
            spawned_before=_moment(self.spawned_before),
            ended_after=_moment(self.ended_after),
            ended_before=_moment(self.ended_before),
            running_longer_than=self.running_longer_than,
            parent=None if self.parent is None else await resolve_one(invocation, self.parent),
        )
        if self.since is None and self.until is None:
            return chosen
        # The end of a task that has ended, else its spawn.
        at = func.coalesce(TaskRow.finished_at, TaskRow.created_at)
        bounds = [] if self.since is None else [at >= _moment(self.since)]
        bounds += [] if self.until is None else [at < _moment(self.until)]
        return select(TaskRow.task_id).where(*matching(chosen), *bounds)

    def options(self) -> str:
        """Return the filters as they are typed in a shell."""
        words: list[str] = [word for state in self.states for word in ("--state", state)]
        for field, value in self._asdict().items():
            if value is not None and field != "states":
                text = f"{value.total_seconds():.15g}s" if isinstance(value, timedelta) else value
                text = text.isoformat() if isinstance(text, datetime) else text
                words += [f"--{field.removesuffix('_name').replace('_', '-')}", text]
        return shlex.join(words)

    async def check_name(self, invocation: Invocation, *, every_task: bool = False) -> None:
        """Refuse the name of a task that no task has; called if nothing matches, because it may read all tasks.

        `every_task` says that all tasks were searched by these filters alone.

        Raises:
            typer.Exit: there is none.
        """
        if self.name is None or self.name in invocation.durable.tasks:
            return
        searched = every_task and self == Filters(name=self.name)
        named = TaskFilter(task_name=self.name)
        if not searched and (await invocation.durable.list_tasks(named, limit=1)).items:
            return
        recent = sorted(row[0] for row in await invocation.durable.database.execute(inspection.RECENT_TASK_NAMES))
        similar = difflib.get_close_matches(self.name, recent, _SHOWN) or recent
        names = f" There are {', '.join(similar[:_SHOWN])}." if similar else ""
        fail(f"There is no task named {self.name!r}.{names}", FAILED)


def _moment(when: datetime | timedelta | None) -> datetime | None:
    return datetime.now(UTC) - when if isinstance(when, timedelta) else when


async def resolve(invocation: Invocation, name: str, queue_name: str | None = None) -> uuid.UUID:
    """Return the id of the task that is named by its id or its key.

    Of the tasks of a queue that have had a unique key, it is the one that is unfinished, or else the newest.

    Raises:
        TaskNotFound: there is no task of that id.
        LookupError: no task, or several tasks in different queues, have that key.
    """
    missing: TaskNotFound | None = None
    try:
        return (await invocation.durable.get_task(uuid.UUID(name))).task_id
    except TaskNotFound as error:
        missing = error
    except ValueError:
        pass
    page = await invocation.durable.list_tasks(TaskFilter(key=name, queue_name=queue_name), limit=_SHOWN)
    by_queue: dict[str, TaskInfo] = {}
    for task in page.items:
        chosen = by_queue.setdefault(task.queue_name, task)
        if chosen.status.finished and not task.status.finished:
            by_queue[task.queue_name] = task
    found = list(by_queue.values())
    if len(found) == 1:
        return found[0].task_id
    if found:
        tasks = ", ".join(f"{task.task_id} in queue {task.queue_name!r}" for task in found)
        raise LookupError(f"Several tasks have the key {name!r}: {tasks}. Give the id of one, or --queue.")
    if missing is not None:
        raise missing
    where = "" if queue_name is None else f" in queue {queue_name!r}"
    raise LookupError(f"There is no task with the id or key {name!r}{where}. List tasks: durable tasks list")


async def resolve_one(invocation: Invocation, name: str, queue_name: str | None = None) -> uuid.UUID:
    """Return the id of the only task that a command is about, and exit if there is no such task.

    Raises:
        typer.Exit: no task, or several, are meant.
    """
    try:
        return await resolve(invocation, name, queue_name)
    except TaskNotFound:
        raise
    except LookupError as error:
        fail(str(error), FAILED)
