"""What the client does to the database, as sequences of statements that any connection can run."""

from __future__ import annotations

import asyncio
import functools
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable
from sqlalchemy.exc import IntegrityError

from ..database.notifier import Hint
from ..database.sessions import Script
from ..database_errors import UNIQUE_VIOLATION, sqlstate
from ..errors import (
    DurableError,
    InvalidState,
    QueueNotFound,
    TaskNotFound,
)
from ..ids import new_id
from ..results import SpawnResult, TaskStatus
from ..spawns import (
    Prepared,
    alike,
    at_position,
    conflict,
    created,
    explain,
    grouped,
    over,
    values,
    wanted,
)
from ..statements import (
    cancelling,
    queues,
    spawning,
    waits,
)

if TYPE_CHECKING:
    from ..telemetry.operations import Emission

SPAWN_BATCH = 1000
SPAWN_BATCH_CHARACTERS = 16 * 1024 * 1024
"""Of params in one statement; Postgres takes messages of up to 1 GiB."""
CASCADE_BATCH = 500


def spawn(
    prepared: Sequence[Prepared], portions: Iterable[Portion] | None = None, *, many: Executable = spawning.SPAWN
) -> Callable[[Hint], Script[list[SpawnResult[Any]]]]:
    """Insert tasks, all or none: those that were inserted are taken back when an error is raised for the first refused.

    The transaction may be the caller's, who may go on with it after the error. The portions are made here if they are
    not given.
    """

    def script(hint: Hint) -> Script[list[SpawnResult[Any]]]:
        outcomes = yield from insert(prepared, hint, many=many, portions=portions)
        results = [outcome for outcome in outcomes if isinstance(outcome, SpawnResult)]
        for position, outcome in enumerate(outcomes):
            if isinstance(outcome, DurableError):
                if inserted := [result.task_id for result in results if result.created]:
                    yield spawning.WITHDRAW, {"task_ids": inserted}
                raise at_position(outcome, position) if len(prepared) > 1 else outcome
        return results

    return script


def spawn_looking_first(prepared: Sequence[Prepared]) -> Callable[[Hint], Script[list[SpawnResult[Any]]]]:
    """As `spawn`, where each statement commits by itself: what would be taken back could be seen, and run, before.

    Only what comes in between the look and the insert still is taken back.
    """

    def script(hint: Hint) -> Script[list[SpawnResult[Any]]]:
        try:
            yield from _refuse(prepared)
        except DurableError as error:
            over(prepared, (), error)
            raise
        return (yield from spawn(prepared)(hint))

    return script


def _refuse(prepared: Sequence[Prepared]) -> Script[None]:
    keyed: dict[tuple[str, str], Prepared] = {}
    position = 0
    for portion in portioned(prepared):
        rows = yield spawning.EXPLAIN_SPAWN, wanted(portion)
        for item in portion:
            outcome = explain(item, rows)
            if outcome is None and item.idempotency_key is not None:
                outcome = conflict(item, keyed.setdefault((item.queue_name, item.idempotency_key), item))
            if isinstance(outcome, DurableError):
                raise at_position(outcome, position)
            position += 1


def insert(
    prepared: Sequence[Prepared],
    hint: Hint,
    *,
    alone: Executable = spawning.SPAWN_ONE,
    many: Executable = spawning.SPAWN,
    portions: Iterable[Portion] | None = None,
) -> Script[list[SpawnResult[Any] | DurableError]]:
    """Insert tasks, by one of two statements; an item that cannot be is an error in the result, the others are not."""
    outcomes: dict[uuid.UUID, SpawnResult[Any] | DurableError] = {}
    try:
        for portion in portions or portioned(prepared):
            yield from _insert(portion, hint, alone, many, outcomes)
    finally:
        if any(item.spawning is not None for item in prepared):
            _tell(prepared, outcomes)
    return [outcomes[item.task_id] for item in prepared]


def _tell(prepared: Sequence[Prepared], outcomes: dict[uuid.UUID, SpawnResult[Any] | DurableError]) -> None:
    """Tell the spans of these spawns what came of them."""
    refused = [outcome for outcome in outcomes.values() if isinstance(outcome, DurableError)]
    created = [task_id for task_id, outcome in outcomes.items() if isinstance(outcome, SpawnResult) and outcome.created]
    error: BaseException | None = refused[0] if refused else None
    if len(outcomes) < len(prepared):
        error = error or sys.exc_info()[1]
    over(prepared, set(created), error)


