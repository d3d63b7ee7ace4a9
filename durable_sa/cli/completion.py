"""Shell completion of the names of queues, tasks and schedules, read from the database that the command names."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import typer
from sqlalchemy import Executable

from .. import Durable
from ..statements import inspection, queues
from .connection import Source, require_database

_SECONDS = 5.0


def complete_queues(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a queue."""
    return _matching(context, incomplete, queues.LIST_QUEUES)


def complete_tasks(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a task: those of the application, of recent tasks and of schedules."""
    return _matching(context, incomplete, inspection.RECENT_TASK_NAMES, lambda durable: [*durable.tasks])


def complete_schedules(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a schedule."""
    return _matching(context, incomplete, inspection.SCHEDULES)


def _matching(
    context: typer.Context,
    incomplete: str,
    statement: Executable,
    known: Callable[[Durable[Any]], list[str]] = lambda durable: [],
) -> list[str]:
    """Return the names, in the first column of a statement's rows, that begin with what is typed.

    Without a database there are none: a shell cannot show an error while it completes.
    """

    async def read(durable: Durable[Any]) -> list[str]:
        async with durable, asyncio.timeout(_SECONDS):
            return [row[0] for row in await durable.database.execute(statement)]

    with contextlib.suppress(Exception):
        given = context.params
        source = Source(
            given.get("url"), bool(given.get("embedded")), given.get("app") or given.get("target"), given.get("schema")
        )
        # An application may print while it is imported, and the shell reads the names from stdout.
        with contextlib.redirect_stdout(sys.stderr):
            durable = source.client()
            require_database(durable)
            names = {*known(durable), *asyncio.run(read(durable))}
        return sorted(name for name in names if name.startswith(incomplete))
    return []
