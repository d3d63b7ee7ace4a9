"""The database's clock, seen from a worker."""

import time
from datetime import UTC, datetime, timedelta


class LocalClock:
    """Tells the database's time without asking for it: what it last said, and what has passed here since.

    It is behind by as long as that answer took, so that nothing is ever over too early, and follows the database's
    clock wherever that goes.
    """

    __slots__ = ("_heard_at", "_said")

    def __init__(self) -> None:
        self.set(datetime(1, 1, 2, tzinfo=UTC))

    def set(self, said: datetime) -> None:
        """Take note of a time that the database has just given."""
        self._said = said
        self._heard_at = time.monotonic()

    def now(self) -> datetime:
        """The database's time, or a little before."""
        return self._said + timedelta(seconds=time.monotonic() - self._heard_at)
