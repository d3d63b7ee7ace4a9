"""Cron schedules as rows: defined, listed, paused and deleted by a client."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Row

from ..app import App
from ..database.connections import Database
from ..database.hint import Hint
from ..database.scripts import Script, drive_async
from ..errors import InvalidConfiguration, InvalidCron, InvalidState, QueueNotFound, ScheduleNotFound
from ..options import SpawnOptions, refuse_nul
from ..policies import MAX_LOST_WORKERS, CancellationPolicy, RetryStrategy
from ..results import ScheduleFilter, ScheduleInfo
from ..serialization.codec import UNTYPED
from ..spawns import Prepared, prepare
from ..statements import queues, scheduling
from ..tasks import Task
from . import pgcron
from .cron import Misfire, next_tick

Overlap = Literal["allow", "skip"]
Backend = Literal["worker", "pg_cron"]

SCHEDULED_BY = "durable::scheduled_by"
CRON = "durable::cron"


def encode_options(options: SpawnOptions) -> str:
    """Encode the spawn options of a schedule as JSON."""
    plain: dict[str, Any] = {}
    for key, value in options.items():
        if value is None:
            continue
        if isinstance(value, RetryStrategy | CancellationPolicy):
            plain[key] = dataclasses.asdict(value)
        elif isinstance(value, timedelta):
            plain[key] = value.total_seconds()
        else:
            plain[key] = value
    return UNTYPED.encode(plain, "the options of a schedule")


def decode_options(text: str | None) -> SpawnOptions:
    """Decode the spawn options of a schedule."""
    plain: dict[str, Any] = UNTYPED.decode(text or "{}", "the options of a schedule")
    plain.setdefault("max_lost_workers", MAX_LOST_WORKERS)
    if (strategy := plain.get("retry_strategy")) is not None:
        plain["retry_strategy"] = RetryStrategy(**strategy)
    if (policy := plain.get("cancellation")) is not None:
        plain["cancellation"] = CancellationPolicy(**policy)
    options: SpawnOptions = plain  # type: ignore[assignment]
    return options


def schedule_info(row: Row[Any]) -> ScheduleInfo:
    """Make the public description of a stored schedule."""
    return ScheduleInfo(
        name=row.name,
        queue_name=row.queue_name,
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


def _encode_metadata(metadata: Mapping[str, Any] | None, what: str) -> str:
    if not isinstance(metadata or {}, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidConfiguration("metadata", f"it must be a Mapping, not {type(metadata).__name__}")
    return refuse_nul(UNTYPED.encode(dict(metadata or {}), what), what)


DECLARED = "durable::declared"
"""The key in the metadata of a schedule that a task declares: when a worker that has the task last confirmed it."""


def create(
    app: App,
    name: str,
    *,
    task: Task[Any, Any] | str,
    params: Any,
    cron_expression: str,
    timezone: str,
    metadata: Mapping[str, Any] | None,
    backend: Backend,
    misfire: Misfire | None,
    overlap: Overlap,
    options: SpawnOptions,
) -> Callable[[Hint], Script[None]]:
    """Check a schedule, and return the script that stores it, with a job of the extension if that fires it."""
    misfire = misfire or ("run_once" if backend == "worker" else "skip")
    for what, value, known in (
        ("misfire", misfire, ("skip", "run_once", "run_all")),
        ("overlap", overlap, ("allow", "skip")),
        ("backend", backend, ("worker", "pg_cron")),
    ):
        if value not in known:
            raise InvalidConfiguration(what, f"{str(value)[:40]!r} is none of {', '.join(known)}")
    if (rule := options.get("on_conflict")) in ("replace", "cancel"):
        raise InvalidConfiguration("on_conflict", f"the ticks of a schedule cannot {rule} tasks", "Leave it out.")
    for key in ("idempotency_key", "available_at"):
        if options.get(key) is not None:
            raise InvalidConfiguration(key, "a schedule spawns a task at every tick", "Leave it out.")
    headers = {SCHEDULED_BY: name, CRON: cron_expression}
    prepared = prepare(app, task, params, options, internal_headers=headers, hooked=False)
    encoded_metadata = _encode_metadata(metadata, "the metadata of a schedule")
    encoded_options = encode_options(_complete(options, prepared))

    def script(hint: Hint) -> Script[None]:
        now = (yield scheduling.DATABASE_TIME, {})[0].now
        first = next_tick(cron_expression, timezone, now)
        if first is None:
            raise InvalidCron(cron_expression, "it never comes true")
        job = pgcron.job_name(prepared.queue_name, name, app.schema) if backend == "pg_cron" else None
        if job is not None:
            pgcron.check_expression(cron_expression)
            if misfire != "skip":
                remedy = "Leave misfire out, or leave the schedule to the workers: backend='worker'."
                raise InvalidConfiguration("misfire", f"pg_cron makes up for no ticks, so not {misfire!r}", remedy)
        if not (yield queues.LOCK_QUEUE, {"queue_name": prepared.queue_name}):
            raise QueueNotFound(prepared.queue_name)
        if job is not None:
            yield from pgcron.require_extension(timezone)
        identity = {"schedule_queue": prepared.queue_name, "schedule_name": name}
        before = yield scheduling.JOB_NAME, identity
        stored = yield (
            scheduling.PUT_SCHEDULE,
            {
                **identity,
                "schedule_task": prepared.task_name,
                "cron": cron_expression,
                "zone": timezone,
                "encoded_params": prepared.params,
                "encoded_options": encoded_options,
                "encoded_metadata": encoded_metadata,
                "firing_backend": backend,
                "job_name": job,
                "misfire_policy": misfire,
                "overlap_policy": overlap,
                # The extension keeps the time of the next tick by itself.
                "next_tick": first if job is None else None,
            },
        )
        if before and before[0].pgcron_job_name != job:
            yield from pgcron.remove_job(before[0].pgcron_job_name)
        if job is not None:
            yield from _refuse_jobs_by_name(identity, app.schema)
            yield from pgcron.put_job(app.schema, name, cron_expression, prepared)
            yield from pgcron.activate_job(job, active=stored[0].paused_at is None)
        hint.timers = True

    return script


def _refuse_jobs_by_name(identity: Mapping[str, str], schema: str) -> Script[None]:
    """Refuse a second job of a name while the first is of a version that knew schedules by name: it would fire both."""
    for row in (yield scheduling.JOBS_OF_OTHER_QUEUES, identity):
        if row.pgcron_job_name != pgcron.job_name(row.queue_name, row.name, schema):
            raise InvalidState(
                f"The pg_cron job of schedule {row.name!r} in queue {row.queue_name!r}",
                "of an earlier version of durable_sa, which knew schedules by name alone",
                "Create that schedule anew first: its job is then replaced.",
            )


def _complete(options: SpawnOptions, prepared: Prepared) -> SpawnOptions:
    """Add the options of the task and the defaults of this process, so that those of the firing process are unused."""
    kind = prepared.kind
    complete: SpawnOptions = {
        "headers": options.get("headers"),
        "delay": options.get("delay"),
        "priority": kind.priority,
        "max_attempts": kind.max_attempts,
        "retry_strategy": RetryStrategy(
            kind.retry_kind, kind.retry_base_delay, kind.retry_factor, kind.retry_max_backoff, kind.retry_jitter
        ),
        "cancellation": CancellationPolicy(kind.max_pending_seconds, kind.max_running_seconds),
    }
    if kind.max_lost_workers is not None:
        # The default is left out, because workers of before durable_0003 fire no schedule that has this option.
        complete["max_lost_workers"] = kind.max_lost_workers
    if prepared.limits is not None:
        complete["limit_key"] = prepared.limits.limit_key
        complete["weight"] = prepared.limits.weight
        complete["unique"] = prepared.limits.unique_key
    return complete


def delete(queue_name: str, name: str) -> Callable[[Hint], Script[None]]:
    """Return the script that deletes a schedule, together with its job.

    It raises `ScheduleNotFound` if the queue has no schedule of that name.
    """

    def script(_: Hint) -> Script[None]:
        rows = yield scheduling.DELETE_SCHEDULE, {"schedule_queue": queue_name, "schedule_name": name}
        if not rows:
            others = yield scheduling.LIST_SCHEDULES, _list_params(name, ScheduleFilter())
            raise ScheduleNotFound(name, queue_name, [row.queue_name for row in others])
        yield from pgcron.remove_job(rows[0].pgcron_job_name)

    return script


async def _not_found(database: Database, queue_name: str, name: str) -> ScheduleNotFound:
    return ScheduleNotFound(name, queue_name, await queues_with(database, name))


async def queues_with(database: Database, name: str) -> list[str]:
    """Return the names of the queues that have a schedule of this name."""
    return [row.queue_name for row in await _rows(database, name, ScheduleFilter())]


async def _rows(database: Database, name: str | None, chosen: ScheduleFilter) -> Sequence[Row[Any]]:
    return await database.execute(scheduling.LIST_SCHEDULES, _list_params(name, chosen))


def _list_params(name: str | None, chosen: ScheduleFilter) -> dict[str, str | None]:
    containing = None if chosen.metadata is None else _encode_metadata(chosen.metadata, "the metadata to look for")
    return {
        "only_queue": chosen.queue_name,
        "only_name": name,
        "only_task": chosen.task_name,
        "containing": containing,
    }


async def list_schedules(database: Database, chosen: ScheduleFilter) -> list[ScheduleInfo]:
    """Return the schedules that match a filter, by name."""
    return [schedule_info(row) for row in await _rows(database, None, chosen)]


async def read(database: Database, queue_name: str, name: str) -> Row[Any]:
    """Return the row of a schedule.

    Raises:
        ScheduleNotFound: the queue has no schedule of that name.
    """
    rows = await _rows(database, name, ScheduleFilter(queue_name=queue_name))
    if not rows:
        raise await _not_found(database, queue_name, name)
    return rows[0]


async def pause(database: Database, queue_name: str, name: str, *, paused: bool) -> None:
    """Pause a schedule, or resume it from its next tick.

    Raises:
        ScheduleNotFound: the queue has no schedule of that name.
    """
    identity = {"schedule_queue": queue_name, "schedule_name": name}
    while True:
        row = await read(database, queue_name, name)
        following: datetime | None = None
        if not paused and row.backend == "worker":
            now = (await database.execute(scheduling.DATABASE_TIME))[0].now
            following = next_tick(row.cron_expression, row.timezone, now)
        values = {**identity, "paused": paused, "next_tick": following, "read_as_of": row.updated_at}
        async with database.transaction() as connection:
            changed = (await connection.execute(scheduling.PAUSE_SCHEDULE, values)).one_or_none()
            if changed is not None and changed.pgcron_job_name is not None:
                script = pgcron.activate_job(changed.pgcron_job_name, active=not paused)
                await drive_async(functools.partial(database.execute_on, connection), script)
        if changed is not None:
            return