def _insert(
    missing: Portion,
    hint: Hint,
    alone: Executable,
    many: Executable,
    outcomes: dict[uuid.UUID, SpawnResult[Any] | DurableError],
) -> Script[None]:
    for _ in range(5):
        if len(missing) == 1:
            inserted = yield from _insert_one(missing[0], hint, alone)
        else:
            inserted = yield from _insert_many(missing, hint, many)
        outcomes.update(inserted)
        if len(inserted) == len(missing):
            return
        missing = Portion(item for item in missing if item.task_id not in inserted)
        rows = yield spawning.EXPLAIN_SPAWN, wanted(missing)
        for item in missing:
            explained = explain(item, rows)
            if explained is not None:
                outcomes[item.task_id] = explained
        # What took the key has gone again in the meantime: the next insert will do.
        missing = Portion(item for item in missing if item.task_id not in outcomes)
        if not missing:
            return
    for item in missing:
        outcomes[item.task_id] = InvalidState(f"Idempotency key {item.idempotency_key!r}", "contended; spawn again")


def _insert_one(item: Prepared, hint: Hint, statement: Executable) -> Script[dict[uuid.UUID, SpawnResult[Any]]]:
    rows = yield statement, values(item)
    if not rows:
        return {}
    hint.add_rows(rows)
    hint.limits |= item.kind.max_pending_seconds is not None
    return {item.task_id: created(item)}


def _insert_many(missing: Portion, hint: Hint, statement: Executable) -> Script[dict[uuid.UUID, SpawnResult[Any]]]:
    try:
        lanes = yield statement, missing.alike if statement is spawning.SPAWN_ALIKE else missing.arrays
    except IntegrityError as error:
        if statement is not spawning.SPAWN_ALIKE or sqlstate(error) != UNIQUE_VIOLATION:
            raise
        # This very statement has been here before, and its reply was lost.
        lanes = yield spawning.SPAWN, missing.arrays
    inserted: dict[uuid.UUID, SpawnResult[Any]] = {}
    for lane in lanes:
        if lane.task_ids is None:
            inserted = missing.results
        else:
            inserted.update((task_id, missing.results[task_id]) for task_id in lane.task_ids)
        hint.add(lane.queue_name, lane.priority, lane.available_at, tasks=lane.tasks)
    hint.limits |= any(item.kind.max_pending_seconds is not None for item in missing if item.task_id in inserted)
    return inserted


class Portion(list[Prepared]):
    """What goes into one statement."""

    @functools.cached_property
    def arrays(self) -> dict[str, list[Any]]:
        """What the statement binds."""
        return grouped(self)

    @property
    def alike(self) -> dict[str, Any]:
        """What it binds where all are of one kind."""
        return alike(self)

    @functools.cached_property
    def results(self) -> dict[uuid.UUID, SpawnResult[Any]]:
        """Of those that are inserted, by id."""
        return {item.task_id: created(item) for item in self}


def portioned(prepared: Iterable[Prepared]) -> Iterator[Portion]:
    """Tasks in portions."""
    portion = Portion()
    size = 0
    for item in prepared:
        length = len(item.params or "")
        if portion and (len(portion) == SPAWN_BATCH or size + length > SPAWN_BATCH_CHARACTERS):
            yield portion
            portion, size = Portion(), 0
        portion.append(item)
        size += length
    if portion:
        yield portion


async def look_ahead(portions: Iterable[Portion]) -> None:
    """Compute what statements need and give, while the database is busy with those before, or with themselves."""
    for number, portion in enumerate(portions):
        # The first statement is sent before anything can be computed ahead of it.
        if number > 0:
            _ = portion.arrays
        await asyncio.sleep(0)
        _ = portion.results
        await asyncio.sleep(0)


def are_alike(portions: Sequence[Portion]) -> bool:
    """Whether all go into one statement, are of one kind, and have no keys.

    Then either all or none are inserted, as their queue is there or is not, and none need be taken back.
    """
    if len(portions) != 1:
        return False
    kind = portions[0][0].kind
    return all((item.kind is kind or item.kind == kind) and item.idempotency_key is None for item in portions[0])


