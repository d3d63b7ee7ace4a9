"""The record of an exception that ended a step or a task, and the rule for its retry."""

import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from pydantic_core import to_json

from ..errors import (
    ChildCancelled,
    ChildFailed,
    IdempotencyConflict,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    InvalidTaskParams,
    PayloadTooLarge,
    SerializationError,
    UserError,
)
from .codec import UNTYPED

MAX_MESSAGE_BYTES: Final = 32 * 1024
MAX_TRACEBACK_BYTES: Final = 64 * 1024
MAX_RAW_BYTES: Final = 1024 * 1024


_PACKAGE: Final = str(Path(__file__).parents[1]) + os.sep

_NEVER_RETRIED: Final = (
    UserError,
    ChildFailed,
    ChildCancelled,
    SerializationError,
    InvalidName,
    InvalidTaskParams,
    InvalidConfiguration,
    InvalidState,
    PayloadTooLarge,
    IdempotencyConflict,
)


class Failure(TypedDict):
    """The stored record of an exception."""

    name: str
    """The exception's class name."""
    message: str
    """Its text, at most 32 KiB."""
    traceback: str
    """The frames outside this package, of its causes as well, at most 64 KiB: head and tail are kept."""
    raw: Any
    """The data of a `UserError`, the task's or a child's, as plain JSON; None for other exceptions and beyond 1 MiB."""


def is_retryable(error: BaseException, no_retry_on: tuple[type[BaseException], ...] = ()) -> bool:
    """Return whether the same code may succeed next time.

    `UserError`, the errors of a child, and errors that would recur (`SerializationError`, `InvalidName`,
    `InvalidTaskParams`, `InvalidConfiguration`, `InvalidState`, `PayloadTooLarge`, `IdempotencyConflict`) are not
    retried, nor are the exceptions of `no_retry_on`; all others are. An exception group is retried if all its
    members are.
    """
    refused = _NEVER_RETRIED + no_retry_on
    return not any(isinstance(inner, refused) for inner in _with_members(error))


def describe(error: BaseException) -> Failure:
    """Return the record of `error`. Never raises, even if the exception's `__str__` does."""
    message = _message(error)
    raw, size = _raw(error)
    if size > MAX_RAW_BYTES:
        raw, message = None, f"{message} (its data is longer than {MAX_RAW_BYTES} bytes as JSON and is not kept)"
    return Failure(
        name=_clean(type(error).__name__, MAX_MESSAGE_BYTES),
        message=_clean(message, MAX_MESSAGE_BYTES),
        traceback=_clean(_traceback(error), MAX_TRACEBACK_BYTES),
        raw=raw,
    )


def encode_error(error: BaseException) -> str:
    """`describe(error)` as JSON text. Never raises."""
    return to_json(describe(error)).decode()


def encode_try(step_name: str, error: BaseException) -> str:
    """Return the record of a step's failed try as JSON text: its step, and its error without traceback. Never raises.

    It is ASCII, so that a database of any encoding can store it.
    """
    failure = describe(error)
    return json.dumps({"step": step_name, "name": failure["name"], "message": failure["message"]})


def stored_failure(text: str, what: str) -> tuple[str, str, Any]:
    """Return the name, message and raw data of a stored error. `what` names it in errors.

    Raises:
        SerializationError: the text is no such object, so it was written by hand.
    """
    stored = UNTYPED.decode(text, what)
    if not isinstance(stored, dict):
        raise SerializationError(what, f"cannot be read back as an object: it is of type {type(stored).__name__}")
    fields = cast(dict[str, Any], stored)
    return str(fields.get("name")), str(fields.get("message")), fields.get("raw")


def _with_members(error: BaseException) -> Iterator[BaseException]:
    yield error
    if isinstance(error, BaseExceptionGroup):
        for member in cast(BaseExceptionGroup[BaseException], error).exceptions:
            yield from _with_members(member)


def _raw(error: BaseException) -> tuple[Any, int]:
    for inner in _with_members(error):
        if isinstance(inner, UserError | ChildFailed):
            try:
                return inner.raw, len(to_json(inner.raw))
            except Exception:  # noqa: BLE001, S112 - subclasses are user code, and a child's raw is whatever was passed
                continue
    return None, 0


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as failure:  # noqa: BLE001 - user code; the failure that is being recorded matters more
        return f"<its text cannot be had: str() raised {type(failure).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        report = traceback.TracebackException.from_exception(error, lookup_lines=False, compact=True)
        pending = [report]
        while pending:
            part = pending.pop()
            outside = [frame for frame in part.stack if not frame.filename.startswith(_PACKAGE)]
            part.stack = traceback.StackSummary.from_list(outside)
            pending.extend(linked for linked in (part.__cause__, part.__context__) if linked is not None)
            pending.extend(part.exceptions or ())
        return "".join(report.format())
    except BaseException as failure:  # noqa: BLE001 - as above
        return f"<no traceback: formatting it raised {type(failure).__name__}>"


def _clean(text: str, limit: int) -> str:
    """Return `text` as valid UTF-8 without NUL, without its middle if it is longer than `limit` bytes."""
    encoded = text.replace("\x00", "\\x00").encode(errors="backslashreplace")
    if len(encoded) > limit:
        mark = b"\n... %d bytes left out ...\n" % (len(encoded) - limit)
        half = (limit - len(mark)) // 2
        encoded = encoded[:half] + mark + encoded[-half:]
    return encoded.decode(errors="ignore")
