"""Schedules: stored as rows, and fired by the first worker that sees a due tick."""

from __future__ import annotations

from typing import cast

from sqlalchemy import (
    Boolean,
    DateTime,
    Float,
    Integer,
    Table,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    exists,
    extract,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy import cast as cast_
from sqlalchemy.dialects.postgresql import JSONB, insert

from ..models import Schedule, TaskRow
from .expressions import array, as_json, as_jsonb, as_text, clamped_time, clock, constant, rows
from .spawning import LIMITED_SPAWN_COLUMNS, arrivals, insert_tasks, limited_spawnable

_name = bindparam("schedule_name", type_=Text())
_queue = bindparam("schedule_queue", type_=Text())
_is_named = (Schedule.queue_name == _queue) & (Schedule.name == _name)
_as_read = clamped_time(Schedule.updated_at) == bindparam("read_as_of", type_=DateTime(timezone=True))

_new = insert(cast("Table", Schedule.__table__)).values(
    name=_name,
    queue_name=_queue,
    task_name=bindparam("schedule_task", type_=Text()),
    cron_expression=bindparam("cron", type_=Text()),
    timezone=bindparam("zone", type_=Text()),
    params=as_json(bindparam("encoded_params", type_=Text())),
    spawn_options=as_jsonb(bindparam("encoded_options", type_=Text())),
    metadata=as_jsonb(bindparam("encoded_metadata", type_=Text())),
    backend=bindparam("firing_backend", type_=Text()),
    pgcron_job_name=bindparam("job_name", type_=Text()),
    misfire=bindparam("misfire_policy", type_=Text()),
    overlap=bindparam("overlap_policy", type_=Text()),
    next_tick_at=bindparam("next_tick", type_=DateTime(timezone=True)),
)
_changed = {
    column: _new.excluded[column]
    for column in (
        "task_name",
        "cron_expression",
        "timezone",
        "params",
        "spawn_options",
        "metadata",
        "backend",
        "pgcron_job_name",
        "misfire",
        "overlap",
    )
}
_same_times = (
    (Schedule.cron_expression == _new.excluded.cron_expression)
    & (Schedule.timezone == _new.excluded.timezone)
    & (Schedule.backend == _new.excluded.backend)
)

PUT_SCHEDULE = _new.on_conflict_do_update(
    index_elements=[Schedule.queue_name, Schedule.name],
    set_={
        **_changed,
        # A deploy that defines the schedule unchanged must not skip a due tick.
        "next_tick_at": case((_same_times, Schedule.next_tick_at), else_=_new.excluded.next_tick_at),
        "updated_at": clock(),
    },
).returning(Schedule.paused_at)
"""Define a schedule, or replace its definition."""

JOB_NAME = select(Schedule.pgcron_job_name).where(_is_named).with_for_update()
"""Lock a schedule and read the name of its pg_cron job."""

JOBS_OF_OTHER_QUEUES = select(Schedule.queue_name, Schedule.name, Schedule.pgcron_job_name).where(
    Schedule.name == _name, Schedule.queue_name != _queue, Schedule.pgcron_job_name.is_not(None)
)
"""Read the pg_cron jobs of schedules with the same name in other queues."""

DELETE_SCHEDULE = delete(Schedule).where(_is_named).returning(Schedule.name, Schedule.pgcron_job_name)
"""Delete a schedule; the tasks it has spawned continue."""

LIST_SCHEDULES = (
    select(
        Schedule.name,
        Schedule.task_name,
        Schedule.queue_name,
        Schedule.cron_expression,
        Schedule.timezone,
        as_text(Schedule.params).label("params"),
        as_text(Schedule.spawn_options).label("spawn_options"),
        as_text(Schedule.metadata_).label("metadata"),
        Schedule.backend,
        Schedule.pgcron_job_name,
        Schedule.misfire,
        Schedule.overlap,
        clamped_time(Schedule.paused_at),
        Schedule.next_tick_at,
        clamped_time(Schedule.last_tick_at),
        clamped_time(Schedule.created_at),
        clamped_time(Schedule.updated_at),
    )
    .where(
        or_(
            bindparam("only_queue", type_=Text()).is_(None),
            Schedule.queue_name == bindparam("only_queue", type_=Text()),
        ),
        or_(bindparam("only_name", type_=Text()).is_(None), Schedule.name == bindparam("only_name", type_=Text())),
        or_(bindparam("only_task", type_=Text()).is_(None), Schedule.task_name == bindparam("only_task", type_=Text())),
        or_(
            bindparam("containing", type_=Text()).is_(None),
            Schedule.metadata_.contains(as_jsonb(bindparam("containing", type_=Text()))),
        ),
    )
    .order_by(Schedule.name, Schedule.queue_name)
)
"""Schedules, filtered by queue, by name, by task and by what their metadata contains."""

PAUSE_SCHEDULE = (
    update(Schedule)
    .where(_is_named, _as_read)
    .values(
        paused_at=case((bindparam("paused", type_=Boolean()), func.coalesce(Schedule.paused_at, clock()))),
        next_tick_at=case(
            (Schedule.paused_at.is_(None), Schedule.next_tick_at),
            else_=func.coalesce(bindparam("next_tick", type_=DateTime(timezone=True)), Schedule.next_tick_at),
        ),
        updated_at=clock(),
    )
    .returning(Schedule.pgcron_job_name)
)
"""Pause or resume a schedule; ticks of the pause are skipped. Returns no row if it was redefined in the meantime."""

DATABASE_TIME = select(clock().label("now"))
"""The database's time, from which the next tick is computed."""

_declared = bindparam("declared", type_=Text())
_confirmed_at = func.jsonb_build_object(_declared, extract("epoch", clock()))
_declares = func.jsonb_exists(Schedule.metadata_, _declared)

CONFIRM_DECLARED = (
    update(Schedule)
    .where(
        _is_named,
        _declares,
        Schedule.task_name == bindparam("schedule_task", type_=Text()),
        Schedule.cron_expression == bindparam("cron", type_=Text()),
        Schedule.timezone == bindparam("zone", type_=Text()),
    )
    .values(metadata_=Schedule.metadata_.op("||", return_type=JSONB())(_confirmed_at))
    .returning(Schedule.name)
)
"""Note in a declared schedule that a worker has its task. Returns no row if it does not exist or is another one."""

FIND_SCHEDULE = select(_declares.label("declared")).where(_is_named)
"""Return whether a schedule is a declared one; no row if it does not exist."""

DELETE_UNDECLARED = (
    delete(Schedule)
    .where(
        _declares,
        Schedule.queue_name == func.any(array("queue_names", Text())),
        cast_(Schedule.metadata_.op("->>", return_type=Text())(_declared), Float(53))
        < extract("epoch", clock()) - bindparam("age", type_=Float(53)),
    )
    .returning(Schedule.name, Schedule.queue_name)
)
"""Delete declared schedules of these queues that no worker has confirmed for `age` seconds."""

DUE_SCHEDULES = (
    select(
        Schedule.name,
        Schedule.queue_name,
        Schedule.task_name,
        Schedule.cron_expression,
        Schedule.timezone,
        as_text(Schedule.params).label("params"),
        as_text(Schedule.spawn_options).label("spawn_options"),
        Schedule.misfire,
        Schedule.overlap,
        Schedule.next_tick_at,
        clamped_time(Schedule.updated_at),
        clock().label("now"),
    )
    .where(
        Schedule.backend == constant("worker"),
        Schedule.paused_at.is_(None),
        Schedule.next_tick_at <= clock(),
        tuple_(Schedule.next_tick_at, Schedule.name, Schedule.queue_name)
        > tuple_(
            bindparam("after_tick", type_=DateTime(timezone=True)),
            bindparam("after_name", type_=Text()),
            bindparam("after_queue", type_=Text()),
        ),
    )
    .order_by(Schedule.next_tick_at, Schedule.name, Schedule.queue_name)
    .limit(bindparam("wanted", type_=Integer()))
    .with_for_update(skip_locked=True, key_share=True)
)
"""A page of schedules with a due tick. Locked rows are skipped, because firing them would wait for the lock."""

# Prefixed, because in an UPDATE SQLAlchemy takes parameters named like columns for values to set.
TICK_COLUMNS = {f"tick_{name}": type_ for name, type_ in LIMITED_SPAWN_COLUMNS.items()}
_tick = rows("tick", **TICK_COLUMNS)
_last_task = bindparam("last_task", type_=Uuid())
_goes_on = exists().where(TaskRow.task_id == Schedule.last_task_id, TaskRow.finished_at.is_(None))
_fires = _last_task.is_not(None) & or_(Schedule.overlap == constant("allow"), ~_goes_on)
_advanced = (
    update(Schedule)
    .where(
        _is_named,
        Schedule.next_tick_at == bindparam("fired_tick", type_=DateTime(timezone=True)),
        Schedule.paused_at.is_(None),
        _as_read,
    )
    .values(
        next_tick_at=bindparam("next_tick", type_=DateTime(timezone=True)),
        # A skipped tick is not recorded: the task of the tick before still runs, and the next tick compares with it.
        last_tick_at=case((_fires, bindparam("last_tick", type_=DateTime(timezone=True))), else_=Schedule.last_tick_at),
        last_task_id=case((_fires, _last_task), else_=Schedule.last_task_id),
    )
    .returning(Schedule.last_task_id)
    .cte("advanced")
)
_due = (
    select(*(_tick.c[f"tick_{name}"].label(name) for name in LIMITED_SPAWN_COLUMNS))
    .where(exists().where(_advanced.c.last_task_id == _last_task))
    .subquery("due")
)
_spawned = (
    insert_tasks(limited_spawnable(_due).subquery("spawnable"))
    .returning(TaskRow.task_id, TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.limit_key)
    .cte("spawned")
)

FIRE = select(_spawned).add_cte(_advanced, arrivals(_spawned))
"""Spawn the tasks of due ticks and advance the schedule to its next tick.

The update is conditional on the tick and the definition that were read: of several workers that fire the same tick one
succeeds, and the others, and one that has read a replaced definition, spawn nothing.
"""
