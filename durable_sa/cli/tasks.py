"""`durable tasks`: find tasks, see what happened to one, spawn, cancel and retry."""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy import Select, func, select

from .. import SpawnOptions, TaskStatus
from ..errors import InvalidState, TaskNotFound
from ..models import DEFAULT_QUEUE
from ..statements import inspection
from . import history
from .arguments import duration, headers, json_value, moment
from .invocation import USAGE, WRONG, Invocation, connected, examples, fail
from .output import as_dicts

tasks = typer.Typer(help="Tasks, one by one and in bulk.", no_args_is_help=True)

_PAGE = 500
_MOST = 2**31 - 1
_COLUMNS = {
    "task_id": "task",
    "task_name": "name",
    "queue_name": "queue",
    "state": "state",
    "attempt": "attempt",
    "created_at": "spawned",
    "finished_at": "finished",
    "error_name": "error",
}

TaskIds = Annotated[list[uuid.UUID] | None, typer.Argument(metavar="TASK_ID", show_default=False)]
Queue = Annotated[str | None, typer.Option("--queue", "-q", help="Only of this queue.")]
States = Annotated[list[TaskStatus] | None, typer.Option("--state", "-s", help="Only in this state; may be repeated.")]
Name = Annotated[str | None, typer.Option("--name", "-n", help="Only tasks of this name.")]
Since = Annotated[
    Any,
    typer.Option(parser=moment, metavar="WHEN", help="Only spawned since then: 15m, 12h, 7d ago or 2026-01-31T08:00Z."),
]
Payloads = Annotated[bool, typer.Option("--payloads", help="Show params, results, headers and tracebacks, too.")]
MaxAttempts = Annotated[int | None, typer.Option(help="How often the task's own code may fail.")]


@tasks.command(
    "list",
    epilog=examples("durable tasks list --state failed --since 12h", "durable tasks list -q mail -n send --json"),
)
@connected
async def list_(
    invocation: Invocation,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", "-l", help="At most so many.", min=1, max=10_000)] = 20,
) -> None:
    """List tasks, the newest first."""
    query = inspection.tasks(queue_name=queue_name, states=states or (), task_name=name, since=since, limit=limit)
    rows = as_dicts(await invocation.durable.database.execute(query))
    invocation.output.table(rows, _COLUMNS, empty="There are no such tasks.")


@tasks.command("show", epilog=examples("durable tasks show 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa --payloads"))
@connected
async def show(
    invocation: Invocation,
    task_id: Annotated[uuid.UUID, typer.Argument(metavar="TASK_ID", show_default=False)],
    payloads: Payloads = False,
) -> None:
    """Show one task: how it stands, its attempts and checkpoints in time, what it waits for, its subtasks."""
    found = await history.load(invocation.durable.database, task_id, payloads=payloads)
    if found is None:
        raise TaskNotFound(task_id)
    if invocation.output.as_json:
        invocation.output.json(found.as_data())
    else:
        found.print(invocation.output)


@tasks.command(
    "spawn",
    epilog='Examples:\n\ndurable tasks spawn research --params \'{"query": "durable execution"}\'\n\n'
    "durable tasks spawn report --params @report.json --delay 1h --key report-17",
)
@connected
async def spawn(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the task.", show_default=False)],
    params: Annotated[
        Any, typer.Option(parser=json_value, metavar="JSON", help="Its params, or @FILE, or @- for stdin.")
    ] = None,
    queue_name: Annotated[str, typer.Option("--queue", "-q", help="The queue.")] = DEFAULT_QUEUE,
    key: Annotated[str | None, typer.Option(help="An idempotency key: the same key spawns one task only.")] = None,
    delay: Annotated[
        timedelta | None, typer.Option(parser=duration, metavar="DURATION", help="Not before so long from now.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Smaller comes first.")] = 0,
    max_attempts: MaxAttempts = None,
    header: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header; may be repeated.")] = None,
) -> None:
    """Spawn a task by its name.

    The task's own code is not known here: whether the params fit is seen by the worker that runs it, and options that
    are not given are the general ones.
    """
    options = SpawnOptions(
        queue_name=queue_name,
        idempotency_key=key,
        delay=delay,
        priority=priority,
        max_attempts=max_attempts,
        headers=headers(header or []),
    )
    spawned = await invocation.durable.spawn_by_name(name, params, unchecked=True, **options)
    message = f"Task {spawned.task_id} is spawned." if spawned.created else f"Task {spawned.task_id} has that key."
    invocation.output.say(message, task_id=spawned.task_id, run_id=spawned.run_id, created=spawned.created)


