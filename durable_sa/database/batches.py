"""Calls made while one is on its way go together in the next."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Generic, TypeAlias, TypeVar

from ..concurrency.branches import detached

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

BatchFunction: TypeAlias = Callable[[list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]]

IN_A_ROW = 3
"""How often a caller must have come again at once for it to be waited for, which takes one turn of the event loop."""
ROW = 0.01
"""Seconds after which a row of calls lets others have what it shares."""
PATIENCE = 1.0
"""Seconds for which calls wait for the one on its way: it may be on a connection that never answers."""


class Batch(Generic[ItemT, ResultT]):
    """Turns single calls into a function of many items, without waiting for company: the first goes at once.

    Nor for long for a call that is on its way: after a second what has come meanwhile goes beside it.

    The function is awaited in a task of its own, so that a caller that is cancelled cancels nobody else's call, and
    nothing inside a driver. It gives a result an item, in order; an item's result may be an exception. What calls in a
    row may share, such as a connection, comes with the function, and is given back before the last of them is answered.
    A caller that comes again as soon as it is answered, and again, keeps it for the time in between.
    """

    def __init__(
        self, opened: Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]], *, most: int = 1000
    ) -> None:
        self._opened = opened
        self._most = most
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._latest: asyncio.Task[None] | None = None
        self._sent_at = 0.0
        self._impatience: asyncio.TimerHandle | None = None
        self._in_a_row = 0

    async def __call__(self, item: ItemT) -> ResultT:
        """The result for one item."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._waiting.append((item, future))
        if self._latest is None:
            self._send()
        elif self._impatience is None:
            self._impatience = loop.call_later(PATIENCE, self._overtake)
        return await future

    def _send(self) -> None:
        with detached():
            self._latest = asyncio.get_running_loop().create_task(self._drain(), name="durable:batch")
        self._tasks.add(self._latest)
        self._latest.add_done_callback(self._tasks.discard)

    def _overtake(self) -> None:
        """Let what waits go beside the call on its way, if that is old."""
        self._impatience = None
        if not self._waiting or self._latest is None:
            return
        loop = asyncio.get_running_loop()
        if (left := self._sent_at + PATIENCE - loop.time()) <= 0:
            self._send()
            left = PATIENCE
        self._impatience = loop.call_later(left, self._overtake)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        answer = _nothing
        try:
            while self._waiting:
                async with self._opened() as function:
                    until = loop.time() + ROW
                    while True:
                        answer = await self._call(function)
                        if loop.time() >= until or not (self._waiting or self._in_a_row >= IN_A_ROW):
                            break
                        answer()
                        answer = _nothing
                        if not self._waiting and not await self._linger():
                            break
                answer()
                await self._linger()
        finally:
            answer()
            if self._latest is asyncio.current_task():
                self._latest = None
                if self._impatience is not None:
                    self._impatience.cancel()
                    self._impatience = None

    async def _linger(self) -> bool:
        """Whether a caller that has just been answered calls again at once, as in a loop."""
        await asyncio.sleep(0)
        self._in_a_row = self._in_a_row + 1 if self._waiting else 0
        return bool(self._waiting)

    async def _call(self, function: BatchFunction[ItemT, ResultT]) -> Callable[[], None]:
        """Call the function with what waits; gives what tells the callers."""
        self._sent_at = asyncio.get_running_loop().time()
        batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        results: Sequence[ResultT | BaseException]
        try:
            results = await function([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - it is the callers'
            results = [error] * len(batch)
        except BaseException:
            _answer(batch, [ConnectionError()] * len(batch))
            raise
        return functools.partial(_answer, batch, results)


def always(
    function: BatchFunction[ItemT, ResultT],
) -> Callable[[], AbstractAsyncContextManager[BatchFunction[ItemT, ResultT]]]:
    """For a batch whose calls share nothing."""
    return lambda: nullcontext(function)


def _answer(batch: Sequence[tuple[ItemT, asyncio.Future[ResultT]]], results: Sequence[ResultT | BaseException]) -> None:
    for (_, future), result in zip(batch, results, strict=True):
        if future.done():
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
            future.exception()
        else:
            future.set_result(result)


def _nothing() -> None:
    """There is nobody left to tell."""
