"""The revision a database is at. It is kept in the comment of the table `queues`, beside what it describes."""

from __future__ import annotations

import json
import re
from typing import Final

from alembic.operations import Operations
from sqlalchemy import Connection, text

from ..errors import InvalidState, SchemaMismatch
from ..models import SCHEMA, Queue
from .chain import BASE, Script, head, is_known
from .sql import quoted

TABLE: Final = Queue.__tablename__
_PREFIX: Final = "schema version: "

# From the catalog: readable by every role, and no error where there is no such table or schema.
_COMMENT = text("""
    SELECT d.description
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_description d
      ON d.objoid = c.oid AND d.classoid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objsubid = 0
    WHERE n.nspname = :schema AND c.relname = :table AND c.relkind IN ('r', 'p')
""")


def current(connection: Connection, schema: str = SCHEMA) -> str | None:
    """The revision durable's tables are at in this database, None where there are none.

    On an `AsyncConnection`: `await connection.run_sync(durable.current)`.

    Raises:
        InvalidState: there are tables, but the comment that says at which revision has been lost.
    """
    comment = _comment(connection, schema)
    if comment is None:
        return None
    if match := re.match(rf"{_PREFIX}(\S+)", comment):
        return match[1]
    table = f"{quoted(schema)}.{TABLE}"
    raise InvalidState(
        f"The table {table}",
        "without the comment that says at which revision durable's tables are",
        "If they were restored from a dump without comments, write the revision that the dumped database was at: "
        f"`COMMENT ON TABLE {table} IS '{_PREFIX}{head()}'`.",
    )


def _comment(connection: Connection, schema: str) -> str | None:
    """None where there is no table."""
    row = connection.execute(_COMMENT, {"schema": schema, "table": TABLE}).one_or_none()
    return None if row is None else row.description or ""


def record(op: Operations, script: Script, schema: str) -> None:
    """Write down the revision that the tables now are at, and the oldest that a version may need to work with them."""
    oldest: str = getattr(script, "oldest", script.revision)
    suffix = "" if oldest == script.revision else f" (for {oldest} and later)"
    op.create_table_comment(TABLE, f"{_PREFIX}{script.revision}{suffix}", schema=schema)


def works_with(connection: Connection, schema: str = SCHEMA) -> bool:
    """Whether the tables are those of this version of the package, or newer ones that say they are for it, too.

    So workers of the version before go on, and may be started anew, while a deploy is under way.

    Raises:
        InvalidState: the comment that says at which revision they are has been lost.
    """
    installed = current(connection, schema)
    if installed is None or is_known(installed):
        return installed == head()
    match = re.search(r"\(for (\S+) and later\)", _comment(connection, schema) or "")
    return match is not None and is_known(match[1])


def check(connection: Connection, schema: str = SCHEMA) -> None:
    """Make sure that durable's tables are those this version of the package works with.

    On an `AsyncConnection`: `await connection.run_sync(check)`.

    Raises:
        SchemaMismatch: they are older, not there, or newer and not for this version. It has the lines to paste.
        InvalidState: the comment that says at which revision they are has been lost.
    """
    if not works_with(connection, schema):
        installed, required = current(connection, schema), head()
        raise SchemaMismatch(installed, required, _remedy(installed, required, schema))


def not_installed(schema: str = SCHEMA) -> SchemaMismatch:
    """The error for a database without durable's tables."""
    return SchemaMismatch(None, head(), _remedy(None, head(), schema))


def too_new(installed: str, schema: str = SCHEMA) -> SchemaMismatch:
    """The error for tables of a newer version of the package, which this one cannot touch."""
    return SchemaMismatch(installed, head(), _remedy(installed, head(), schema))


def upgrade_call(revision: str, since: str, schema: str) -> str:
    """The line of Python that takes the tables from one revision to a later one."""
    return _call("upgrade", revision, None if since == BASE else since, schema)


def downgrade_call(revision: str, since: str, schema: str) -> str:
    """The line of Python that takes the tables from one revision back to an earlier one."""
    return _call("downgrade", revision, since, schema)


def _call(function: str, revision: str, since: str | None, schema: str) -> str:
    keywords = {"since": since, "schema": None if schema == SCHEMA else schema}
    arguments = [f"{name}={_literal(value)}" for name, value in keywords.items() if value is not None]
    return f"durable.{function}({', '.join([_literal(revision), *arguments])})"


def _literal(value: str) -> str:
    """A string as Python writes it, in the double quotes that formatters leave alone."""
    return json.dumps(value, ensure_ascii=False)


def _remedy(installed: str | None, required: str, schema: str) -> str:
    since = installed or BASE
    if not is_known(since):
        return f"""\
A newer version of durable_sa migrated them. Install that version here as well:

    pip install --upgrade durable_sa

Or go back with that version: `alembic downgrade -1` where the latest revision of your application upgraded them, \
`alembic downgrade durable@{required}` where durable's revisions are a branch of your own."""
    return f"""\
Run `alembic revision --autogenerate`, or paste this into a revision of your application, and `alembic upgrade head`:

    from durable_sa import migrations as durable

    def upgrade() -> None:
        {upgrade_call(required, since, schema)}

    def downgrade() -> None:
        {downgrade_call(since, required, schema)}

Where durable's revisions are a branch of your own, run `alembic upgrade heads`; without Alembic, `durable migrate`."""
