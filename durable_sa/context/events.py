"""Events: awaiting and emitting them."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar, overload

from ..errors import SerializationError, TaskTimeout
from ..execution.calls import Call
from ..execution.waits import Stored
from ..execution.writes import CheckpointValues, EventValues, Kind
from ..ids import step_key
from ..names import validate_name
from ..serialization.codec import UNTYPED, Codec, check_size, codec_for
from ..validation import Duration, seconds
from .base import NULL, ContextBase

T = TypeVar("T")


def _replacement(call: Call, number: int) -> Call:
    """Return the record of a payload that was read anew, because the one before could not be decoded."""
    return Call("event", "$replaced", step_key("replaced", str(call.key), "", (), number, part=True))


class Events(ContextBase):
    """The part of a context that deals with the events of its queue."""

    __slots__ = ()

    @overload
    async def await_event(self, name: str, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    @overload
    async def await_event(self, name: str, *, timeout: Duration | None = None, type: Any = None) -> Any: ...

    def await_event(self, name: str, *, timeout: Duration | None = None, type: Any = None) -> Any:  # noqa: A002
        """Return the payload of the queue's event of this name; suspends until the event is emitted.

        The payload is decoded as a `type`, without one as plain JSON. The event may have been emitted before.

        Raises:
            InvalidName: a name that breaks the rules for events.
            SerializationError: the payload is not of that type. `replace_event` and `retry_task` mend that: a retried
                task reads an event anew whose recorded payload cannot be decoded.
            TaskTimeout: the event was not emitted within `timeout` seconds. Recorded, so a replay raises it too;
                only if it fails the attempt does the next one wait anew.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        validate_name("event", name)
        codec = UNTYPED if type is None else codec_for(type)
        call = self._call("event", name)
        return self._begun(call, self._await_event(call, limit, codec))

    async def _await_event(self, call: Call, timeout: float | None, codec: Codec[T]) -> T:
        run = self._run
        what = f"the payload of event {call.name!r}"
        stored = await self._recorded(call)
        if stored is not None and stored.status != "timeout":
            return await self._decode_recorded(call, stored.value or NULL, codec, what)
        if stored is None:
            await run.enter()
            with self._observed("await", event=call.name) as span:
                with run.branches.busy():
                    event = await run.host.reader.event((run.claimed.queue_name, call.name))
                if event is not None:
                    if span is not None:
                        span.link(event.metadata)
                    stored = await self._settle(call, Stored("completed", event.payload))
                else:
                    stored = await self._park(call, event_name=call.name, timeout=timeout)
        if stored.status == "timeout":
            raise run.timed_out(call.key, TaskTimeout(f"event {call.name!r}", timeout or 0.0))
        return codec.decode(stored.value or NULL, what)

    async def _decode_recorded(self, call: Call, text: str, codec: Codec[T], what: str) -> T:
        """Decode what an earlier run has recorded; if that fails, read the event anew, which may have been replaced.

        A payload that was read anew is recorded beside the first one, and is the one that counts from then on.
        """
        number = 0
        while (entry := await self._recall(replaced := _replacement(call, number))) is not None:
            text, number = entry.value or NULL, number + 1
        try:
            return codec.decode(text, what)
        except SerializationError:
            run = self._run
            await run.enter()
            with run.branches.busy():
                event = await run.host.reader.event((run.claimed.queue_name, call.name))
            if event is None or event.payload == text:
                raise
            codec.decode(event.payload, what)
            stored = await self._settle(replaced, Stored("completed", event.payload))
            return codec.decode(stored.value or NULL, what)

    def emit_event(self, name: str, payload: Any = None) -> Coroutine[object, None, bool]:
        """Emit an event in this task's queue once. Returns False, without effect, if the name had been emitted before.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or payload that cannot be stored.
        """
        validate_name("event", name)
        what = f"the payload of event {name!r}"
        text = UNTYPED.encode(payload, what)
        check_size(text, self._run.host.max_payload_bytes, what)
        call = self._call("emit", name)
        return self._begun(call, self._emit(call, text))

    async def _emit(self, call: Call, text: str) -> bool:
        if (entry := await self._recall(call)) is not None:
            return entry.value == "true"
        await self._run.enter()
        telemetry = self._run.host.telemetry
        with self._observed("emit", event=call.name), self._run.branches.busy():
            metadata = None if telemetry is None else telemetry.metadata()
            checkpoint = CheckpointValues("emit", call.name, "completed", None)
            values = EventValues(checkpoint, call.name, text, metadata)
            stored = await self._run.write(Kind.EVENT, call.key, values, size=len(text))
        first = stored is not None and stored.value == "true"
        if first and telemetry is not None:
            telemetry.emitted(self._run.claimed.queue_name)
        return first
