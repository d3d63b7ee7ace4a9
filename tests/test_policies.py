import math
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable_sa.errors import InvalidConfiguration
from durable_sa.policies import CancellationPolicy, RetryStrategy
from durable_sa.validation import MAX_DURATION, integer, number, seconds, timestamp

durations = st.floats(0, MAX_DURATION)
failures = st.integers(1, 2**31)
shares = st.floats(0, 1)
draws = st.floats(0, 1, exclude_max=True)


ranges = st.tuples(durations, durations).map(sorted)
"""The first delay of an exponential strategy, and its longest."""


@given(ranges, st.floats(1, 1000), st.integers(1, 100))
def test_exponential_delays_follow_the_formula(bounds: list[float], factor: float, count: int) -> None:
    base, cap = bounds
    exact = min(Fraction(base) * Fraction(factor) ** (count - 1), Fraction(cap))
    delay = RetryStrategy.exponential(base, factor, cap).delay(count)
    assert delay == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


@given(durations, failures)
def test_fixed_delays_are_all_the_same(base: float, count: int) -> None:
    assert RetryStrategy.fixed(base).delay(count) == base


@given(ranges, st.floats(1, 1000), shares, failures, draws)
def test_delays_never_leave_their_range(
    bounds: list[float], factor: float, jitter: float, count: int, draw: float
) -> None:
    base, cap = bounds
    strategy = RetryStrategy.exponential(base, factor, cap, jitter)
    without = RetryStrategy.exponential(base, factor, cap).delay(count)
    delay = strategy.delay(count, lambda: draw)
    assert 0 <= delay <= cap
    assert without * (1 - jitter) <= delay * (1 + 1e-9)
    assert delay <= without * (1 + jitter) * (1 + 1e-9)


@given(durations, shares, failures, st.integers(1, 1000))
def test_delays_never_shrink_with_more_failures(base: float, jitter: float, count: int, more: int) -> None:
    strategy = RetryStrategy.exponential(base, 1.5, max_backoff=MAX_DURATION, jitter=jitter)
    assert strategy.delay(count, lambda: 0.5) <= strategy.delay(count + more, lambda: 0.5)


def test_jitter_goes_both_ways() -> None:
    strategy = RetryStrategy.fixed(10, jitter=0.25)
    assert [strategy.delay(1, iter([draw]).__next__) for draw in (0.0, 0.5, 1.0)] == [7.5, 10, 12.5]


def test_the_defaults() -> None:
    assert RetryStrategy.none() == RetryStrategy("none")
    assert RetryStrategy.none().delay(1) == 0
    assert RetryStrategy.fixed() == RetryStrategy("fixed", base_delay=5.0)
    assert RetryStrategy.exponential() == RetryStrategy("exponential", 5.0, 2.0, 300.0, 0.0)
    assert [RetryStrategy.exponential().delay(count) for count in (1, 2, 7, 8, 10**9)] == [5, 10, 300, 300, 300]


def test_a_delay_of_nothing_stays_nothing() -> None:
    assert RetryStrategy.exponential(0, 1000).delay(2**31) == 0


