"""Scripts that insert tasks: `spawn` inserts all of them or none, `insert` those that can be inserted.

Most calls end in `_insert_one` or `_insert_many`. The rest is for keys that are taken, limits, and lost replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy.exc import IntegrityError

from ..database.hint import Hint
from ..database.scripts import Script, undone_by_errors
from ..database_errors import UNIQUE_VIOLATION, sqlstate
from ..errors import DurableError, InvalidState, TaskNotFound
from ..results import SpawnResult
from ..spawns import NO_LIMITS, Kind, Prepared, at_position, conflict, lookup_params, resolve_missing, spawn_result
from ..statements import spawning
from ..statements.expressions import arrays
from ..statements.spawning import ITEM_COLUMNS, KIND_COLUMNS, LIMITED_SPAWN_COLUMNS, SAME_KIND_COLUMNS, SPAWN_COLUMNS
from .tasks import cancel

SPAWN_BATCH = 1000
"""Tasks in one statement."""
SPAWN_BATCH_CHARACTERS = 16 * 1024 * 1024
"""Characters of params in one statement; Postgres takes messages of up to 1 GiB."""
_TRIES = 5
"""Inserts of a task whose key is taken and free by turns."""
_CONTENDED = "contended; spawn again"

Outcome = SpawnResult[Any] | DurableError


class Portion(list[Prepared]):
    """Tasks that are inserted by one statement."""

    @functools.cached_property
    def is_plain(self) -> bool:
        """True if they are of one kind and without idempotency keys."""
        kind = self[0].kind if self else None
        return all((item.kind is kind or item.kind == kind) and item.idempotency_key is None for item in self)

    @functools.cached_property
    def results(self) -> dict[uuid.UUID, SpawnResult[Any]]:
        """The results of those that are inserted, by id."""
        return {item.task_id: spawn_result(item) for item in self}


async def compute_results(portions: Iterable[Portion]) -> None:
    """Compute the results of spawns while the database is busy with their statements."""
    for portion in portions:
        await asyncio.sleep(0)
        _ = portion.results


def spawn(
    prepared: Sequence[Prepared],
    hint: Hint,
    limited_queues: set[str],
    portions: Iterable[Portion] | None = None,
) -> Script[list[SpawnResult[Any]]]:
    """Insert tasks, all or none: those that were inserted are deleted before the error of the first refused is raised.

    The transaction may be the caller's, who may continue it after the error.
    """
    outcomes = yield from insert(prepared, hint, limited_queues, portions=portions)
    results = [outcome for outcome in outcomes if isinstance(outcome, SpawnResult)]
    for position, outcome in enumerate(outcomes):
        if isinstance(outcome, DurableError):
            if inserted := [result.task_id for result in results if result.created]:
                yield spawning.WITHDRAW, {"task_ids": inserted}
            raise at_position(outcome, position) if len(prepared) > 1 else outcome
    return results


def spawn_within(prepared: Sequence[Prepared], hint: Hint, limited_queues: set[str]) -> Script[list[SpawnResult[Any]]]:
    """Insert tasks as `spawn` does, in the caller's transaction; other tasks are as before if one is refused."""
    script: Callable[[Hint], Script[list[SpawnResult[Any]]]]
    script = functools.partial(spawn, prepared, limited_queues=limited_queues)
    if any(item.limits is not None and item.limits.on_conflict != "return" for item in prepared):
        script = undone_by_errors(script)
    return script(hint)


def spawn_looking_first(
    prepared: Sequence[Prepared], hint: Hint, limited_queues: set[str]
) -> Script[list[SpawnResult[Any]]]:
    """Insert tasks as `spawn` does, where each statement commits by itself.

    There, a task might run before `spawn` deletes it, so the reasons to refuse a task are looked for first. A reason
    that arises between that and the insert still deletes tasks.
    """
    keyed: dict[tuple[str, str], Prepared] = {}
    position = 0
    for portion in portioned(prepared):
        rows = yield spawning.EXPLAIN_SPAWN, lookup_params(portion)
        for item in portion:
            outcome = resolve_missing(item, rows)
            if outcome is None and item.idempotency_key is not None:
                outcome = conflict(item, keyed.setdefault((item.queue_name, item.idempotency_key), item))
            if isinstance(outcome, DurableError):
                raise at_position(outcome, position)
            position += 1
    return (yield from spawn(prepared, hint, limited_queues))


