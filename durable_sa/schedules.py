"""Cron schedules: when they fire, what a missed tick means, and the firing itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from sqlalchemy import Executable, Row

from .codec import Codec, codec_for
from .errors import InvalidConfiguration, InvalidCron, ScheduleNotFound
from .options import SpawnOptions
from .policies import CancellationPolicy, RetryStrategy
from .results import ScheduleFilter, ScheduleInfo
from .spawns import Prepared, columns, over, prepare
from .statements import scheduling
from .statements.spawning import SPAWN_COLUMNS

if TYPE_CHECKING:
    from .client import Durable
    from .tasks import Task

Misfire = Literal["skip", "run_once", "run_all"]
Overlap = Literal["allow", "skip"]
Backend = Literal["worker", "pg_cron"]

MISSED_AFTER = timedelta(seconds=60)
"""A tick that is later than this was missed, and the misfire policy decides."""

MOST_MISSED = 100
"""Ticks that `run_all` makes up for, at most: the latest."""

SCHEDULED_BY = "durable::scheduled_by"
CRON = "durable::cron"

_PLAIN: Codec[Any] = codec_for(Any)


def zone(name: str) -> ZoneInfo:
    """The time zone of that IANA name.

    Raises:
        InvalidConfiguration: there is none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise InvalidConfiguration(
            "timezone", f"there is no time zone {str(name)[:80]!r}", "Give an IANA name such as 'Europe/Paris'."
        ) from None


def ticks(expression: str, timezone: str, after: datetime) -> Iterator[datetime]:
    """The times at which an expression fires after `after`, in UTC. They end if it never fires again.

    Local times that a change of the clocks skips or repeats fire once.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    local = zone(timezone)
    if not isinstance(expression, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidCron(expression, "it is no str")
    try:
        simulated = CronSim(expression, after.astimezone(local))
    except CronSimError as error:
        raise InvalidCron(expression, str(error) or "it cannot be read") from None
    for moment in simulated:
        yield moment.astimezone(UTC)


def next_tick(expression: str, timezone: str, after: datetime) -> datetime | None:
    """The first tick after `after`; None if there is none within the next fifty years.

    Raises:
        InvalidCron: the expression cannot be read.
    """
    return next(ticks(expression, timezone, after), None)


def due_ticks(
    expression: str, timezone: str, first: datetime, now: datetime, misfire: str
) -> tuple[list[datetime], datetime | None]:
    """The ticks to fire now, and the next one, for a schedule whose next tick was `first`."""
    due = [first]
    following: datetime | None = None
    for moment in ticks(expression, timezone, first):
        if moment > now:
            following = moment
            break
        due.append(moment)
        if len(due) > MOST_MISSED * 2:
            due = due[-MOST_MISSED:]
        if moment < now - timedelta(days=400):
            # Far behind: what matters is the recent past.
            return due_ticks(expression, timezone, _recent(expression, timezone, now) or first, now, misfire)
    if misfire == "run_all":
        return due[-MOST_MISSED:], following
    latest = due[-1]
    if misfire == "skip" and now - latest > MISSED_AFTER:
        return [], following
    return [latest], following


def _recent(expression: str, timezone: str, now: datetime) -> datetime | None:
    return next_tick(expression, timezone, now - timedelta(days=366))


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
    return _PLAIN.encode(plain, "the options of a schedule")


def decode_options(text: str | None) -> SpawnOptions:
    """The spawn options of a schedule."""
    plain: dict[str, Any] = _PLAIN.decode(text or "{}", "the options of a schedule")
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
        params=None if row.params is None else _PLAIN.decode(row.params, "the params of a schedule"),
        spawn_options=_PLAIN.decode(row.spawn_options or "{}", "the options of a schedule"),
        metadata=_PLAIN.decode(row.metadata or "{}", "the metadata of a schedule"),
        backend=row.backend,
        pgcron_job_name=row.pgcron_job_name,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def tick_key(name: str, tick: datetime) -> str:
    """The idempotency key of a tick: whatever happens, there is one task of it."""
    return f"durable::{name}:{tick.isoformat()}"[-255:]


def prepare_tick(durable: Durable[Any], row: Row[Any], tick: datetime | None) -> Prepared:
    """A schedule's spawn; without a tick, one that was asked for by hand."""
    options = decode_options(row.spawn_options)
    options["queue_name"] = row.queue_name
    if tick is not None:
        options["idempotency_key"] = tick_key(row.name, tick)
    params = None if row.params is None else _PLAIN.decode(row.params, "the params of a schedule")
    return prepare(
        durable,
        row.task_name,
        params,
        options,
        unchecked=True,
        internal_headers={SCHEDULED_BY: row.name, CRON: row.cron_expression},
    )


class Definition(NamedTuple):
    """A schedule as its author gives it."""

    name: str
    task: Task[Any, Any] | str
    params: Any
    cron_expression: str
    timezone: str
    metadata: Mapping[str, Any] | None
    backend: Backend
    misfire: Misfire
    overlap: Overlap
    options: SpawnOptions


