"""Sleeps, which occupy a row and no slot."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime

from ..execution.calls import Call
from ..execution.waits import PendingWait
from ..serialization.codec import codec_for
from ..validation import Duration, seconds, timestamp
from .base import NULL, ContextBase


class Sleeps(ContextBase):
    """The part of a context that sleeps."""

    __slots__ = ()

    def sleep_for(self, name: str, duration: Duration) -> Coroutine[object, None, None]:
        """Suspend for a duration: seconds or a `timedelta`, up to 100 years. It holds no slot and no connection.

        The wake time is fixed by the first call, by the database's clock; replays and retries do not change it.

        Raises:
            InvalidConfiguration: the duration is negative or too long.
            InvalidName: a name that breaks the rules for steps.
        """
        delay = seconds(duration, "duration")
        call = self._call("sleep", name)
        return self._begun(call, self._sleep(call, delay=delay, due_at=None))

    def sleep_until(self, name: str, when: datetime) -> Coroutine[object, None, None]:
        """Suspend until `when`, which has a time zone, as :meth:`sleep_for` does; not at all if that has passed."""
        due_at = timestamp(when, "when")
        call = self._call("sleep", name)
        return self._begun(call, self._sleep(call, delay=None, due_at=due_at))

    async def _sleep(self, call: Call, *, delay: float | None, due_at: datetime | None) -> None:
        run = self._run
        entry = await self._recall(call)
        if entry is not None:
            due_at, delay = codec_for(datetime).decode(entry.value or NULL, "a wake time"), None
        await run.enter()
        if delay == 0 or (due_at is not None and due_at <= run.now()):
            return
        self._refuse_inside_step(call)
        with self._observed("sleep", call.name):
            await run.park(PendingWait(call.key, "sleep", call.name, due_at=due_at, delay=delay))
