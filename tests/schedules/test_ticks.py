"""When expressions fire, and which missed ticks are made up for."""

import os
import time
from collections.abc import Generator
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice, takewhile
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim

from durable_sa import InvalidConfiguration, InvalidCron
from durable_sa.schedules.cron import MAX_MISSED_TICKS, MISSED_AFTER, due_ticks, next_tick, ticks

BERLIN = "Europe/Berlin"


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def first(expression: str, after: str, count: int = 3, zone: str = BERLIN) -> list[str]:
    return [f"{moment:%m-%dT%H:%M:%S}" for moment in islice(ticks(expression, zone, utc(after)), count)]


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        # On 29 March 2026 the clocks go from 02:00 to 03:00, which is 01:00 in UTC.
        ("30 1 * * *", "2026-03-27T12:00", ["03-28T00:30:00", "03-29T00:30:00", "03-29T23:30:00"]),
        ("30 2 * * *", "2026-03-27T12:00", ["03-28T01:30:00", "03-29T01:00:00", "03-30T00:30:00"]),
        ("0 3 * * *", "2026-03-27T12:00", ["03-28T02:00:00", "03-29T01:00:00", "03-30T01:00:00"]),
        ("*/30 * * * *", "2026-03-29T00:20", ["03-29T00:30:00", "03-29T01:00:00", "03-29T01:30:00"]),
        # On 25 October they go from 03:00 back to 02:00: from 00:00 to 02:00 in UTC the hour is twice there.
        ("30 2 * * *", "2026-10-23T12:00", ["10-24T00:30:00", "10-25T00:30:00", "10-26T01:30:00"]),
        ("0 3 * * *", "2026-10-23T12:00", ["10-24T01:00:00", "10-25T02:00:00", "10-26T02:00:00"]),
        ("*/30 * * * *", "2026-10-25T00:20", ["10-25T00:30:00", "10-25T01:00:00", "10-25T01:30:00"]),
        ("0 */2 * * *", "2026-10-24T21:00", ["10-24T22:00:00", "10-25T00:00:00", "10-25T01:00:00"]),
        # Seconds in front change nothing of that.
        ("0 30 2 * * *", "2026-03-27T12:00", ["03-28T01:30:00", "03-29T01:00:00", "03-30T00:30:00"]),
        ("0 30 2 * * *", "2026-10-23T12:00", ["10-24T00:30:00", "10-25T00:30:00", "10-26T01:30:00"]),
        ("0 */30 2 * * *", "2026-10-24T12:00", ["10-25T00:00:00", "10-25T00:30:00", "10-26T01:00:00"]),
        # The hour is named, whatever the minutes are: a time that is there twice fires once, one that is not there, too.
        ("*/30 2 * * *", "2026-10-24T12:00", ["10-25T00:00:00", "10-25T00:30:00", "10-26T01:00:00"]),
        ("*/30 2 * * *", "2026-03-28T12:00", ["03-29T01:00:00", "03-30T00:00:00", "03-30T00:30:00"]),
        ("*/30 1-3 * * *", "2026-10-25T00:20", ["10-25T00:30:00", "10-25T02:00:00", "10-25T02:30:00"]),
        # In the hour that comes again what was in it is over.
        ("45 2 * * *", "2026-10-25T01:10", ["10-26T01:45:00", "10-27T01:45:00", "10-28T01:45:00"]),
        ("0,45 2,3 * * *", "2026-10-25T01:10", ["10-25T02:00:00", "10-25T02:45:00", "10-26T01:00:00"]),
        # Calendars.
        ("0 0 29 2 *", "2026-01-01T00:00", ["02-28T23:00:00", "02-28T23:00:00", "02-28T23:00:00"]),
        ("0 12 L * *", "2028-01-31T12:00", ["02-29T11:00:00", "03-31T10:00:00", "04-30T10:00:00"]),
        ("0 12 LW * *", "2026-01-01T00:00", ["01-30T11:00:00", "02-27T11:00:00", "03-31T10:00:00"]),
        ("0 12 * * MON#1", "2026-01-01T00:00", ["01-05T11:00:00", "02-02T11:00:00", "03-02T11:00:00"]),
        ("*/20 * * * * *", "2026-01-01T00:00", ["01-01T00:00:20", "01-01T00:00:40", "01-01T00:01:00"]),
    ],
)
def test_ticks_go_by_the_clock_on_the_wall(expression: str, after: str, expected: list[str]) -> None:
    assert first(expression, after) == expected


@pytest.mark.parametrize(
    ("zone", "change"),
    [
        ("America/New_York", "2026-11-01T06:00"),
        ("America/Havana", "2026-03-08T05:00"),  # from midnight on
        ("America/Havana", "2026-11-01T05:00"),
        ("Australia/Lord_Howe", "2026-04-04T15:00"),  # by half an hour
        ("Australia/Lord_Howe", "2026-10-03T15:30"),
        ("Antarctica/Troll", "2026-03-29T01:00"),  # by two hours
        ("Pacific/Apia", "2011-12-30T10:00"),  # by a day
    ],
)
@pytest.mark.parametrize(
    "expression", ["* * * * *", "0 */3 * * *", "*/20 */2 * * *", "* * * * 0-6", "30 * * * *", "15 */30 * * * *"]
)
def test_steady_ticks_are_all_those_times_at_which_the_clock_shows_them(
    zone: str, change: str, expression: str
) -> None:
    start, end = utc(change) - timedelta(hours=30), utc(change) + timedelta(hours=30)
    days = timedelta(days=2)
    walls = CronSim(expression, start.replace(tzinfo=None) - days)
    wanted = set(takewhile(lambda wall: wall < end.replace(tzinfo=None) + days, walls))
    moments = (start + timedelta(seconds=15 * number) for number in range(1, 4 * 60 * 60))
    expected = [each for each in moments if each.astimezone(ZoneInfo(zone)).replace(tzinfo=None) in wanted]
    assert list(takewhile(lambda each: each < end, ticks(expression, zone, start))) == expected


