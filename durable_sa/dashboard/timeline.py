"""The history of a task as bars on one scale, on which long idle times take little room."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from ..results import HistoryEntry

WIDTH: Final = 1000
"""Units of the scale."""
LEAST: Final = 4
"""Units of the shortest bar, so that it can be seen."""
_BUSY: Final = ("step", "transaction", "try")
_IDLE_SHARE: Final = 0.12
"""Share of all busy time that one idle time takes at most."""
_CUT: Final = 3
"""The factor from which an idle time that is cut short is marked."""


class Bar(NamedTuple):
    """The place of an entry on the scale."""

    x: int
    width: int
    ongoing: bool = False


class Gap(NamedTuple):
    """An idle time that takes less room than it lasted."""

    x: int
    width: int
    seconds: float


_Idle = tuple[int, int, float]
"""The first moment and the last of an idle time, and its seconds."""


class Scale:
    """Maps times to a width, linearly except for idle times."""

    def __init__(self, entries: Iterable[HistoryEntry], begin: datetime, now: datetime) -> None:
        shown = list(entries)
        self._now = now
        spans = [_span(entry, now) for entry in shown]
        known = sorted({begin, *(moment for span in spans for moment in span if moment is not None)})
        self._moments = known
        busy = sorted(
            (first, last)
            for entry, (first, last) in zip(shown, spans, strict=True)
            if entry.kind in _BUSY and first is not None and last is not None
        )
        weights, idle = self._weigh(busy)
        total = sum(weights) or 1.0
        self._places = [0.0]
        for weight in weights:
            self._places.append(self._places[-1] + weight / total * WIDTH)
        self.gaps = [
            Gap(round(self._places[first]), max(1, round(self._places[last] - self._places[first])), seconds)
            for first, last, seconds in idle
        ]

    def _weigh(self, busy: Sequence[tuple[datetime, datetime]]) -> tuple[list[float], list[_Idle]]:
        """Return the weight of each stretch between two moments, and the idle ones that are cut short."""
        lengths = [
            (later - earlier).total_seconds() for earlier, later in zip(self._moments, self._moments[1:], strict=False)
        ]
        is_busy = [False] * len(lengths)
        position, last_end = 0, None
        for index, start in enumerate(self._moments[:-1]):
            while position < len(busy) and busy[position][0] <= start:
                end = busy[position][1]
                last_end = end if last_end is None or end > last_end else last_end
                position += 1
            is_busy[index] = last_end is not None and last_end > start
        worked = sum(length for length, is_working in zip(lengths, is_busy, strict=True) if is_working)
        if not worked:
            return lengths, []
        return _cut(lengths, is_busy, worked * _IDLE_SHARE)

    def at(self, moment: datetime) -> float:
        """Return the place of a time."""
        if moment <= self._moments[0]:
            return 0.0
        if moment >= self._moments[-1]:
            return self._places[-1]
        index = bisect_right(self._moments, moment) - 1
        first, last = self._moments[index], self._moments[index + 1]
        share = (moment - first) / (last - first)
        return self._places[index] + share * (self._places[index + 1] - self._places[index])

    def bar(self, entry: HistoryEntry) -> Bar | None:
        """Return the place of an entry; None if nothing is known of its time."""
        first, last = _span(entry, self._now)
        first = last if first is None else first
        if first is None or last is None:
            return None
        x = min(self.at(first), WIDTH - LEAST)
        width = max(self.at(last) - x, LEAST)
        return Bar(round(x), round(min(width, WIDTH - x)), entry.ended_at is None)


def _cut(lengths: Sequence[float], is_busy: Sequence[bool], most: float) -> tuple[list[float], list[_Idle]]:
    """Return the stretches, idle times cut short to `most`, and which those are."""
    weights, idle = list(lengths), list[_Idle]()
    first = 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and is_busy[last] == is_busy[first]:
            last += 1
        seconds = sum(lengths[first:last])
        if not is_busy[first] and seconds > most:
            weights[first:last] = [length / seconds * most for length in lengths[first:last]]
            if seconds > _CUT * most:
                idle.append((first, last, seconds))
        first = last
    return weights, idle


def _span(entry: HistoryEntry, now: datetime) -> tuple[datetime | None, datetime | None]:
    first, last = entry.began_at, entry.ended_at
    if last is None and first is not None:
        # It goes on.
        last = max(first, now)
    return first, last
