"""Messages and values of the tasks in the open transaction of a test: rows of that transaction."""

from __future__ import annotations

import uuid

from sqlalchemy import Row, Text, Uuid, bindparam, select, update
from sqlalchemy.dialects.postgresql import insert

from ..database.scripts import Script
from ..execution.messages import Outgoing
from ..models import Message, TaskRow, TaskValueRow
from ..statements import messages
from ..statements.expressions import arrays, as_json, as_text, clock, constant

_task_id, _topic = bindparam("receiver_id", type_=Uuid()), bindparam("topics", type_=Text())
_UNRECEIVED = (
    select(Message.message_id, as_text(Message.payload).label("payload"))
    .where(Message.task_id == _task_id, Message.topic == _topic, Message.received_at.is_(None))
    .order_by(Message.seq)
)
_RECEIVED = (
    update(Message)
    .where(Message.task_id == _task_id, Message.message_id == bindparam("taken_id", type_=Uuid()))
    .values(received_at=clock())
)
_value = insert(TaskValueRow).from_select(
    ["task_id", "name", "value", "updated_at"],
    select(
        TaskRow.task_id,
        bindparam("names", type_=Text()),
        as_json(bindparam("encoded", type_=Text())),
        clock(),
    ).where(TaskRow.task_id == bindparam("publisher_id", type_=Uuid())),
)
_PUBLISH = _value.on_conflict_do_update(
    index_elements=[TaskValueRow.task_id, TaskValueRow.name],
    set_={
        "value": _value.excluded.value,
        "version": TaskValueRow.version + constant(1),
        "updated_at": clock(),
    },
)


def send(message: Outgoing) -> Script[bool]:
    """Send a message, and return whether its receiver exists and has not ended, or has it already."""
    if (yield messages.SEND, {**arrays(messages.MESSAGE_COLUMNS, [message]), "lock_timeout": None}):
        return True
    sent = yield messages.SENT, {"receiver_ids": [message.receiver_id], "message_ids": [message.message_id]}
    return bool(sent)


def receiver(task_id: uuid.UUID) -> Script[tuple[str, str | None] | None]:
    """Return the state and the outcome of a task, None if it does not exist."""
    rows = yield messages.RECEIVER_STATES, {"task_ids": [task_id]}
    return (rows[0].state, rows[0].outcome) if rows else None


def next_message(task_id: uuid.UUID, topic: str) -> Script[Row[tuple[uuid.UUID, str | None]] | None]:
    """Return the next message to a task of a topic, None if there is none."""
    rows = yield _UNRECEIVED, {"receiver_id": task_id, "topics": topic}
    return rows[0] if rows else None


def receive(task_id: uuid.UUID, topic: str) -> Script[str | None]:
    """Receive the next message to a task of a topic, and return its payload; None if there is none."""
    found = yield from next_message(task_id, topic)
    if found is None:
        return None
    yield _RECEIVED, {"receiver_id": task_id, "taken_id": found.message_id}
    return found.payload or "null"


def publish(task_id: uuid.UUID, name: str, text: str) -> Script[None]:
    """Write a value of a task."""
    yield _PUBLISH, {"publisher_id": task_id, "names": name, "encoded": text}
