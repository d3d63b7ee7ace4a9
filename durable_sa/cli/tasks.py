"""`durable tasks`: list, show, spawn, cancel and retry tasks."""

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
from .invocation import FAILED, USAGE, Invocation, connected, examples, fail
from .output import as_dicts, span

tasks = typer.Typer(help="List and manage tasks, one by one or in bulk.", no_args_is_help=True)

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
Queue = Annotated[str | None, typer.Option("--queue", "-q", help="Only tasks in this queue.")]
States = Annotated[
    list[TaskStatus] | None, typer.Option("--state", "-s", help="Only tasks in this state; may be repeated.")
]
Name = Annotated[str | None, typer.Option("--name", "-n", help="Only tasks of this name.")]
Since = Annotated[
    Any,
    typer.Option(
        parser=moment, metavar="WHEN", help="Only tasks spawned since: 12h for 12 hours ago, or 2026-01-31T08:00Z."
    ),
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
Sort = Annotated[inspection.Order, typer.Option(help="By the spawn, or by how long the current attempt has run.")]
Payloads = Annotated[bool, typer.Option("--payloads", help="Show params, results, headers and tracebacks.")]
MaxAttempts = Annotated[
    int | None, typer.Option(help="Number of failures of the task's own code after which it fails.")
]


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
    running_longer_than: RunningLongerThan = None,
    sort: Sort = "newest",
    limit: Annotated[int, typer.Option("--limit", "-l", help="Maximum number of tasks.", min=1, max=10_000)] = 20,
) -> None:
    """List tasks, the newest first."""
    query = inspection.tasks(
        queue_name=queue_name,
        states=states or (),
        task_name=name,
        since=since,
        running_longer_than=running_longer_than,
        order=sort,
        limit=limit,
    )
    rows = as_dicts(await invocation.durable.database.execute(query))
    columns = dict(_COLUMNS)
    if running_longer_than is not None or sort == "running":
        columns["running"] = "running for"
        for row in rows:
            row["running"] = "" if row["running_seconds"] is None else span(row["running_seconds"])
    invocation.output.table(rows, columns, empty="No matching tasks.")


@tasks.command("show", epilog=examples("durable tasks show 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa --payloads"))
@connected
async def show(
    invocation: Invocation,
    task_id: Annotated[uuid.UUID, typer.Argument(metavar="TASK_ID", show_default=False)],
    payloads: Payloads = False,
) -> None:
    """Show one task: its state, timeline, waits and subtasks."""
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
        Any, typer.Option(parser=json_value, metavar="JSON", help="The params, or @FILE, or @- for stdin.")
    ] = None,
    queue_name: Annotated[str, typer.Option("--queue", "-q", help="The queue.")] = DEFAULT_QUEUE,
    key: Annotated[str | None, typer.Option(help="An idempotency key: one key spawns only one task.")] = None,
    delay: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help="Do not run the task before this time has passed."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Smaller numbers are claimed first.")] = 0,
    max_attempts: MaxAttempts = None,
    header: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header; may be repeated.")] = None,
) -> None:
    """Spawn a task by its name.

    The command does not know the task's code: the worker that runs the task validates the params, and options that are
    not given have their general defaults, not those of the task.
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
    message = f"Task {spawned.task_id} spawned." if spawned.created else f"Task {spawned.task_id} already has that key."
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
    every: Annotated[bool, typer.Option("--all", help="All unfinished tasks that match the other options.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    since: Since = None,
) -> None:
    """Cancel tasks with their unfinished descendants. Ended tasks are not changed."""
    chosen = Choice(queue_name, states or (), name, since)
    if every == bool(task_ids) or chosen.anything != every:
        fail("Give the ids of tasks, or --all with --queue, --name, --state or --since.", USAGE)
    if every:
        if any(state.finished for state in chosen.states):
            fail("Only unfinished tasks can be cancelled: --state pending, running or sleeping.", USAGE)
        unfinished = [state for state in TaskStatus if not state.finished]
        await _do_all(invocation, chosen.among(unfinished), "Cancelling", "cancelled", invocation.durable.cancel_task)
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
    every: Annotated[
        bool, typer.Option("--all", help="All failed tasks, or those that match the other options.")
    ] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    since: Since = None,
    max_attempts: MaxAttempts = None,
) -> None:
    """Retry failed or cancelled tasks. They keep their checkpoints; failures are counted from zero."""
    chosen = Choice(queue_name, states or (), name, since)
    if every == bool(task_ids) or (chosen.anything and not every):
        fail("Give the ids of tasks, or --all with --queue, --name, --state or --since.", USAGE)
    retry_task = functools.partial(invocation.durable.retry_task, max_attempts=max_attempts)
    if every:
        if set(chosen.states) - {TaskStatus.FAILED, TaskStatus.CANCELLED}:
            fail("Only failed and cancelled tasks can be retried: --state failed, --state cancelled.", USAGE)
        await _do_all(invocation, chosen.among([TaskStatus.FAILED]), "Retrying", "retried", retry_task)
        return
    await _do_each(invocation, task_ids or (), retry_task)


class Choice(NamedTuple):
    """The conditions that select tasks."""

    queue_name: str | None
    states: Sequence[TaskStatus]
    name: str | None
    since: datetime | timedelta | None

    @property
    def anything(self) -> bool:
        """True if there is any condition."""
        return self != (None, (), None, None)

    def among(self, states: Sequence[TaskStatus]) -> Choice:
        """Restrict the choice to these states, unless it names states itself."""
        return self._replace(states=self.states or states)

    def query(self, *, before: uuid.UUID | None = None, limit: int) -> Select[*tuple[Any, ...]]:
        """Select a page of the matching tasks, the newest first."""
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
    """Act on each of these tasks, and report the refused ones at the end."""
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
        fail("\nerror: ".join(refusals), FAILED)


async def _do_all(
    invocation: Invocation,
    chosen: Choice,
    doing: str,
    done: str,
    act: Callable[[uuid.UUID], Awaitable[object]],
) -> None:
    """Act on all matching tasks, and print their number."""
    changed, passed_over = 0, 0
    every = chosen.query(limit=_MOST).order_by(None).subquery()
    rows = await invocation.durable.database.execute(select(func.count()).select_from(every))
    with invocation.output.progress(doing, rows[0][0]) as advance:
        async for task_id in _matching(invocation, chosen):
            try:
                await act(task_id)
                changed += 1
            except (InvalidState, TaskNotFound):
                # Another command changed the task first, or its parent was retried with all descendants.
                passed_over += 1
            advance(1)
    invocation.output.say(f"Tasks {done}: {changed}.", **{done: changed, "passed_over": passed_over})


async def _matching(invocation: Invocation, chosen: Choice) -> AsyncIterator[uuid.UUID]:
    """Yield matching tasks page by page, each once, also if it matches again in the meantime."""
    before: uuid.UUID | None = None
    while True:
        rows = await invocation.durable.database.execute(chosen.query(before=before, limit=_PAGE))
        for row in rows:
            yield row.task_id
        if len(rows) < _PAGE:
            return
        before = rows[-1].task_id
