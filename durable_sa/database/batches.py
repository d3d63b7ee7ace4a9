"""Calls that are made while one is in flight go together in the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from ..concurrency.branches import detached

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

UNANSWERED_TIMEOUT = 1.0
"""Seconds for which calls wait for the one in flight, whose connection may never answer."""


class Batch(Generic[ItemT, ResultT]):
    """Turns single calls into calls of a function of many items. The first is made at once, without waiting for others.

    The function is awaited in a task of its own, so that a caller that is cancelled cancels no other caller's item, and
    no statement within a driver. It returns a result for each item, in order, which may be an exception. A call that
    takes longer than a second no longer delays the items that have come since.
    """

    def __init__(
        self, function: Callable[[list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]], *, most: int = 1000
    ) -> None:
        self._function = function
        self._most = most
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._current: asyncio.Task[None] | None = None
        """The task that takes what waits."""

    async def __call__(self, item: ItemT) -> ResultT:
        """Return the result for one item."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._current is None:
            self._start()
        return await future

    def _start(self) -> None:
        with detached():
            self._current = asyncio.get_running_loop().create_task(self._drain(), name="durable:batch")
        self._tasks.add(self._current)
        self._current.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        loop, task = asyncio.get_running_loop(), self._current
        try:
            while self._waiting and self._current is task:
                overtaking = loop.call_later(UNANSWERED_TIMEOUT, self._overtake, task)
                try:
                    await self._call()
                finally:
                    overtaking.cancel()
        finally:
            if self._current is task:
                self._current = None

    def _overtake(self, task: asyncio.Task[None] | None) -> None:
        """Let another task take what waits, as a call of this one takes too long."""
        if self._current is task:
            self._current = None
            if self._waiting:
                self._start()

    async def _call(self) -> None:
        batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        results: Sequence[ResultT | BaseException] = [ConnectionError()] * len(batch)
        try:
            results = await self._function([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - the callers get it
            results = [error] * len(batch)
        finally:
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


async def halving(
    call: Callable[[list[ItemT]], Awaitable[Sequence[ResultT]]],
    items: list[ItemT],
    *,
    when: Callable[[Exception], bool],
) -> list[ResultT | Exception]:
    """Make a call for many items; if it is refused, make it for each half of them, to find the items at fault.

    `when` accepts the errors that are refusals. The result of an item whose own call is refused is the error.
    """
    try:
        return [*await call(items)]
    except Exception as error:
        if not when(error):
            raise
        if len(items) == 1:
            return [error]
    middle = len(items) // 2
    return [*await halving(call, items[:middle], when=when), *await halving(call, items[middle:], when=when)]
