"""The record of an exception that ended a step or a task, and the rule for its retry."""

import json
import os
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict, cast

from pydantic_core import from_json, to_json

from ..errors import (
    ChildCancelled,
    ChildFailed,
    IdempotencyConflict,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    InvalidTaskParams,
    PayloadTooLarge,
    QueueNotFound,
    RateLimited,
    ReplayMismatch,
    Retry,
    SerializationError,
    TaskNotFound,
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
    ReplayMismatch,
)

_STEP_MARK: Final = "_durable_sa_step"


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
    step: str | None
    """The step or transaction in which it arose; None for an exception of the task's own code."""
    arguments: str | None
    """The beginning of that step's arguments as JSON."""


class StoredFailure(NamedTuple):
    """A stored failure, as it is read back."""

    name: str
    message: str
    raw: Any
    step: str | None


# The class of an exception is asked by `type`, not by `isinstance`, which calls `__class__`, and that is user code.


def is_retryable(
    error: BaseException,
    no_retry_on: tuple[type[BaseException], ...] = (),
    retry_on: tuple[type[BaseException], ...] | None = None,
) -> bool:
    """Return whether the same code may succeed next time.

    `UserError`, the errors of a child, and errors that would recur (`SerializationError`, `InvalidName`,
    `InvalidTaskParams`, `InvalidConfiguration`, `InvalidState`, `PayloadTooLarge`, `IdempotencyConflict`,
    `ReplayMismatch`, and `QueueNotFound` and `TaskNotFound` of a context) are not retried, nor are the exceptions of
    `no_retry_on`; all others are, or if `retry_on` is given, those of it. A `Retry` always is. An exception group is
    retried if all its members are.
    """
    refused = _NEVER_RETRIED + no_retry_on

    def retried(inner: BaseException, *, listed: bool) -> bool:
        if issubclass(type(inner), Retry):
            return True
        if issubclass(type(inner), refused) or _recurs(inner):
            return False
        listed = listed or retry_on is None or issubclass(type(inner), retry_on)
        members = _members(inner)
        return all(retried(member, listed=listed) for member in members) if members else listed

    leaves = [inner for inner in with_members(error) if not _members(inner)]
    return all(issubclass(type(leaf), Retry) for leaf in leaves) or retried(error, listed=False)


def retry_delay(error: BaseException) -> float | None:
    """Return the longest delay in seconds of the `Retry` that an error is, or holds as a group; None without one."""
    delays = [float(cast(Retry, member).after) for member in with_members(error) if issubclass(type(member), Retry)]
    return max(delays, default=None)


def put_off(error: BaseException) -> float | None:
    """Return the seconds by which `RateLimited`, or a group of nothing else, puts a task off; None for other errors."""
    leaves = [inner for inner in with_members(error) if not issubclass(type(inner), BaseExceptionGroup)]
    if not leaves or not all(issubclass(type(leaf), RateLimited) for leaf in leaves):
        return None
    return max(RateLimited.delay_of(leaf) for leaf in leaves)


def mark_step(error: BaseException, run_id: uuid.UUID, step: str, arguments: str | None, *, inner: bool) -> None:
    """Remember at an exception the step of a run in which it arose. A step inside of another one (`inner`) counts."""
    try:
        # By the base class, because an exception may have methods of its own for its attributes.
        mark = BaseException.__getattribute__(error, "__dict__").get(_STEP_MARK)
        if inner or mark is None or mark[0] != run_id or not mark[1]:
            BaseException.__setattr__(error, _STEP_MARK, (run_id, inner, step, arguments))
    except Exception:  # noqa: BLE001, S110 - it is still a failure, only without the name of its step
        pass


def describe(error: BaseException, run_id: uuid.UUID | None = None) -> Failure:
    """Return the record of `error`, with the step of that run which has raised it.

    Never raises, even if the exception's methods do.
    """
    message = _message(error)
    raw, size = _raw(error)
    step, arguments = _step(error, run_id)
    if size > MAX_RAW_BYTES:
        raw, message = None, f"{message} (its data is longer than {MAX_RAW_BYTES} bytes as JSON and is not kept)"
    return Failure(
        name=clean(_class_name(error), MAX_MESSAGE_BYTES),
        message=clean(message, MAX_MESSAGE_BYTES),
        traceback=clean(_traceback(error), MAX_TRACEBACK_BYTES),
        raw=raw,
        step=step,
        arguments=arguments,
    )


def encode_error(error: BaseException, run_id: uuid.UUID | None = None) -> str:
    """Return `describe(error, run_id)` as JSON text. Never raises."""
    try:
        return to_json(describe(error, run_id)).decode()
    except BaseException as failure:  # noqa: BLE001 - methods of the exception are user code
        return by_class_alone(error, f"it could not be recorded: {_class_name(failure)}")