@tasks.command(
    "cancel",
    epilog=examples(
        "durable tasks cancel 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa",
        "durable tasks cancel --all --name send --state pending --since 2h",
    ),
)
@connected
async def cancel(
    invocation: Invocation,
    task_ids: TaskIds = None,
    every: Annotated[bool, typer.Option("--all", help="All unfinished tasks that the other options choose.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    since: Since = None,
) -> None:
    """Cancel tasks with their unfinished descendants. One that has ended already stays as it is."""
    chosen = Choice(queue_name, states or (), name, since)
    if every == bool(task_ids) or chosen.anything != every:
        fail("Give the ids of tasks, or --all with --queue, --name, --state or --since.", USAGE)
    if every:
        if any(state.finished for state in chosen.states):
            fail("Only unfinished tasks can be cancelled: --state pending, running or sleeping.", USAGE)
        unfinished = [state for state in TaskStatus if not state.finished]
        await _do_all(
            invocation, chosen.among(unfinished), "Cancelling", "cancelled", "cancelled", invocation.durable.cancel_task
        )
        return
    await _do_each(invocation, task_ids or (), invocation.durable.cancel_task)


@tasks.command(
    "retry",
    epilog=examples(
        "durable tasks retry 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa", "durable tasks retry --all --name send --since 2h"
    ),
)
@connected
async def retry(
    invocation: Invocation,
    task_ids: TaskIds = None,
    every: Annotated[bool, typer.Option("--all", help="All failed tasks, or what the other options choose.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    since: Since = None,
    max_attempts: MaxAttempts = None,
) -> None:
    """Put failed or cancelled tasks back, with their checkpoints and a fresh count of failures."""
    chosen = Choice(queue_name, states or (), name, since)
    if every == bool(task_ids) or (chosen.anything and not every):
        fail("Give the ids of tasks, or --all with --queue, --name, --state or --since.", USAGE)
    put_back = functools.partial(invocation.durable.retry_task, max_attempts=max_attempts)
    if every:
        if set(chosen.states) - {TaskStatus.FAILED, TaskStatus.CANCELLED}:
            fail("Only failed and cancelled tasks can be retried: --state failed, --state cancelled.", USAGE)
        await _do_all(invocation, chosen.among([TaskStatus.FAILED]), "Retrying", "put back", "retried", put_back)
        return
    await _do_each(invocation, task_ids or (), put_back)


class Choice(NamedTuple):
    """What tasks to do something with."""

    queue_name: str | None
    states: Sequence[TaskStatus]
    name: str | None
    since: datetime | timedelta | None

    @property
    def anything(self) -> bool:
        """Whether any of it is said."""
        return self != (None, (), None, None)

    def among(self, states: Sequence[TaskStatus]) -> Choice:
        """In these states, if none is said."""
        return self._replace(states=self.states or states)

    def query(self, *, before: uuid.UUID | None = None, limit: int) -> Select[*tuple[Any, ...]]:
        """A page of them, the newest first."""
        return inspection.tasks(
            queue_name=self.queue_name,
            states=self.states,
            task_name=self.name,
            since=self.since,
            before=before,
            limit=limit,
        )


async def _do_each(
    invocation: Invocation, task_ids: Sequence[uuid.UUID], act: Callable[[uuid.UUID], Awaitable[TaskStatus]]
) -> None:
    """Do the same with each of these; one that it cannot be done with keeps it from none of the others."""
    results: list[dict[str, Any]] = []
    refusals: list[str] = []
    for task_id in task_ids:
        try:
            results.append({"task_id": task_id, "state": await act(task_id)})
        except (InvalidState, TaskNotFound) as error:
            refusals.append(str(error))
    if results:
        invocation.output.table(results, {"task_id": "task", "state": "state"}, empty="")
    if refusals:
        fail("\nerror: ".join(refusals), WRONG)


async def _do_all(
    invocation: Invocation,
    chosen: Choice,
    doing: str,
    done: str,
    key: str,
    act: Callable[[uuid.UUID], Awaitable[object]],
) -> None:
    """Do the same with all that are chosen, and say how many they were."""
    changed, passed_over = 0, 0
    every = chosen.query(limit=_MOST).order_by(None).subquery()
    rows = await invocation.durable.database.execute(select(func.count()).select_from(every))
    with invocation.output.progress(doing, rows[0][0]) as advance:
        async for task_id in _matching(invocation, chosen):
            try:
                await act(task_id)
                changed += 1
            except (InvalidState, TaskNotFound):
                # Somebody else was faster, or it went with the parent that was put back before.
                passed_over += 1
            advance(1)
    invocation.output.say(f"{changed} tasks are {done}.", **{key: changed, "passed_over": passed_over})


async def _matching(invocation: Invocation, chosen: Choice) -> AsyncIterator[uuid.UUID]:
    """Page by page, each task once: one that fails again meanwhile does not come back."""
    before: uuid.UUID | None = None
    while True:
        rows = await invocation.durable.database.execute(chosen.query(before=before, limit=_PAGE))
        for row in rows:
            yield row.task_id
        if len(rows) < _PAGE:
            return
        before = rows[-1].task_id
