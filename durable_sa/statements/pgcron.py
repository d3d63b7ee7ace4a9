"""The pg_cron extension: its jobs, and the statement that a job runs at every tick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Table,
    Text,
    Uuid,
    bindparam,
    column,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    table,
    text,
    true,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects import postgresql

from ..models import SCHEMA, Queue, Schedule, TaskRow
from .expressions import constant, statement_time
from .spawning import LIMITED_SPAWN_COLUMNS, arrivals, hint_payload, insert_tasks, limited_spawnable

_job = table(
    "job", column("jobid", BigInteger()), column("jobname", Text()), column("active", Boolean()), schema="cron"
)
_job_name = bindparam("job_name", type_=Text())

CREATE_EXTENSION = text("CREATE EXTENSION IF NOT EXISTS pg_cron")
"""Install the extension into this database."""

INSTALLED = select(
    exists()
    .select_from(table("pg_extension", column("extname", Text())))
    .where(column("extname") == "pg_cron")
    .label("installed"),
    func.coalesce(func.current_setting("cron.timezone", true()), "GMT").label("timezone"),
)
"""Read whether the extension is installed, and the time zone it uses."""

SCHEDULE_JOB = select(
    func.cron.schedule(_job_name, bindparam("job_schedule", type_=Text()), bindparam("command", type_=Text()))
)
"""Create a job, or change the one of that name."""

UNSCHEDULE_JOB = select(func.cron.unschedule(_job.c.jobid)).where(_job.c.jobname == _job_name)
"""Remove a job, if it exists."""

ACTIVATE_JOB = select(
    func.cron.alter_job(
        _job.c.jobid, null(), null(), null(), null(), sql_cast(bindparam("active", type_=Boolean()), Boolean())
    )
).where(_job.c.jobname == _job_name)
"""Activate or deactivate a job."""


def quoted(value: str) -> str:
    """Quote a string so that it is read the same with and without `standard_conforming_strings`."""
    escaped = value.replace("'", "''")
    if "\\" not in value:
        return f"'{escaped}'"
    return "E'" + escaped.replace("\\", "\\\\") + "'"


def _literal(value: Any, name: str) -> ColumnElement[Any]:
    """Write a value of a spawn into the text of a statement."""
    if value is None:
        written: ColumnElement[Any] = null()
    elif isinstance(value, int | float):
        written = literal_column(repr(value))
    else:
        written = literal_column(quoted(str(value)))
    return sql_cast(written, LIMITED_SPAWN_COLUMNS[name])


def _new_id() -> ColumnElement[Any]:
    """Generate a UUIDv7: a random UUID with the time in front, because only servers from version 18 have a function."""
    milliseconds = "floor(extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::bigint"
    timed = f"overlay(uuid_send(gen_random_uuid()) PLACING substring(int8send({milliseconds}) FROM 3) FROM 1 FOR 6)"
    return literal_column(f"encode(set_bit(set_bit({timed}, 52, 1), 53, 1), 'hex')::uuid", Uuid())


# pg_cron does not tell a job for which tick it runs. It starts jobs once a minute, so the tick is the current minute.
_TICK: Final = func.date_trunc(constant("minute"), statement_time(), type_=DateTime(timezone=True))
_KEY_TIME: Final = constant('YYYY-MM-DD"T"HH24:MI:SS"+00:00"')
_DIALECT: Final = postgresql.dialect(paramstyle="named")  # type: ignore[no-untyped-call]
"""A dialect without a driver, because drivers would have percent signs doubled."""


def firing(
    queue_name: str, schedule_name: str, key_prefix: str, values: Mapping[str, Any], *, schema: str, channel: str
) -> str:
    """Build the statement of a job: it spawns the task with these values of `LIMITED_SPAWN_COLUMNS`, once per tick.

    The statement updates the schedule's row under a condition on its last tick, so that only one of two jobs spawns.
    """
    queue = literal_column(quoted(queue_name), Text())
    name = literal_column(quoted(schedule_name), Text())
    unfinished = exists().where(TaskRow.task_id == Schedule.last_task_id, TaskRow.finished_at.is_(None))
    advanced = (
        update(cast(Table, Schedule.__table__))
        .where(
            Schedule.queue_name == queue,
            Schedule.name == name,
            Schedule.backend == constant("pg_cron"),
            Schedule.paused_at.is_(None),
            or_(Schedule.last_tick_at.is_(None), Schedule.last_tick_at < _TICK),
            or_(Schedule.overlap == constant("allow"), ~unfinished),
            exists().where(Queue.queue_name == Schedule.queue_name),
        )
        .values(last_tick_at=_TICK, last_task_id=_new_id())
        .returning(Schedule.last_tick_at, Schedule.last_task_id)
        .cte("advanced")
    )
    key = literal_column(quoted(key_prefix), Text()) + func.to_char(
        func.timezone(constant("UTC"), advanced.c.last_tick_at), _KEY_TIME
    )
    drawn = {"task_id": advanced.c.last_task_id, "run_id": _new_id(), "idempotency_key": key}
    spawn = select(
        *(
            (drawn[column_name] if column_name in drawn else _literal(values[column_name], column_name)).label(
                column_name
            )
            for column_name in LIMITED_SPAWN_COLUMNS
        )
    ).subquery("spawn")
    spawned = (
        insert_tasks(limited_spawnable(spawn).subquery("spawnable"))
        .returning(TaskRow.queue_name, TaskRow.priority, TaskRow.available_at, TaskRow.cancel_at, TaskRow.limit_key)
        .cte("spawned")
    )
    statement = (
        select(func.pg_notify(literal_column(quoted(channel), Text()), hint_payload(spawned)))
        .select_from(spawned)
        .add_cte(arrivals(spawned))
    )
    compiled = statement.compile(
        dialect=_DIALECT,
        schema_translate_map={SCHEMA: schema},
        render_schema_translate=True,
        compile_kwargs={"literal_binds": True},
    )
    return str(compiled)
