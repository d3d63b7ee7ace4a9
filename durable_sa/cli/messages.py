"""Errors of this package as messages for the shell: what to do is said as a command."""

from __future__ import annotations

import shlex

from ..errors import (
    DurableError,
    InvalidConfiguration,
    InvalidCron,
    InvalidName,
    InvalidTaskParams,
    PayloadTooLarge,
    QueueNotFound,
    ScheduleNotFound,
    SerializationError,
    TaskNotFound,
    TaskNotRegistered,
)

USAGE_ERRORS = (InvalidConfiguration, InvalidCron, InvalidName, InvalidTaskParams, PayloadTooLarge, SerializationError)
"""Errors that are caused by the arguments alone."""

_NAMES = 10


def message(error: DurableError) -> str:
    """Return the message of an error, with commands in place of advice that is Python code."""
    match error:
        case QueueNotFound():
            return (
                f"There is no queue named {error.name!r}. List them: durable queues. "
                f"Create it: durable queues create {shlex.quote(error.name)}"
            )
        case ScheduleNotFound():
            where = "" if error.queue_name is None else f" in queue {error.queue_name!r}"
            others = ", ".join(error.elsewhere[:_NAMES])
            elsewhere = f" Queues that have one: {others}." if others else ""
            return f"There is no schedule named {error.name!r}{where}.{elsewhere} List them: durable schedules list"
        case TaskNotRegistered():
            known = ", ".join(error.registered[:_NAMES]) or "none"
            more = f" and {len(error.registered) - _NAMES} more" if error.registered[_NAMES:] else ""
            return f"The application has no task named {error.name!r} (it has: {known}{more})."
        case TaskNotFound(reason=None):
            return (
                f"There is no task {error.task_id}. Its spawn was not committed, or it was cleaned up. "
                "List tasks: durable tasks list"
            )
        case PayloadTooLarge():
            return (
                f"{error.what[:1].upper()}{error.what[1:]} has {error.size} bytes as JSON and at most {error.limit} "
                "are allowed. Store the data elsewhere and pass a reference."
            )
        case _:
            return str(error)