def insert(
    prepared: Sequence[Prepared],
    hint: Hint,
    limited_queues: set[str],
    *,
    lock_timeout: str | None = None,
    channel: str | None = None,
    portions: Iterable[Portion] | None = None,
) -> Script[list[Outcome]]:
    """Insert tasks. An item that is refused has an error for its outcome; the others are inserted.

    With a `lock_timeout`, such as "5ms", the script fails with 55P03 after it if an open transaction of another session
    has inserted one of the keys. `limited_queues` are those that are known to have limits. With a `channel`, the insert
    of one task sends the hint, what it holds before included.
    """
    outcomes: dict[uuid.UUID, Outcome] = {}
    for portion in portions or portioned(prepared):
        yield from _insert(portion, hint, limited_queues, lock_timeout, channel, outcomes)
    return [outcomes[item.task_id] for item in prepared]


def _insert(
    missing: Portion,
    hint: Hint,
    limited_queues: set[str],
    lock_timeout: str | None,
    channel: str | None,
    outcomes: dict[uuid.UUID, Outcome],
) -> Script[None]:
    for _ in range(_TRIES):
        limited = [item for item in missing if item.limits is not None]
        if limited:
            inserted = yield from _insert_limited(limited, hint, lock_timeout)
            if plain := Portion(item for item in missing if item.limits is None):
                inserted |= yield from _insert_many(plain, hint, lock_timeout)
        elif len(missing) == 1 and lock_timeout is None:
            inserted = yield from _insert_one(missing[0], hint, channel)
        else:
            inserted = yield from _insert_many(missing, hint, lock_timeout)
        outcomes.update(inserted)
        if len(inserted) == len(missing):
            return
        missing = Portion(item for item in missing if item.task_id not in outcomes)
        rows = yield spawning.EXPLAIN_SPAWN, lookup_params(missing)
        limited_queues.update(
            item.queue_name for item in missing for row in rows if row.wanted_id == item.task_id and row.queue_limited
        )
        holders: list[tuple[Prepared, SpawnResult[Any]]] = []
        for item in missing:
            outcome = resolve_missing(item, rows)
            if isinstance(outcome, SpawnResult) and not outcome.created and item.limits is not None:
                holders.append((item, outcome))
            elif outcome is not None:
                outcomes[item.task_id] = outcome
        # In the order of their ids, in which tasks are locked, so that two such calls cannot deadlock.
        for item, holder in sorted(holders, key=lambda each: each[1].task_id):
            outcome = yield from _resolve_conflict(item, holder, hint)
            if outcome is not None:
                outcomes[item.task_id] = outcome
        # The task that had the key of any other item has been deleted or ended since, so the next insert succeeds.
        missing = Portion(
            item._replace(limits=NO_LIMITS) if item.limits is None and item.queue_name in limited_queues else item
            for item in missing
            if item.task_id not in outcomes
        )
        if not missing:
            return
    for item in missing:
        key = item.idempotency_key if item.limits is None else item.limits.unique_key or item.idempotency_key
        outcomes[item.task_id] = InvalidState(f"The key {key!r}", _CONTENDED)


def is_contended(error: BaseException) -> bool:
    """Return whether a key was taken at each of several tries, by one task after the other."""
    return isinstance(error, InvalidState) and error.state == _CONTENDED


def _insert_limited(
    items: Sequence[Prepared], hint: Hint, lock_timeout: str | None
) -> Script[dict[uuid.UUID, SpawnResult[Any]]]:
    values = arrays(LIMITED_SPAWN_COLUMNS, [item.all_values for item in items])
    rows = yield spawning.SPAWN_LIMITED, {**values, "lock_timeout": lock_timeout}
    hint.add_rows(rows)
    created = {row.task_id for row in rows}
    hint.timers |= any(item.kind.max_pending_seconds is not None and item.task_id in created for item in items)
    return {item.task_id: spawn_result(item) for item in items if item.task_id in created}