def test_strategies_are_values() -> None:
    assert hash(RetryStrategy.fixed(timedelta(seconds=1.5))) == hash(RetryStrategy.fixed(1.5))
    with pytest.raises(FrozenInstanceError):
        RetryStrategy.fixed().jitter = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_delay": -0.001}, r"base_delay \(seconds\): -0.001 is not between 0 and"),
        ({"base_delay": math.nan}, "nan is not between"),
        ({"base_delay": math.inf}, "inf is not between"),
        ({"base_delay": 10**400}, "a number too long to show"),
        ({"base_delay": True}, "not bool"),
        ({"base_delay": "5"}, "a duration is a number of seconds or a timedelta, not str"),
        ({"max_backoff": timedelta(days=36_525, microseconds=1)}, r"max_backoff \(seconds\)"),
        ({"factor": 0.999}, "factor: 0.999 is not between 1 and 1000"),
        ({"factor": 1000.5}, "factor"),
        ({"factor": math.nan}, "factor: nan"),
        ({"factor": None}, "factor: it must be a number, not NoneType"),
        ({"jitter": 1.01}, "jitter: 1.01 is not between 0 and 1"),
        ({"jitter": -0.1}, "jitter"),
        ({"kind": "quadratic"}, "there is no kind 'quadratic'"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        RetryStrategy(**{"kind": "exponential", **fields})


def test_the_largest_legal_values_work() -> None:
    strategy = RetryStrategy.exponential(timedelta(days=36_525), 1000, timedelta(days=36_525), 1)
    assert strategy.delay(2**31, lambda: 0.999) == MAX_DURATION
    assert RetryStrategy.fixed(MAX_DURATION, 1).delay(1, lambda: 0.999) <= MAX_DURATION
    policy = CancellationPolicy(timedelta(days=36_525), MAX_DURATION)
    assert policy.max_pending_time == policy.max_running_time == MAX_DURATION


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", False, MAX_DURATION + 1])
@pytest.mark.parametrize("name", ["max_pending_time", "max_running_time"])
def test_cancellation_policies_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InvalidConfiguration, match=name):
        CancellationPolicy(**{name: value})


@given(st.timedeltas(timedelta(0), timedelta(days=36_525)))
def test_durations_keep_their_fractions(duration: timedelta) -> None:
    assert timedelta(seconds=seconds(duration, "it")) == duration


@given(st.floats() | st.integers())
def test_durations_in_range_and_no_others_pass(value: float) -> None:
    if 0 <= value <= MAX_DURATION:
        assert seconds(value, "it") == value
    else:
        with pytest.raises(InvalidConfiguration):
            seconds(value, "it")


def test_a_minimum_is_named() -> None:
    assert seconds(1, "claim_timeout", minimum=1) == 1
    with pytest.raises(InvalidConfiguration, match=r"claim_timeout \(seconds\): 0.5 is not between 1 and"):
        seconds(0.5, "claim_timeout", minimum=1)


@pytest.mark.parametrize("value", [0, 2**31, 1.0, True, "1", None, 10**4000])
def test_integers_outside_their_range_are_refused(value: object) -> None:
    with pytest.raises(InvalidConfiguration, match="max_attempts"):
        integer(value, "max_attempts", minimum=1, maximum=2**31 - 1)


def test_numbers_may_be_given_as_int() -> None:
    assert number(1, "it", minimum=0, maximum=1) == 1
    assert type(number(1, "it", minimum=0, maximum=1)) is float


@pytest.mark.slow
@given(st.datetimes(datetime(1000, 1, 2), datetime(8999, 12, 30), timezones=st.timezones()))
def test_timestamps_keep_their_instant(value: datetime) -> None:
    assert timestamp(value, "it") == value.astimezone(UTC)
    assert timestamp(value, "it").tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime(2024, 1, 1, 12), "available_at: 2024-01-01T12:00:00 has no time zone.* Give it a time zone"),
        (datetime.max.replace(tzinfo=UTC), "is not between the years 1000 and 9000"),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), "is not between the years 1000 and 9000"),
        ("2024-01-01", "it must be a datetime, not str"),
        (1e9, "it must be a datetime, not float"),
    ],
)
def test_timestamps_that_cannot_work_are_refused(value: object, message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        timestamp(value, "available_at")


@pytest.mark.parametrize("base", [301, timedelta(hours=1)])
def test_a_first_delay_beyond_the_longest_one_is_refused(base: Any) -> None:
    with pytest.raises(InvalidConfiguration, match=r"base_delay: .* is more than max_backoff, 300 seconds. .*raise"):
        RetryStrategy.exponential(base)
    assert RetryStrategy.exponential(base, max_backoff=base).delay(1) == RetryStrategy.fixed(base).delay(1)
