"""`durable schedules`: what is spawned by the clock."""

from __future__ import annotations

import typer

from ..statements import inspection
from .invocation import Invocation, connected
from .output import as_dicts

schedules = typer.Typer(help="Cron schedules.", no_args_is_help=True)

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


@schedules.command("list")
@connected
async def list_(invocation: Invocation) -> None:
    """List the schedules with their last and next ticks."""
    rows = as_dicts(await invocation.durable.database.execute(inspection.SCHEDULES))
    if not invocation.output.as_json:
        for row in rows:
            row["status"] = "open" if row["paused_at"] is None else "paused"
    invocation.output.table(rows, _COLUMNS, empty="There are no schedules.")
