"""`durable schedules`: list, pause, resume and trigger cron schedules."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from ..errors import InvalidConfiguration
from ..names import validate_name
from ..schedules.cron import next_tick
from ..schedules.store import queues_with
from ..statements import inspection
from .invocation import Invocation, connected, examples
from .output import as_dicts

schedules = typer.Typer(
    help="List and manage cron schedules.",
    no_args_is_help=True,
    epilog=examples("durable schedules list", "durable schedules pause nightly-report"),
)

Name = Annotated[str, typer.Argument(metavar="SCHEDULE", show_default=False)]
QueueName = Annotated[
    str | None,
    typer.Option(
        "--queue", "-q", help="The queue of the schedule, if several have one of that name.", show_default=False
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
@connected
async def list_(invocation: Invocation) -> None:
    """List the schedules with their last and next ticks."""
    rows = as_dicts(await invocation.durable.database.execute(inspection.SCHEDULES))
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


async def _queue(invocation: Invocation, name: str, queue_name: str | None) -> str | None:
    """Return the queue that was named, else the only one that has the schedule."""
    if queue_name is not None:
        return queue_name
    queues = await queues_with(invocation.durable.database, validate_name("schedule", name))
    if len(queues) > 1:
        raise InvalidConfiguration(
            "queue", f"{len(queues)} queues have a schedule {name!r}", f"Name one with --queue: {', '.join(queues)}."
        )
    return next(iter(queues), None)
