"""Calls made while one is on its way go together in the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from .branches import detached

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

PATIENCE = 1.0
"""Seconds for which calls wait for the one on its way: it may be on a connection that never answers."""


class Batch(Generic[ItemT, ResultT]):
    """Turns single calls into a function of many items, without waiting for company: the first goes at once.

    Nor for long for a call that is on its way: after a second what has come meanwhile goes beside it.

    The function is awaited in a task of its own, so that a caller that is cancelled cancels nobody else's call, and
    nothing inside a driver. It gives a result an item, in order; an item's result may be an exception.
    """

    def __init__(
        self, function: Callable[[list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]], *, most: int = 1000
    ) -> None:
        self._function = function
        self._most = most
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._latest: asyncio.Task[None] | None = None
        self._sent_at = 0.0
        self._impatience: asyncio.TimerHandle | None = None

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
        try:
            while self._waiting:
                self._sent_at = asyncio.get_running_loop().time()
                batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                try:
                    results = await self._function([item for item, _ in batch])
                except BaseException as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error if isinstance(error, Exception) else ConnectionError())
                            future.exception()
                    if not isinstance(error, Exception):
                        raise
                    continue
                for (_, future), result in zip(batch, results, strict=True):
                    if future.done():
                        continue
                    if isinstance(result, BaseException):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            if self._latest is asyncio.current_task():
                self._latest = None
                if self._impatience is not None:
                    self._impatience.cancel()
                    self._impatience = None
