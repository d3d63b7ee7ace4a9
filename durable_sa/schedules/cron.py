"""The ticks of cron expressions, and the misfire policies for ticks that no worker fired in time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from ..errors import InvalidConfiguration, InvalidCron

Misfire = Literal["skip", "run_once", "run_all"]

MISSED_AFTER: Final = timedelta(seconds=60)
"""Age from which a due tick counts as missed, so that the misfire policy decides about it."""

MAX_MISSED_TICKS: Final = 100
"""Number of missed ticks, the latest ones, that `run_all` fires at most."""

EVERY: Final = "@every "
"""The beginning of an expression that is an interval."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_SECOND: Final = timedelta(seconds=1)
_OFFSET_CHANGE_STEP: Final = timedelta(days=7)
"""Time within which no zone changes its offset twice."""


def zone(name: str) -> ZoneInfo:
    """Return the time zone of an IANA name.

    Raises:
        InvalidConfiguration: no time zone has that name.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise InvalidConfiguration(
            "timezone", f"there is no time zone {str(name)[:80]!r}", "Give an IANA name such as 'Europe/Paris'."
        ) from None


def ticks(expression: str, timezone: str, after: datetime) -> Iterator[datetime]:
    """Yield the times at which an expression fires after `after`, in UTC, as long as there are any.

    It has five fields, or six with seconds first. An expression that names the hour fires once at local times that a
    change of the clocks skips or repeats; one that fires every so many minutes or hours keeps its steps. `@every` with
    a number of seconds is an interval.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    local = zone(timezone)
    if not isinstance(expression, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidCron(expression, "it is no str")
    after = after.astimezone(UTC)
    if expression.startswith(EVERY):
        yield from _every(expression, after)
        return
    _walk(expression, _wall(after, local))  # raises if the expression cannot be read
    hour = expression.split()[-4]  # from the end, because seconds may come first
    names_the_hour = not hour.startswith("*")
    yield from (_named if names_the_hour else _steady)(expression, local, after)


def _every(expression: str, after: datetime) -> Iterator[datetime]:
    """Yield the multiples of an interval since 1970, so that all workers agree on them."""
    try:
        interval = timedelta(seconds=float(expression.removeprefix(EVERY)))
    except (ValueError, OverflowError):
        raise InvalidCron(expression, "it is not @every and a number of seconds") from None
    if interval < _SECOND:
        raise InvalidCron(expression, "the interval is shorter than a second")
    moment = _EPOCH + (after - _EPOCH) // interval * interval
    with contextlib.suppress(OverflowError):
        while True:
            moment += interval
            yield moment


def _walk(expression: str, wall: datetime) -> CronSim:
    """Iterate over the times at which an expression fires after `wall`, on a clock that is never changed."""
    try:
        return CronSim(expression, wall)
    except (CronSimError, ValueError) as error:
        raise InvalidCron(expression, str(error) or "it cannot be read") from None


def _wall(moment: datetime, local: ZoneInfo) -> datetime:
    """Return the local time without its zone."""
    return moment.astimezone(local).replace(tzinfo=None)


def _named(expression: str, local: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """Yield skipped local times as the moment of the change, and repeated ones once, as their first occurrence."""
    last = after
    for wall in _walk(expression, _wall(after, local)):
        moment = wall.replace(tzinfo=local).astimezone(UTC)
        if _wall(moment, local) != wall:
            # The change skips this local time: the moment of the change is after `earlier` and up to `moment`.
            earlier = wall.replace(tzinfo=local, fold=1).astimezone(UTC)
            moment = _change(local, earlier, moment) or moment
        if moment > last:
            last = moment
            yield moment


def _steady(expression: str, local: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """Yield all local times, with steps that are counted anew from each change of the clocks."""
    start, seen = _wall(after, local), after
    while True:
        offset = _wall(seen, local) - seen.replace(tzinfo=None)
        for wall in _walk(expression, start):
            moment = (wall - offset).replace(tzinfo=UTC)
            if (change := _change(local, seen, moment)) is not None:
                break
            seen = moment
            yield moment
        else:
            return
        start, seen = _wall(change, local) - _SECOND, change


def _change(local: ZoneInfo, start: datetime, end: datetime) -> datetime | None:
    """Return the first moment after `start` and up to `end` that has another offset, to the second."""
    offset = start.astimezone(local).utcoffset()
    while start < end:
        low, high = start, min(end, start + _OFFSET_CHANGE_STEP)
        if high.astimezone(local).utcoffset() != offset:
            while high - low > _SECOND:
                middle = low + (high - low) // 2
                if middle.astimezone(local).utcoffset() == offset:
                    low = middle
                else:
                    high = middle
            return high.replace(microsecond=0)
        start = high
    return None


def next_tick(expression: str, timezone: str, after: datetime) -> datetime | None:
    """Return the first tick after `after`; None if there is none within the next fifty years.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    return next(ticks(expression, timezone, after), None)


def due_ticks(
    expression: str, timezone: str, first: datetime, now: datetime, misfire: Misfire
) -> tuple[list[datetime], datetime | None]:
    """Return the ticks to fire now, and the next one, for a schedule whose next tick was `first`.

    All due ticks fire, unless the first was missed: then the misfire policy decides.
    """
    missed = now - first > MISSED_AFTER
    due = _latest(expression, timezone, first, now, 1 if missed and misfire != "run_all" else MAX_MISSED_TICKS)
    if misfire == "skip" and now - due[-1] > MISSED_AFTER:
        due = []
    return due, next_tick(expression, timezone, now)


def _latest(expression: str, timezone: str, first: datetime, now: datetime, most: int) -> list[datetime]:
    """Return the latest ticks from `first`, which is one, to `now`, in order: at least one, at most `most`.

    The window of the search grows backwards from `now`, so that its cost does not depend on the age of `first`.
    """
    window = timedelta(seconds=most)
    while True:
        start = max(first - _MICROSECOND, now - window)
        found = list(takewhile(lambda moment: moment <= now, ticks(expression, timezone, start)))
        if start < first or len(found) >= most:
            return found[-most:] or [first]
        window *= 10
