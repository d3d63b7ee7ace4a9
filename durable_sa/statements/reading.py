"""Queries of lists of tasks: filters, keyset pages, and the ids that a bulk operation goes through.

A list is short and the tables may be long, so a page is looked for in two ways. First among the newest tasks, of which
a bounded number is read whatever the filter; most lists end there. What is rare among those is then looked for by the
index that its filter allows. For a filter that no index knows, the second way reads all tasks.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import (
    ColumnElement,
    DateTime,
    Integer,
    LargeBinary,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import aliased
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import TextClause
from sqlalchemy.sql.selectable import AliasedReturnsRows, CompoundSelect, SelectBase

from ..models import Checkpoint, Queue, TaskRow, Wait, WorkerRow
from ..results import TaskFilter, TaskStatus
from ..validation import seconds
from .expressions import as_text, clamped_time, clock, constant, interval, statement_time

Order = Literal["newest", "oldest", "running"]
Position = tuple[datetime | None, uuid.UUID]
"""The place of a task in an order: its id, and in the order `running` the start of its attempt."""
TaskIds = Select[uuid.UUID]
Where = TaskFilter | Select[Any] | CompoundSelect[Any]
"""A filter, or a select of task ids."""

RECENT: Final = 20_000
"""Number of tasks that are looked through, the newest first, before an index is used: 15 ms."""

SEARCHED: Final = 50_000
"""Number of tasks that are looked through at once where all would take too long: 40 ms."""

CLOCK_ERROR: Final = timedelta(days=1)
"""Time by which a client's clock, whose time is in the ids, may be ahead of the database's: a wrong time zone's."""

_UNSUCCESSFUL: Final = ("failed", "cancelled")
_ENDED: Final = ("completed", *_UNSUCCESSFUL)

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# Versions of tasks do not exist yet, so that no task matches a filter by them.
_version: Any = cast(null(), Integer())


def matching(where: TaskFilter, task: Any = TaskRow) -> list[ColumnElement[bool]]:
    """Return the conditions of a filter on `TaskRow`, or on an alias of it.

    They match the predicates of the partial indexes.
    """
    found: list[ColumnElement[bool]] = []
    ended = [state for state in where.states if state.finished]
    if where.states and len(ended) == len(where.states):
        found += [task.finished_at.is_not(None), _among(task.outcome, ended)]
    elif where.states and not ended:
        found += [task.finished_at.is_(None), _among(task.state, where.states)]
    elif where.states:
        found.append(_among(task.state, where.states))
    for column, value in (
        (task.queue_name, where.queue_name),
        (task.task_name, where.task_name),
        (task.limit_key, where.limit_key),
        (_version, where.version),
        (task.parent_task_id, where.parent),
    ):
        if value is not None:
            found.append(column == value)
    if where.limit_key is not None:
        found.append(task.limit_key.is_not(None))
    if where.key is not None:
        found.append(or_(task.idempotency_key == where.key, task.unique_key == where.key))
    if where.error_name is not None:
        found += [task.error.is_not(None), _error_name(task) == where.error_name]
    if where.spawned_after is not None:
        found.append(task.created_at >= where.spawned_after)
    if where.spawned_before is not None:
        found.append(task.created_at < where.spawned_before)
    if where.ended_after is not None or where.ended_before is not None:
        found.append(task.finished_at.is_not(None))
    if where.ended_after is not None:
        found.append(task.finished_at >= where.ended_after)
    if where.ended_before is not None:
        found.append(task.finished_at < where.ended_before)
    if where.running_longer_than is not None:
        age = interval(literal(seconds(where.running_longer_than, "running_longer_than")))
        found += [
            task.finished_at.is_(None),
            task.state == constant("running"),
            task.started_at < statement_time() - age,
        ]
    return found


def _error_name(task: Any) -> ColumnElement[str]:
    """Return the name of a task's error. The guide on reading has an index of this expression."""
    # The server cannot take apart JSON with NUL in one of its texts, such as the data of a UserError. The escape of NUL
    # is behind an even number of backslashes; of a text about it, behind an odd one. The regular expression is slow,
    # and tried on few texts.
    text = as_text(task.error)
    has_nul = and_(
        func.strpos(text, constant("\\u0000")) > constant(0), text.op("~")(constant(r"(^|[^\\])(\\\\)*\\u0000"))
    )
    return case((has_nul, null()), else_=task.error.op("->>", return_type=Text())(constant("name")))


def conditions(where: Where) -> list[ColumnElement[bool]]:
    """Return the conditions of a filter or a select on `TaskRow`.

    The select becomes a subquery of its own, because SQLAlchemy takes a table that it has in common with the statement
    around it for that of the statement, whereby its LIMIT and its aggregates would be about something else.
    """
    if isinstance(where, TaskFilter):
        return matching(where)
    return [TaskRow.task_id.in_(select(where.subquery("chosen").c[0]))]


