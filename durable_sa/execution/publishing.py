"""The values that a run publishes: coalesced, so that few of them reach the database, and the last one always."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ..database_errors import without_values
from ..signals import LeaseLost
from .writes import Kind, PublicationValues, Write

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun
    from .writer import Writer

INTERVAL = 0.25
"""Seconds between two writes of a run."""


class Publications:
    """The values of one run that are to be written: the first at once, those of the next 0.25 seconds together."""

    def __init__(
        self,
        claimed: ClaimedRun,
        writer: Writer,
        *,
        on_lost: Callable[[], None],
        warn: Callable[..., None],
        follows_loss: Callable[[], Awaitable[bool]],
        start_task: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        """`follows_loss` returns whether the run before was lost, with the values that it had not written."""
        self._claimed = claimed
        self._writer = writer
        self._on_lost = on_lost
        self._warn = warn
        self._follows_loss = follows_loss
        self._start_task = start_task
        self._loop = asyncio.get_running_loop()
        self._replayed: dict[str, str] = {}
        """The last values that the replay has published; an earlier run has written them, unless it was lost."""
        self._unsent: dict[str, str] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Future[None] | None = None
        self._next_turn = 0.0
        """When the next write may be sent, on the monotonic clock."""

    @property
    def pending(self) -> bool:
        """True if values are not written yet."""
        return bool(self._unsent or self._replayed) or self._sending is not None

    def publish(self, name: str, text: str) -> None:
        """Have a value written soon."""
        self._replayed.pop(name, None)
        self._unsent[name] = text
        self._schedule()

    def replay(self, name: str, text: str) -> None:
        """Keep a value that an earlier run has published, to write it if that run was lost before it did."""
        if not self._replayed:
            self._loop.call_later(INTERVAL, self._start_restoring)
        self._replayed[name] = text

    def _start_restoring(self) -> None:
        if self._replayed:
            self._start_task(self._restore(), "durable:restore-values")

    async def _restore(self) -> None:
        lost = await self._follows_loss()
        replayed, self._replayed = self._replayed, {}
        if lost and replayed:
            self._unsent = replayed | self._unsent
            self._schedule()

    async def flush(self) -> None:
        """Write what is not written yet, and wait for that."""
        if self._replayed:
            await self._restore()
        while self.pending:
            if self._sending is None:
                self._send()
            if self._sending is not None:
                await asyncio.wait([self._sending])

    def drop(self) -> None:
        """Leave out what is not sent yet, because the run was lost."""
        self._unsent.clear()
        self._replayed.clear()
        self._cancel_timer()

    def _schedule(self) -> None:
        if self._timer is not None or self._sending is not None or not self._unsent:
            return
        if (early := self._next_turn - time.monotonic()) > 0:
            self._timer = self._loop.call_later(early, self._send)
        else:
            self._send()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send(self) -> None:
        self._cancel_timer()
        published, self._unsent = self._unsent, {}
        if not published:
            return
        self._sending = self._loop.create_future()
        self._next_turn = time.monotonic() + INTERVAL
        write = Write(
            Kind.PUBLICATION,
            self._claimed.task_id,
            self._claimed.fence,
            self._written,
            PublicationValues(published),
            size=sum(map(len, published.values())),
        )
        self._writer.submit(write)

    def _written(self, _: Any, error: BaseException | None) -> None:
        sending, self._sending = self._sending, None
        if isinstance(error, LeaseLost):
            self.drop()
            self._on_lost()
        elif error is not None:
            self._warn("has published a value that the database refuses: %s", type(without_values(error)).__name__)
        if sending is not None and not sending.done():
            sending.set_result(None)
        self._schedule()
