"""`durable migrate` and `durable cleanup`: the tables, and what can go from them."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from .. import migrations
from ..models import DEFAULT_QUEUE
from .arguments import duration
from .invocation import Invocation, connected

_BATCH = 1000


@connected
async def migrate(invocation: Invocation) -> None:
    """Bring durable's tables to the newest version; safe to repeat.

    For applications without Alembic. With it, a revision of your own calls durable's: see `durable_sa.migrations`.
    """
    await invocation.durable.migrate()
    invocation.output.say(
        f"The tables in schema {invocation.durable.schema!r} are at revision {migrations.head()}.",
        schema=invocation.durable.schema,
        revision=migrations.head(),
    )


@connected
async def cleanup(
    invocation: Invocation,
    older_than: Annotated[timedelta, typer.Option(parser=duration, metavar="DURATION", help="Such as 30d.")],
    queue_name: Annotated[str, typer.Option("--queue", "-q", help="The queue.")] = DEFAULT_QUEUE,
    events: Annotated[bool, typer.Option("--events", help="Delete events instead of tasks.")] = False,
) -> None:
    """Delete tasks that ended long ago, or old events, in batches.

    What unfinished tasks still need stays: subtasks of a parent that goes on, events that somebody waits for.
    """
    await invocation.durable.require_queue(queue_name)
    delete = invocation.durable.cleanup_events if events else invocation.durable.cleanup_tasks
    deleted = 0
    with invocation.output.progress("Deleting", None) as advance:
        while batch := await delete(older_than, limit=_BATCH, queue_name=queue_name):
            deleted += batch
            advance(batch)
    what = "events" if events else "tasks"
    invocation.output.say(f"{deleted} {what} are deleted.", deleted=deleted)