def _among(column: Any, states: Sequence[TaskStatus]) -> ColumnElement[bool]:
    return or_(*(column == constant(state) for state in states))


def _any_queue(where: TaskFilter) -> list[ColumnElement[bool]]:
    """Name the queue where the filter does not, so that an index that begins with it can be used."""
    return [] if where.queue_name is not None else [TaskRow.queue_name.in_(select(Queue.queue_name))]


def by_index(where: TaskFilter, *, first: bool = False) -> TaskIds | CompoundSelect[uuid.UUID] | None:
    """Select the ids of all matching tasks, in no order, by an index; None if no index knows the filter.

    With `first`, for a page, also None if the index would return most tasks that ended before a time.
    """
    conditions = matching(where)
    found: TaskIds = select(TaskRow.task_id)
    if where.parent is not None:
        return found.where(*conditions)
    found = found.where(*_any_queue(where))
    if where.key is not None:
        # A task has one of the two at most.
        return union_all(
            *(
                found.where(*conditions, column == where.key, column.is_not(None))
                for column in (TaskRow.idempotency_key, TaskRow.unique_key)
            )
        )
    states = where.states or tuple(TaskStatus)
    unfinished = [] if _is_about_ends(where) else [state for state in states if not state.finished]
    ended = [] if where.running_longer_than is not None else [state for state in states if state.finished]
    if where.error_name is not None:
        ended = [state for state in ended if state is not TaskStatus.COMPLETED]
    about_ends = where.ended_after is not None if first else _is_about_ends(where)
    known = where.queue_name is not None or where.running_longer_than is not None or about_ends
    if TaskStatus.COMPLETED in ended and not known:
        return None
    parts: list[TaskIds] = []
    if unfinished:
        part = found.where(TaskRow.finished_at.is_(None), *conditions)
        if where.running_longer_than is not None or unfinished == [TaskStatus.RUNNING]:
            part = part.where(has_been_due())
        parts.append(part)
    # One range of the index each.
    parts += [
        found.where(TaskRow.finished_at.is_not(None), TaskRow.outcome == constant(state), *conditions)
        for state in ended
    ]
    return union_all(*parts) if len(parts) > 1 else parts[0] if parts else found.where(null().is_not(None))


def has_been_due() -> ColumnElement[bool]:
    """Return a condition that is true of all running tasks, and that an index knows.

    A range of two subqueries, because the planner takes it for a small part of the index. For a bound that it knows it
    counts the finished tasks too, nearly all of which are past it, and reads the whole table instead.
    """
    beginning = select(literal_column("timestamptz '-infinity'", DateTime(timezone=True))).scalar_subquery()
    return TaskRow.available_at.between(beginning, select(statement_time()).scalar_subquery())


def _is_about_ends(where: TaskFilter) -> bool:
    return where.ended_after is not None or where.ended_before is not None


def recent_page(where: TaskFilter, order: Order, after: Position | None, limit: int, searched: int = RECENT) -> TaskIds:
    """Select the ids of a page, as far as it is among the first `searched` tasks behind the position."""
    read = select(TaskRow).where(*_behind(TaskRow.task_id, order, after), *_before(TaskRow.task_id, where))
    read = read.order_by(_by_id(TaskRow.task_id, order)).limit(_constant(searched))
    window = aliased(TaskRow, read.subquery("recent"))
    page = select(window.task_id).where(*matching(where, window)).order_by(_by_id(window.task_id, order))
    return page.limit(limit)


def part_of_page(where: Where, order: Order, after: Position | None, limit: int, end: uuid.UUID | None) -> TaskIds:
    """Select the ids of a page, as far as it is between the position and `end`, at which :func:`search_end` is."""
    if isinstance(where, TaskFilter):
        return recent_page(where, order, after, limit, SEARCHED)
    task_id = where.subquery("chosen").c[0]
    bounds = _behind(task_id, order, after)
    if end is not None:
        bounds.append(task_id <= literal(end, Uuid()) if order == "oldest" else task_id >= literal(end, Uuid()))
    return select(task_id.label("task_id")).where(*bounds).distinct().order_by(_by_id(task_id, order)).limit(limit)


def search_end(where: Where, order: Order, after: Position | None) -> TaskIds:
    """Select the last id of the `SEARCHED` tasks behind a position, and the next if there are more."""
    bounds = _behind(TaskRow.task_id, order, after)
    if isinstance(where, TaskFilter):
        bounds += _before(TaskRow.task_id, where)
    found = select(TaskRow.task_id).where(*bounds).order_by(_by_id(TaskRow.task_id, order))
    return found.offset(_constant(SEARCHED - 1)).limit(_constant(2))


