"""`durable tasks`: list, show, spawn, cancel, retry and delete tasks."""

from __future__ import annotations

import contextlib
import uuid
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from pydantic_core import from_json, to_json

from .. import Durable, SpawnOptions, StreamItem, StreamRestart, TaskInfo
from ..client.wording import span
from ..errors import TaskNotFound
from ..models import DEFAULT_QUEUE
from ..statements import inspection, values
from ..statements.log_lines import LOG
from ..statements.reading import Order
from . import history, repairs
from .arguments import duration, headers, json_value
from .completion import complete_queues, complete_tasks
from .invocation import FAILED, USAGE, Invocation, connected, examples, fail, listing
from .output import as_dicts
from .selection import (
    EndedAfter,
    EndedBefore,
    ErrorName,
    Filters,
    Key,
    LimitKey,
    Name,
    Parent,
    Queue,
    RunningLongerThan,
    Since,
    SpawnedAfter,
    SpawnedBefore,
    States,
    Until,
    resolve_one,
)

tasks = typer.Typer(help="List and manage tasks, one by one or in bulk.", no_args_is_help=True)

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


Sort = Annotated[
    Order, typer.Option(help="By the spawn; or only running tasks, by how long the current attempt has run.")
]


@tasks.command(
    "list",
    epilog=examples("durable tasks list --state failed --since 12h", "durable tasks list -q mail -n send --json"),
)
@listing
async def list_(
    invocation: Invocation,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    error: ErrorName = None,
    key: Key = None,
    limit_key: LimitKey = None,
    parent: Parent = None,
    since: Since = None,
    until: Until = None,
    spawned_after: SpawnedAfter = None,
    spawned_before: SpawnedBefore = None,
    ended_after: EndedAfter = None,
    ended_before: EndedBefore = None,
    running_longer_than: RunningLongerThan = None,
    sort: Sort = "newest",
    limit: Annotated[int, typer.Option("--limit", "-l", help="Maximum number of tasks.", min=1, max=10_000)] = 20,
    after: Annotated[
        str | None,
        typer.Option(metavar="TASK_ID", help="The end of the page before, which prints this option."),
    ] = None,
) -> None:
    """List tasks, the newest first. If there are more than the limit, the command for the next page is on stderr."""
    times = (since, until, spawned_after, spawned_before, ended_after, ended_before, running_longer_than)
    filters = Filters(queue_name, tuple(states or ()), name, error, key, limit_key, parent, *times)
    where = await filters.where(invocation)
    page = await invocation.durable.list_tasks(where, order=sort, limit=limit, after=after)
    if not page.items and after is None:
        await filters.check_name(invocation, every_task=sort != "running")
    columns = dict(_COLUMNS)
    rows = [history.row(task) for task in page.items]
    if running_longer_than is not None or sort == "running":
        columns["running"] = "running for"
        for row, task in zip(rows, page.items, strict=True):
            row["running"] = _running(task)
    invocation.output.table(rows, columns, empty="No matching tasks.")
    if page.next is not None:
        order = "" if sort == "newest" else f"--sort {sort}"
        given = (invocation.options, filters.options(), order, f"--limit {limit}")
        options = " ".join(part for part in given if part)
        invocation.output.note(f"There are more. Next page: durable tasks list {options} --after {page.next}")


def _running(task: TaskInfo) -> str:
    since = task.started_at if task.status == "running" else None
    return "" if since is None else span((datetime.now(UTC) - since).total_seconds())


