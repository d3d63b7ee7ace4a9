"""The block of a stream: items are gathered, and written in rows of many."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from ..database.hint import Hint
from ..database.scripts import Script
from ..errors import InvalidState
from ..ids import new_id
from ..signals import LeaseLost
from ..statements import checkpoints, streams
from ..statements.claiming import ClaimedRun
from .writer import Writer
from .writes import ItemsValues, Kind, Write

GATHERING_SECONDS = 0.05
ROW_BYTES = 32 * 1024
"""Characters of JSON from which on a row is written without waiting for more."""
ROWS_IN_FLIGHT = 4
"""Rows that may be on their way to the database before a writer has to wait."""
FIRST_RESERVATION = 1_000
LARGEST_RESERVATION = 100_000
"""Positions that are reserved at once: each time twice as many, because each time waits for the disk."""


class Source(NamedTuple):
    """What writes a stream."""

    step_key: uuid.UUID
    """The key of the step, or of a block in the task's body."""
    try_id: uuid.UUID
    """The try of the step."""


class Block:
    """An open block of a stream."""

    def __init__(
        self, claimed: ClaimedRun, writer: Writer, name: str, source: Source, *, on_lost: Callable[[], None]
    ) -> None:
        self.block_id = new_id()
        self.name = name
        self.source = source
        self.position = 0
        """The position of the last item that was written or gathered."""
        self._claimed = claimed
        self._writer = writer
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reserved = 0
        self._reservation = FIRST_RESERVATION
        self._gathered: list[str] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None
        self._in_flight = 0
        self._settled = asyncio.Event()
        self._settled.set()
        self._error: BaseException | None = None

    def opening(self, hint: Hint) -> Script[None]:
        """Return the script that opens the block, and supersedes what earlier tries of its step have written."""
        it = {"stream_task_id": self._claimed.task_id, "stream_name": self.name}
        yield from self._fenced()
        rows = yield streams.LOCK_STREAM, it
        last, restarts, began_after = 0, "null", 0
        if rows:
            found = rows[0]
            repeated = found.block_id == self.block_id
            mine = found.step_key == self.source.step_key
            same_try = mine and found.try_id == self.source.try_id
            if found.closed and (same_try or not mine):
                raise ended(self.name)
            last = found.last_position if found.block_id is None else found.reserved
            began_after = found.began_after if same_try else last
            restarts = found.restarts or "null"
            if repeated:
                # The script is repeated, because its commit was not answered.
                last = found.last_position
            else:
                deleted = yield (
                    streams.SUPERSEDE,
                    {**it, "of_step": self.source.step_key, "of_try": self.source.try_id},
                )
                before = [row.before for row in deleted]
                if mine and not same_try:
                    before.append(found.began_after)
                if before and min(before) < last:
                    began_after = min(before)
                    restarts = _with_restart(restarts, began_after, last)
        yield (
            streams.OPEN_STREAM,
            {
                **it,
                "new_block": self.block_id,
                "new_step": self.source.step_key,
                "new_try": self.source.try_id,
                "new_began_after": began_after,
                "new_last": last,
                "new_reserved": last + FIRST_RESERVATION,
                "new_restarts": None if restarts == "null" else restarts,
            },
        )
        self.position, self._reserved = last, last + FIRST_RESERVATION

    def closing(self, *, ends: bool, key: uuid.UUID | None) -> Callable[[Hint], Script[bool]]:
        """Return the script that leaves the block, and records that under `key`, if that is given."""
        it = {"stream_task_id": self._claimed.task_id, "stream_name": self.name}

        def script(hint: Hint) -> Script[bool]:
            yield from self._fenced()
            rows = yield (
                streams.CLOSE_STREAM,
                {**it, "open_block": self.block_id, "new_last": self.position, "ends": ends},
            )
            if key is not None:
                yield streams.RECORD_BLOCK, {**it, "block_key": key}
            return bool(rows)

        return script

    def _fenced(self) -> Script[None]:
        fenced = {"task_id": self._claimed.task_id, "fence": self._claimed.fence}
        if not (yield checkpoints.LOCK_UNDER_FENCE, fenced):
            raise LeaseLost

    async def write(self, text: str) -> None:
        """Add an item; waits while many rows are on their way.

        Raises:
            InvalidState: the stream is not this block's any more.
            LeaseLost: the run has lost its task.
        """
        while self._in_flight >= ROWS_IN_FLIGHT and self._error is None:
            self._settled.clear()
            await self._settled.wait()
        if self._error is not None:
            raise self._error
        self._gathered.append(text)
        self._size += len(text) + 1
        self.position += 1
        if self._size >= ROW_BYTES:
            self._send()
        elif self._timer is None:
            self._timer = self._loop.call_later(GATHERING_SECONDS, self._send)

    async def flush(self) -> None:
        """Write what was gathered, and wait for that."""
        self._send()
        while self._in_flight and self._error is None:
            self._settled.clear()
            await self._settled.wait()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Write nothing more: the run has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._gathered.clear()

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._gathered:
            return
        items, self._gathered, self._size = f"[{','.join(self._gathered)}]", [], 0
        reservation = None
        if self.position + self._reservation // 2 > self._reserved:
            # Ahead of time, because positions may be used once their reservation is on the disk.
            self._reservation = min(self._reservation * 2, LARGEST_RESERVATION)
            reservation = self._reserved = self.position + self._reservation
        values = ItemsValues(self.name, self.block_id, self.position, *self.source, items, reservation)
        self._in_flight += 1
        claimed = self._claimed
        self._writer.submit(
            Write(Kind.ITEMS, claimed.task_id, claimed.fence, self._written, values, new_id(), size=len(items))
        )

    def _written(self, stored: Any, error: BaseException | None) -> None:
        self._in_flight -= 1
        if error is not None:
            self._error = error
            if isinstance(error, LeaseLost):
                self._on_lost()
        elif stored is not None and stored.status == "refused":
            self._error = LeaseLost()
            self._on_lost()
        self._settled.set()


def ended(name: str) -> InvalidState:
    """Return the error of a write after the end of a stream."""
    return InvalidState(
        f"Stream {name!r}", "ended", "A block that others are to go on with is opened with `keep_open=True`."
    )


def _with_restart(restarts: str, last_valid: int, last_superseded: int) -> str:
    """Add a restart to the stored ones, of which it replaces those that it includes."""
    known: list[list[int]] = json.loads(restarts) or []
    return json.dumps([*(pair for pair in known if pair[0] < last_valid), [last_valid, last_superseded]])
