"""Cron schedules: defined by a client, kept as rows, fired by workers or by pg_cron."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sqlalchemy import Row

from ..database.channel import Executing
from ..errors import (
    InvalidConfiguration,
    InvalidCron,
    QueueNotFound,
    ScheduleNotFound,
)
from ..options import SpawnOptions, queryable
from ..policies import CancellationPolicy, RetryStrategy
from ..results import ScheduleFilter, ScheduleInfo
from ..serialization.codec import UNTYPED
from ..spawns import (
    Prepared,
    SpawnCall,
    columns,
    prepare,
)
from ..statements import queues, scheduling
from ..statements.spawning import SPAWN_COLUMNS
from . import pgcron
from .cron import Misfire, due_ticks, next_tick

if TYPE_CHECKING:
    from ..app import App
    from ..tasks import Task

Overlap = Literal["allow", "skip"]
Backend = Literal["worker", "pg_cron"]

SCHEDULED_BY = "durable::scheduled_by"
CRON = "durable::cron"

logger = logging.getLogger("durable_sa")

_PAGE = 100
_BEGINNING = (datetime(1, 1, 2, tzinfo=UTC), "")


def encode_options(options: SpawnOptions) -> str:
    """Spawn options as the JSON that a schedule keeps."""
    plain: dict[str, Any] = {}
    for key, value in options.items():
        if value is None:
            continue
        if isinstance(value, RetryStrategy):
            plain[key] = {
                "kind": value.kind,
                "base_delay": value.base_delay,
                "factor": value.factor,
                "max_backoff": value.max_backoff,
                "jitter": value.jitter,
            }
        elif isinstance(value, CancellationPolicy):
            plain[key] = {"max_pending_time": value.max_pending_time, "max_running_time": value.max_running_time}
        elif isinstance(value, timedelta):
            plain[key] = value.total_seconds()
        else:
            plain[key] = value
    return UNTYPED.encode(plain, "the options of a schedule")


def decode_options(text: str | None) -> SpawnOptions:
    """The spawn options of a schedule."""
    plain: dict[str, Any] = UNTYPED.decode(text or "{}", "the options of a schedule")
    if (strategy := plain.get("retry_strategy")) is not None:
        plain["retry_strategy"] = RetryStrategy(**strategy)
    if (policy := plain.get("cancellation")) is not None:
        plain["cancellation"] = CancellationPolicy(**policy)
    options: SpawnOptions = plain  # type: ignore[assignment]
    return options


def schedule_info(row: Row[Any]) -> ScheduleInfo:
    """A schedule as it is stored."""
    return ScheduleInfo(
        name=row.name,
        task_name=row.task_name,
        cron_expression=row.cron_expression,
        timezone=row.timezone,
        params=None if row.params is None else UNTYPED.decode(row.params, f"the params of schedule {row.name!r}"),
        spawn_options={
            "queue_name": row.queue_name,
            **UNTYPED.decode(row.spawn_options or "{}", f"the options of schedule {row.name!r}"),
        },
        metadata=UNTYPED.decode(row.metadata or "{}", f"the metadata of schedule {row.name!r}"),
        backend=row.backend,
        pgcron_job_name=row.pgcron_job_name,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def tick_key(name: str, tick: datetime) -> str:
    """The idempotency key of a tick: whatever happens, there is one task of it."""
    return f"durable::{name}:{tick.isoformat()}"[-255:]


def prepare_tick(client: App, row: Row[Any], tick: datetime | None, call: SpawnCall | None = None) -> Prepared:
    """A schedule's spawn, the same in whatever process; without a tick, one that was asked for by hand."""
    options = decode_options(row.spawn_options)
    options["queue_name"] = row.queue_name
    if tick is not None:
        options["idempotency_key"] = tick_key(row.name, tick)
    params = None if row.params is None else UNTYPED.decode(row.params, "the params of a schedule")
    headers = {SCHEDULED_BY: row.name, CRON: row.cron_expression}
    return prepare(client, row.task_name, params, options, as_stored=True, internal_headers=headers, call=call)


