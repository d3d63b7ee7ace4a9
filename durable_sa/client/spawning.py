"""Enqueuing tasks: one or many, in a transaction of their own or the caller's."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar, cast, overload

from sqlalchemy import Executable
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import Unpack

from ..app import App
from ..concurrency.branches import detached
from ..database.batches import Batch
from ..database.loans import HeldConnection, lent
from ..database.notifier import (
    BOARDING,
    Hint,
    HintSender,
    channel_name,
)
from ..database.scripts import perform_in_autocommit
from ..database.sessions import Script, SessionOrConnection, perform
from ..database_errors import LOCK_NOT_AVAILABLE, backoff, sqlstate
from ..errors import DurableError
from ..options import SpawnOptions
from ..results import SpawnResult
from ..spawns import Prepared, Spawn, at_position, prepare, prepare_another
from ..statements import spawning
from ..tasks import Task
from . import inserting

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


SELDOM = 2
"""How many times as long as the last spawn took must have passed for the next to carry its own hint.

Workers hear of it sooner then, but commits that send something wait for each other, so what comes often must not.
"""
IN_PASSING = 3
"""How many times as long as a spawn takes must have passed since the last hint for one of many in a row to carry them.

That saves the statement which would send what has gathered. Where commits take long it is the better way, so that
nobody waits in line for them.
"""


class Spawning(App):
    """The part of a client that enqueues tasks."""

    _last_spawn = 0.0, 0.0
    """When it began and ended, on the monotonic clock."""

    @overload
    async def spawn(
        self, task: Task[None, T], params: None = None, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[T]: ...
    @overload
    async def spawn(
        self, task: Task[ParamsT, T], params: ParamsT, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[T]: ...
    async def spawn(
        self, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[Any]:
        """Enqueue a task, in a transaction of its own.

        Raises:
            InvalidTaskParams, PayloadTooLarge: params that do not fit.
            InvalidConfiguration, InvalidName: an option that cannot work.
            QueueNotFound: there is no such queue.
            IdempotencyConflict: the idempotency key belongs to a task of another name or with other params.
        """
        return await self._spawn(prepare(self, task, params, options))

    async def spawn_by_name(
        self, name: str, params: Any = None, *, unchecked: bool = False, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[Any]:
        """Enqueue a task by its name.

        `unchecked` leaves it to the workers to know the name and to find the params fit: what does not fit the task
        that is registered here, if one is, is sent as plain JSON.

        Raises:
            TaskNotRegistered, InvalidTaskParams: nobody here knows the name, or the params do not fit, and `unchecked`
                is not set.
        """
        return await self._spawn(prepare(self, name, params, options, unchecked=unchecked))

    @overload
    def spawn_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: Task[None, T],
        params: None = None,
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, SpawnResult[T]]: ...
    @overload
    def spawn_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: Task[ParamsT, T],
        params: ParamsT,
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, SpawnResult[T]]: ...
    @overload
    def spawn_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task: Task[None, T],
        params: None = None,
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[T]: ...
    @overload
    def spawn_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task: Task[ParamsT, T],
        params: ParamsT,
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[T]: ...
    def spawn_with(
        self, session: SessionOrConnection, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]
    ) -> Any:
        """Enqueue a task in the caller's transaction: it exists if and only if that commits.

        With an asynchronous session or connection this is a coroutine, with a synchronous one it returns directly.
        Nothing is flushed: if the params need `order.id`, flush before. Nothing is committed or closed either.

        Raises:
            DurableError: whatever :meth:`spawn` raises; the transaction is then still usable.
        """
        prepared = prepare(self, task, params, options)
        return perform(session, self.schema, lambda hint: _first(inserting.spawn([prepared])(hint)))

    @overload
    def spawn_by_name_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str,
        params: Any = None,
        *,
        unchecked: bool = False,
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, SpawnResult[Any]]: ...
    @overload
    def spawn_by_name_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        name: str,
        params: Any = None,
        *,
        unchecked: bool = False,
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[Any]: ...
    def spawn_by_name_with(
        self,
        session: SessionOrConnection,
        name: str,
        params: Any = None,
        *,
        unchecked: bool = False,
        **options: Unpack[SpawnOptions],
    ) -> Any:
        """As :meth:`spawn_with`, by the task's name."""
        prepared = prepare(self, name, params, options, unchecked=unchecked)
        return perform(session, self.schema, lambda hint: _first(inserting.spawn([prepared])(hint)))

    async def spawn_many(self, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]) -> list[SpawnResult[Any]]:
        """Enqueue many tasks, all or none, with one statement a thousand. Results come in the order of the items.

        Raises:
            DurableError: whatever :meth:`spawn` raises, for the first item that is at fault, with its position in a
                note.
        """
        prepared = self._prepare_many(items)
        portions = list(inserting.portioned(prepared))
        with detached():
            ahead = asyncio.ensure_future(inserting.look_ahead(portions))
        try:
            if inserting.are_alike(portions):
                script = inserting.spawn(prepared, portions, many=spawning.SPAWN_ALIKE)
                return await perform_in_autocommit(self.database, script)
            return await self._perform(inserting.spawn(prepared, portions))
        finally:
            ahead.cancel()

    @overload
    def spawn_many_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]],
    ) -> Coroutine[Any, Any, list[SpawnResult[Any]]]: ...
    @overload
    def spawn_many_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]],
    ) -> list[SpawnResult[Any]]: ...
    def spawn_many_with(
        self, session: SessionOrConnection, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]
    ) -> Any:
        """As :meth:`spawn_many`, in the caller's transaction.

        On an `AUTOCOMMIT` connection, which has none, what would be refused is looked for before anything is inserted.
        """
        prepared = self._prepare_many(items)
        return perform(
            session,
            self.schema,
            inserting.spawn(prepared),
            in_autocommit=inserting.spawn_looking_first(prepared) if len(prepared) > 1 else None,
        )

    def _prepare_many(self, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]) -> list[Prepared]:
        prepared: list[Prepared] = []
        spawning = None if (telemetry := self.telemetry) is None else telemetry.spawn()
        ready = functools.partial(prepare, self, spawning=spawning, observed=spawning is not None)
        # A task that was there without options, as most are again, and what came of it.
        last: tuple[object, Prepared] | None = None
        for position, item in enumerate(items):
            try:
                match item:
                    case Spawn():
                        prepared.append(ready(item.task, item.params, item.options))
                    case (Task() as task, params) if last is not None and last[0] is task and not self.hooks.on_spawn:
                        prepared.append(prepare_another(self, task, params, last[1]))
                    case (task, params):
                        prepared.append(ready(task, params, {}))
                        last = task, prepared[-1]
                    case _:
                        raise TypeError(
                            "what is to be spawned is a tuple of a task and its params, or Spawn(task, params, ...), "
                            f"not {type(item).__name__}"
                        )
            except Exception as error:
                if spawning is not None:
                    spawning.over((), error)
                at_position(error, position)
                raise
        return prepared

    @functools.cached_property
    def _spawns(self) -> Batch[Prepared, SpawnResult[Any]]:
        return Batch(lent(lambda: self.database, self._spawn_batch))

    @functools.cached_property
    def _keyed_spawns(self) -> Batch[Prepared, SpawnResult[Any] | None]:
        return Batch(lent(lambda: self.database, self._spawn_keyed))

    async def _spawn(self, prepared: Prepared) -> SpawnResult[Any]:
        """Together with others, but none waits for a transaction that has the idempotency key of another one."""
        if prepared.idempotency_key is None:
            return await self._spawns(prepared)
        attempt = 0
        while (spawned := await self._keyed_spawns(prepared)) is None:
            await asyncio.sleep(backoff(attempt, most=0.5))
            attempt += 1
        return spawned

    async def _spawn_keyed(
        self, loan: HeldConnection, prepared: list[Prepared]
    ) -> Sequence[SpawnResult[Any] | BaseException | None]:
        """As `_spawn_batch`, with None for those whose key is in somebody's open transaction."""
        try:
            return await self._spawn_batch(loan, prepared, alone=spawning.SPAWN_ONE_KEYED, many=spawning.SPAWN_KEYED)
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
        if len(prepared) == 1:
            return [None]
        middle = len(prepared) // 2
        return [*await self._spawn_keyed(loan, prepared[:middle]), *await self._spawn_keyed(loan, prepared[middle:])]

    def _may_tell(self, sender: HintSender, now: float) -> bool:
        """Whether a spawn that begins now may carry hints."""
        began, ended = self._last_spawn
        took = ended - began
        return now >= ended + SELDOM * took or sender.quiet_for >= max(BOARDING, IN_PASSING * took)

    async def _spawn_batch(
        self,
        loan: HeldConnection,
        prepared: list[Prepared],
        *,
        alone: Executable = spawning.SPAWN_ONE,
        many: Executable = spawning.SPAWN,
    ) -> Sequence[SpawnResult[Any] | BaseException]:
        """Spawns of callers that came at the same time: one statement, an outcome each."""
        hint, sender = Hint(), self._sender()
        # A worker beside it need not be told by way of the database.
        here = next((worker for worker in self._workers if worker.loop is sender.loop), None)
        began = time.monotonic()
        gathered: Hint | None = None
        if here is None and len(prepared) == 1 and alone is spawning.SPAWN_ONE and self._may_tell(sender, began):
            alone = spawning.SPAWN_AND_TELL
            gathered = sender.take()
        script = inserting.insert(prepared, hint, alone=alone, many=many)
        try:
            statement, parameters = next(script)
            while True:
                if statement is spawning.SPAWN_AND_TELL:
                    parameters = {
                        **parameters,
                        "channel": channel_name(self.schema),
                        "gathered": gathered.encode() if gathered else None,
                    }
                rows = await loan.execute(statement, parameters)
                if rows and statement is spawning.SPAWN_AND_TELL:
                    gathered = None
                statement, parameters = script.send(rows)
        except StopIteration as end:
            results: list[SpawnResult[Any] | DurableError] = end.value
        finally:
            if gathered:
                sender.send(gathered)
        self._last_spawn = began, time.monotonic()
        told = alone is spawning.SPAWN_AND_TELL or (
            here is not None and here.offer(hint) and all(spawn.task_name in self.tasks for spawn in prepared)
        )
        if not told:
            sender.send(hint)
        return cast("list[SpawnResult[Any] | BaseException]", results)


def _first(script: Script[list[SpawnResult[Any]]]) -> Script[SpawnResult[Any]]:
    results = yield from script
    return results[0]
