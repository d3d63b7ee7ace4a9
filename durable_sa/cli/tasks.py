"""`durable tasks`: find tasks, see what happened to one, spawn, cancel and retry."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from .. import SpawnOptions, TaskStatus
from ..errors import InvalidState, TaskNotFound
from ..models import DEFAULT_QUEUE
from ..statements import inspection
from . import history
from .arguments import duration, headers, json_value, moment
from .invocation import USAGE, Invocation, connected, examples, fail
from .output import as_dicts

tasks = typer.Typer(help="Tasks, one by one and in bulk.", no_args_is_help=True)

_PAGE = 500
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

TaskIds = Annotated[list[uuid.UUID], typer.Argument(metavar="TASK_ID", show_default=False)]
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


@tasks.command("cancel", epilog=examples("durable tasks cancel 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa"))
@connected
async def cancel(invocation: Invocation, task_ids: TaskIds) -> None:
    """Cancel tasks with their unfinished descendants. One that has ended already stays as it is."""
    results: list[dict[str, Any]] = []
    for task_id in task_ids:
        status = await invocation.durable.cancel_task(task_id)
        results.append({"task_id": task_id, "state": status})
    invocation.output.table(results, {"task_id": "task", "state": "state"}, empty="")


@tasks.command(
    "retry",
    epilog=examples(
        "durable tasks retry 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa", "durable tasks retry --all --name send --since 2h"
    ),
)
@connected
async def retry(
    invocation: Invocation,
    task_ids: Annotated[list[uuid.UUID] | None, typer.Argument(metavar="TASK_ID", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="All failed tasks, or what the other options choose.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    since: Since = None,
    max_attempts: MaxAttempts = None,
) -> None:
    """Put failed or cancelled tasks back, with their checkpoints and a fresh count of failures."""
    chosen = (queue_name, states, name, since) != (None, None, None, None)
    if every == bool(task_ids) or (chosen and not every):
        fail("Give the ids of tasks, or --all with --queue, --name, --state or --since.", USAGE)
    if every:
        wanted = states or [TaskStatus.FAILED]
        if set(wanted) - {TaskStatus.FAILED, TaskStatus.CANCELLED}:
            fail("Only failed and cancelled tasks can be retried: --state failed, --state cancelled.", USAGE)
        await _retry_all(invocation, queue_name, wanted, name, since, max_attempts)
        return
    results: list[dict[str, Any]] = []
    for task_id in task_ids or ():
        status = await invocation.durable.retry_task(task_id, max_attempts=max_attempts)
        results.append({"task_id": task_id, "state": status})
    invocation.output.table(results, {"task_id": "task", "state": "state"}, empty="")


async def _retry_all(
    invocation: Invocation,
    queue_name: str | None,
    states: Sequence[str],
    name: str | None,
    since: datetime | timedelta | None,
    max_attempts: int | None,
) -> None:
    retried, passed_over = 0, 0
    with invocation.output.progress("Retrying", None) as advance:
        async for task_id in _matching(invocation, queue_name, states, name, since):
            try:
                await invocation.durable.retry_task(task_id, max_attempts=max_attempts)
                retried += 1
            except (InvalidState, TaskNotFound):
                # Somebody else was faster, or it went with the parent that was put back before.
                passed_over += 1
            advance(1)
    invocation.output.say(f"{retried} tasks are put back.", retried=retried, passed_over=passed_over)


async def _matching(
    invocation: Invocation,
    queue_name: str | None,
    states: Sequence[str],
    name: str | None,
    since: datetime | timedelta | None,
) -> AsyncIterator[uuid.UUID]:
    """Page by page, each task once: one that fails again meanwhile does not come back."""
    before: uuid.UUID | None = None
    while True:
        query = inspection.tasks(
            queue_name=queue_name, states=states, task_name=name, since=since, before=before, limit=_PAGE
        )
        rows = await invocation.durable.database.execute(query)
        for row in rows:
            yield row.task_id
        if len(rows) < _PAGE:
            return
        before = rows[-1].task_id
