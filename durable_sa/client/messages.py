"""Sending messages to tasks."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, overload

from sqlalchemy import Row
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..database.batches import Batch, with_connection
from ..database.connections import HeldConnection, is_worth_another
from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, perform_within
from ..database_errors import LOCK_NOT_AVAILABLE, retrying, sqlstate
from ..errors import DurableError
from ..execution.messages import Outgoing, outgoing, refusal
from ..results import AnyTaskId
from ..statements import messages
from ..statements.expressions import arrays
from .spawning import LOCK_TIMEOUT, LONGEST_LOCKED_PAUSE, Spawning

SEND_TRIES = 5


class Messages(Spawning):
    """The part of a client that sends messages to tasks."""

    async def send(
        self, task: AnyTaskId, topic: str, payload: Any = None, *, idempotency_key: str | None = None
    ) -> None:
        """Send a message to a task that has not ended, which receives it by `ctx.receive(topic)`, once.

        Messages of one topic are received in the order in which a client sends them, one call after the other. They are
        kept until they are received or the task is deleted. A second message to a task with the same idempotency key
        is none, also after the first was received and after the end of the task.

        Raises:
            InvalidName, SerializationError, PayloadTooLarge: a topic, key or payload that cannot be stored.
            TaskNotFound: there is no such task.
            InvalidState: it has ended.
        """
        message = self._outgoing(task, topic, payload, idempotency_key)
        if idempotency_key is None:
            await self._sends(message)
        else:
            await retrying(lambda: self._keyed_sends(message), when=_is_locked, most=LONGEST_LOCKED_PAUSE)

    @overload
    def send_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: AnyTaskId,
        topic: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
    ) -> Coroutine[Any, Any, None]: ...
    @overload
    def send_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        task: AnyTaskId,
        topic: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
    ) -> None: ...
    def send_with(
        self,
        session: SessionOrConnection,
        task: AnyTaskId,
        topic: str,
        payload: Any = None,
        *,
        idempotency_key: str | None = None,
    ) -> Any:
        """Send a message as :meth:`send` does, in the caller's transaction: it is received only after the commit.

        The task is not locked. If it ends before the commit, the message is deleted with it.
        """
        return perform_within(session, self.schema, _send(self._outgoing(task, topic, payload, idempotency_key)))

    def _outgoing(self, task: AnyTaskId, topic: str, payload: Any, idempotency_key: str | None) -> Outgoing:
        return outgoing(task, topic, payload, idempotency_key, self.max_payload_bytes)

    @functools.cached_property
    def _sends(self) -> Batch[Outgoing, None]:
        return Batch(with_connection(lambda: self.database, self._send_batch))

    @functools.cached_property
    def _keyed_sends(self) -> Batch[Outgoing, None]:
        return Batch(with_connection(lambda: self.database, self._send_keyed))

    async def _send_keyed(self, held: HeldConnection, items: list[Outgoing]) -> Sequence[BaseException | None]:
        """Send as `_send_batch` does, with an error for items whose key an open transaction has inserted."""
        try:
            return await self._send_batch(held, items, lock_timeout=LOCK_TIMEOUT)
        except DBAPIError as error:
            if not _is_locked(error):
                raise
            if len(items) == 1:
                return [error]
        middle = len(items) // 2
        first = await self._send_keyed(held, items[:middle])
        return [*first, *await self._send_keyed(held, items[middle:])]

    async def _send_batch(
        self, held: HeldConnection, items: list[Outgoing], *, lock_timeout: str | None = None
    ) -> Sequence[BaseException | None]:
        """Send messages of callers that came at the same time with one statement; return an error or None for each."""
        sent: set[uuid.UUID] = set()
        repeated = False

        async def insert() -> None:
            nonlocal repeated
            if repeated:
                # The reply of the first statement was lost, and the receiver may have received the message since.
                rows = await held.execute(messages.SENT, _asked(items))
                sent.update(row.message_id for row in rows)
            repeated = True
            unsent = [item for item in items if item.message_id not in sent]
            parameters = {**arrays(messages.MESSAGE_COLUMNS, unsent), "lock_timeout": lock_timeout}
            sent.update(row.message_id for row in await held.execute_once(messages.SEND, parameters))

        await retrying(insert, tries=SEND_TRIES, when=is_worth_another)
        missing = [item for item in items if item.message_id not in sent]
        errors: dict[uuid.UUID, DurableError | None] = {}
        if missing:
            rows = await held.execute(messages.RECEIVER_STATES, {"task_ids": [item.receiver_id for item in missing]})
            errors = {item.message_id: _refusal(item.receiver_id, rows) for item in missing}
            if keyed := [item for item in missing if item.idempotency_key is not None and errors[item.message_id]]:
                # The receiver has ended since the first message with the key.
                rows = await held.execute(messages.SENT, _asked(keyed))
                errors |= dict.fromkeys((row.message_id for row in rows), None)
        hint = Hint().add_receivers(item.receiver_id for item in items if errors.get(item.message_id) is None)
        if hint:
            hints = self._sender()
            here = next((worker for worker in list(self._workers) if worker.loop is hints.loop), None)
            if here is None or not here.offer(hint):
                hints.send(hint)
        return [errors.get(item.message_id) for item in items]


def _send(item: Outgoing) -> Callable[[Hint], Script[None]]:
    """Return the script that sends a message."""

    def script(hint: Hint) -> Script[None]:
        rows = yield messages.SEND, {**arrays(messages.MESSAGE_COLUMNS, [item]), "lock_timeout": None}
        if not rows:
            rows = yield messages.RECEIVER_STATES, {"task_ids": [item.receiver_id]}
            if (error := _refusal(item.receiver_id, rows)) is not None:
                known = item.idempotency_key is not None and (yield messages.SENT, _asked([item]))
                if not known:
                    raise error
        hint.add_receivers([item.receiver_id])

    return script


def _refusal(receiver_id: uuid.UUID, rows: Sequence[Row[Any]]) -> DurableError | None:
    """Return why a message to a task was not inserted; None if it was sent before."""
    row = next((row for row in rows if row.task_id == receiver_id), None)
    if row is not None and row.outcome is None:
        return None
    return refusal(receiver_id, None if row is None else row.outcome)


def _asked(items: Sequence[Outgoing]) -> dict[str, list[uuid.UUID]]:
    return {
        "message_ids": [item.message_id for item in items],
        "receiver_ids": [item.receiver_id for item in items],
    }


def _is_locked(error: BaseException) -> bool:
    return sqlstate(error) == LOCK_NOT_AVAILABLE
