"""Enqueuing tasks: one or many, in a transaction of their own or the caller's."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import Unpack

from ..app import App
from ..concurrency.branches import detached
from ..database.batches import Batch, with_connection
from ..database.connections import HeldConnection
from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, drive_async, perform, perform_in_autocommit, perform_within
from ..database_errors import LOCK_NOT_AVAILABLE, retrying, sqlstate
from ..options import SpawnOptions
from ..results import SpawnResult
from ..spawns import Prepared, Spawn, SpawnCall, at_position, prepare, prepare_another
from ..tasks import OfTask, Task
from . import inserting

if TYPE_CHECKING:
    from ..worker.worker import Worker

LOCK_TIMEOUT: Final = "5ms"
"""Longest wait for an open transaction that has inserted one of the idempotency keys of a statement."""
LONGEST_LOCKED_PAUSE = 0.5
"""Seconds between tries of a spawn whose key an open transaction has inserted, at most."""

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


class Spawning(App):
    """The part of a client that enqueues tasks."""

    @overload
    async def spawn(
        self, task: Task[None, T], params: None = None, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[T]: ...
    @overload
    async def spawn(
        self, task: Task[ParamsT, T], params: ParamsT | OfTask[ParamsT], **options: Unpack[SpawnOptions]
    ) -> SpawnResult[T]: ...
    async def spawn(
        self, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[Any]:
        """Enqueue a task, in a transaction of its own.

        Raises:
            InvalidTaskParams, SerializationError, PayloadTooLarge: params that do not fit or cannot be stored.
            InvalidConfiguration, InvalidName: an option that cannot work.
            QueueNotFound: there is no such queue.
            IdempotencyConflict: the idempotency key belongs to a task of another name or with other params.
        """
        with SpawnCall(self) as call:
            return await self._spawn(prepare(self, task, params, options, call=call), call)

    async def spawn_by_name(
        self, name: str, params: Any = None, *, unchecked: bool = False, **options: Unpack[SpawnOptions]
    ) -> SpawnResult[Any]:
        """Enqueue a task by its name.

        `unchecked` leaves it to the workers to know the name and to find the params fit: what does not fit the task
        that is registered here, if one is, is sent as plain JSON.

        Raises:
            TaskNotRegistered, InvalidTaskParams: no task of that name is registered here, or the params do not fit, and
                `unchecked` is not set.
            DurableError: the other errors of :meth:`spawn`.
        """
        with SpawnCall(self) as call:
            return await self._spawn(prepare(self, name, params, options, unchecked=unchecked, call=call), call)

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
        params: ParamsT | OfTask[ParamsT],
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
        params: ParamsT | OfTask[ParamsT],
        **options: Unpack[SpawnOptions],
    ) -> SpawnResult[T]: ...
    def spawn_with(
        self, session: SessionOrConnection, task: Task[Any, Any], params: Any = None, **options: Unpack[SpawnOptions]
    ) -> Any:
        """Enqueue a task in the caller's transaction: it exists if and only if that commits.

        With an asynchronous session or connection this is a coroutine, with a synchronous one it returns directly.
        Nothing is flushed: if the params need `order.id`, flush before. Nothing is committed or closed either.

        Raises:
            DurableError: the same errors as :meth:`spawn`; the transaction is then still usable.
        """
        return self._spawn_one_with(session, functools.partial(prepare, self, task, params, options))

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
        """Enqueue a task by its name as :meth:`spawn_with` does.

        Raises:
            DurableError: the same errors as :meth:`spawn_by_name`; the transaction is then still usable.
        """
        return self._spawn_one_with(
            session, functools.partial(prepare, self, name, params, options, unchecked=unchecked)
        )

    async def spawn_many(self, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]]) -> list[SpawnResult[Any]]:
        """Enqueue many tasks, all or none, a thousand per statement. Results are in the order of the items.

        Raises:
            DurableError: the same errors as :meth:`spawn`, for the first item at fault, with its position in a note.
        """
        with SpawnCall(self) as call:
            prepared = self._prepare_many(items, call)
            portions = list(inserting.portioned(prepared))
            run = perform_in_autocommit if inserting.is_atomic(portions) else perform
            with detached():
                computing = asyncio.ensure_future(inserting.compute_results(portions))
            try:
                spawning = functools.partial(
                    inserting.spawn, prepared, limited_queues=self.limited_queues, portions=portions
                )
                results = await _insisting(lambda: run(self.database, spawning))
            finally:
                computing.cancel()
            return _count(call, prepared, results)

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
        """Enqueue many tasks as :meth:`spawn_many` does, in the caller's transaction.

        An `AUTOCOMMIT` connection has no transaction: there, all items are checked before the first is inserted.

        Raises:
            DurableError: the same errors as :meth:`spawn_many`; the transaction is then still usable.
        """
        return self._spawn_with(session, functools.partial(self._prepare_many, items))

    def _spawn_one_with(self, session: SessionOrConnection, prepare_one: Callable[..., Prepared]) -> Any:
        results = self._spawn_with(session, lambda call: [prepare_one(call=call)])
        return _first(results) if inspect.isawaitable(results) else results[0]

    def _spawn_with(self, session: SessionOrConnection, prepare_all: Callable[[SpawnCall], list[Prepared]]) -> Any:
        call = SpawnCall(self)
        try:
            prepared = prepare_all(call)
        except BaseException as error:
            call.end(error)
            raise

        def observed(script: Script[list[SpawnResult[Any]]]) -> Script[list[SpawnResult[Any]]]:
            with call:
                return _count(call, prepared, (yield from script))

        in_autocommit = inserting.spawn_looking_first if len(prepared) > 1 else inserting.spawn
        return perform_within(
            session,
            self.schema,
            lambda hint: observed(inserting.spawn_within(prepared, hint, self.limited_queues)),
            in_autocommit=lambda hint: observed(in_autocommit(prepared, hint, self.limited_queues)),
        )

    def _prepare_many(
        self, items: Iterable[tuple[Task[Any, Any], Any] | Spawn[Any]], call: SpawnCall
    ) -> list[Prepared]:
        prepared: list[Prepared] = []
        call.begin()
        # The latest task without options, and its spawn: most are followed by another of the kind.
        last: tuple[object, Prepared] | None = None
        for position, item in enumerate(items):
            try:
                match item:
                    case Spawn():
                        prepared.append(prepare(self, item.task, item.params, item.options, call=call))
                    case (Task() as task, params) if last is not None and last[0] is task and not self.hooks.on_spawn:
                        prepared.append(prepare_another(self, task, params, last[1]))
                    case (task, params):
                        prepared.append(prepare(self, task, params, {}, call=call))
                        last = task, prepared[-1]
                    case _:
                        raise TypeError(
                            "what is to be spawned is a tuple of a task and its params, or Spawn(task, params, ...), "
                            f"not {type(item).__name__}"
                        )
            except Exception as error:
                at_position(error, position)
                raise
        return prepared

    @functools.cached_property
    def _workers(self) -> set[Worker]:
        """The workers of this client that run."""
        return set()

    @functools.cached_property
    def _spawns(self) -> Batch[Prepared, SpawnResult[Any]]:
        return Batch(with_connection(lambda: self.database, self._spawn_batch))

    @functools.cached_property
    def _keyed_spawns(self) -> Batch[Prepared, SpawnResult[Any]]:
        return Batch(with_connection(lambda: self.database, self._spawn_keyed))

    async def _spawn(self, prepared: Prepared, call: SpawnCall) -> SpawnResult[Any]:
        """Spawn together with others, but without waiting for a transaction that has another one's idempotency key."""
        limits = prepared.limits
        if limits is not None and limits.on_conflict == "cancel":
            # The old task is cancelled if and only if the new one is inserted.
            spawning = functools.partial(inserting.spawn, [prepared], limited_queues=self.limited_queues)
            (result,) = await _insisting(lambda: perform(self.database, spawning))
        elif prepared.idempotency_key is None and (limits is None or limits.unique_key is None):
            result = await self._spawns(prepared)
        else:
            result = await _insisting(lambda: self._keyed_spawns(prepared))
        if result.created:
            call.created(prepared)
        return result

    async def _spawn_keyed(
        self, held: HeldConnection, prepared: list[Prepared]
    ) -> Sequence[SpawnResult[Any] | BaseException]:
        """Spawn as `_spawn_batch` does, with an error for items whose key an open transaction has inserted."""
        try:
            return await self._spawn_batch(held, prepared, lock_timeout=LOCK_TIMEOUT)
        except DBAPIError as error:
            if not _is_locked(error):
                raise
            if len(prepared) == 1:
                return [error]
        # Each half is spawned in turn, down to the single item whose key is locked.
        middle = len(prepared) // 2
        first = await self._spawn_keyed(held, prepared[:middle])
        return [*first, *await self._spawn_keyed(held, prepared[middle:])]

    async def _spawn_batch(
        self, held: HeldConnection, prepared: list[Prepared], *, lock_timeout: str | None = None
    ) -> Sequence[SpawnResult[Any] | BaseException]:
        """Spawn tasks of callers that came at the same time with one statement, and an outcome each."""
        hints = self._sender()
        # A worker on this event loop that has slots for all of the tasks gets the hint without the database.
        here = next((worker for worker in list(self._workers) if worker.loop is hints.loop), None)
        alone = here is None and len(prepared) == 1 and lock_timeout is None
        carried = hints.take() if alone else None
        channel = None if carried is None else hints.channel
        hint = carried or Hint()
        script = inserting.insert(prepared, hint, self.limited_queues, lock_timeout=lock_timeout, channel=channel)
        try:
            return await drive_async(held.execute, script)
        finally:
            if not (here is not None and here.offer(hint) and all(spawn.task_name in self.tasks for spawn in prepared)):
                hints.send(hint)


def _count(call: SpawnCall, prepared: Sequence[Prepared], results: list[SpawnResult[Any]]) -> list[SpawnResult[Any]]:
    if call.observed:
        for item, result in zip(prepared, results, strict=True):
            if result.created:
                call.created(item)
    return results


async def _first(results: Awaitable[list[SpawnResult[Any]]]) -> SpawnResult[Any]:
    return (await results)[0]


async def _insisting(spawn: Callable[[], Awaitable[T]]) -> T:
    """Spawn, and retry as long as other transactions have the keys, or take them each time."""
    return await retrying(
        spawn, when=lambda error: _is_locked(error) or inserting.is_contended(error), most=LONGEST_LOCKED_PAUSE
    )


def _is_locked(error: BaseException) -> bool:
    return sqlstate(error) == LOCK_NOT_AVAILABLE