def _encode_metadata(metadata: Mapping[str, Any] | None, what: str) -> str:
    if not isinstance(metadata or {}, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidConfiguration("metadata", f"it must be a Mapping, not {type(metadata).__name__}")
    return queryable(UNTYPED.encode(dict(metadata or {}), what), what)


class Definition(NamedTuple):
    """A schedule as its author gives it."""

    name: str
    task: Task[Any, Any] | str
    params: Any
    cron_expression: str
    timezone: str
    metadata: Mapping[str, Any] | None
    backend: Backend
    misfire: Misfire | None
    overlap: Overlap
    options: SpawnOptions


async def create(client: App, definition: Definition) -> None:
    """Check a definition and store it, with its job if the extension is to fire it."""
    misfire = definition.misfire or ("run_once" if definition.backend == "worker" else "skip")
    for what, value, known in (
        ("misfire", misfire, ("skip", "run_once", "run_all")),
        ("overlap", definition.overlap, ("allow", "skip")),
        ("backend", definition.backend, ("worker", "pg_cron")),
    ):
        if value not in known:
            raise InvalidConfiguration(what, f"{str(value)[:40]!r} is none of {', '.join(known)}")
    for key in ("idempotency_key", "available_at"):
        if definition.options.get(key) is not None:
            raise InvalidConfiguration(key, "a schedule spawns a task at every tick", "Leave it out.")
    headers = {SCHEDULED_BY: definition.name, CRON: definition.cron_expression}
    prepared = prepare(
        client, definition.task, definition.params, definition.options, internal_headers=headers, hooked=False
    )
    metadata = _encode_metadata(definition.metadata, "the metadata of a schedule")
    now = (await client.database.execute(scheduling.DATABASE_TIME))[0].now
    first = next_tick(definition.cron_expression, definition.timezone, now)
    if first is None:
        raise InvalidCron(definition.cron_expression, "it never comes true")
    job = pgcron.job_name(definition.name, client.schema) if definition.backend == "pg_cron" else None
    if job is not None:
        pgcron.check_expression(definition.cron_expression)
        if misfire != "skip":
            remedy = "Leave misfire out, or leave the schedule to the workers: backend='worker'."
            raise InvalidConfiguration("misfire", f"pg_cron makes up for no ticks, so not {misfire!r}", remedy)
    values = {
        "schedule_name": definition.name,
        "schedule_queue": prepared.queue_name,
        "schedule_task": prepared.task_name,
        "cron": definition.cron_expression,
        "zone": definition.timezone,
        "encoded_params": prepared.params,
        "encoded_options": encode_options(_complete(definition.options, prepared)),
        "encoded_metadata": metadata,
        "firing_backend": definition.backend,
        "job_name": job,
        "misfire_policy": misfire,
        "overlap_policy": definition.overlap,
        # The extension decides by itself.
        "next_tick": first if job is None else None,
    }
    async with client.database.transaction() as connection:
        if not (await connection.execute(queues.HOLD_QUEUE, {"queue_name": prepared.queue_name})).all():
            raise QueueNotFound(prepared.queue_name)
        if job is not None:
            await pgcron.require_extension(connection, definition.timezone)
        before = (await connection.execute(scheduling.JOB_NAME, {"schedule_name": definition.name})).one_or_none()
        stored = (await connection.execute(scheduling.PUT_SCHEDULE, values)).one()
        if job is not None:
            await pgcron.put_job(connection, client, definition.name, definition.cron_expression, prepared)
            await pgcron.activate_job(connection, job, active=stored.paused_at is None)
        elif before is not None:
            await pgcron.remove_job(connection, before.pgcron_job_name)


def _complete(options: SpawnOptions, prepared: Prepared) -> SpawnOptions:
    """All that the task and this client have to say about a spawn, so that no other process's opinion counts."""
    values = dict(zip(SPAWN_COLUMNS, prepared.values, strict=True))
    complete: SpawnOptions = {
        "headers": options.get("headers"),
        "delay": options.get("delay"),
        "priority": values["priority"],
        "max_attempts": values["max_attempts"],
        "retry_strategy": RetryStrategy(
            values["retry_kind"],
            base_delay=values["retry_base_delay"],
            factor=values["retry_factor"],
            max_backoff=values["retry_max_backoff"],
            jitter=values["retry_jitter"],
        ),
        "cancellation": CancellationPolicy(
            max_pending_time=values["max_pending_seconds"], max_running_time=values["max_running_seconds"]
        ),
    }
    return complete


async def delete(client: App, name: str) -> None:
    """Remove a schedule, with its job."""
    async with client.database.transaction() as connection:
        row = (await connection.execute(scheduling.DELETE_SCHEDULE, {"schedule_name": name})).one_or_none()
        if row is None:
            raise ScheduleNotFound(name)
        await pgcron.remove_job(connection, row.pgcron_job_name)


async def _rows(client: App, name: str | None, chosen: ScheduleFilter) -> Sequence[Row[Any]]:
    containing = None if chosen.metadata is None else _encode_metadata(chosen.metadata, "the metadata to look for")
    return await client.database.execute(
        scheduling.LIST_SCHEDULES, {"only_name": name, "only_task": chosen.task_name, "containing": containing}
    )


async def listed(client: App, chosen: ScheduleFilter) -> list[ScheduleInfo]:
    """Schedules that match a filter."""
    return [schedule_info(row) for row in await _rows(client, None, chosen)]


async def _stored(client: App, name: str) -> Row[Any]:
    rows = await _rows(client, name, ScheduleFilter())
    if not rows:
        raise ScheduleNotFound(name)
    return rows[0]


async def pause(client: App, name: str, *, paused: bool) -> None:
    """Stop a schedule, or let it go on from its next tick."""
    while True:
        row = await _stored(client, name)
        following: datetime | None = None
        if not paused and row.backend == "worker":
            now = (await client.database.execute(scheduling.DATABASE_TIME))[0].now
            following = next_tick(row.cron_expression, row.timezone, now)
        values = {"schedule_name": name, "paused": paused, "next_tick": following, "read_as_of": row.updated_at}
        async with client.database.transaction() as connection:
            changed = (await connection.execute(scheduling.PAUSE_SCHEDULE, values)).one_or_none()
            if changed is not None and changed.pgcron_job_name is not None:
                await pgcron.activate_job(connection, changed.pgcron_job_name, active=not paused)
        if changed is not None:
            return


async def triggered(client: App, name: str, call: SpawnCall) -> Prepared:
    """The spawn of a tick that is asked for by hand."""
    return prepare_tick(client, await _stored(client, name), None, call)


async def fire_due(client: App, channel: Executing, said: set[str] | None = None) -> tuple[list[Row[Any]], bool]:
    """Fire all schedules that are due; any number of workers may do it at the same time.

    Gives the tasks spawned, and whether any schedule has moved on. One that cannot be fired here, for its time zone or
    for a hook, keeps none of the others from firing, and is logged unless its name is in `said` already.
    """
    said = set() if said is None else said
    spawned: list[Row[Any]] = []
    moved = False
    tick, name = _BEGINNING
    while True:
        rows = await channel.execute(
            scheduling.DUE_SCHEDULES, {"wanted": _PAGE, "after_tick": tick, "after_name": name}
        )
        for row in rows:
            call = SpawnCall(client)
            try:
                fired, following = due_ticks(row.cron_expression, row.timezone, row.next_tick_at, row.now, row.misfire)
                # Several at once would overlap: the latest is left.
                ticks = fired[-1 if row.overlap == "skip" else 0 :]
                prepared = [prepare_tick(client, row, each, call) for each in ticks]
            except Exception as error:
                if row.name not in said:
                    said.add(row.name)
                    logger.exception("schedule %s cannot be fired by this worker", row.name)
                call.end(error)
                continue
            with call:
                spawned.extend(await _fire(channel, row, fired, following, prepared, call))
            said.discard(row.name)
            moved = True
        if len(rows) < _PAGE:
            return spawned, moved
        tick, name = rows[-1].next_tick_at, rows[-1].name


async def _fire(
    channel: Executing,
    row: Row[Any],
    fired: list[datetime],
    following: datetime | None,
    prepared: list[Prepared],
    call: SpawnCall,
) -> Sequence[Row[Any]]:
    arrays = columns(prepared) if prepared else dict.fromkeys(SPAWN_COLUMNS, ())
    parameters = {
        "schedule_name": row.name,
        "fired_tick": row.next_tick_at,
        "read_as_of": row.updated_at,
        "next_tick": following,
        "last_tick": fired[-1] if fired else None,
        "last_task": prepared[-1].task_id if prepared else None,
        **{f"tick_{name}": list(array) for name, array in arrays.items()},
    }
    rows = await channel.execute(scheduling.FIRE, parameters)
    if not rows:
        # Another worker was faster, so there is nothing to record in a span.
        call.drop()
    created = {row.task_id for row in rows}
    for item in prepared:
        if item.task_id in created:
            call.created(item)
    return rows
