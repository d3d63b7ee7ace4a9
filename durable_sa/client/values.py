"""Reading and watching the values that tasks publish."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar, overload

from sqlalchemy import Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..database.batches import Batch, with_connection
from ..database.connections import HeldConnection
from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, perform_within
from ..database_errors import is_transient
from ..errors import TaskNotFound
from ..names import validate_name
from ..results import AnyTaskId, id_of
from ..serialization.codec import UNTYPED, Codec, codec_for
from ..statements import values
from .tasks import Tasks

T = TypeVar("T")

POLL_INTERVAL = 0.25
"""Seconds between looks at watched values; a task writes them no more often."""


class PublishedValues(Tasks):
    """The part of a client that reads the values of tasks."""

    @overload
    async def get_value(self, task: AnyTaskId, name: str, *, type: type[T]) -> T | None: ...
    @overload
    async def get_value(self, task: AnyTaskId, name: str, *, type: Any = None) -> Any: ...
    async def get_value(self, task: AnyTaskId, name: str, *, type: Any = None) -> Any:  # noqa: A002
        """Return the value that a task has published last under a name, None if none; readable after its end, too.

        It is decoded as a `type`, without one as plain JSON.

        Raises:
            TaskNotFound: there is no such task.
            SerializationError: the value is not of that type.
        """
        task_id, codec = id_of(task), _codec(type)
        row = await self._values((task_id, validate_name("value", name)))
        return _decode(task_id, name, row, codec)

    @overload
    def get_value_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: AnyTaskId,
        name: str,
        *,
        type: type[T],
    ) -> Coroutine[Any, Any, T | None]: ...
    @overload
    def get_value_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: AnyTaskId,
        name: str,
        *,
        type: Any = None,
    ) -> Coroutine[Any, Any, Any]: ...
    @overload
    def get_value_with(
        self, session: Session | scoped_session[Any] | Connection, task: AnyTaskId, name: str, *, type: type[T]
    ) -> T | None: ...
    @overload
    def get_value_with(
        self, session: Session | scoped_session[Any] | Connection, task: AnyTaskId, name: str, *, type: Any = None
    ) -> Any: ...
    def get_value_with(
        self,
        session: SessionOrConnection,
        task: AnyTaskId,
        name: str,
        *,
        type: Any = None,  # noqa: A002
    ) -> Any:
        """Return a value as :meth:`get_value` does, read in the caller's transaction."""
        task_id, codec = id_of(task), _codec(type)
        validate_name("value", name)

        def script(_: Hint) -> Script[Any]:
            rows = yield values.GET_VALUES, {"task_ids": [task_id], "names": [name]}
            return _decode(task_id, name, rows[0] if rows else None, codec)

        return perform_within(session, self.schema, script)

    @overload
    def watch_value(self, task: AnyTaskId, name: str, *, type: type[T]) -> AsyncGenerator[T]: ...
    @overload
    def watch_value(self, task: AnyTaskId, name: str, *, type: Any = None) -> AsyncGenerator[Any]: ...
    async def watch_value(
        self,
        task: AnyTaskId,
        name: str,
        *,
        type: Any = None,  # noqa: A002
    ) -> AsyncGenerator[Any]:
        """Yield the value that a task has published under a name, and then each later one, until the task has ended.

        Of values that follow each other within a quarter of a second, the last is enough. Watchers hold no connection,
        and those of one client share their statements.

        Raises:
            TaskNotFound: there is no such task, or it was deleted.
            SerializationError: a value is not of that type.
        """
        task_id, codec = id_of(task), _codec(type)
        validate_name("value", name)
        ended, changes = asyncio.Event(), self._changes.get()
        changes.setdefault(task_id, set()).add(ended)
        version: int | None = None
        row: Row[Any] | None = None
        read = False
        try:
            while True:
                try:
                    row, read = await self._values((task_id, name)), True
                except (SQLAlchemyError, OSError) as error:
                    # Once the database has answered, it may go away and come back.
                    if not read or not is_transient(error):
                        raise
                else:
                    value = _decode(task_id, name, row, codec)
                    if row is not None and row.version != version:
                        version = row.version
                        yield value
                    if row is not None and row.outcome is not None:
                        return
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_INTERVAL):
                        await ended.wait()
                ended.clear()
        finally:
            changes[task_id].discard(ended)
            if not changes[task_id]:
                del changes[task_id]

    @functools.cached_property
    def _values(self) -> Batch[tuple[uuid.UUID, str], Row[Any] | None]:
        return Batch(with_connection(lambda: self.database, _read))


async def _read(held: HeldConnection, items: list[tuple[uuid.UUID, str]]) -> list[Row[Any] | None]:
    distinct = list(dict.fromkeys(items))
    parameters = {"task_ids": [task_id for task_id, _ in distinct], "names": [name for _, name in distinct]}
    found = {(row.task_id, row.name): row for row in await held.execute(values.GET_VALUES, parameters)}
    return [found.get(item) for item in items]


def _codec(annotation: Any) -> Codec[Any]:
    return UNTYPED if annotation is None else codec_for(annotation)


def _decode(task_id: uuid.UUID, name: str, row: Row[Any] | None, codec: Codec[Any]) -> Any:
    if row is None:
        raise TaskNotFound(task_id)
    return None if row.version is None else codec.decode(row.value or "null", f"value {name!r} of task {task_id}")
