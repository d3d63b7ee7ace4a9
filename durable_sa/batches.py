"""Calls made while one is on its way go together in the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from .branches import detached

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batch(Generic[ItemT, ResultT]):
    """Turns single calls into a function of many items, without waiting for company: the first goes at once.

    The function is awaited in a task of its own, so that a caller that is cancelled cancels nobody else's call, and
    nothing inside a driver. It gives a result an item, in order; an item's result may be an exception.
    """

    def __init__(
        self, function: Callable[[list[ItemT]], Awaitable[Sequence[ResultT | BaseException]]], *, most: int = 1000
    ) -> None:
        self._function = function
        self._most = most
        self._waiting: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: ItemT) -> ResultT:
        """The result for one item."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            with detached():
                self._task = asyncio.get_running_loop().create_task(self._drain(), name="durable:batch")
        return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
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
            self._task = None
