"""How long due work has waited although a worker had a free slot for it, by the history of every row.

Time in which no worker that serves the queue had one does not count, nor does time before the round was steady: while
faults last, a worker that cannot reach the server looks as if it were free.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from .evidence import Evidence, Row


class Lag(NamedTuple):
    """A time that a task was due, and the seconds of it in which it could have been claimed."""

    seconds: float
    task: Row


class _Vacancies:
    """The seconds up to a moment in which any of some workers had a free slot."""

    def __init__(self, e: Evidence, serving: frozenset[str]) -> None:
        self._times: list[float] = []
        self._sums: list[float] = []
        self._free: list[bool] = []
        alive: set[str] = set()
        taken: Counter[str] = Counter()
        total = 0.0
        for at, kind, worker_id in _turns(e, serving):
            if self._times:
                total += (at - self._times[-1]) * self._free[-1]
            if kind == "taken":
                taken[worker_id] += 1
            elif kind == "freed":
                taken[worker_id] -= 1
            elif kind == "came":
                alive.add(worker_id)
            else:
                alive.discard(worker_id)
            self._times.append(at)
            self._sums.append(total)
            self._free.append(any(taken[each] < e.slots for each in alive))

    def until(self, at: float) -> float:
        index = bisect.bisect_right(self._times, at) - 1
        return 0.0 if index < 0 else self._sums[index] + (at - self._times[index]) * self._free[index]


def _serving(e: Evidence, queue_name: str, task_name: str) -> frozenset[str]:
    """The workers that may run such a task."""
    return frozenset(
        worker_id
        for worker_id, row in e.workers.items()
        if queue_name in row["queue_names"] and task_name in e.knows.get(row["name"], ())
    )


def _turns(e: Evidence, serving: frozenset[str]) -> list[tuple[float, str, str]]:
    """When workers came and went, and when their slots were taken and freed, in order."""
    turns: list[tuple[int, tuple[float, str, str]]] = []
    for change in e.by_relation["workers"]:
        if change.row["worker_id"] in serving:
            kind = "came" if change.was is None else "went"
            turns.append((change.seq, (change.at.timestamp(), kind, change.row["worker_id"])))
            if change.was is None and (told := e.told.get(change.row["name"])):
                turns.append((change.seq, (max(told, change.at).timestamp(), "went", change.row["worker_id"])))
    for change in e.by_relation["tasks"]:
        before = change.was["claimed_by"] if change.was and change.was["state"] == "running" else None
        after = change.became["claimed_by"] if change.became and change.became["state"] == "running" else None
        if before != after:
            at = change.at.timestamp()
            turns += [(change.seq, (at, "freed", before))] if before in serving else []
            turns += [(change.seq, (at, "taken", after))] if after in serving else []
    return [turn for _, turn in sorted(turns, key=lambda entry: (entry[1][0], entry[0]))]


def lags(e: Evidence) -> Iterator[Lag]:
    """One for each time that a task was due, since the round was steady."""
    if e.steady_since is None or e.clock_moved or not e.changes:
        return
    steady_since, over = e.steady_since.timestamp(), max(change.at for change in e.changes).timestamp()
    serving: dict[tuple[str, str], frozenset[str]] = {}
    vacancies: dict[frozenset[str], _Vacancies] = {}
    history = defaultdict(list)
    for change in e.by_relation["tasks"]:
        history[change.row["task_id"]].append(change)
    for changes in history.values():
        for change, following in zip(changes, [*changes[1:], None], strict=True):
            row = change.became
            if not row or row["outcome"] or row["claimed_by"] or not row["available_at"]:
                continue
            visible = (change.committed_at or change.at).timestamp()
            due = max(datetime.fromisoformat(row["available_at"]).timestamp(), visible, steady_since)
            end = following.at.timestamp() if following else over
            if end > due:
                kind = row["queue_name"], row["task_name"]
                if kind not in serving:
                    serving[kind] = _serving(e, *kind)
                if serving[kind] not in vacancies:
                    vacancies[serving[kind]] = _Vacancies(e, serving[kind])
                vacant = vacancies[serving[kind]]
                yield Lag(vacant.until(end) - vacant.until(due), row)


def histogram(e: Evidence) -> dict[str, float]:
    """How many there were, and the seconds that most of them were below."""
    found = sorted(lag.seconds for lag in lags(e))
    if not found:
        return {"count": 0}
    shares = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {
        "count": len(found),
        **{name: round(found[int(share * (len(found) - 1))], 3) for name, share in shares.items()},
    }
