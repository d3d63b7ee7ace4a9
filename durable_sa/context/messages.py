"""Messages: sending them to other tasks, and receiving those to this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar, cast, overload

from ..concurrency.branches import RACE
from ..errors import TaskNotFound, TaskTimeout
from ..execution.calls import Call
from ..execution.conversation import PATIENCE
from ..execution.messages import Outgoing, outgoing, refusal
from ..execution.waits import Stored
from ..execution.writes import CheckpointValues, Kind, MessageValues, ReceiptValues
from ..names import validate_name
from ..results import AnyTaskId
from ..serialization.codec import UNTYPED, Codec, codec_for
from ..validation import Duration, seconds
from .base import NULL, ContextBase

T = TypeVar("T")


class Available(NamedTuple):
    """The result of a call in a race that could receive a message."""

    call: Call
    codec: Codec[Any]
    again: Callable[[], Coroutine[Any, Any, Any]]
    """Make the call once more, as another one has received the message."""


class Messages(ContextBase):
    """The part of a context that sends and receives messages."""

    __slots__ = ()

    def send(
        self, task: AnyTaskId, topic: str, payload: Any = None, *, idempotency_key: str | None = None
    ) -> Coroutine[object, None, None]:
        """Send a message to another task, or to this one, once; see :meth:`durable_sa.Durable.send`.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a topic, key or payload that cannot be stored.
            TaskNotFound: there is no such task; this one is then not retried.
            InvalidState: it has ended.
        """
        message = outgoing(task, topic, payload, idempotency_key, self._run.host.max_payload_bytes)
        call = self._call("send", topic, str(message.receiver_id))
        return self._begun(call, self._send(call, message))

    async def _send(self, call: Call, message: Outgoing) -> None:
        run = self._run
        if await self._recall(call) is not None:
            return
        await run.enter()
        with self._observed("send", topic=call.name), run.branches.busy():
            checkpoint = CheckpointValues("send", call.name, "completed", None)
            values = MessageValues(checkpoint, *message)
            run.converse()
            stored = await run.write(Kind.MESSAGE, call.key, values, size=len(message.payload))
            if stored is not None and stored.status == "refused":
                reader = run.host.reader
                if message.idempotency_key is not None and await reader.was_sent(
                    message.receiver_id, message.message_id
                ):
                    # The receiver has ended since the first message with the key.
                    await run.write(Kind.CHECKPOINT, call.key, checkpoint)
                    return
                state = await reader.receiver(message.receiver_id)
                error = refusal(message.receiver_id, None if state is None else state[1] or state[0])
                if isinstance(error, TaskNotFound):
                    error.final = True
                raise error

    @overload
    async def receive(self, topic: str, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    @overload
    async def receive(self, topic: str, *, timeout: Duration | None = None, type: Any = None) -> Any: ...

    def receive(self, topic: str, *, timeout: Duration | None = None, type: Any = None) -> Any:  # noqa: A002
        """Return the next message of a topic; suspends until one is sent.

        Each message is received once: the record of the call and the removal of the message commit together. It is
        decoded as a `type`, without one as plain JSON.

        Raises:
            InvalidName: a topic that breaks the rules.
            InvalidState: the call is made inside a step or transaction.
            SerializationError: the message is not of that type. It counts as received.
            TaskTimeout: none was sent within `timeout` seconds. Recorded, so a replay raises it too; only if it fails
                the attempt does the next one wait anew.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        validate_name("topic", topic)
        codec = UNTYPED if type is None else codec_for(type)
        call = self._call("message", topic)
        return self._begun(call, self._receive(call, limit, codec))

    async def _receive(self, call: Call, timeout: float | None, codec: Codec[T]) -> T:
        run = self._run
        stored = await self._recorded(call)
        if stored is None and _is_in_race(run.branch().path):
            # Which wait wins is not decided yet, and the message of one that loses is not received.
            stored = await self._await_message(call, timeout)
            if stored.status == "available":
                return cast(T, Available(call, codec, lambda: self._receive(call, timeout, codec)))
        if stored is None:
            await run.enter()
            self._refuse_inside_step(call)
            with self._observed("receive", topic=call.name):
                # With such a wait, there was no message when the run began, and one that comes resolves the wait.
                if run.journal.receives(call.key):
                    stored = await self._park(call, timeout=timeout)
                else:
                    stored = await self._next_message(call, timeout)
        if stored.status == "timeout":
            raise run.timed_out(call.key, TaskTimeout(f"a message of topic {call.name!r}", timeout or 0.0))
        return codec.decode(stored.value or NULL, f"the message of topic {call.name!r}")

    async def _next_message(self, call: Call, timeout: float | None) -> Stored:
        """Receive a message that was sent before, or wait for one; in a conversation, at first without suspending."""
        run = self._run
        conversation = run.conversation
        seen = 0 if conversation is None else conversation.arrivals
        if (stored := await self._receipt(call)) is not None:
            run.converse()
            return stored
        # The run holds its slot while it stays, so it only does where most are free.
        if conversation is not None and run.host.has_room:
            began = time.monotonic()
            patience = PATIENCE if timeout is None else min(PATIENCE, timeout)
            with run.branches.busy():
                while await conversation.next_arrival(seen, patience - (time.monotonic() - began)):
                    seen = conversation.arrivals
                    if (stored := await self._receipt(call)) is not None:
                        return stored
            if timeout is not None:
                timeout = max(0.0, timeout - (time.monotonic() - began))
        return await self._park(call, timeout=timeout)

    async def _await_message(self, call: Call, timeout: float | None) -> Stored:
        """Wait in a race until there is a message, without receiving it."""
        run = self._run
        await run.enter()
        with run.branches.busy():
            available = await run.host.reader.with_message((run.claimed.task_id, call.name))
        if available:
            return Stored("available", None)
        with self._observed("receive", topic=call.name):
            return await self._park(call, timeout=timeout, kind="race message")

    async def _receipt(self, call: Call) -> Stored | None:
        """Receive a message that has been sent before, if there is one."""
        with self._run.branches.busy():
            stored = await self._run.write(Kind.RECEIPT, call.key, ReceiptValues(call.name))
        return None if stored is not None and stored.status == "none" else stored


def _is_in_race(path: tuple[int | str, ...]) -> bool:
    return len(path) > 1 and str(path[-2]).startswith(RACE)
