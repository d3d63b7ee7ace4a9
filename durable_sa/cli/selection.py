"""Which tasks a command is about: filters, and tasks named by their ids or keys."""

from __future__ import annotations

import difflib
import shlex
import uuid
from collections.abc import AsyncIterator, Iterable
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy import Select

from .. import TaskStatus
from ..errors import TaskNotFound
from ..statements import inspection
from .arguments import duration, moment
from .completion import complete_queues, complete_tasks
from .invocation import FAILED, Invocation, fail

_PAGE = 500
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
Key = Annotated[str | None, typer.Option(help="Only tasks with this idempotency key.")]
Since = Annotated[
    Any,
    typer.Option(
        parser=moment,
        metavar="WHEN",
        help="Only tasks that have ended, or of unfinished ones were spawned, since: 12h for 12 hours ago, or "
        "2026-01-31T08:00Z.",
    ),
]
Until = Annotated[
    Any, typer.Option(parser=moment, metavar="WHEN", help="Only tasks that have ended, or were spawned, before.")
]
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
    since: datetime | timedelta | None = None
    until: datetime | timedelta | None = None
    running_longer_than: timedelta | None = None

    @property
    def anything(self) -> bool:
        """True if there is any condition."""
        return self != Filters()

    def among(self, states: Iterable[TaskStatus]) -> Filters:
        """Restrict the filters to these states, unless they name states themselves."""
        return self._replace(states=self.states or tuple(states))

    def query(
        self, *, order: inspection.Order = "newest", after: uuid.UUID | None = None, limit: int
    ) -> Select[*tuple[Any, ...]]:
        """Select a page of the matching tasks."""
        return inspection.tasks(
            queue_name=self.queue_name,
            states=self.states,
            task_name=self.name,
            error_name=self.error,
            key=self.key,
            since=self.since,
            until=self.until,
            running_longer_than=self.running_longer_than,
            order=order,
            after=after,
            limit=limit,
        )

    def options(self) -> str:
        """Return the filters as they are typed in a shell."""
        words: list[str] = []
        for option, value in (("--queue", self.queue_name), ("--name", self.name), ("--error", self.error)):
            words += [option, value] if value is not None else []
        for state in self.states:
            words += ["--state", state]
        if self.key is not None:
            words += ["--key", self.key]
        times = {"--since": self.since, "--until": self.until, "--running-longer-than": self.running_longer_than}
        for option, when in times.items():
            if when is not None:
                words += [option, f"{when.total_seconds():g}s" if isinstance(when, timedelta) else when.isoformat()]
        return shlex.join(words)

    async def check(self, invocation: Invocation) -> None:
        """Refuse the name of a queue that does not exist.

        Raises:
            QueueNotFound: there is no such queue.
        """
        if self.queue_name is not None:
            await invocation.durable.require_queue(self.queue_name)

    async def check_name(self, invocation: Invocation) -> None:
        """Refuse the name of a task that no task has; called if nothing matches, because it may read all tasks.

        Raises:
            typer.Exit: there is none.
        """
        if self.name is None or self.name in invocation.durable.tasks:
            return
        database = invocation.durable.database
        if await database.execute(inspection.KNOWN_NAME, {"name": self.name}):
            return
        recent = sorted(row[0] for row in await database.execute(inspection.RECENT_TASK_NAMES))
        similar = difflib.get_close_matches(self.name, recent, _SHOWN) or recent
        names = f" There are {', '.join(similar[:_SHOWN])}." if similar else ""
        fail(f"There is no task named {self.name!r}.{names}", FAILED)


async def matching(invocation: Invocation, filters: Filters) -> AsyncIterator[uuid.UUID]:
    """Yield matching tasks page by page, each once, also if it matches again in the meantime."""
    after: uuid.UUID | None = None
    while True:
        rows = await invocation.durable.database.execute(filters.query(after=after, limit=_PAGE))
        for row in rows:
            yield row.task_id
        if len(rows) < _PAGE:
            return
        after = rows[-1].task_id


async def resolve(invocation: Invocation, name: str, queue_name: str | None = None) -> uuid.UUID:
    """Return the id of the task that is named by its id or its key.

    Raises:
        TaskNotFound: there is no task of that id.
        LookupError: no task, or several tasks in different queues, have that key.
    """
    try:
        task_id = uuid.UUID(name)
    except ValueError:
        task_id = None
    database = invocation.durable.database
    if task_id is not None and await database.execute(inspection.KNOWN_TASK, {"task_id": task_id}):
        return task_id
    rows = await database.execute(Filters(queue_name=queue_name, key=name).query(limit=_SHOWN))
    if len(rows) == 1:
        found: uuid.UUID = rows[0].task_id
        return found
    if rows:
        tasks = ", ".join(f"{row.task_id} in queue {row.queue_name!r}" for row in rows)
        raise LookupError(f"Several tasks have the key {name!r}: {tasks}. Give the id of one, or --queue.")
    if task_id is not None:
        raise TaskNotFound(task_id)
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
