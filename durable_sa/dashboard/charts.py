"""Numbers of ended tasks per period as pictures: heights on a scale, and points of lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

HEIGHT: Final = 100
"""Units of the vertical scale."""
LEAST: Final = 3
"""Units of the lowest bar, so that it can be seen."""


class Window(NamedTuple):
    """A time up to now, in periods of the same length."""

    name: str
    seconds: int
    """Of a period."""
    periods: int

    def since(self, now: datetime) -> datetime:
        """Return the beginning of the first period. The last one has not ended."""
        begin = int(now.timestamp()) // self.seconds - self.periods + 1
        return datetime.fromtimestamp(begin * self.seconds, UTC)


HOUR: Final = Window("1h", 60, 60)
WINDOWS: Final = (HOUR, Window("24h", 900, 96), Window("7d", 7200, 84))


def periods(rows: Iterable[Mapping[str, Any]], window: Window, since: datetime) -> list[dict[str, Any]]:
    """Return every period of a window, also those in which no task ended, from rows with `bucket`."""
    found = {row["bucket"]: row for row in rows}
    listed: list[dict[str, Any]] = []
    for number in range(window.periods):
        at = since + timedelta(seconds=number * window.seconds)
        listed.append({"at": at, **numbers(found.get(number))})
    return listed


def numbers(row: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the numbers of tasks in a row, and their mean and greatest duration in seconds."""
    if row is None:
        return {"completed": 0, "failed": 0, "cancelled": 0, "mean_seconds": None, "slowest_seconds": None}
    ended = row["completed"] + row["failed"]
    return {
        "completed": row["completed"],
        "failed": row["failed"],
        "cancelled": row["cancelled"],
        "mean_seconds": row["milliseconds"] / ended / 1000 if ended else None,
        "slowest_seconds": row["slowest"] / 1000 if ended else None,
    }


class Bars(NamedTuple):
    """Completed tasks above a line and failed ones below it, on one scale."""

    most: int
    """The greatest number of one period."""
    up: list[tuple[int, int]]
    """The periods in which tasks were completed, and the heights of their bars."""
    down: list[tuple[int, int]]
    line: int
    """The height of the line, from above."""
    width: int
    completed: int
    failed: int


def bars(completed: Sequence[int], failed: Sequence[int]) -> Bars:
    """Return the bars of periods."""
    above, below = max(completed, default=0), max(failed, default=0)
    most = above + below
    if not below:
        line = HEIGHT
    elif not above:
        line = 0
    else:
        line = min(HEIGHT - LEAST, max(LEAST, round(HEIGHT * above / most)))

    def heights(of: Sequence[int], greatest: int, room: int) -> list[tuple[int, int]]:
        return [(at, min(room, max(LEAST, round(room * value / greatest)))) for at, value in enumerate(of) if value]

    return Bars(
        max(above, below),
        heights(completed, above, line),
        heights(failed, below, HEIGHT - line),
        line,
        len(completed),
        sum(completed),
        sum(failed),
    )


def points(values: Sequence[float | None], greatest: float) -> list[str]:
    """Return the lines through the values, as points; a period without a value interrupts them."""
    lines: list[list[str]] = [[]]
    for at, value in enumerate(values):
        if value is None:
            lines.append([])
            continue
        y = HEIGHT - (HEIGHT - 2) * value / greatest if greatest else HEIGHT
        # From the left to the right end of the period, so that one alone can be seen.
        lines[-1] += [f"{at},{y:.1f}", f"{at + 1},{y:.1f}"]
    return [" ".join(line) for line in lines if line]
