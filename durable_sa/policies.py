"""How failed tasks are retried, when tasks are given up, and the ranges of durations and timestamps."""

import math
import random as _random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from .errors import InvalidConfiguration

Duration = float | timedelta
"""Seconds, or a `timedelta`. Sub-second precision is kept."""

MAX_DURATION: Final = timedelta(days=36_525).total_seconds()
"""100 years, in seconds."""

_EARLIEST: Final = datetime(1000, 1, 1, tzinfo=UTC)
# Far enough below the last datetime of Python that a time plus the longest durations can still be read back.
_LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)


def number(value: object, what: str, *, minimum: float, maximum: float) -> float:
    """Return `value` as a float.

    Raises:
        InvalidConfiguration: for NaN, anything that is no number (`bool` included), or a number outside the range.
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
        InvalidConfiguration: for anything that is no int (`bool` included), or one outside the range.
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
        InvalidConfiguration: for NaN, values below `minimum` or above 100 years, and what is no duration.
    """
    if isinstance(duration, timedelta):
        duration = duration.total_seconds()
    elif isinstance(duration, bool) or not isinstance(duration, int | float):
        raise InvalidConfiguration(
            what, f"a duration is a number of seconds or a timedelta, not {type(duration).__name__}"
        )
    return number(duration, f"{what} (seconds)", minimum=minimum, maximum=MAX_DURATION)


def timestamp(value: object, what: str) -> datetime:
    """Return an aware datetime in UTC.

    Raises:
        InvalidConfiguration: for naive datetimes, years before 1000 or after 8999, and what is no datetime.
    """
    if not isinstance(value, datetime):
        raise InvalidConfiguration(what, f"it must be a datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        remedy = "Give it a time zone, such as `datetime.now(UTC)` or `value.replace(tzinfo=ZoneInfo('Europe/Paris'))`."
        raise InvalidConfiguration(what, f"{value.isoformat()} has no time zone", remedy)
    if not _EARLIEST <= value <= _LATEST:
        raise InvalidConfiguration(what, f"{value.isoformat()} is not between the years 1000 and 9000")
    return value.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class RetryStrategy:
    """How long a failed task, or step, waits before it runs again. Made by `none()`, `fixed()` or `exponential()`.

    Raises:
        InvalidConfiguration: for a field outside its range.
    """

    kind: Literal["none", "fixed", "exponential"]
    base_delay: float = 0.0
    """Seconds before the first retry, and between all of them if `fixed`. At most 100 years."""
    factor: float = 1.0
    """What each further failure multiplies the delay by, 1 to 1000. Only `exponential` has one."""
    max_backoff: float = MAX_DURATION
    """The longest delay in seconds, jitter included. Only `exponential` has one."""
    jitter: float = 0.0
    """Share of the delay, 0 to 1, by which it is made shorter or longer at random."""

    def __post_init__(self) -> None:
        if self.kind not in ("none", "fixed", "exponential"):
            raise InvalidConfiguration("retry_strategy", f"there is no kind {str(self.kind)[:40]!r}")
        checked = {
            "base_delay": seconds(self.base_delay, "base_delay"),
            "factor": number(self.factor, "factor", minimum=1, maximum=1000),
            "max_backoff": seconds(self.max_backoff, "max_backoff"),
            "jitter": number(self.jitter, "jitter", minimum=0, maximum=1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def none(cls) -> "RetryStrategy":
        """No retry: the first failure is the last."""
        return cls("none")

    @classmethod
    def fixed(cls, base_delay: Duration = 5, jitter: float = 0) -> "RetryStrategy":
        """The same delay before each retry, in seconds or as a `timedelta`; `jitter` is a share of it, 0 to 1."""
        return cls("fixed", seconds(base_delay, "base_delay"), jitter=jitter)

    @classmethod
    def exponential(
        cls, base_delay: Duration = 5, factor: float = 2, max_backoff: Duration = 300, jitter: float = 0
    ) -> "RetryStrategy":
        """`base_delay` before the first retry, `factor` times longer before each further one, up to `max_backoff`.

        Both are seconds or a `timedelta`; `jitter` is a share of the delay, 0 to 1, by which it varies at random.
        """
        return cls(
            "exponential", seconds(base_delay, "base_delay"), factor, seconds(max_backoff, "max_backoff"), jitter
        )

    def delay(self, failures: int, random: Callable[[], float] = _random.random) -> float:
        """Seconds to wait after the `failures`-th failure, counted from 1. `random` gives numbers in [0, 1).

        Where nothing is retried, `none`, it is 0.
        """
        if self.kind == "none":
            return 0.0
        delay = self.base_delay
        if self.kind == "exponential":
            try:
                delay *= self.factor ** (failures - 1)
            except OverflowError:
                # The power alone is beyond what a number can hold, its product with a tiny delay need not be.
                logarithm = math.log(delay) + (failures - 1) * math.log(self.factor) if delay else -math.inf
                delay = math.exp(min(logarithm, math.log(MAX_DURATION)))
            delay = min(delay, self.max_backoff)
        if self.jitter:
            delay *= 1 - self.jitter + 2 * self.jitter * random()
        return min(delay, self.max_backoff)


DEFAULT_RETRY_STRATEGY: Final = RetryStrategy.fixed(5)
"""Of clients that say nothing else."""


@dataclass(frozen=True, slots=True)
class CancellationPolicy:
    """When a task that takes too long is cancelled by itself. `None` is never.

    Raises:
        InvalidConfiguration: for durations outside 0 to 100 years.
    """

    max_pending_time: Duration | None = None
    """Seconds from `available_at` to the first start."""
    max_running_time: Duration | None = None
    """Seconds from the first start on, retries and sleep included."""

    def __post_init__(self) -> None:
        for name in ("max_pending_time", "max_running_time"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, seconds(value, name))
