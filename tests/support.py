"""What tests of several areas share: waiting for a condition."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(condition: Callable[[], Awaitable[T]], *, within: float = 30.0) -> T: ...
@overload
async def eventually(condition: Callable[[], T], *, within: float = 30.0) -> T: ...
async def eventually(condition: Callable[[], T | Awaitable[T]], *, within: float = 30.0) -> T:
    """What `condition` gives as soon as it is true; fails if that takes longer than `within` seconds."""
    deadline, pause = time.monotonic() + within, 0.01
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not true within {within} s"
        await asyncio.sleep(pause)
        pause = min(1.2 * pause, 0.05)
