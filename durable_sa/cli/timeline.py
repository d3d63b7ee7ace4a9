"""The timeline of a task: what happened to it, in order, with durations; a long one is grouped to fit a screen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from ..client.wording import span

GROUPED_FROM = 25
"""Entries of a timeline that is long enough to be grouped."""
MOST_ENTRIES = 12
"""Entries of a grouped timeline: with the facts above it, and two lines for each, it fits a screen."""

_LONGEST_PATTERN = 8
_REPETITIONS = 3
_NUMBER = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+")

Fields = Mapping[str, Any]


class Moment(NamedTuple):
    """An entry of a task's timeline."""

    at: datetime
    what: str
    detail: str = ""
    took: float | None = None
    """Seconds, if they are known."""
    attempt: int = 0
    failed: bool = False


class Entry(NamedTuple):
    """A moment, or several of the same kind, as one line."""

    at: datetime
    what: str
    detail: str
    took: float | None
    times: int = 1

    def row(self) -> dict[str, Any]:
        """Return the cells of the entry."""
        return {
            "at": f"{self.at:%Y-%m-%d %H:%M:%S}.{self.at.microsecond // 1000:03}Z",
            "took": span(self.took),
            "what": self.what if self.times == 1 else f"{self.what}, {self.times} times",
            "detail": self.detail,
        }


def entries(moments: Sequence[Moment], *, everything: bool = False) -> list[Entry]:
    """Return the moments as lines; of many, no more than fit a screen unless `everything` is wanted.

    Repetitions become one line for each of their parts, and if that is not enough, the middle becomes one line that
    counts what is in it.
    """
    if everything or len(moments) < GROUPED_FROM:
        return [_entry([moment]) for moment in moments]
    groups = list(_groups(moments))
    if len(groups) <= MOST_ENTRIES:
        return [_entry(group) for group in groups]
    head, tail = MOST_ENTRIES // 2, MOST_ENTRIES - MOST_ENTRIES // 2 - 1
    middle = [moment for group in groups[head:-tail] for moment in group]
    counts = Counter(_pattern(moment.what) for moment in middle)
    named = ", ".join(f"{count} of {what}" for what, count in counts.most_common(5))
    more = "" if len(counts) <= 5 else f" and {len(counts) - 5} other kinds"
    left_out = Entry(middle[0].at, f"{len(middle)} entries (--all)", f"{named}{more}", _sum(middle))
    return [*(_entry(group) for group in groups[:head]), left_out, *(_entry(group) for group in groups[-tail:])]


def _groups(moments: Sequence[Moment]) -> Iterator[list[Moment]]:
    """Yield the moments, those that a pattern repeats three times or more together, part by part of the pattern."""
    patterns = [_pattern(f"{moment.what} {moment.failed} {moment.detail}") for moment in moments]
    begin = 0
    while begin < len(moments):
        length, times = max(
            ((length, _repetitions(patterns, begin, length)) for length in range(1, _LONGEST_PATTERN + 1)),
            # The shortest of those that cover the most.
            key=lambda found: (found[0] * found[1] if found[1] >= _REPETITIONS else 1, -found[0]),
        )
        if times < _REPETITIONS:
            length, times = 1, 1
        for part in range(length):
            yield [moments[begin + part + length * number] for number in range(times)]
        begin += length * times


def _repetitions(patterns: Sequence[str], begin: int, length: int) -> int:
    unit = patterns[begin : begin + length]
    times = 1
    while patterns[begin + times * length : begin + (times + 1) * length] == unit and len(unit) == length:
        times += 1
    return times


def _entry(group: Sequence[Moment]) -> Entry:
    first, last = group[0], group[-1]
    if len(group) == 1:
        return Entry(first.at, first.what, first.detail, first.took)
    what = first.what if first.what == last.what else _pattern(first.what)
    details = {moment.detail for moment in group}
    detail = details.pop() if len(details) == 1 else _pattern(first.detail)
    return Entry(first.at, what, f"until {last.at:%H:%M:%S}Z {detail}".rstrip(), _sum(group), len(group))


def _sum(group: Sequence[Moment]) -> float | None:
    durations = [moment.took for moment in group if moment.took is not None]
    return sum(durations) if durations else None


def _pattern(text: str) -> str:
    return _NUMBER.sub("#", text)
