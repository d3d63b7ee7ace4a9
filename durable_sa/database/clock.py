"""The database's clock, seen from a worker."""

import time
from datetime import UTC, datetime, timedelta


class LocalClock:
    """The database's time without a query: the latest time that it returned, and the time that has passed here since.

    It is late by the duration of that query, so that nothing ends too early, and follows any change of the database's
    clock.
    """

    __slots__ = ("_set_at", "_time")

    def __init__(self) -> None:
        self.set(datetime(1, 1, 2, tzinfo=UTC))

    def set(self, time_: datetime) -> None:
        """Set the time that the database has just returned."""
        self._time = time_
        self._set_at = time.monotonic()

    def now(self) -> datetime:
        """Return the database's time, or a little before."""
        return self._time + timedelta(seconds=time.monotonic() - self._set_at)

    def seconds_since(self, moment: datetime) -> float:
        """Return the seconds that have passed since a time of the database, or a little less."""
        return (self._time - moment).total_seconds() + time.monotonic() - self._set_at
