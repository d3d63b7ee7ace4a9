"""Schedules that the pg_cron extension fires, inside the database and without a worker.

Each has a job of the extension, which is made, changed and removed in the same transaction as the schedule. Schedules
beyond the extension are refused: those in other time zones than the server's, with seconds, with the days `L`, `W` and
`#`, and those that make up for ticks at which the server was down.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from sqlalchemy.exc import DBAPIError

from ..database.connections import Database
from ..database.engines import Bind
from ..database.hint import channel_name
from ..database.scripts import Script
from ..database_errors import sqlstate
from ..errors import InvalidConfiguration, InvalidCron
from ..spawns import Prepared
from ..statements import pgcron as statements
from ..statements.spawning import LIMITED_SPAWN_COLUMNS

_FIELDS: Final = re.compile(r"[0-9A-Za-z*,/-]+( +[0-9A-Za-z*,/-]+){4}")
_UNSUPPORTED: Final = re.compile(r"(?<![A-Za-z])[LWH](?![A-Za-z])|[0-9][LWlw]", re.ASCII)
_GMT: Final = frozenset({"GMT", "UTC", "Etc/UTC", "Etc/GMT", "Zulu", "Etc/Zulu", "Universal", "Etc/Universal"})
_MAX_NAME_BYTES: Final = 63
_INVALID_PARAMETER: Final = "22023"


async def setup_pgcron(bind: Bind | None = None) -> None:
    """Install the pg_cron extension into the database that has durable's tables, for `backend="pg_cron"`.

    Safe to repeat. The server has to load it (`shared_preload_libraries = 'pg_cron'`, `cron.database_name` naming this
    database), and the role needs the right to create extensions. Roles that define schedules need
    `GRANT USAGE ON SCHEMA cron`.

    Raises:
        InvalidConfiguration: the server has no such extension, or does not allow it here; the message says why.
    """
    database = Database(bind)
    try:
        async with database.transaction() as connection:
            await connection.execute(statements.CREATE_EXTENSION)
    except DBAPIError as error:
        raise InvalidConfiguration(
            "pg_cron",
            f"it cannot be set up: {_first_line(error)}",
            "It is installed with the server's packages, loaded by shared_preload_libraries, and belongs into the "
            "database that cron.database_name names.",
        ) from error
    finally:
        await database.close()


def check_expression(expression: str) -> None:
    """Refuse expressions that the extension reads differently, or cannot read.

    Raises:
        InvalidCron: the expression is one of those.
    """
    if not _FIELDS.fullmatch(expression.strip()):
        raise InvalidCron(expression, "pg_cron takes five fields of numbers, names, and the signs *,/-")
    if _UNSUPPORTED.search(expression):
        raise InvalidCron(expression, "pg_cron does not know L, W or H")


def job_name(queue_name: str, schedule_name: str, schema: str) -> str:
    """Return the name of a schedule's job, unique in the database."""
    name = f"durable:{schema}:{queue_name}:{schedule_name}"
    if len(name.encode()) > _MAX_NAME_BYTES or ":" in schema + queue_name:
        # NUL is in no name, so that two schedules have the same digest only if all their names are the same.
        identity = "\0".join((schema, queue_name, schedule_name))
        return f"durable:{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}"
    return name


def require_extension(timezone: str) -> Script[None]:
    """Refuse a schedule if the extension is missing or uses another time zone.

    Raises:
        InvalidConfiguration: either of the two.
    """
    row = (yield statements.INSTALLED, {})[0]
    if not row.installed:
        raise InvalidConfiguration(
            "backend",
            "the extension pg_cron is not in this database",
            "Call `await setup_pgcron(bind)` first, or leave the schedule to the workers: backend='worker'.",
        )
    if timezone != row.timezone and not {timezone, row.timezone} <= _GMT:
        raise InvalidConfiguration(
            "timezone",
            f"pg_cron fires by the time of {row.timezone}, not of {timezone}",
            "Write the times in that zone, or leave the schedule to the workers: backend='worker'.",
        )


def put_job(schema: str, name: str, cron: str, spawn: Prepared) -> Script[None]:
    """Create or change the job of a schedule.

    Raises:
        InvalidCron: the extension refuses the expression.
    """
    command = statements.firing(
        spawn.queue_name,
        name,
        f"durable::{name}:",
        dict(zip(LIMITED_SPAWN_COLUMNS, spawn.all_values, strict=True)),
        schema=schema,
        channel=channel_name(schema),
    )
    parameters = {"job_name": job_name(spawn.queue_name, name, schema), "job_schedule": cron, "command": command}
    try:
        yield statements.SCHEDULE_JOB, parameters
    except DBAPIError as error:
        if sqlstate(error) == _INVALID_PARAMETER:
            raise InvalidCron(cron, _first_line(error)) from error
        raise


def remove_job(name: str | None) -> Script[None]:
    """Remove a job, if it has a name and exists."""
    if name is not None and (yield from _installed()):
        yield statements.UNSCHEDULE_JOB, {"job_name": name}


def activate_job(name: str, *, active: bool) -> Script[None]:
    """Activate or deactivate a job."""
    if (yield from _installed()):
        yield statements.ACTIVATE_JOB, {"job_name": name, "active": active}


def _installed() -> Script[bool]:
    return bool((yield statements.INSTALLED, {})[0].installed)


def _first_line(error: DBAPIError) -> str:
    return (str(error.orig).strip().splitlines() or [type(error.orig).__name__])[0]
