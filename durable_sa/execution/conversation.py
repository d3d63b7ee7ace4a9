"""Conversations: a run that has sent or received messages stays for a moment for the next, instead of suspending."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

PATIENCE: Final = 0.02
"""Seconds for which a run stays. A suspended task answers within 6 ms, of which it takes 4 to wake and to load it."""


class Conversation:
    """The messages that have come to the task of a run, as far as its worker knows."""

    __slots__ = ("_arrived", "arrivals")

    def __init__(self) -> None:
        self.arrivals = 0
        """How often a message may have come."""
        self._arrived = asyncio.Event()

    def arrive(self) -> None:
        """Note that a message may have come."""
        self.arrivals += 1
        self._arrived.set()

    async def next_arrival(self, seen: int, seconds: float) -> bool:
        """Wait up to so many seconds for an arrival after the first `seen`. Return whether there was one."""
        if seconds > 0 and self.arrivals == seen:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._arrived.wait()
        return seconds > 0 and self.arrivals != seen
