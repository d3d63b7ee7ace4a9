"""Objects of which each event loop has one of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One object for each event loop, made on first use there.

    Futures, tasks and connections belong to the loop in which they were made. Those of a closed loop never end, so its
    object is dropped, by `drop`, when the next loop comes. Safe to use from several threads.
    """

    __slots__ = ("_drop", "_found", "_make")

    def __init__(self, make: Callable[[], T], drop: Callable[[T], object] | None = None) -> None:
        self._make = make
        self._drop = drop
        self._found: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """Return the object of the running event loop."""
        loop = asyncio.get_running_loop()
        try:
            return self._found[loop]
        except KeyError:
            for other in list(self._found):
                if other.is_closed() and (dropped := self._found.pop(other, None)) is not None and self._drop:
                    self._drop(dropped)
            return self._found.setdefault(loop, self._make())

    def pop(self) -> T | None:
        """Remove the object of the running event loop, and return it if there is one."""
        return self._found.pop(asyncio.get_running_loop(), None)
