"""How long due work has waited although a worker had a free slot for it, by the history of every row.

Time in which no worker that serves the queue had one does not count, nor does time before the round was steady: while
faults last, a worker that cannot reach the server looks as if it were free. A worker that runs a suspect has no free
slot, a suspect needs a worker that runs nothing, and where a suspect has waited for `PATIENCE` seconds, any worker with
runs may be making room for it.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from durable_sa.policies import SUSPECT_AFTER
from durable_sa.worker.suspects import PATIENCE

from .evidence import Evidence, Row


class Lag(NamedTuple):
    """A time that a task was due, and the seconds of it in which it could have been claimed."""

    seconds: float
    task: Row


class _Due(NamedTuple):
    """A time that a task was due and unclaimed."""

    begin: float
    end: float
    row: Row

    @property
    def suspect(self) -> bool:
        return _is_suspect(self.row)


class _Vacancies:
    """The seconds up to a moment in which any of some workers had a free slot, for a suspect or for other tasks."""

    def __init__(self, e: Evidence, serving: frozenset[str], neglected: list[_Due], *, suspect: bool) -> None:
        self._times: list[float] = []
        self._sums: list[float] = []
        self._free: list[bool] = []
        alive: set[str] = set()
        taken: Counter[str] = Counter()
        alone: set[str] = set()
        waiting = 0
        total = 0.0
        for at, kind, worker_id in _turns(e, serving, neglected):
            if self._times:
                total += (at - self._times[-1]) * self._free[-1]
            if kind in ("taken", "taken alone"):
                taken[worker_id] += 1
                alone |= {worker_id} if kind == "taken alone" else set()
            elif kind == "freed":
                taken[worker_id] -= 1
                alone.discard(worker_id)
            elif kind == "came":
                alive.add(worker_id)
            elif kind == "went":
                alive.discard(worker_id)
            else:
                waiting += 1 if kind == "waits" else -1
            most = 1 if suspect or waiting else e.slots
            self._times.append(at)
            self._sums.append(total)
            self._free.append(any(taken[each] < most and each not in alone for each in alive))

    def until(self, at: float) -> float:
        index = bisect.bisect_right(self._times, at) - 1
        return 0.0 if index < 0 else self._sums[index] + (at - self._times[index]) * self._free[index]


def _is_suspect(row: Row) -> bool:
    return bool(row["lease_losses"] >= SUSPECT_AFTER)


def _serving(e: Evidence, queue_name: str, task_name: str) -> frozenset[str]:
    """The workers that may run such a task."""
    return frozenset(
        worker_id
        for worker_id, row in e.workers.items()
        if queue_name in row["queue_names"] and task_name in e.knows.get(row["name"], ())
    )


def _turns(e: Evidence, serving: frozenset[str], neglected: list[_Due]) -> list[tuple[float, str, str]]:
    """When workers came and went, when their slots were taken and freed, and when suspects had waited, in order."""
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
            if after in serving:
                turns.append((change.seq, (at, "taken alone" if _is_suspect(change.row) else "taken", after)))
    for due in neglected:
        turns += [(0, (due.begin + PATIENCE, "waits", "")), (0, (due.end, "served", ""))]
    return [turn for _, turn in sorted(turns, key=lambda entry: (entry[1][0], entry[0]))]


def _due(e: Evidence) -> Iterator[_Due]:
    """Each time that a task was due and unclaimed."""
    over = max(change.at for change in e.changes).timestamp()
    history = defaultdict(list)
    for change in e.by_relation["tasks"]:
        history[change.row["task_id"]].append(change)
    for changes in history.values():
        for change, following in zip(changes, [*changes[1:], None], strict=True):
            row = change.became
            if row and not row["outcome"] and not row["claimed_by"] and row["available_at"]:
                visible = (change.committed_at or change.at).timestamp()
                begin = max(datetime.fromisoformat(row["available_at"]).timestamp(), visible)
                yield _Due(begin, following.at.timestamp() if following else over, row)


def lags(e: Evidence) -> Iterator[Lag]:
    """One for each time that a task was due, since the round was steady."""
    if e.steady_since is None or e.clock_moved or not e.changes:
        return
    steady_since = e.steady_since.timestamp()
    serving: dict[tuple[str, str], frozenset[str]] = {}
    vacancies: dict[tuple[frozenset[str], bool], _Vacancies] = {}
    times = list(_due(e))
    neglected = [each for each in times if each.suspect and each.end > each.begin + PATIENCE]
    for due in times:
        begin = max(due.begin, steady_since)
        if due.end > begin:
            kind = due.row["queue_name"], due.row["task_name"]
            if kind not in serving:
                serving[kind] = _serving(e, *kind)
            key = serving[kind], due.suspect
            if key not in vacancies:
                vacancies[key] = _Vacancies(e, serving[kind], neglected, suspect=due.suspect)
            yield Lag(vacancies[key].until(due.end) - vacancies[key].until(begin), due.row)


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