def page(where: Where, order: Order, after: Position | None, limit: int) -> TaskIds:
    """Select the ids of a page, wherever its tasks are."""
    if order == "running":
        return _running_page(where, after, limit)
    if isinstance(where, TaskFilter):
        found = by_index(where, first=True)
        if found is None and where.spawned_after is not None:
            # Ids are in the order of the spawns. A page that the newest tasks do not fill has few tasks, and the oldest
            # are behind all that were spawned before, so that a walk in the order of the ids passes nearly all.
            found = select(TaskRow.task_id).where(*matching(where))
        if found is None:
            behind = _behind(TaskRow.task_id, order, after)
            plain = select(TaskRow.task_id).where(*matching(where), *behind, *_before(TaskRow.task_id, where))
            return plain.order_by(_by_id(TaskRow.task_id, order)).limit(limit)
        # OFFSET keeps the planner from walking through all tasks in the order of their ids instead.
        every = select(found.subquery("match").c.task_id).offset(_constant(0)).subquery("every")
        ids = every.c.task_id
        return select(ids).where(*_behind(ids, order, after)).order_by(_by_id(ids, order)).limit(limit)
    behind = _behind(TaskRow.task_id, order, after)
    chosen = select(TaskRow.task_id).where(*conditions(where), *behind)
    return chosen.order_by(_by_id(TaskRow.task_id, order)).limit(limit)


def _running_page(where: Where, after: Position | None, limit: int) -> TaskIds:
    chosen = conditions(where)
    place = (TaskRow.started_at, TaskRow.task_id)
    if after is not None:
        chosen.append(tuple_(*place) > tuple_(literal(after[0], DateTime(timezone=True)), literal(after[1], Uuid())))
    running = select(TaskRow.task_id).where(
        TaskRow.queue_name.in_(select(Queue.queue_name)),
        TaskRow.finished_at.is_(None),
        has_been_due(),
        TaskRow.state == constant("running"),
        *chosen,
    )
    return running.order_by(*place).limit(limit)


def _behind(task_id: Any, order: Order, after: Position | None) -> list[ColumnElement[bool]]:
    if after is None:
        return []
    return [task_id > after[1] if order == "oldest" else task_id < after[1]]


