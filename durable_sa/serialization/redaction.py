"""Errors as they may be logged: with messages and tracebacks, and without the values that libraries quote in them.

SQLAlchemy quotes the parameters of a statement, the server a row that it refuses, pydantic the input that does not fit,
and URLs have passwords in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from ..errors import SerializationError, UserError
from .codec import UNTYPED

SHORTEST_VALUE: Final = 4
"""Characters of a text in a payload from which it is looked for in messages. Shorter ones are parts of other words."""
LONGEST_PAYLOAD: Final = 256 * 1024
"""Characters of a payload up to which its texts are looked for in messages, which takes some milliseconds."""
LONGEST_MESSAGE: Final = 8 * 1024
LONGEST_CHAIN: Final = 50
"""Exceptions of one chain that are shown; further causes are left out."""
NOT_SHOWN: Final = "<not shown, as it may repeat a value>"

_QUOTED: Final = (
    (re.compile(r"\[parameters: .*?(?:\](?=\n\(Background on this error|\s*\Z)|\Z)", re.DOTALL), "[parameters: ...]"),
    # The server's details quote rows, and its contexts lines of a COPY.
    (re.compile(r"\n(?:DETAIL|CONTEXT): .*?(?=\n\[SQL: |\n\[parameters: |\n\(Background|\Z)", re.DOTALL), ""),
    (re.compile(r"(invalid input for query argument \$\d+: ).*?(?= \(|\Z)", re.DOTALL), r"\1..."),
    (re.compile(r"(invalid input (?:syntax|value) for [^:]*: )\".*?\"(?=\s|\Z)", re.DOTALL), r"\1..."),
    (re.compile(r"value \"[^\"]*\" is out of range"), 'value "..." is out of range'),
    (re.compile(r"input_value=.*?, input_type=", re.DOTALL), "input_value=..., input_type="),
    (re.compile(r"(\w://[^\s/:@]*:)[^\s/@]+@"), r"\1...@"),
)


def redact(text: str) -> str:
    """Return a message or traceback without the values that libraries quote in them."""
    for pattern, replacement in _QUOTED:
        text = pattern.sub(replacement, text)
    return text


def payload_redactor(*payloads: str | None) -> Callable[[str], str]:
    """Return a function that redacts a text as `redact` does, and removes texts of these payloads, which are JSON."""
    try:
        given = [
            UNTYPED.decode(payload, "a payload") for payload in payloads if payload and len(payload) < LONGEST_PAYLOAD
        ]
    except SerializationError:
        given = []
    if len(given) < sum(map(bool, payloads)):
        return lambda text: NOT_SHOWN
    # The longest first, because one may be a part of another.
    values = sorted({value for part in given for value in _texts(part)}, key=len, reverse=True)

    def redacted(text: str) -> str:
        for value in values:
            if value in text:
                text = text.replace(value, "...")
        return redact(text)

    return redacted


def _texts(value: object) -> Iterator[str]:
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            if len(part) >= SHORTEST_VALUE:
                yield part
        elif isinstance(part, dict):
            pending.extend(cast(dict[str, object], part).values())
        elif isinstance(part, list):
            pending.extend(cast(list[object], part))


def loggable(error: BaseException, redacted: Callable[[str], str] = redact) -> BaseException:
    """Return an error as it may be logged: itself, or a copy of it and its causes with redacted messages.

    Never raises, whatever the code of the exception's class does.
    """
    try:
        return _Copies(redacted).of(error) or error
    except BaseException:  # noqa: BLE001 - user code; the failure that is being logged matters more
        return _copy(type(error), redacted(message(error)), [])


class _Copies:
    """The copies of one chain of exceptions."""

    def __init__(self, redacted: Callable[[str], str]) -> None:
        self._redacted = redacted
        self._seen: dict[int, BaseException | None] = {}

    def of(self, error: BaseException | None) -> BaseException | None:
        """Return a copy, None if the exception may be logged as it is."""
        if error is None:
            return None
        if id(error) in self._seen:
            return self._seen[id(error)]
        self._seen[id(error)] = None
        deep = len(self._seen) > LONGEST_CHAIN
        cause, context = (None, None) if deep else (self.of(error.__cause__), self.of(error.__context__))
        members = _members(error)
        copies = [self.of(member) for member in members]
        text, notes = message(error), list(getattr(error, "__notes__", ()))
        shown, shown_notes = self._redacted(text), [self._redacted(str(note)) for note in notes]
        unchanged = (shown, shown_notes, cause, context) == (_text_or_none(error), notes, None, None)
        if unchanged and not any(copies):
            return None
        copy = _copy(type(error), shown, [each or member for each, member in zip(copies, members, strict=True)])
        copy.__cause__, copy.__context__ = cause or error.__cause__, context or error.__context__
        copy.__suppress_context__ = error.__suppress_context__
        for note in shown_notes:
            copy.add_note(note)
        self._seen[id(error)] = copy = copy.with_traceback(error.__traceback__)
        return copy


def _members(error: BaseException) -> list[BaseException]:
    # isinstance, as the traceback module calls it: an exception for which it raises is replaced by a copy.
    if isinstance(error, BaseExceptionGroup):
        return list(cast("BaseExceptionGroup[BaseException]", error).exceptions)
    return []


def _copy(kind: type[BaseException], text: str, members: list[BaseException]) -> BaseException:
    """Make an exception that a traceback shows as one of this kind."""
    named: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if members:

        def show(_: BaseException) -> str:
            return text

        named["__str__"] = show
        return cast(BaseException, type(kind.__name__, (BaseExceptionGroup,), named)("", members))
    return cast(BaseException, type(kind.__name__, (Exception,), named)(text))


def message(error: BaseException) -> str:
    """Return the message of an exception as valid UTF-8, shortened. The data of a `UserError` is no message.

    Never raises, even if the exception's `__str__` does.
    """
    try:
        if issubclass(type(error), UserError):
            user_error = cast(UserError, error)
            raw = None if isinstance(user_error.data, str) else user_error.raw
            if raw is not None and not (
                isinstance(raw, dict) and isinstance(cast(dict[str, object], raw).get("message"), str)
            ):
                return NOT_SHOWN
        return str(error)[:LONGEST_MESSAGE].encode(errors="backslashreplace").decode()
    except BaseException as failure:  # noqa: BLE001 - as above
        return f"<its text cannot be had: str() raised {type(failure).__name__}>"


def _text_or_none(error: BaseException) -> str | None:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - as above
        return None
