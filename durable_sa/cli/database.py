"""`durable migrate` and `durable cleanup`."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from .. import migrations
from ..models import DEFAULT_QUEUE
from .arguments import duration
from .completion import complete_queues
from .invocation import Invocation, connected

_BATCH = 1000


@connected
async def migrate(invocation: Invocation) -> None:
    """Upgrade durable's tables to the newest revision; safe to repeat.

    For applications without Alembic. With Alembic, call durable's migrations from a revision of your own: see
    `durable_sa.migrations`.
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
    older_than: Annotated[
        timedelta, typer.Option(parser=duration, metavar="DURATION", help="Minimum age, such as 30d.")
    ],
    queue_name: Annotated[
        str, typer.Option("--queue", "-q", autocompletion=complete_queues, help="The queue.")
    ] = DEFAULT_QUEUE,
    events: Annotated[bool, typer.Option("--events", help="Delete events instead of tasks.")] = False,
) -> None:
    """Delete old ended tasks, or old events, in batches.

    Those that unfinished tasks need are kept: subtasks of an unfinished parent, and events that a task waits for.
    """
    await invocation.durable.require_queue(queue_name)
    delete = invocation.durable.cleanup_events if events else invocation.durable.cleanup_tasks
    deleted = 0
    with invocation.output.progress("Deleting") as progress:
        while batch := await delete(older_than, limit=_BATCH, queue_name=queue_name):
            deleted += batch
            progress(deleted, None)
    kind = "Events" if events else "Tasks"
    invocation.output.say(f"{kind} deleted: {deleted}.", deleted=deleted)
