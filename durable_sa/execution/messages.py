"""Messages to tasks before they are sent: checked and encoded, by a client or by a task."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

from ..errors import DurableError, InvalidState, TaskNotFound
from ..ids import keyed_id, new_id
from ..names import validate_name
from ..results import AnyTaskId, id_of
from ..serialization.codec import UNTYPED, check_size


class Outgoing(NamedTuple):
    """A message to send, in the order of `MESSAGE_COLUMNS`."""

    message_id: uuid.UUID
    receiver_id: uuid.UUID
    topic: str
    payload: str
    idempotency_key: str | None


def outgoing(
    task: AnyTaskId, topic: str, payload: Any, idempotency_key: str | None, max_payload_bytes: int
) -> Outgoing:
    """Check a message and encode it.

    Raises:
        InvalidName, SerializationError, PayloadTooLarge: a topic, key or payload that cannot be stored.
    """
    receiver_id = id_of(task)
    validate_name("topic", topic)
    key = None if idempotency_key is None else validate_name("idempotency key", idempotency_key)
    what = f"the message of topic {topic!r}"
    text = UNTYPED.encode(payload, what)
    check_size(text, max_payload_bytes, what)
    return Outgoing(new_id() if key is None else keyed_id(key), receiver_id, topic, text, key)


def refusal(receiver_id: uuid.UUID, outcome: str | None) -> DurableError:
    """Return the error of a message to a task that has this outcome, or does not exist."""
    if outcome is None:
        return TaskNotFound(receiver_id)
    return InvalidState(
        f"Task {receiver_id}", outcome, "Only a task that has not ended receives messages; nothing was sent."
    )
