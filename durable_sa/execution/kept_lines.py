"""The lines of `ctx.logger` that are kept in the task's stream `$log`."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from ..database_errors import without_values
from ..ids import new_id
from ..serialization.failures import clean
from ..signals import LeaseLost
from .lines import LOGGER
from .streaming import GATHERING_SECONDS, ROW_BYTES
from .writes import Kind, LinesValues, Write

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun
    from .writer import Writer

BUFFER_BYTES = 8 * ROW_BYTES
"""Characters of JSON from which on lines are dropped, because the database does not take them as fast."""
MESSAGE_BYTES = 8 * 1024
"""The length from which on a message is kept without its middle."""


class KeptLines:
    """The lines of one run, which are gathered and written without anything that waits for them.

    One row is in flight at a time. What does not fit into the buffer meanwhile is dropped and counted.
    """

    def __init__(
        self,
        claimed: ClaimedRun,
        writer: Writer,
        level: int,
        *,
        now: Callable[[], datetime],
        on_lost: Callable[[], None],
        warn: Callable[..., None],
    ) -> None:
        self._claimed = claimed
        self._writer = writer
        self.level = level
        """The lowest level that is kept."""
        self._now = now
        self._on_lost = on_lost
        self._warn = warn
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._gathered: list[str] = []
        self._size = 0
        self._dropped = 0
        self._arranged = False
        """True while the gathered lines are about to be written."""
        self._in_flight = False
        self._over = False

    def handle(self, record: logging.LogRecord) -> None:
        """Pass a record on to the handlers of logging, and keep it, as far as its level is that of each."""
        if LOGGER.isEnabledFor(record.levelno):
            LOGGER.handle(record)
        if record.levelno >= self.level:
            self._add(self._line(record.levelname, _message(record), record.created))

    def _line(self, level: str, message: str, created: float) -> str:
        # The worker's clock may differ from that of the database.
        at = self._now() - timedelta(seconds=max(0.0, time.time() - created))
        line = {
            "time": at.astimezone(UTC).isoformat(),
            "level": level,
            "message": message,
            "attempt": self._claimed.attempt,
        }
        return to_json(line).decode()

    def _add(self, text: str) -> None:
        """Gather a line; called in any thread."""
        with self._lock:
            if self._over:
                return
            if self._size + len(text) > BUFFER_BYTES:
                self._dropped += 1
                return
            self._gathered.append(text)
            self._size += len(text) + 1
            if self._arranged or self._in_flight:
                return
            self._arranged = True
        try:
            self._loop.call_soon_threadsafe(self._loop.call_later, GATHERING_SECONDS, self._send)
        except RuntimeError:
            # The loop was closed, and the worker with it.
            self._over = True

    def finish(self, *, lost: bool) -> None:
        """Have the rest written before the outcome of the run, or drop it if the run was `lost`."""
        if not lost:
            # The writer keeps the order of a task's writes, so this does not wait for a row in flight.
            self._send()
        with self._lock:
            self._over = True
            self._gathered.clear()

    def _send(self) -> None:
        with self._lock:
            self._arranged = False
            lines, self._gathered, self._size = self._gathered, [], 0
            dropped, self._dropped = self._dropped, 0
            if self._over or not (lines or dropped):
                return
            self._in_flight = True
        if dropped:
            message = f"{dropped} lines were dropped here, because the database did not take them as fast"
            lines.append(self._line("WARNING", message, time.time()))
        text = f"[{','.join(lines)}]"
        claimed = self._claimed
        values = LinesValues(text, len(lines))
        self._writer.submit(
            Write(Kind.LINES, claimed.task_id, claimed.fence, self._written, values, new_id(), size=len(text))
        )

    def _written(self, _: Any, error: BaseException | None) -> None:
        with self._lock:
            self._in_flight = False
            if again := error is None and not self._over and bool(self._gathered or self._dropped):
                self._arranged = True
        if again:
            self._loop.call_later(GATHERING_SECONDS, self._send)
        if isinstance(error, LeaseLost):
            self.finish(lost=True)
            self._on_lost()
        elif error is not None:
            self.finish(lost=True)
            self._warn("has logged lines that the database refuses to keep: %s", type(without_values(error)).__name__)


def _message(record: logging.LogRecord) -> str:
    """Return the message of a record, with the class of its exception, as text that can be stored."""
    try:
        message = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            message += f" ({record.exc_info[0].__name__})"
    except Exception as error:  # noqa: BLE001 - methods of the arguments are user code, and a line never fails a task
        message = f"a message that cannot be formatted: {type(error).__name__}"
    return clean(message, MESSAGE_BYTES)
