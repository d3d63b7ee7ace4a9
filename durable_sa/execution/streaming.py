"""The block of a stream: items are gathered, and written in rows of many."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import InvalidState
from ..ids import new_id
from ..signals import LeaseLost
from ..statements import streams
from .writes import BlockValues, ClosingValues, ItemsValues, Kind, Write

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun
    from .writer import Writer

GATHERING_SECONDS = 0.05
ROW_BYTES = 32 * 1024
"""Characters of JSON from which on a row is written without waiting for more."""
BUFFER_BYTES = 2 * ROW_BYTES
"""Characters of JSON from which on a writer waits, while a row is in flight."""
LARGEST_RESERVATION = 100_000
"""Positions that are reserved at once: each time twice as many, because each time waits for the disk."""


class Block:
    """An open block of a stream.

    One row is in flight at a time, so that readers, who go by positions, pass over none. What is gathered meanwhile
    forms the next one.
    """

    def __init__(
        self,
        claimed: ClaimedRun,
        writer: Writer,
        block_id: uuid.UUID,
        values: BlockValues,
        position: int,
        *,
        on_lost: Callable[[], None],
    ) -> None:
        self.block_id = block_id
        self.position = position
        """The position of the last item that was written or gathered."""
        self._values = values
        self._claimed = claimed
        self._writer = writer
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reserved = position + streams.FIRST_RESERVATION
        self._reservation = streams.FIRST_RESERVATION
        self._gathered: list[str] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._next_turn = 0.0
        """When the next row may be written that is not full."""
        self._in_flight = False
        self._written = asyncio.Event()
        self._error: BaseException | None = None
        self._abandoned = False

    @property
    def full(self) -> bool:
        """True if a writer has to wait."""
        return self._size >= BUFFER_BYTES and self._error is None

    def add(self, text: str) -> None:
        """Add an item.

        Raises:
            InvalidState: the stream is not this block's any more.
            LeaseLost: the run has lost its task.
        """
        if self._error is not None:
            raise self._error
        self._gathered.append(text)
        self._size += len(text) + 1
        self.position += 1
        self._arrange()

    async def next_written(self) -> None:
        """Wait until the row in flight is written."""
        self._written.clear()
        await self._written.wait()

    async def flush(self) -> None:
        """Write what was gathered, and wait for that."""
        while self._error is None and (self._gathered or self._in_flight):
            if not self._in_flight:
                self._send()
            await self.next_written()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Write nothing more: the block was cut off."""
        self._abandoned = True
        self._cancel_timer()
        self._gathered.clear()

    def note_position(self, positions: dict[uuid.UUID, dict[str, int]]) -> None:
        """Note the last position of the stream for the step that writes."""
        positions.setdefault(self._values.step_key, {})[self._values.name] = self.position

    def closing(self, *, ends: bool, key: uuid.UUID | None) -> ClosingValues:
        """Return what leaves the block, once all of it is written."""
        return ClosingValues(self._values.name, self.block_id, self.position, ends, key)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arrange(self) -> None:
        """Have what is gathered written: at once if that is much, or if nothing was written for a while."""
        if self._in_flight or not self._gathered:
            return
        if self._size >= ROW_BYTES:
            self._send()
        elif self._timer is None:
            # Not in this turn of the loop, in which more items may come.
            self._timer = self._loop.call_at(max(self._next_turn, self._loop.time()), self._send)

    def _send(self) -> None:
        self._cancel_timer()
        items, self._gathered, self._size = f"[{','.join(self._gathered)}]", [], 0
        reservation = None
        if self.position + self._reservation // 2 > self._reserved:
            # Ahead of time, so that few of the rows wait for the disk.
            self._reservation = min(self._reservation * 2, LARGEST_RESERVATION)
            reservation = self._reserved = self.position + self._reservation
        name, step_key, try_id = self._values
        values = ItemsValues(name, self.block_id, self.position, step_key, try_id, items, reservation)
        self._in_flight = True
        self._next_turn = self._loop.time() + GATHERING_SECONDS
        claimed = self._claimed
        write = Write(Kind.ITEMS, claimed.task_id, claimed.fence, self._settled, values, new_id(), size=len(items))
        self._writer.submit(write)

    def _settled(self, row: Any, error: BaseException | None) -> None:
        self._in_flight = False
        if error is None and not row.valid:
            error = InvalidState(
                f"Stream {self._values.name!r}", "written by another block", "Has its row been changed by hand?"
            )
        self._error = error
        self._written.set()
        if isinstance(error, LeaseLost) and not self._abandoned:
            self._on_lost()
        elif error is None:
            self._arrange()


def ended(name: str) -> InvalidState:
    """Return the error of a write after the end of a stream."""
    return InvalidState(
        f"Stream {name!r}", "ended", "A block that others are to go on with is opened with `keep_open=True`."
    )
