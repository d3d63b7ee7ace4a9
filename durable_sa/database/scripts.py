"""Scripts in transactions of their own, one for all statements or one for each, seen through to the end."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.exc import DBAPIError

from ..concurrency.branches import detached
from ..database_errors import backoff, is_conflict, is_lost
from ..statements import maintenance
from .connections import Database
from .loans import HeldConnection
from .notifier import Hint, channel_name, sender
from .sessions import Script

T = TypeVar("T")

_TRIES = 5
_STATUS_TRIES = 12


async def perform_alone(database: Database, script: Callable[[Hint], Script[T]]) -> T:
    """Run a script in a transaction of its own, again if it loses against another one; its hint is sent after that.

    A caller that is cancelled leaves it to finish by itself.
    """
    return await _left_alone(_perform(database, script))


async def perform_in_autocommit(database: Database, script: Callable[[Hint], Script[T]]) -> T:
    """As :func:`perform_alone`, of a script whose statements may each be repeated, and commit by itself."""
    return await _left_alone(_perform_in_autocommit(database, script))


async def _left_alone(performing: Coroutine[Any, Any, T]) -> T:
    with detached():
        task = asyncio.get_running_loop().create_task(performing, name="durable:client")
    return await asyncio.shield(task)


async def _perform_in_autocommit(database: Database, script: Callable[[Hint], Script[T]]) -> T:
    hint = Hint()
    async with HeldConnection(database) as loan:
        result = await _drive(loan.execute, script(hint))
    sender(database.engine, channel_name(database.schema)).send(hint)
    return result


async def _perform(database: Database, script: Callable[[Hint], Script[T]]) -> T:
    for attempt in range(_TRIES):
        hint = Hint()
        done: tuple[T, str | None] | None = None
        try:
            async with database.transaction(again=attempt + 1 < _TRIES) as connection:
                result = await _drive(functools.partial(database.execute_within, connection), script(hint))
                done = result, (await connection.execute(maintenance.TRANSACTION_ID)).scalar()
        except DBAPIError as error:
            status: str | None = "aborted"
            if done is not None and done[1] is not None and is_lost(error):
                # Run again after a commit without a reply, it would take its own work for somebody else's.
                status = await _status(database, done[1])
            if status == "aborted" and is_conflict(error) and attempt + 1 < _TRIES:
                await asyncio.sleep(backoff(attempt))
                continue
            if done is None or status != "committed":
                raise
        sender(database.engine, channel_name(database.schema)).send(hint)
        return done[0]
    raise AssertionError("unreachable")


async def _drive(
    execute: Callable[[Executable, Mapping[str, Any]], Awaitable[Sequence[Row[Any]]]], script: Script[T]
) -> T:
    try:
        statement, parameters = next(script)
        while True:
            try:
                rows = await execute(statement, parameters)
            except Exception as error:  # noqa: BLE001 - the script raises it, unless it knows better
                statement, parameters = script.throw(error)
            else:
                statement, parameters = script.send(rows)
    except StopIteration as end:
        value: T = end.value
        return value


async def _status(database: Database, transaction_id: str) -> str | None:
    """What became of a transaction that nobody was told about: "committed", "aborted", or not known."""
    status: str | None = None
    for attempt in range(_STATUS_TRIES):
        rows = await database.execute(maintenance.TRANSACTION_STATUS, {"transaction_id": transaction_id})
        status = rows[0].status
        if status != "in progress":
            break
        await asyncio.sleep(backoff(attempt))
    return status