def _resolve_conflict(item: Prepared, holder: SpawnResult[Any], hint: Hint) -> Script[Outcome | None]:
    """Return the outcome of a spawn whose unique key another task has; None if it is to be inserted once more."""
    limits = item.limits or NO_LIMITS
    if limits.unique_key is None or limits.on_conflict == "return":
        return holder
    if limits.on_conflict == "cancel":
        with contextlib.suppress(TaskNotFound):
            yield from cancel(holder.task_id)(hint)
        return None
    rows = yield (
        spawning.REPLACE_UNSTARTED,
        {
            "target_id": holder.task_id,
            "new_params": item.params,
            "new_time": item.kind.available_at,
            "delay": item.kind.delay_seconds,
            "longest_delay": limits.max_delay,
            "new_limit_key": limits.limit_key,
            "new_weight": limits.weight,
        },
    )
    hint.add_rows(rows)
    hint.timers |= any(row.cancel_at is not None for row in rows)
    # One that has started is left alone.
    return holder


def _insert_one(item: Prepared, hint: Hint, channel: str | None) -> Script[dict[uuid.UUID, SpawnResult[Any]]]:
    values = dict(zip(SPAWN_COLUMNS, item.values, strict=True))
    if channel is not None:
        carried = {"channel": channel, "carried": hint.encode() if hint else None}
        rows = yield spawning.SPAWN_AND_NOTIFY, {**values, **carried}
    else:
        rows = yield spawning.SPAWN_ONE, values
    if not rows:
        return {}
    if channel is not None:
        hint.clear()
    else:
        hint.add_rows(rows)
        hint.timers |= item.kind.max_pending_seconds is not None
    return {item.task_id: spawn_result(item)}


def _insert_many(items: Portion, hint: Hint, lock_timeout: str | None) -> Script[dict[uuid.UUID, SpawnResult[Any]]]:
    if items.is_plain:
        try:
            lanes = yield spawning.SPAWN_SAME_KIND, same_kind_params(items)
        except IntegrityError as error:
            if sqlstate(error) != UNIQUE_VIOLATION:
                raise
            # This statement was executed before, and its reply was lost.
            lanes = yield spawning.SPAWN, {**spawn_params(items), "lock_timeout": lock_timeout}
    else:
        lanes = yield spawning.SPAWN, {**spawn_params(items), "lock_timeout": lock_timeout}
    results = items.results
    inserted: dict[uuid.UUID, SpawnResult[Any]] = {}
    for lane in lanes:
        if lane.task_ids is None:
            inserted = results
        else:
            inserted.update((task_id, results[task_id]) for task_id in lane.task_ids)
        hint.add(lane.queue_name, lane.priority, lane.available_at, tasks=lane.tasks)
    # One of each kind will do, because they have the time limit in common.
    of_each_kind = items[:1] if items.is_plain and inserted is results else items
    hint.timers |= any(item.kind.max_pending_seconds is not None and item.task_id in inserted for item in of_each_kind)
    return inserted


def spawn_params(prepared: Sequence[Prepared]) -> dict[str, list[Any]]:
    """Return the arrays that the insert of many tasks binds: the values of each task, and each kind once."""
    numbers: dict[Kind, int] = {}
    items: list[tuple[Any, ...]] = []
    last, number = None, 0
    for item in prepared:
        if item.kind is not last:
            last = item.kind
            number = numbers.setdefault(last, len(numbers) + 1)
        items.append((*item[:4], number))
    return {**arrays(ITEM_COLUMNS, items), **arrays(KIND_COLUMNS, list(numbers))}


def portioned(prepared: Iterable[Prepared]) -> Iterator[Portion]:
    """Divide tasks into portions of one statement each."""
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


def same_kind_params(prepared: Sequence[Prepared]) -> dict[str, Any]:
    """Return what the insert of many tasks of one kind binds: arrays of the values of each task, and the kind."""
    kind = zip(KIND_COLUMNS, prepared[0].kind, strict=True)
    return {**arrays(SAME_KIND_COLUMNS, [item[:3] for item in prepared]), **dict(kind)}


def is_atomic(portions: Sequence[Portion]) -> bool:
    """Return whether one statement inserts all tasks or none, so that it needs no transaction around it.

    They are of one kind and without keys, and their queue exists or does not.
    """
    if len(portions) != 1 or not portions[0].is_plain:
        return False
    limits = [item.limits for item in portions[0] if item.limits is not None]
    return not limits or (len(limits) == len(portions[0]) and all(each.unique_key is None for each in limits))
