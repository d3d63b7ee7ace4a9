"""When a cron expression fires, and which of the ticks that nobody was there for are made up for."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from ..errors import InvalidConfiguration, InvalidCron

Misfire = Literal["skip", "run_once", "run_all"]

MISSED_AFTER: Final = timedelta(seconds=60)
"""A tick that is later than this was missed, and the misfire policy decides."""

MOST_MISSED: Final = 100
"""Ticks that `run_all` makes up for, at most: the latest."""

_MOMENT: Final = timedelta(microseconds=1)
_SECOND: Final = timedelta(seconds=1)
_BETWEEN_CHANGES: Final = timedelta(days=7)
"""No zone changes its clocks twice within that time."""


def zone(name: str) -> ZoneInfo:
    """The time zone of that IANA name.

    Raises:
        InvalidConfiguration: there is none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise InvalidConfiguration(
            "timezone", f"there is no time zone {str(name)[:80]!r}", "Give an IANA name such as 'Europe/Paris'."
        ) from None


def ticks(expression: str, timezone: str, after: datetime) -> Iterator[datetime]:
    """The times at which an expression fires after `after`, in UTC. They end if it never fires again.

    Five fields, or six with seconds first. Of local times that a change of the clocks skips or repeats, those of
    expressions that name the hour fire once; what fires every so many minutes or hours goes on in steady steps.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    local = zone(timezone)
    if not isinstance(expression, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidCron(expression, "it is no str")
    after = after.astimezone(UTC)
    _walk(expression, _wall(after, local))
    names_the_hour = not any(field.startswith("*") for field in expression.split()[-5:-3])
    yield from (_named if names_the_hour else _steady)(expression, local, after)


def _walk(expression: str, wall: datetime) -> CronSim:
    """The times at which it fires after `wall`, on a clock that nobody changes."""
    try:
        return CronSim(expression, wall)
    except (CronSimError, ValueError) as error:
        raise InvalidCron(expression, str(error) or "it cannot be read") from None


def _wall(moment: datetime, local: ZoneInfo) -> datetime:
    """What the clock on the wall shows."""
    return moment.astimezone(local).replace(tzinfo=None)


def _named(expression: str, local: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """A time that is skipped fires when the clocks are changed, one that is repeated only the first time."""
    last = after
    for wall in _walk(expression, _wall(after, local)):
        moment = wall.replace(tzinfo=local).astimezone(UTC)
        if _wall(moment, local) != wall:
            # As the clock shows it after the change: before that in UTC.
            earlier = wall.replace(tzinfo=local, fold=1).astimezone(UTC)
            moment = _change(local, earlier, moment) or moment
        if moment > last:
            last = moment
            yield moment


def _steady(expression: str, local: ZoneInfo, after: datetime) -> Iterator[datetime]:
    """Fires whenever the clock on the wall says so, from one change to the next."""
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
    """The first moment after `start` until `end` with another offset, to the second."""
    offset = start.astimezone(local).utcoffset()
    while start < end:
        low, high = start, min(end, start + _BETWEEN_CHANGES)
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
    """The first tick after `after`; None if there is none within the next fifty years.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    return next(ticks(expression, timezone, after), None)


def due_ticks(
    expression: str, timezone: str, first: datetime, now: datetime, misfire: Misfire
) -> tuple[list[datetime], datetime | None]:
    """The ticks to fire now, and the next one, for a schedule whose next tick was `first`.

    All that are due, unless the first of them was missed: then the policy decides.
    """
    missed = now - first > MISSED_AFTER
    due = _latest(expression, timezone, first, now, 1 if missed and misfire != "run_all" else MOST_MISSED)
    if misfire == "skip" and now - due[-1] > MISSED_AFTER:
        due = []
    return due, next_tick(expression, timezone, now)


def _latest(expression: str, timezone: str, first: datetime, now: datetime, most: int) -> list[datetime]:
    """The latest ticks from `first` to `now`, in order, however long ago `first` is: it looks further and further back.

    One at least, for `first` is one.
    """
    window = timedelta(seconds=most)
    while True:
        start = max(first - _MOMENT, now - window)
        found = list(takewhile(lambda moment: moment <= now, ticks(expression, timezone, start)))
        if start < first or len(found) >= most:
            return found[-most:] or [first]
        window *= 10
