"""Calls that are made while one is in flight go together in the next."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Generic, TypeAlias, TypeVar

from ..concurrency.branches import detached
from ..concurrency.loops import PerLoop
from .connections import Database, HeldConnection

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

BatchFunction: TypeAlias = Callable[[list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]]

CALLS_IN_A_ROW = 20
"""Calls after which a connection is returned for others to take, although callers in loops have called once more."""
MOST_ITEMS = 1000
"""Items in one call."""
UNANSWERED_TIMEOUT = 1.0
"""Seconds for which calls wait for the one in flight, whose connection may never answer."""


class Batch(Generic[ItemT, ResultT]):
    """Turns single calls into calls of a function of many items. The first is made at once, without waiting for others.

    The function is awaited in a task of its own, so that a caller that is cancelled cancels no other caller's item, and
    no statement within a driver. It returns a result for each item, in order, which may be an exception. A call that
    takes longer than a second no longer delays the items that have come since.

    The function comes from a context manager, such as that of :func:`with_connection`, which is left one turn of the
    event loop after the callers were answered. A caller that spawns in a loop has called once more by then; taking a
    connection for each of its calls would cost it a quarter of the throughput.

    Callers on several event loops share nothing: each loop has calls of its own.
    """

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]]) -> None:
        self._calls: PerLoop[_Calls[ItemT, ResultT]] = PerLoop(lambda: _Calls(opened))

    async def __call__(self, item: ItemT) -> ResultT:
        """Return the result for one item."""
        return await self._calls.get().add(item)

    async def flush(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until no call on this event loop is in flight, nor holds a connection."""
        await self._calls.get().flush(timeout)


class _Calls(Generic[ItemT, ResultT]):
    """The calls of a batch on one event loop."""

    def __init__(self, opened: Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]]) -> None:
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._current: asyncio.Task[None] | None = None
        """The task that takes what waits."""

    def add(self, item: ItemT) -> asyncio.Future[ResultT]:
        """Have an item wait for the next call, and return the future of its result."""
        future: asyncio.Future[ResultT] = self._loop.create_future()
        self._waiting.append((item, future))
        if self._current is None:
            self._start()
        return future

    async def flush(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until no call is in flight, and its connection is back in the pool."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)

    def _start(self) -> None:
        with detached():
            self._current = self._loop.create_task(self._drain(), name="durable:batch")
        self._tasks.add(self._current)
        self._current.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        loop, task = self._loop, self._current
        try:
            while self._waiting and self._current is task:
                async with self._opened() as function:
                    for _ in range(CALLS_IN_A_ROW):
                        overtaking = loop.call_later(UNANSWERED_TIMEOUT, self._overtake, task)
                        try:
                            await self._call(function)
                        finally:
                            overtaking.cancel()
                        await asyncio.sleep(0)
                        if not self._waiting or self._current is not task:
                            break
                # The next in line for the connection takes it in this turn, before this task asks for one.
                await asyncio.sleep(0)
        finally:
            if self._current is task:
                self._current = None

    def _overtake(self, task: asyncio.Task[None] | None) -> None:
        """Let another task take what waits, as a call of this one takes too long."""
        if self._current is task:
            self._current = None
            if self._waiting:
                self._start()

    async def _call(self, function: BatchFunction[ItemT, ResultT]) -> None:
        batch, self._waiting = self._waiting[:MOST_ITEMS], self._waiting[MOST_ITEMS:]
        results: Sequence[ResultT | BaseException] = [ConnectionError()] * len(batch)
        try:
            results = await function([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - the callers get it
            results = [error] * len(batch)
        finally:
            if not self._loop.is_closed():
                _answer(batch, results)


def _answer(batch: Sequence[tuple[ItemT, asyncio.Future[ResultT]]], results: Sequence[ResultT | BaseException]) -> None:
    for (_, future), result in zip(batch, results, strict=True):
        if future.done():
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
            future.exception()
        else:
            future.set_result(result)


def always(
    function: BatchFunction[ItemT, ResultT],
) -> Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]]:
    """Open nothing for a batch's function."""
    return lambda: nullcontext(function)


def with_connection(
    database: Callable[[], Database],
    function: Callable[[HeldConnection, list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]],
) -> Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]]:
    """Open a connection of the database, which is the first argument of a batch's function."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[BatchFunction[ItemT, ResultT]]:
        try:
            held = HeldConnection(database())
        except Exception as error:  # noqa: BLE001 - the callers get it, of a bind that cannot work
            yield functools.partial(_refuse, error)
            return
        async with held:
            yield functools.partial(function, held)

    return opened


async def _refuse(error: Exception, items: list[Any]) -> Sequence[Any]:
    return [error] * len(items)
