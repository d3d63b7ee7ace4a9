"""When a cron expression fires, and which of the ticks that nobody was there for are made up for."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from .errors import InvalidConfiguration, InvalidCron

Misfire = Literal["skip", "run_once", "run_all"]

MISSED_AFTER: Final = timedelta(seconds=60)
"""A tick that is later than this was missed, and the misfire policy decides."""

MOST_MISSED: Final = 100
"""Ticks that `run_all` makes up for, at most: the latest."""

_MOMENT: Final = timedelta(microseconds=1)


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
    try:
        simulated = CronSim(expression, after.astimezone(local))
    except CronSimError as error:
        raise InvalidCron(expression, str(error) or "it cannot be read") from None
    for moment in simulated:
        yield moment.astimezone(UTC)


def next_tick(expression: str, timezone: str, after: datetime) -> datetime | None:
    """The first tick after `after`; None if there is none within the next fifty years.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    return next(ticks(expression, timezone, after), None)


def due_ticks(
    expression: str, timezone: str, first: datetime, now: datetime, misfire: Misfire
) -> tuple[list[datetime], datetime | None]:
    """The ticks to fire now, and the next one, for a schedule whose next tick was `first`."""
    due = _latest(expression, timezone, first, now, MOST_MISSED if misfire == "run_all" else 1)
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