async def create(durable: Durable[Any], definition: Definition) -> None:
    """Check a definition and store it."""
    for what, value, known in (
        ("misfire", definition.misfire, ("skip", "run_once", "run_all")),
        ("overlap", definition.overlap, ("allow", "skip")),
        ("backend", definition.backend, ("worker", "pg_cron")),
    ):
        if value not in known:
            raise InvalidConfiguration(what, f"{str(value)[:40]!r} is none of {', '.join(known)}")
    options = definition.options.copy()
    for key in ("idempotency_key", "available_at"):
        if options.get(key) is not None:
            raise InvalidConfiguration(key, "a schedule spawns a task at every tick", "Leave it out.")
    prepared = prepare(durable, definition.task, definition.params, options, hooked=False)
    await durable.require_queue(prepared.queue_name)
    now = (await durable.database.execute(scheduling.DATABASE_TIME))[0].now
    first = next_tick(definition.cron_expression, definition.timezone, now)
    if first is None:
        raise InvalidCron(definition.cron_expression, "it never comes true")
    options.pop("queue_name", None)
    values = {
        "schedule_name": definition.name,
        "schedule_queue": prepared.queue_name,
        "schedule_task": prepared.task_name,
        "cron": definition.cron_expression,
        "zone": definition.timezone,
        "encoded_params": prepared.params,
        "encoded_options": encode_options(options),
        "encoded_metadata": _PLAIN.encode(dict(definition.metadata or {}), "the metadata of a schedule"),
        "firing_backend": definition.backend,
        "job_name": None,
        "misfire_policy": definition.misfire,
        "overlap_policy": definition.overlap,
        "next_tick": first,
    }
    await durable.database.execute(scheduling.PUT_SCHEDULE, values)


async def delete(durable: Durable[Any], name: str) -> None:
    """Remove a schedule."""
    if not await durable.database.execute(scheduling.DELETE_SCHEDULE, {"schedule_name": name}):
        raise ScheduleNotFound(name)


async def _rows(durable: Durable[Any], name: str | None, chosen: ScheduleFilter) -> Sequence[Row[Any]]:
    containing = None if chosen.metadata is None else _PLAIN.encode(dict(chosen.metadata), "the metadata to look for")
    return await durable.database.execute(
        scheduling.LIST_SCHEDULES, {"only_name": name, "only_task": chosen.task_name, "containing": containing}
    )


async def listed(durable: Durable[Any], chosen: ScheduleFilter) -> list[ScheduleInfo]:
    """Schedules that match a filter."""
    return [schedule_info(row) for row in await _rows(durable, None, chosen)]


async def _stored(durable: Durable[Any], name: str) -> Row[Any]:
    rows = await _rows(durable, name, ScheduleFilter())
    if not rows:
        raise ScheduleNotFound(name)
    return rows[0]


async def pause(durable: Durable[Any], name: str, *, paused: bool) -> None:
    """Stop a schedule, or let it go on from its next tick."""
    row = await _stored(durable, name)
    following: datetime | None = None
    if not paused:
        now = (await durable.database.execute(scheduling.DATABASE_TIME))[0].now
        following = next_tick(row.cron_expression, row.timezone, now)
    await durable.database.execute(
        scheduling.PAUSE_SCHEDULE, {"schedule_name": name, "paused": paused, "next_tick": following}
    )


async def triggered(durable: Durable[Any], name: str) -> Prepared:
    """The spawn of a tick that is asked for by hand."""
    return prepare_tick(durable, await _stored(durable, name), None)


class Executing(Protocol):
    """Something that runs one statement as a transaction."""

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Run a statement."""
        ...


async def fire_due(durable: Durable[Any], channel: Executing) -> list[Row[Any]]:
    """Fire all schedules that are due; gives the tasks spawned. Any number of workers may do it at the same time."""
    spawned: list[Row[Any]] = []
    for row in await channel.execute(scheduling.DUE_SCHEDULES, {"wanted": 100}):
        fired, following = due_ticks(row.cron_expression, row.timezone, row.next_tick_at, row.now, row.misfire)
        prepared = [prepare_tick(durable, row, tick) for tick in fired]
        last: uuid.UUID | None = prepared[-1].task_id if prepared else None
        arrays = columns(prepared) if prepared else dict.fromkeys(SPAWN_COLUMNS, ())
        parameters = {
            "schedule_name": row.name,
            "fired_tick": row.next_tick_at,
            "next_tick": following,
            "last_tick": fired[-1] if fired else None,
            "last_task": last,
            **{f"tick_{name}": list(array) for name, array in arrays.items()},
        }
        try:
            rows = await channel.execute(scheduling.FIRE, parameters)
        except BaseException as error:
            over(prepared, (), error)
            raise
        over(prepared, {row.task_id for row in rows})
        spawned.extend(rows)
    return spawned


def preview(expression: str, timezone: str, after: datetime, count: int) -> list[datetime]:
    """The next `count` ticks after `after`, in UTC."""
    return list(islice(ticks(expression, timezone, after), count))