def emit(queue_name: str, name: str, payload: str, emission: Emission | None = None) -> Callable[[Hint], Script[bool]]:
    """Emit one event, with the span that it is emitted in."""
    emitted_at: datetime | None = None

    def script(hint: Hint) -> Script[bool]:
        if emission is None:
            return (yield from insert_event(hint, None))
        first, error = False, None
        try:
            first = yield from insert_event(hint, emission.metadata)
            return first
        except BaseException as refusal:
            error = refusal
            raise
        finally:
            emission.over(first, error)

    def insert_event(hint: Hint, metadata: str | None) -> Script[bool]:
        nonlocal emitted_at
        known = yield queues.KNOWN_QUEUES, {"queue_names": [queue_name]}
        if not known:
            raise QueueNotFound(queue_name)
        rows = yield (
            waits.EMIT,
            {"queue_names": [queue_name], "names": [name], "payloads": [payload], "metadata": [metadata]},
        )
        if rows:
            emitted_at = rows[0].emitted_at
        elif emitted_at is not None:
            # The script is run again: if the commit was only not heard of, the event that is there is its own.
            stored = yield waits.PEEK_EVENTS, {"queue_names": [queue_name], "event_names": [name]}
            rows = [row for row in stored if row.emitted_at == emitted_at]
        hint.events = bool(rows)
        return bool(rows)

    return script


def cancel(task_id: uuid.UUID) -> Callable[[Hint], Script[TaskStatus]]:
    """Cancel a task and, generation by generation, its unfinished descendants."""

    def script(hint: Hint) -> Script[TaskStatus]:
        rows = yield cancelling.CANCEL, {"target_id": task_id}
        if not rows:
            rows = yield cancelling.TASK_STATE, {"target_id": task_id}
            if not rows:
                raise TaskNotFound(task_id)
            return TaskStatus(rows[0].state)
        cancelled = list(rows)
        while True:
            rows = yield cancelling.DESCENDANTS, {"ancestor_ids": [task_id], "wanted": CASCADE_BATCH, "passed": 0}
            if not rows:
                break
            rows = yield (
                cancelling.CANCEL_DESCENDANTS,
                {"task_ids": [row.task_id for row in rows], "origin": task_id},
            )
            cancelled.extend(rows)
            if not rows:
                # They ended by themselves between the two statements, or a snapshot hides that they have.
                break
        hint.taken = any(row.was == "running" for row in cancelled)
        if begun := [row.task_id for row in cancelled if row.was != "pending"]:
            yield waits.DELETE_WAITS, {"task_ids": begun}
        ended = [row.task_id for row in cancelled if row.parent_task_id is not None]
        if ended:
            waiting = yield waits.WAITING_FOR, {"task_ids": ended}
            if waiting:
                rows = yield waits.RESOLVE, {"task_ids": sorted({row.task_id for row in waiting})}
                hint.add_rows(rows)
        return TaskStatus.CANCELLED

    return script


def retry(task_id: uuid.UUID, max_attempts: int | None) -> Callable[[Hint], Script[TaskStatus]]:
    """Put an ended task back, with the descendants that its end had cancelled."""
    run_id = new_id()

    def script(hint: Hint) -> Script[TaskStatus]:
        rows = yield cancelling.LOCK_FOR_RETRY, {"target_id": task_id}
        if not rows:
            raise TaskNotFound(task_id)
        if rows[0].run_id == run_id:
            # This very retry, whose commit was not heard of.
            hint.add_rows(rows)
            return TaskStatus.PENDING
        state, cancelled_by = rows[0].state, rows[0].cancelled_by
        if state not in ("failed", "cancelled"):
            raise InvalidState(f"Task {task_id}", state, "Only failed and cancelled tasks can be retried.")
        rows = yield (
            cancelling.RETRY,
            {"target_id": task_id, "next_run_id": run_id, "new_max_attempts": max_attempts},
        )
        hint.add_rows(rows)
        origins = [task_id] if cancelled_by is None else [task_id, cancelled_by]
        fallen = yield cancelling.CASCADE_CANCELLED, {"target_id": task_id, "origins": origins}
        family = [task_id, *(row.task_id for row in fallen)]
        if fallen:
            restored = sorted(row.task_id for row in fallen)
            rows = yield (
                cancelling.RETRY_DESCENDANTS,
                {"task_ids": restored, "next_run_ids": [new_id() for _ in restored]},
            )
            hint.add_rows(rows)
        yield cancelling.DELETE_FAILED_JOINS, {"task_ids": family}
        return TaskStatus.PENDING

    return script
