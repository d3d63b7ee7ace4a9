"""Emitting events, and replacing what was emitted wrongly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..app import App
from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, perform, perform_within
from ..errors import InvalidState, QueueNotFound
from ..execution.waits import warn_of_waiters_elsewhere
from ..names import validate_name
from ..serialization.codec import UNTYPED, check_size
from ..statements import queues, waits

if TYPE_CHECKING:
    from ..telemetry.operations import Emission


class Events(App):
    """The part of a client that emits events."""

    async def emit_event(self, name: str, payload: Any = None, *, queue_name: str | None = None) -> bool:
        """Emit an event of a queue. The first of a name wins: False, and no change, for any later one.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or payload that cannot be stored.
            QueueNotFound: there is no such queue.
        """
        script, emission = self._emission(name, payload, queue_name)
        with emission or nullcontext():
            first = await perform(self.database, script)
            if first and emission is not None:
                emission.emitted()
            return first

    @overload
    def emit_event_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str,
        payload: Any = None,
        *,
        queue_name: str | None = None,
    ) -> Coroutine[Any, Any, bool]: ...
    @overload
    def emit_event_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        name: str,
        payload: Any = None,
        *,
        queue_name: str | None = None,
    ) -> bool: ...
    def emit_event_with(
        self, session: SessionOrConnection, name: str, payload: Any = None, *, queue_name: str | None = None
    ) -> Any:
        """Emit an event in the caller's transaction; tasks that wait for it wake after the commit."""
        script, emission = self._emission(name, payload, queue_name)

        def observed(hint: Hint) -> Script[bool]:
            with emission or nullcontext():
                first = yield from script(hint)
                if first and emission is not None:
                    emission.emitted()
                return first

        return perform_within(session, self.schema, observed)

    async def replace_event(self, name: str, payload: Any, queue_name: str | None = None) -> None:
        """Replace the payload of an event that was emitted wrongly.

        Waits that are resolved from then on get the new payload; tasks that have received the former one keep it. A
        task that failed because it could not decode the former payload gets the new one when it is retried.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or payload that cannot be stored.
            InvalidState: the event was not emitted, or was deleted since.
            QueueNotFound: there is no such queue.
        """
        text = self._encoded(name, payload)
        queue = self._queue(queue_name)
        parameters = {"event_queue": queue, "event": name, "new_payload": text}
        async with self.database.transaction() as connection:
            if not (await connection.execute(queues.KNOWN_QUEUES, {"queue_names": [queue]})).all():
                raise QueueNotFound(queue)
            if not (await connection.execute(waits.REPLACE_EVENT, parameters)).all():
                raise InvalidState(
                    f"Event {name!r} of queue {queue!r}", "not emitted", "Emit it: `await durable.emit_event(...)`."
                )

    def _encoded(self, name: str, payload: Any) -> str:
        validate_name("event", name)
        what = f"the payload of event {name!r}"
        text = UNTYPED.encode(payload, what)
        check_size(text, self.max_payload_bytes, what)
        return text

    def _emission(
        self, name: str, payload: Any, queue_name: str | None
    ) -> tuple[Callable[[Hint], Script[bool]], Emission | None]:
        text = self._encoded(name, payload)
        queue = self._queue(queue_name)
        emission = None if (telemetry := self.telemetry) is None else telemetry.emit(name, queue)
        return emit(queue, name, text, None if emission is None else emission.metadata), emission


def emit(queue_name: str, name: str, payload: str, metadata: str | None = None) -> Callable[[Hint], Script[bool]]:
    """Return the script that emits an event."""
    emitted_at: datetime | None = None

    def script(hint: Hint) -> Script[bool]:
        nonlocal emitted_at
        known = yield queues.KNOWN_QUEUES, {"queue_names": [queue_name]}
        if not known:
            raise QueueNotFound(queue_name)
        rows = yield (
            waits.EMIT,
            {"queue_names": [queue_name], "names": [name], "payloads": [payload], "metadata": [metadata]},
        )
        if rows:
            emitted_at = rows[0].emitted_at
            if rows[0].elsewhere is not None:
                warn_of_waiters_elsewhere(name, queue_name, rows[0].elsewhere)
        elif emitted_at is not None:
            # The script is retried: if only the reply to its commit was lost, the event that exists is its own.
            stored = yield waits.PEEK_EVENTS, {"queue_names": [queue_name], "event_names": [name]}
            rows = [row for row in stored if row.emitted_at == emitted_at]
        hint.events = bool(rows)
        return bool(rows)

    return script
