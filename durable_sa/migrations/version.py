"""The revision of the tables in a database, which is stored in the comment of the table `queues`."""

from __future__ import annotations

import json
import re
import shlex
from typing import Final

from alembic.operations import Operations
from sqlalchemy import Connection, text

from ..errors import InvalidState, SchemaMismatch
from ..models import SCHEMA, Queue
from .chain import BASE, Script, head, is_known
from .sql import quoted

TABLE: Final = Queue.__tablename__
_PREFIX: Final = "schema version: "

# The catalog is readable by every role, and a missing table or schema is not an error.
_COMMENT = text("""
    SELECT d.description
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_description d
      ON d.objoid = c.oid AND d.classoid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objsubid = 0
    WHERE n.nspname = :schema AND c.relname = :table AND c.relkind IN ('r', 'p')
""")


def current(connection: Connection, schema: str = SCHEMA) -> str | None:
    """Return the revision of durable's tables in this database; None if they do not exist.

    On an `AsyncConnection`: `await connection.run_sync(durable.current)`.

    Raises:
        InvalidState: the tables exist, but the comment with their revision was lost.
    """
    comment = _comment(connection, schema)
    if comment is None:
        return None
    if match := re.match(rf"{_PREFIX}(\S+)", comment):
        return match[1]
    table = f"{quoted(schema)}.{TABLE}"
    raise InvalidState(
        f"The table {table}",
        "without the comment that has the revision of durable's tables",
        "If they were restored from a dump without comments, write the revision of the dumped database: "
        f"`COMMENT ON TABLE {table} IS '{_PREFIX}{head()}'`.",
    )


def _comment(connection: Connection, schema: str) -> str | None:
    """Read the comment, empty if it was lost; None if the table does not exist."""
    row = connection.execute(_COMMENT, {"schema": schema, "table": TABLE}).one_or_none()
    return None if row is None else row.description or ""


def record(op: Operations, script: Script, schema: str) -> None:
    """Record the revision of the tables, and the oldest revision whose versions of the package work with them."""
    oldest: str = getattr(script, "oldest", script.revision)
    suffix = "" if oldest == script.revision else f" (for {oldest} and later)"
    op.create_table_comment(TABLE, f"{_PREFIX}{script.revision}{suffix}", schema=schema)


def works_with(connection: Connection, schema: str = SCHEMA) -> bool:
    """Return whether this version of the package works with the tables: its own revision, or a newer compatible one.

    Compatible revisions let workers of the previous version continue, and restart, during a deploy.

    Raises:
        InvalidState: the comment with their revision was lost.
    """
    installed = current(connection, schema)
    if installed is None or is_known(installed):
        return installed == head()
    match = re.search(r"\(for (\S+) and later\)", _comment(connection, schema) or "")
    return match is not None and is_known(match[1])


def check(connection: Connection, schema: str = SCHEMA) -> None:
    """Check that this version of the package works with durable's tables.

    On an `AsyncConnection`: `await connection.run_sync(check)`.

    Raises:
        SchemaMismatch: they are older, missing, or newer and not compatible. The message has the lines to paste.
        InvalidState: the comment with their revision was lost.
    """
    if not works_with(connection, schema):
        raise mismatch(current(connection, schema), schema)


def mismatch(installed: str | None, schema: str) -> SchemaMismatch:
    """Create the error for tables of a revision that this version of the package does not work with; None for none."""
    return SchemaMismatch(installed, head(), _remedy(installed, head(), schema))


def upgrade_call(revision: str, since: str, schema: str) -> str:
    """Write the line of Python that upgrades the tables from one revision to a later one."""
    return _call("upgrade", revision, None if since == BASE else since, schema)


def downgrade_call(revision: str, since: str, schema: str) -> str:
    """Write the line of Python that downgrades the tables from one revision to an earlier one."""
    return _call("downgrade", revision, since, schema)


def _call(function: str, revision: str, since: str | None, schema: str) -> str:
    keywords = {"since": since, "schema": None if schema == SCHEMA else schema}
    arguments = [f"{name}={_literal(value)}" for name, value in keywords.items() if value is not None]
    return f"durable.{function}({', '.join([_literal(revision), *arguments])})"


def _literal(value: str) -> str:
    """Write a string as Python, in the double quotes that formatters keep."""
    return json.dumps(value, ensure_ascii=False)


def _remedy(installed: str | None, required: str, schema: str) -> str:
    since = installed or BASE
    option = configured = ""
    if schema != SCHEMA:
        option = f" --schema {shlex.quote(schema)}"
        configured = f"Write `context.configure(..., durable_schema={_literal(schema)})` in `env.py`. "
    if not is_known(since):
        return f"""\
A newer version of durable_sa migrated them. Install that version here too:

    pip install --upgrade durable_sa

Or downgrade with that version: `alembic downgrade -1` if the latest revision of your application upgraded them, \
`alembic downgrade durable@{required}` if durable's revisions are a branch of your history."""
    return f"""\
{configured}Run `alembic revision --autogenerate`, or paste this into a revision of your application, and \
`alembic upgrade head`:

    from durable_sa import migrations as durable

    def upgrade() -> None:
        {upgrade_call(required, since, schema)}

    def downgrade() -> None:
        {downgrade_call(since, required, schema)}

If durable's revisions are a branch of your history, run `alembic upgrade heads`; without Alembic, \
`durable migrate{option}`."""