def test_leap_days_are_four_years_apart() -> None:
    assert [moment.year for moment in islice(ticks("0 0 29 2 *", "UTC", utc("2095-01-01")), 2)] == [2096, 2104]


@pytest.fixture
def elsewhere() -> Generator[None]:
    """A machine that is in another time zone."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Pacific/Auckland"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_where_the_machine_is_does_not_matter(elsewhere: None) -> None:
    assert first("30 2 * * *", "2026-03-27T12:00") == ["03-28T01:30:00", "03-29T01:00:00", "03-30T00:30:00"]
    given = [
        utc("2026-03-27T12:00").astimezone(zone) for zone in (timezone(timedelta(hours=9)), ZoneInfo("Asia/Kolkata"))
    ]
    assert {next_tick("30 2 * * *", BERLIN, moment) for moment in given} == {utc("2026-03-28T01:30")}


@pytest.mark.parametrize(
    "expression",
    ["", "x", "@daily", "* * * *", "* * * * * * *", "60 * * * *", "* 24 * * *", "0 0 30 2 *", "0 0 0 * *", "*/0 * * * *",
     "0 0 * * MON#6", f"{'9' * 5000} * * * *", "-5 * * * *", "1-0 * * * *", "* * * * *\n* * * * *", None, 5],
)  # fmt: skip
def test_what_is_no_expression_is_refused(expression: Any) -> None:
    with pytest.raises(InvalidCron):
        next_tick(expression, "UTC", utc("2026-01-01"))


@pytest.mark.parametrize("zone", ["", "Mars/Base", "../etc/passwd", "CEST\0", None, 7])
def test_what_is_no_time_zone_is_refused(zone: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="timezone: there is no time zone"):
        next_tick("0 0 * * *", zone, utc("2026-01-01"))


NOW = utc("2026-06-01T12:00:30")
OUTAGE = utc("2026-06-01T09:01")


def due(misfire: Any, expression: str = "*/5 * * * *", since: datetime = OUTAGE, now: datetime = NOW) -> list[datetime]:
    start = next_tick(expression, "UTC", since)
    assert start is not None
    found, following = due_ticks(expression, "UTC", start, now, misfire)
    assert following == next_tick(expression, "UTC", now)
    assert found == sorted(found)
    return found


def test_after_an_outage_the_policy_decides() -> None:
    assert due("run_once") == [utc("2026-06-01T12:00")]
    assert due("run_all") == [utc("2026-06-01T09:05") + number * timedelta(minutes=5) for number in range(36)]
    assert due("skip") == [utc("2026-06-01T12:00")], "that one is not late"
    assert due("skip", now=utc("2026-06-01T12:02")) == []
    assert due("skip", now=utc("2026-06-01T12:01")) == [utc("2026-06-01T12:00")], "a minute is not late"
    assert timedelta(minutes=1) == MISSED_AFTER


@pytest.mark.parametrize("misfire", ["skip", "run_once", "run_all"])
def test_ticks_that_are_not_a_minute_late_all_fire(misfire: str) -> None:
    late = [NOW - timedelta(seconds=number) for number in (2, 1, 0)]
    assert due(misfire, "* * * * * *", since=NOW - timedelta(seconds=3)) == late
    assert len(due(misfire, "* * * * * *", since=NOW - timedelta(seconds=61))) == 61
    assert len(due(misfire, "* * * * * *", since=NOW - timedelta(seconds=62))) == (62 if misfire == "run_all" else 1)


def test_run_all_has_a_cap() -> None:
    found = due("run_all", "* * * * *")
    assert (
        found == [utc("2026-06-01T12:00") - number * timedelta(minutes=1) for number in range(MAX_MISSED_TICKS)][::-1]
    )
    assert len(found) == 100


@pytest.mark.parametrize("misfire", ["skip", "run_once", "run_all"])
@pytest.mark.parametrize("expression", ["* * * * * *", "*/5 * * * *", "0 0 29 2 *"])
def test_an_outage_of_thirty_years_is_looked_through_at_once(misfire: str, expression: str) -> None:
    began = time.process_time()
    found = due(misfire, expression, since=utc("1996-01-01"))
    assert time.process_time() - began < 0.5
    if misfire == "run_all":
        assert len(found) == (8 if "29" in expression else 100)


def test_a_single_tick_is_due_at_its_moment() -> None:
    moment = utc("2026-06-01T12:00")
    for misfire in ("skip", "run_once", "run_all"):
        assert due(misfire, "0 12 * * *", since=utc("2026-06-01T00:00"), now=moment) == [moment]


def test_a_tick_that_somebody_moved_by_hand_is_fired_as_it_is() -> None:
    odd = utc("2026-06-01T11:59:59")
    assert due_ticks("0 12 1 1 *", "UTC", odd, NOW, "run_once") == ([odd], utc("2027-01-01T12:00"))
