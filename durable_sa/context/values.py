"""Values that are drawn once and recorded: random numbers, times, ids."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import TypeVar

from ..execution.calls import Call
from ..ids import new_id
from ..serialization.codec import Codec, codec_for
from .base import NULL, ContextBase

T = TypeVar("T")


class Values(ContextBase):
    """The part of a context that draws values."""

    __slots__ = ()

    def rand(self) -> Coroutine[object, None, float]:
        """Return a random number in [0, 1), drawn once."""
        # The key of the record is drawn when this is awaited, as it was in the first version.
        call = Call("value", "$rand", new_id())
        return self._begun(call, self._rand(call))

    async def _rand(self, call: Call) -> float:
        self._run.unawaited.pop(call.key, None)
        return await self._draw("$rand", codec_for(float), random.random)

    def now(self) -> Coroutine[object, None, datetime]:
        """Return the time by the database's clock, in UTC, drawn once."""
        return self._draw("$now", codec_for(datetime), self._run.now)

    def uuid7(self) -> Coroutine[object, None, uuid.UUID]:
        """Return a UUIDv7, drawn once."""
        return self._draw("$uuid7", codec_for(uuid.UUID), new_id)

    def _draw(self, name: str, codec: Codec[T], source: Callable[[], T]) -> Coroutine[object, None, T]:
        call = self._call("value", name)
        return self._begun(call, self._drawn(call, codec, source))

    async def _drawn(self, call: Call, codec: Codec[T], source: Callable[[], T]) -> T:
        if (entry := await self._recall(call)) is not None:
            return codec.decode(entry.value or NULL, call.name)
        await self._run.enter()
        return await self._end_step(call, codec, source())