@tasks.command(
    "show",
    epilog=examples(
        "durable tasks show 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa --payloads",
        "durable tasks show order-17",
        "durable tasks show --failed",
    ),
)
@connected
async def show(
    invocation: Invocation,
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help="The id of the task, or its key.", show_default=False)
    ] = None,
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue of the key.")
    ] = None,
    last: Annotated[
        bool,
        typer.Option("--last", help="Without TASK the one that was spawned last, with TASK only its last attempt."),
    ] = False,
    failed: Annotated[
        bool,
        typer.Option("--failed", help="Without TASK the one that failed last, with TASK only what failed in it."),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show each entry of a long timeline.")] = False,
    payloads: Annotated[
        bool, typer.Option("--payloads", help="Show params, results, headers and whole errors.")
    ] = False,
    pager: Annotated[
        bool, typer.Option("--pager/--no-pager", help="Use a pager where the terminal is too short.")
    ] = True,
) -> None:
    """Show one task: its state, its timeline with durations, its error, waits and subtasks.

    A long timeline is grouped, so that it fits a screen. Without --payloads no value appears: messages of errors are
    without SQL parameters and input values, and that of a UserError is left out.
    """
    durable, output = invocation.durable, invocation.output
    if task is not None:
        task_id = await resolve_one(invocation, task, queue_name)
    elif last != failed:
        task_id = await _latest(durable, failed=failed)
        last = failed = False
    else:
        fail("Name a task by its id or key, or give either --last or --failed.", USAGE)
    found = await durable.get_task(task_id, payloads=payloads)
    entries = await durable.get_history(task_id, payloads=payloads)
    if output.as_json:
        output.json({"task": history.row(found, payloads=payloads), "history": history.data(entries)})
        return
    parent = None
    if found.parent_task_id is not None:
        with contextlib.suppress(TaskNotFound):
            parent = await durable.get_task(found.parent_task_id)
    with output.paged(enabled=pager):
        history.print_history(found, parent, entries, output, last=last, failed=failed, everything=everything)


async def _latest(durable: Durable[Any], *, failed: bool) -> uuid.UUID:
    """Return the task that was spawned last, or that failed last."""
    if failed:
        found: list[uuid.UUID] = [row.task_id for row in await durable.database.execute(inspection.LATEST_FAILED_TASK)]
    else:
        # The ids of a task and its subtasks, which begin with the same time, are in no order among each other.
        newest = (await durable.list_tasks(limit=100)).items
        found = [task.task_id for task in sorted(newest, key=lambda task: task.created_at, reverse=True)]
    if not found:
        fail("No task has failed." if failed else "There are no tasks.", FAILED)
    return found[0]


@tasks.command(
    "spawn",
    epilog='Examples:\n\ndurable tasks spawn research --params \'{"query": "durable execution"}\'\n\n'
    "durable tasks spawn report --params @report.json --delay 1h --key report-17",
)
@connected
async def spawn(
    invocation: Invocation,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", autocompletion=complete_tasks, help="The name of the task.", show_default=False),
    ],
    params: Annotated[
        Any, typer.Option(parser=json_value, metavar="JSON", help="The params, or @FILE, or @- for stdin.")
    ] = None,
    queue_name: Annotated[
        str | None,
        typer.Option(
            "--queue",
            "-q",
            autocompletion=complete_queues,
            help="The queue.",
            show_default=f"that of the application's task, else {DEFAULT_QUEUE}",
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="An idempotency key: one key spawns only one task.")] = None,
    unique: Annotated[str | None, typer.Option(help="A key that only one unfinished task has.")] = None,
    limit_key: Annotated[str | None, typer.Option(help="The key whose limits hold for the task.")] = None,
    delay: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help="Do not run the task before this time has passed."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Smaller numbers are claimed first.")] = 0,
    max_attempts: repairs.MaxAttempts = None,
    header: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A header; may be repeated.")] = None,
) -> None:
    """Spawn a task by its name.

    With --app the task must be one of the application, whose options and params count. Without, the command does not
    know the task's code: the worker that runs it validates the params, and options that are not given have their
    general defaults.
    """
    options = SpawnOptions(
        idempotency_key=key,
        unique=unique,
        limit_key=limit_key,
        delay=delay,
        priority=priority,
        max_attempts=max_attempts,
        headers=headers(header or []),
    )
    if queue_name is not None:
        options["queue_name"] = queue_name
    spawned = await invocation.durable.spawn_by_name(name, params, unchecked=invocation.app is None, **options)
    message = f"Task {spawned.task_id} spawned." if spawned.created else f"Task {spawned.task_id} already has that key."
    invocation.output.say(message, task_id=spawned.task_id, run_id=spawned.run_id, created=spawned.created)


