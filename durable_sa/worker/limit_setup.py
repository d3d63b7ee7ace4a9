"""Making a queue one whose tasks are claimed key by key, while workers are at work on it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..database.channel import Executing
from ..database.connections import Database
from ..database_errors import LOCK_NOT_AVAILABLE, sqlstate
from ..errors import InvalidState, QueueNotFound
from ..statements import limiting, limits

LOCK_TRIES = 20
"""Tries to lock a table, each of half a second at most."""
LOCK_PAUSE = 0.1
PREPARATION_PAUSE = 0.05
"""Seconds between looks whether all running tasks have been counted."""


async def under_lock(database: Database, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
    """Do work in a transaction with a short lock timeout, and retry it while a lock is not granted.

    Raises:
        InvalidState: the lock was not granted after all tries.
    """
    for attempt in range(LOCK_TRIES):
        try:
            async with database.transaction() as connection:
                await connection.execute(limiting.SET_LOCK_TIMEOUT)
                await work(connection)
            return
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            if attempt == LOCK_TRIES - 1:
                raise InvalidState(
                    "The change of limits",
                    "blocked: another transaction holds a lock that it needs",
                    "Nothing was changed. Repeat it once that transaction has ended, such as a dump of the database.",
                ) from error
        await asyncio.sleep(LOCK_PAUSE)


async def refuse_old_workers(database: Executing) -> None:
    """Refuse limits that workers alive would not obey.

    Raises:
        InvalidState: workers of a version that knows no limits are alive.
    """
    check_old_workers(await database.execute(limiting.OLD_WORKERS))


def check_old_workers(rows: Sequence[Row[Any]]) -> None:
    """Refuse limits if `OLD_WORKERS` has returned rows.

    Raises:
        InvalidState: workers of a version that knows no limits are alive.
    """
    if rows:
        raise InvalidState(
            f"Worker {rows[0].name!r}",
            "of a version of durable_sa that knows no limits, and alive",
            "Deploy this version to all workers first.",
        )


async def enable(database: Database, queue_name: str) -> None:
    """Make a queue one whose tasks are claimed key by key, and wait until they are.

    Raises:
        QueueNotFound: there is no such queue.
        InvalidState: workers of a version that knows no limits are alive.
    """
    rows = await database.execute(limiting.LIMITED_STATE, {"queue_name": queue_name})
    if not rows:
        raise QueueNotFound(queue_name)
    if rows[0].limited_at is None:
        await refuse_old_workers(database)

        async def mark(connection: AsyncConnection) -> None:
            await connection.execute(limiting.LOCK_CLAIMS)
            await connection.execute(limiting.MARK_LIMITED, {"queue_name": queue_name, "is_new": False})

        await under_lock(database, mark)
    if rows[0].limits_ready_at is None:
        await prepare(database, queue_name)


async def prepare(database: Executing, queue_name: str) -> None:
    """Count the running tasks of a queue that was marked, let claims begin, and give the waiting tasks the empty key.

    Any number of processes may do so at once, and one may end what another has begun.
    """
    parameters = {"queue_name": queue_name}
    while True:
        while (await database.execute(limiting.ADOPT_RUNNING, parameters))[0].adopted:
            pass
        while (await database.execute(limits.DRAIN_ARRIVALS, {**parameters, "floor": 0}))[0].drained:
            pass
        if await database.execute(limiting.MARK_READY, parameters):
            break
        state = await database.execute(limiting.LIMITED_STATE, parameters)
        if not state or state[0].limits_ready_at is not None:
            break
        await asyncio.sleep(PREPARATION_PAUSE)
    after: uuid.UUID | None = uuid.UUID(int=0)
    while after is not None:
        after = (await database.execute(limiting.ADOPT_WAITING, {**parameters, "after": after}))[0].last