def _before(task_id: Any, where: TaskFilter) -> list[ColumnElement[bool]]:
    """Return a bound of the ids for a bound of the time of the spawn or the end, because an id begins with a time.

    It is the time of the spawn, or for a subtask the earlier one of the task at its root.
    """
    bounds = [bound for bound in (where.spawned_before, where.ended_before) if bound is not None]
    if not bounds:
        return []
    latest = min(bounds) + CLOCK_ERROR
    milliseconds = max(0, (latest - _EPOCH) // timedelta(milliseconds=1))
    return [task_id < literal(uuid.UUID(int=milliseconds << 80), Uuid())]


def _by_id(task_id: Any, order: Order) -> ColumnElement[Any]:
    ordered: ColumnElement[Any] = task_id.asc() if order == "oldest" else task_id.desc()
    return ordered


def _constant(number: int) -> Any:
    return constant(number)


_BY_OTHERS: Final = re.compile(r"\b(LIMIT|OFFSET|FETCH|DISTINCT|GROUP|HAVING|OVER)\b", re.IGNORECASE)


def is_by_task(where: Select[Any] | CompoundSelect[Any]) -> bool:
    """Return whether a task is chosen whatever other tasks are, so that it may be looked for after these were changed.

    It is not known of a select with a LIMIT or groups, or with another select, a second alias or a text in it.
    """
    if not isinstance(where, Select):
        return False
    (column,) = where.selected_columns
    if getattr(column, "table", None) is not TaskRow.__table__ or column.key != TaskRow.task_id.key:
        return False
    others = (SelectBase, AliasedReturnsRows, TextClause)
    if any(isinstance(part, others) for part in visitors.iterate(where) if part is not where):
        return False
    # In the text, because no public attribute of a select says it. A name that has such a word in it does no harm.
    return _BY_OTHERS.search(str(where)) is None


def chosen_ids(where: Select[Any] | CompoundSelect[Any], size: int) -> Select[bytes]:
    """Select the ids of the tasks that a select chooses, in their order; in each row the bytes of `size` ids."""
    number = func.row_number().over(order_by=TaskRow.task_id) - constant(1)
    numbered = select(TaskRow.task_id, number.label("number")).where(*conditions(where)).subquery("numbered")
    page = numbered.c.number // constant(size)
    separator: Any = aggregate_order_by(literal_column("''::bytea", LargeBinary()), numbered.c.task_id)
    ids = func.string_agg(func.uuid_send(numbered.c.task_id), separator, type_=LargeBinary())
    return select(ids.label("ids")).group_by(page).order_by(page)


def some(where: Where, limit: int) -> TaskIds | None:
    """Select up to `limit` ids of matching tasks, in no order; None for a filter that no index knows."""
    if not isinstance(where, TaskFilter):
        ids = where.subquery("chosen")
        return select(ids.c[0].label("task_id")).limit(limit)
    found = by_index(where)
    return None if found is None else select(found.subquery("match").c.task_id).limit(limit)


WINDOW_END = (
    select(TaskRow.task_id)
    .where(TaskRow.task_id > bindparam("begin", type_=Uuid()))
    .order_by(TaskRow.task_id)
    .offset(bindparam("size", type_=Integer()))
    .limit(constant(1))
)
"""The last id of a window: the tasks behind `begin` in the order of their ids."""

LAST_TASK = select(TaskRow.task_id).order_by(TaskRow.task_id.desc()).limit(constant(1))
"""The greatest id."""


def window(where: Where, begin: uuid.UUID, end: uuid.UUID) -> Select[uuid.UUID]:
    """Select the ids of the matching tasks behind `begin`, up to `end`, in their order."""
    if isinstance(where, TaskFilter):
        # OFFSET keeps the planner from reading all that matches, by another index, for each window.
        read = select(TaskRow).where(*_within(TaskRow.task_id, begin, end)).offset(_constant(0))
        task = aliased(TaskRow, read.subquery("part"))
        return select(task.task_id).where(*matching(where, task)).order_by(task.task_id)
    task_id = where.subquery("chosen").c[0]
    return select(task_id.label("task_id")).where(*_within(task_id, begin, end)).distinct().order_by(task_id)


def _within(task_id: Any, begin: uuid.UUID, end: uuid.UUID) -> tuple[ColumnElement[bool], ...]:
    return task_id > literal(begin, Uuid()), task_id <= literal(end, Uuid())


_waits = (
    select(
        func.json_agg(
            aggregate_order_by(
                func.json_build_array(
                    Wait.kind, func.coalesce(Wait.event_name, cast(Wait.child_task_id, Text()), Wait.name)
                ),
                Wait.created_at,
            )
        )
    )
    .where(Wait.task_id == TaskRow.task_id)
    .correlate(TaskRow)
    .scalar_subquery()
)
_sleep = (
    select(Checkpoint.name)
    .where(
        Checkpoint.task_id == TaskRow.task_id,
        Checkpoint.kind == constant("sleep"),
        as_text(Checkpoint.value) == cast(func.to_json(TaskRow.available_at), Text()),
    )
    .limit(constant(1))
    .correlate(TaskRow)
    .scalar_subquery()
)

_error = TaskRow.error
_info: tuple[Any, ...] = (
    TaskRow.task_id,
    TaskRow.task_name,
    TaskRow.queue_name,
    TaskRow.state,
    TaskRow.attempt,
    func.coalesce(TaskRow.idempotency_key, TaskRow.unique_key).label("key"),
    func.nullif(TaskRow.limit_key, constant("")).label("limit_key"),
    _version.label("version"),
    TaskRow.parent_task_id,
    clamped_time(TaskRow.created_at),
    TaskRow.available_at,
    clamped_time(TaskRow.first_started_at),
    clamped_time(TaskRow.started_at),
    clamped_time(TaskRow.finished_at),
    TaskRow.priority,
    TaskRow.failures,
    TaskRow.max_attempts,
    TaskRow.lease_losses,
    as_text(_error).label("error"),
    cast(_waits, Text()).label("waits"),
    case((and_(TaskRow.state == constant("sleeping"), TaskRow.available_at.is_not(None)), _sleep)).label("sleep"),
    WorkerRow.name.label("worker"),
    clock().label("now"),
)


def infos(ids: TaskIds | None, order: Order = "newest", *, payloads: bool = False) -> Select[Any]:
    """Select the tasks with these ids, in this order; with None for `ids` the task `task_id`."""
    columns = _info
    if payloads:
        columns = (*columns, *(as_text(column).label(column.key) for column in _PAYLOADS))
    query = select(*columns).outerjoin(
        WorkerRow, and_(WorkerRow.worker_id == TaskRow.claimed_by, TaskRow.state == constant("running"))
    )
    if ids is None:
        return query.where(TaskRow.task_id == bindparam("task_id", type_=Uuid()))
    query = query.where(TaskRow.task_id.in_(ids))
    if order == "running":
        return query.order_by(TaskRow.started_at, TaskRow.task_id)
    return query.order_by(_by_id(TaskRow.task_id, order))


_PAYLOADS: Final = (TaskRow.params, TaskRow.headers, TaskRow.output)
