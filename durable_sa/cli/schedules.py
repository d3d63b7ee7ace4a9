"""`durable schedules`: list, pause, resume, trigger and delete cron schedules."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from ..errors import ScheduleNotFound
from ..names import validate_name
from ..schedules.cron import next_tick
from ..schedules.store import queues_with
from ..statements import inspection
from .completion import complete_queues, complete_schedules
from .invocation import USAGE, Invocation, connected, examples, fail, listing
from .output import as_dicts

schedules = typer.Typer(
    help="List and manage cron schedules.",
    no_args_is_help=True,
    epilog=examples("durable schedules list", "durable schedules pause nightly-report"),
)

Name = Annotated[str, typer.Argument(metavar="SCHEDULE", autocompletion=complete_schedules, show_default=False)]
QueueName = Annotated[
    str | None,
    typer.Option(
        "--queue",
        "-q",
        autocompletion=complete_queues,
        help="The queue of the schedule; needed only if several queues have one of that name.",
        show_default=False,
    ),
]

_COLUMNS = {
    "name": "schedule",
    "task_name": "task",
    "queue_name": "queue",
    "cron_expression": "cron",
    "timezone": "time zone",
    "status": "status",
    "last_tick_at": "last",
    "next_tick_at": "next",
}


@schedules.command("list", epilog=examples("durable schedules list --json"))
@listing
async def list_(
    invocation: Invocation,
    queue_name: Annotated[
        str | None, typer.Option("--queue", "-q", autocompletion=complete_queues, help="Only schedules of this queue.")
    ] = None,
) -> None:
    """List the schedules with their last and next ticks."""
    if queue_name is not None:
        await invocation.durable.require_queue(queue_name)
    rows = as_dicts(await invocation.durable.database.execute(inspection.SCHEDULES))
    rows = [row for row in rows if queue_name in (None, row["queue_name"])]
    for row in rows:
        if row["backend"] == "pg_cron" and row["paused_at"] is None:
            # pg_cron does not store the next tick.
            row["next_tick_at"] = next_tick(row["cron_expression"], row["timezone"], datetime.now(UTC))
    if not invocation.output.as_json:
        for row in rows:
            row["status"] = "open" if row["paused_at"] is None else "paused"
    invocation.output.table(rows, _COLUMNS, empty="No schedules.")


@schedules.command("pause", epilog=examples("durable schedules pause nightly-report"))
@connected
async def pause(invocation: Invocation, name: Name, queue_name: QueueName = None) -> None:
    """Stop a schedule until it is resumed. Ticks during the pause are skipped."""
    await invocation.durable.pause_schedule(name, queue_name=await _queue(invocation, name, queue_name))
    invocation.output.say(f"Schedule {name!r} paused.", name=name, paused=True)


@schedules.command("resume", epilog=examples("durable schedules resume nightly-report"))
@connected
async def resume(invocation: Invocation, name: Name, queue_name: QueueName = None) -> None:
    """Resume a paused schedule, from its next tick on."""
    await invocation.durable.resume_schedule(name, queue_name=await _queue(invocation, name, queue_name))
    invocation.output.say(f"Schedule {name!r} resumed.", name=name, paused=False)


@schedules.command("trigger", epilog=examples("durable schedules trigger nightly-report"))
@connected
async def trigger(invocation: Invocation, name: Name, queue_name: QueueName = None) -> None:
    """Spawn a schedule's task now, in addition to its ticks."""
    spawned = await invocation.durable.trigger_schedule(name, queue_name=await _queue(invocation, name, queue_name))
    invocation.output.say(f"Task {spawned.task_id} spawned.", name=name, task_id=spawned.task_id)


@schedules.command("delete", epilog=examples("durable schedules delete nightly-report --yes"))
@connected
async def delete(
    invocation: Invocation,
    name: Name,
    queue_name: QueueName = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a schedule, after a confirmation. Tasks that it has spawned continue."""
    queue_name = await _queue(invocation, name, queue_name)
    if not yes:
        typer.confirm(f"Delete schedule {name!r} of queue {queue_name!r}?", abort=True, err=True)
    await invocation.durable.delete_schedule(name, queue_name=queue_name)
    invocation.output.say(f"Schedule {name!r} deleted.", name=name)


async def _queue(invocation: Invocation, name: str, queue_name: str | None) -> str:
    """Return the queue that was named, or else the only one that has the schedule.

    Raises:
        ScheduleNotFound: that queue, or every queue, has no schedule of that name.
        typer.Exit: several queues have one.
    """
    queues = await queues_with(invocation.durable.database, validate_name("schedule", name))
    if not queues or (queue_name is not None and queue_name not in queues):
        raise ScheduleNotFound(name, queue_name, queues)
    if queue_name is None and len(queues) > 1:
        fail(f"Several queues have a schedule {name!r}. Name one with --queue: {', '.join(queues)}.", USAGE)
    return queue_name or queues[0]