def in_ascii(text: str) -> str:
    """Return an encoded error in which every character beyond ASCII is escaped by its number.

    It fits a database of any encoding. Unlike escapes of JSON, it can be read by SQL there as well.
    """
    return to_json(_escaped(from_json(text))).decode()


def by_class_alone(error: BaseException, reason: str) -> str:
    """Return an encoded error with no more than the class, and the reason for that, in ASCII."""
    name = ascii(_class_name(error)[:200])[1:-1]
    message = f"<its text is not stored: {ascii(reason[:200])[1:-1]}>"
    return to_json(Failure(name=name, message=message, traceback="", raw=None, step=None, arguments=None)).decode()


def encode_try(step: str, arguments: str | None, error: BaseException) -> str:
    """Return the record of a step's failed try as JSON text: its step, and its error without traceback. Never raises.

    It is ASCII, so that a database of any encoding can store it.
    """
    failure = describe(error)
    return json.dumps({"step": step, "arguments": arguments, "name": failure["name"], "message": failure["message"]})


def stored_failure(text: str, what: str) -> StoredFailure:
    """Return a stored error, which an earlier version may have stored without its step. `what` names it in errors.

    Raises:
        SerializationError: the text is no such object, so it was written by hand.
    """
    stored = UNTYPED.decode(text, what)
    if not isinstance(stored, dict):
        raise SerializationError(what, f"cannot be read back as an object: it is of type {type(stored).__name__}")
    fields = cast(dict[str, Any], stored)
    step = fields.get("step")
    return StoredFailure(
        str(fields.get("name")),
        str(fields.get("message")),
        fields.get("raw"),
        step if isinstance(step, str) else None,
    )


def with_members(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and if it is a group its members, also those of groups inside of it."""
    yield error
    for member in _members(error):
        yield from with_members(member)


def _members(error: BaseException) -> tuple[BaseException, ...]:
    if not issubclass(type(error), BaseExceptionGroup):
        return ()
    # By the base class, because a subclass is user code.
    members: Any = vars(BaseExceptionGroup)["exceptions"]
    return cast(tuple[BaseException, ...], members.__get__(error))


def _recurs(error: BaseException) -> bool:
    return issubclass(type(error), QueueNotFound | TaskNotFound) and cast(QueueNotFound | TaskNotFound, error).final


def _raw(error: BaseException) -> tuple[Any, int]:
    for inner in with_members(error):
        if issubclass(type(inner), UserError | ChildFailed):
            try:
                raw = cast(UserError | ChildFailed, inner).raw
                return raw, len(to_json(raw))
            except BaseException:  # noqa: BLE001, S112 - subclasses are user code, and a child's raw is whatever was passed
                continue
    return None, 0


def _step(error: BaseException, run_id: uuid.UUID | None) -> tuple[str | None, str | None]:
    """Return the step of the run that has raised an exception, one of its members, or its cause, and its arguments."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while run_id is not None and cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        for inner in with_members(cause):
            mark = BaseException.__getattribute__(inner, "__dict__").get(_STEP_MARK)
            if mark is not None and mark[0] == run_id:
                return cast(tuple[str, str | None], mark[2:])
        cause = BaseException.__getattribute__(cause, "__cause__")
    return None, None


def _class_name(error: BaseException) -> str:
    try:
        return str(type.__getattribute__(type(error), "__name__"))
    except Exception:  # noqa: BLE001 - a metaclass is user code
        return "Exception"


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("ascii", "backslashreplace").decode()
    if isinstance(value, list):
        return [_escaped(item) for item in cast(list[Any], value)]
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in cast(dict[str, Any], value).items()}
    return value


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as failure:  # noqa: BLE001 - user code; the failure that is being recorded matters more
        return f"<its text cannot be had: str() raised {_class_name(failure)}>"


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
        return _frames_alone(error, f"<no more than frames: formatting it raised {_class_name(failure)}>")


def _frames_alone(error: BaseException, reason: str) -> str:
    try:
        frames = traceback.extract_tb(BaseException.__getattribute__(error, "__traceback__"))
        outside = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
        return "".join([*traceback.format_list(outside), reason])
    except BaseException:  # noqa: BLE001 - as above
        return reason


def clean(text: str, limit: int) -> str:
    """Return `text` as valid UTF-8 without NUL, without its middle if it is longer than `limit` bytes."""
    encoded = text.replace("\x00", "\\x00").encode(errors="backslashreplace")
    if len(encoded) > limit:
        mark = b"\n... %d bytes left out ...\n" % (len(encoded) - limit)
        half = (limit - len(mark)) // 2
        encoded = encoded[:half] + mark + encoded[-half:]
    return encoded.decode(errors="ignore")
