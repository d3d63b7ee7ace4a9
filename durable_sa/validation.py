"""The ranges of numbers, durations and timestamps that applications pass."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from .errors import InvalidConfiguration

Duration = float | timedelta
"""Seconds, or a `timedelta`. Sub-second precision is kept."""

MAX_DURATION: Final = timedelta(days=36_525).total_seconds()
"""100 years, in seconds."""

UNSTORABLE: Final = re.compile(r"[\x00\ud800-\udfff]")
"""The characters of a `str` that the database cannot hold."""

_ANNOTATE: Final = (
    "If a step or transaction has returned it, annotate the function, `-> {}`: without an annotation values come back "
    "as JSON has them."
)
_EARLIEST: Final = datetime(1000, 1, 1, tzinfo=UTC)
# Far enough below the last datetime of Python that a time plus the longest durations can still be read back.
_LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)


def number(value: object, what: str, *, minimum: float, maximum: float) -> float:
    """Return `value` as a float.

    Raises:
        InvalidConfiguration: for NaN, a value that is no number (`bool` included), or a number outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidConfiguration(what, f"it must be a number, not {type(value).__name__}")
    if not minimum <= value <= maximum:
        shown = "a number too long to show" if isinstance(value, int) and value.bit_length() > 256 else repr(value)
        raise InvalidConfiguration(what, f"{shown} is not between {minimum:g} and {maximum:g}")
    return float(value)


def integer(value: object, what: str, *, minimum: int, maximum: int) -> int:
    """Return `value` as an int.

    Raises:
        InvalidConfiguration: for a value that is no int (`bool` included), or one outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidConfiguration(what, f"it must be an int, not {type(value).__name__}")
    if not minimum <= value <= maximum:
        shown = "a number too long to show" if value.bit_length() > 256 else str(value)
        raise InvalidConfiguration(what, f"{shown} is not between {minimum} and {maximum}")
    return int(value)


def seconds(duration: object, what: str, *, minimum: float = 0.0) -> float:
    """Return a duration, `float` seconds or a `timedelta`, as seconds.

    Raises:
        InvalidConfiguration: for NaN, values below `minimum` or above 100 years, and a value that is no duration.
    """
    if isinstance(duration, timedelta):
        duration = duration.total_seconds()
    elif isinstance(duration, bool) or not isinstance(duration, int | float):
        remedy = None if not isinstance(duration, str) else _ANNOTATE.format("timedelta")
        raise InvalidConfiguration(
            what, f"a duration is a number of seconds or a timedelta, not {type(duration).__name__}", remedy
        )
    return number(duration, f"{what} (seconds)", minimum=minimum, maximum=MAX_DURATION)


def timestamp(value: object, what: str) -> datetime:
    """Return an aware datetime in UTC.

    Raises:
        InvalidConfiguration: for naive datetimes, years before 1000 or after 8999, and a value that is no datetime.
    """
    if not isinstance(value, datetime):
        remedy = None if not isinstance(value, str) else _ANNOTATE.format("datetime")
        raise InvalidConfiguration(what, f"it must be a datetime, not {type(value).__name__}", remedy)
    if value.utcoffset() is None:
        remedy = "Give it a time zone, such as `datetime.now(UTC)` or `value.replace(tzinfo=ZoneInfo('Europe/Paris'))`."
        raise InvalidConfiguration(what, f"{value.isoformat()} has no time zone", remedy)
    if not _EARLIEST <= value <= _LATEST:
        raise InvalidConfiguration(what, f"{value.isoformat()} is not between the years 1000 and 9000")
    return value.astimezone(UTC)


def text(value: object, what: str) -> None:
    """Refuse a value that is not a `str`, or has a character that the database has none like.

    Raises:
        InvalidConfiguration: another type, NUL, or a surrogate, such as Python makes of bytes that are not UTF-8.
    """
    if not isinstance(value, str):
        raise InvalidConfiguration(what, f"it must be a str, not {type(value).__name__}")
    if UNSTORABLE.search(value):
        raise InvalidConfiguration(what, f"{value[:80]!r} has a NUL or a surrogate in it, which no stored text has")


def instance(value: object, wanted: type, what: str) -> None:
    """Refuse a value that is not an instance of `wanted`.

    Raises:
        InvalidConfiguration: with both types.
    """
    if not isinstance(value, wanted):
        raise InvalidConfiguration(what, f"it must be a {wanted.__name__}, not {type(value).__name__}")
