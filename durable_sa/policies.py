"""How failed tasks are retried, and when tasks that take too long are cancelled or that end their workers given up."""

import math
import random as _random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from .errors import InvalidConfiguration
from .validation import MAX_DURATION, Duration, instance, integer, number, seconds

SUSPECT_AFTER: Final = 2
"""Workers lost in a row while they ran a task, after which it is suspected of ending them, and is run alone."""
MAX_LOST_WORKERS: Final = 5
"""Workers lost in a row while they ran a suspect alone, after which it fails, unless an option says another number."""


@dataclass(frozen=True, slots=True)
class RetryStrategy:
    """The delay of a failed task, or step, before its retry. Made by `none()`, `fixed()` or `exponential()`.

    Raises:
        InvalidConfiguration: for a field outside its range.
    """

    kind: Literal["none", "fixed", "exponential"]
    base_delay: float = 0.0
    """Seconds before the first retry, and between all of them if `fixed`. At most 100 years."""
    factor: float = 1.0
    """The factor of the delay for each further failure, 1 to 1000. Only `exponential` has one."""
    max_backoff: float = MAX_DURATION
    """The longest delay in seconds, jitter included. Only `exponential` has one."""
    jitter: float = 0.0
    """The share of the delay, 0 to 1, by which it varies at random."""

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
        """Return a strategy without retries: the first failure is final."""
        return cls("none")

    @classmethod
    def fixed(cls, base_delay: Duration = 5, jitter: float = 0) -> "RetryStrategy":
        """Return a strategy with the same delay before each retry, in seconds or as a `timedelta`.

        `jitter` is a share of the delay, 0 to 1, by which it varies at random.
        """
        return cls("fixed", seconds(base_delay, "base_delay"), jitter=jitter)

    @classmethod
    def exponential(
        cls, base_delay: Duration = 5, factor: float = 2, max_backoff: Duration = 300, jitter: float = 0
    ) -> "RetryStrategy":
        """Return a strategy whose delay begins at `base_delay` and grows by `factor` per retry, up to `max_backoff`.

        Both times are seconds or a `timedelta`; `jitter` is a share of the delay, 0 to 1, by which it varies at random.

        Raises:
            InvalidConfiguration: `base_delay` is longer than `max_backoff`, or a field is outside its range.
        """
        first, longest = seconds(base_delay, "base_delay"), seconds(max_backoff, "max_backoff")
        if first > longest:
            # Checked here rather than for each instance, because schedules of earlier versions may store such a pair.
            raise InvalidConfiguration(
                "base_delay",
                f"{first:g} seconds is more than max_backoff, {longest:g} seconds",
                "No delay is longer than max_backoff: raise it, or lower base_delay.",
            )
        return cls("exponential", first, factor, longest, jitter)

    def delay(self, failures: int, random: Callable[[], float] = _random.random) -> float:
        """Return the seconds to wait after the `failures`-th failure, counted from 1; 0 for the strategy `none`.

        `random` returns numbers in [0, 1).
        """
        if self.kind == "none":
            return 0.0
        delay = self.base_delay
        if self.kind == "exponential":
            try:
                delay *= self.factor ** (failures - 1)
            except OverflowError:
                # The power exceeds the range of a float, but its product with a tiny delay may not.
                logarithm = math.log(delay) + (failures - 1) * math.log(self.factor) if delay else -math.inf
                delay = math.exp(min(logarithm, math.log(MAX_DURATION)))
            delay = min(delay, self.max_backoff)
        if self.jitter:
            delay *= 1 - self.jitter + 2 * self.jitter * random()
        return min(delay, self.max_backoff)


DEFAULT_RETRY_STRATEGY: Final = RetryStrategy.fixed(5)
"""The strategy of a client that sets no other."""


@dataclass(frozen=True, slots=True)
class CancellationPolicy:
    """The times after which the engine cancels a task. `None` is never.

    Raises:
        InvalidConfiguration: for durations outside 0 to 100 years.
    """

    max_pending_time: Duration | None = None
    """Seconds from `available_at` to the first start."""
    max_running_time: Duration | None = None
    """Seconds from the first start, retries and sleeps included."""

    def __post_init__(self) -> None:
        for name in ("max_pending_time", "max_running_time"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, seconds(value, name))


MAX_CONCURRENCY: Final = 1_000_000_000
MAX_RATE: Final = 1_000_000
"""Most starts that a rate counts, and the largest burst."""
_LONGEST_INTERVAL: Final = 5 * 365.25 * 86400
"""Seconds between starts. After the heaviest, which counts as a thousand, the next is due within the times of dates."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate of starts: in any window of `w` seconds at most `burst` and `w * count / per` of them, rounded down.

    Raises:
        InvalidConfiguration: for a field outside its range, more than a million starts a second, or less than one in
            five years.
    """

    count: int
    """Starts in `per` seconds, 1 to 1,000,000."""
    per: Duration
    """Seconds, above 0, or a `timedelta`."""
    burst: int = 1
    """Starts that may come at once after a pause, 1 to 1,000,000."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", integer(self.count, "count", minimum=1, maximum=MAX_RATE))
        object.__setattr__(self, "per", seconds(self.per, "per", minimum=1e-6))
        object.__setattr__(self, "burst", integer(self.burst, "burst", minimum=1, maximum=MAX_RATE))
        if self.interval < 1e-6:
            raise InvalidConfiguration("Rate", f"{self.count} in {self.per:g} seconds is more than a million a second")
        if self.interval > _LONGEST_INTERVAL:
            raise InvalidConfiguration(
                "Rate", f"{self.count} in {self.per:g} seconds is less than one in five years", "Give a faster rate."
            )
        if self.interval * self.burst > MAX_DURATION:
            raise InvalidConfiguration("Rate", f"a burst of {self.burst} takes more than 100 years to refill")

    @property
    def interval(self) -> float:
        """The seconds between starts."""
        return float(self.per) / self.count  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Limit:
    """How many tasks of a queue, or of a key, may run at once, and how many may start in a time.

    Raises:
        InvalidConfiguration: for a field outside its range, or a limit with neither part.
    """

    concurrency: int | None = None
    """Tasks that run at once, at least 1. None: any number."""
    rate: Rate | None = None
    """The rate of starts. None: any."""
    hold: Literal["run", "task"] = "run"
    """With "run", a task holds a slot while it runs; with "task", from its first start to its end, also while it
    sleeps, waits, or is about to be retried."""

    def __post_init__(self) -> None:
        if self.concurrency is None and self.rate is None:
            raise InvalidConfiguration(
                "Limit", "it limits neither concurrency nor rate", "Give one of them, or None for no limit."
            )
        if self.concurrency is not None:
            concurrency = integer(self.concurrency, "concurrency", minimum=1, maximum=MAX_CONCURRENCY)
            object.__setattr__(self, "concurrency", concurrency)
        if self.rate is not None:
            instance(self.rate, Rate, "rate")
        if self.hold not in ("run", "task"):
            raise InvalidConfiguration("hold", f"{self.hold!r:.40} is neither 'run' nor 'task'")