@tasks.command(
    "send",
    epilog=examples(
        'durable tasks send 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa approval \'{"by": "ann"}\'',
        "durable tasks send order-17 approval @approval.json --key approval-17",
    ),
)
@connected
async def send(
    invocation: Invocation,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The id of the task, or its key.", show_default=False)],
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="What the task receives.", show_default=False)],
    payload: Annotated[
        Any, typer.Argument(parser=json_value, metavar="JSON", help="The message, or @FILE, or @- for stdin.")
    ] = None,
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue of the task's key.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="An idempotency key: the task receives one message with it.")] = None,
) -> None:
    """Send a message to a task that has not ended."""
    task_id = await resolve_one(invocation, task, queue_name)
    await invocation.durable.send(task_id, topic, payload, idempotency_key=key)
    invocation.output.say(f"Message sent to task {task_id}.", task_id=task_id, topic=topic)


@tasks.command(
    "values",
    epilog=examples("durable tasks values 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa --payloads"),
)
@listing
async def values_(
    invocation: Invocation,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The id of the task, or its key.", show_default=False)],
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue of the key.")
    ] = None,
    payloads: Annotated[bool, typer.Option("--payloads", help="Show the values.")] = False,
) -> None:
    """List the values that a task has published."""
    task_id = await resolve_one(invocation, task, queue_name)
    rows = as_dicts(await invocation.durable.database.execute(values.LIST_VALUES, {"task_id": task_id}))
    columns = {"name": "value", "updated_at": "published"}
    for row in rows:
        text = row.pop("value")
        if payloads:
            row["value"] = from_json(text or "null") if invocation.output.as_json else text
    if payloads:
        columns["value"] = "content"
    invocation.output.table(rows, columns, empty="The task has published no values.")


@tasks.command(
    "stream",
    epilog=examples(
        "durable tasks stream order-17 answer --payloads",
        "durable tasks stream 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa answer --follow --payloads",
    ),
)
@connected
async def stream(
    invocation: Invocation,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The id of the task, or its key.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="STREAM", help="The name of the stream.", show_default=False)],
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue of the key.")
    ] = None,
    after: Annotated[int, typer.Option(help="Only items behind this position.", min=0)] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with the items that come, until the stream or the task ends.")
    ] = False,
    payloads: Annotated[bool, typer.Option("--payloads", help="Show the items, not only their positions.")] = False,
) -> None:
    """Print the items of a task's stream, one per line; with --json each is an object with its position."""
    task_id = await resolve_one(invocation, task, queue_name)
    reading = invocation.durable.read_stream(task_id, name, after=after, follow=follow)
    async with aclosing(reading) as entries:
        async for entry in entries:
            if isinstance(entry, StreamRestart):
                data: dict[str, Any] = {"restart": entry.position}
                text = f"-- restart after {entry.position}"
            else:
                data = {"position": entry.position} | ({"value": entry.value} if payloads else {})
                text = f"{entry.position}" + (f"  {to_json(entry.value).decode()}" if payloads else "")
            invocation.output.say(text, **data)


@tasks.command("logs", epilog=examples("durable tasks logs order-17", "durable tasks logs order-17 --follow --json"))
@connected
async def logs(
    invocation: Invocation,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The id of the task, or its key.", show_default=False)],
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue of the key.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with the lines that come, until the task ends.")
    ] = False,
) -> None:
    """Print the lines that a task has logged with ctx.logger, if its client keeps them: Durable(keep_logs=...)."""
    task_id = await resolve_one(invocation, task, queue_name)
    async with aclosing(invocation.durable.read_stream(task_id, LOG, follow=follow)) as entries:
        async for entry in entries:
            if isinstance(entry, StreamItem):
                line = entry.value
                text = f"{line['time']} {line['level']:<8} {line['message']}"
                invocation.output.say(text, position=entry.position, **line)


tasks.command("cancel", epilog=repairs.CANCEL_EXAMPLES)(repairs.cancel)
tasks.command("retry", epilog=repairs.RETRY_EXAMPLES)(repairs.retry)
tasks.command("delete", epilog=repairs.DELETE_EXAMPLES)(repairs.delete)
