"""Emitting events."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, overload

from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..app import App
from ..database.notifier import Hint
from ..database.sessions import Script, SessionOrConnection, perform
from ..names import validate_name
from ..serialization.codec import UNTYPED, check_size
from . import inserting


class Events(App):
    """The part of a client that emits events."""

    async def emit_event(self, name: str, payload: Any = None, *, queue_name: str | None = None) -> bool:
        """Emit an event of a queue. The first of a name wins: False, and no change, for any later one.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a name or payload that cannot be stored.
            QueueNotFound: there is no such queue.
        """
        return await self._perform(self._emission(name, payload, queue_name))

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
        """As :meth:`emit_event`, in the caller's transaction; whoever waits is woken after the commit."""
        return perform(session, self.schema, self._emission(name, payload, queue_name))

    def _emission(self, name: str, payload: Any, queue_name: str | None) -> Callable[[Hint], Script[bool]]:
        validate_name("event", name)
        queue = self._queue(queue_name)
        what = f"the payload of event {name!r}"
        text = UNTYPED.encode(payload, what)
        check_size(text, self.max_payload_bytes, what)
        telemetry = self.telemetry
        return inserting.emit(queue, name, text, None if telemetry is None else telemetry.emit(name, queue))
