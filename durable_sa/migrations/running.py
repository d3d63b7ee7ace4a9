"""Runs the revisions: called by an application's revision, as an Alembic branch, or without Alembic's files."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

from alembic import op as alembic_op
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateSchema

from ..database_errors import LOCK_NOT_AVAILABLE, refuse_read_only, sqlstate
from ..errors import InvalidConfiguration, InvalidState, SchemaMismatch
from ..models import SCHEMA
from . import concurrent
from .chain import BASE, head, is_known, position, scripts
from .version import current, downgrade_call, mismatch, record, upgrade_call, works_with

SCHEMA_OPTION: Final = "durable_schema"
"""The keyword of `context.configure()` in env.py for another schema than `durable`."""

QUEUE_SECONDS: Final = 60
LOCK_SECONDS: Final = 5

_SCHEMA_EXISTS = text("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = :schema")


def upgrade(revision: str, *, since: str = BASE, schema: str = SCHEMA) -> None:
    """Upgrade durable's tables from the revision `since` to `revision`, in the `upgrade()` of your own revision.

    The upgrade is part of that revision's transaction. Revisions that the database already has, for instance from
    `Durable.migrate()`, are skipped. With `--sql` the database is assumed to be at `since`.

    Raises:
        InvalidConfiguration: this version of the package does not know a revision, or they are in the wrong order.
        SchemaMismatch: the database has not reached `since`, or a newer version of the package migrated it.
    """
    _upgrade(Operations(alembic_op.get_context()), revision, since, schema)


def downgrade(revision: str, *, since: str, schema: str = SCHEMA) -> None:
    """Take durable's tables from the revision `since` back to `revision`, in the `downgrade()` of your own revision.

    This reverses `upgrade(since, since=revision)`. A downgrade to `"base"` drops all tables with their data, and keeps
    the schema and the grants on it.

    Raises:
        InvalidConfiguration: this version of the package does not know a revision, or they are in the wrong order.
        SchemaMismatch: the database is past `since`.
    """
    _downgrade(Operations(alembic_op.get_context()), revision, since, schema)


def upgrade_branch(revision: str, *, since: str | None) -> None:
    """Upgrade as a file in `versions` that Alembic runs for an application."""
    op = Operations(alembic_op.get_context())
    _upgrade(op, revision, since or BASE, configured_schema(op.get_context()) or SCHEMA)


def downgrade_branch(revision: str | None, *, since: str) -> None:
    """Downgrade as a file in `versions` that Alembic runs for an application."""
    op = Operations(alembic_op.get_context())
    _downgrade(op, revision or BASE, since, configured_schema(op.get_context()) or SCHEMA)


def migrate(connection: Connection, schema: str = SCHEMA, *, deferred: bool = False) -> None:
    """Upgrade durable's tables to the newest revision, creating the schema if it does not exist.

    Newer tables that are compatible with this version of the package are left unchanged.

    The connection has to be in a READ COMMITTED transaction, which the caller commits. Of several concurrent callers,
    in any process, one migrates and the others wait for it, up to a minute. The migration waits for a lock on a table
    at most 5 seconds, so that the application's statements do not queue up behind it. If `deferred`, indexes of large
    tables are left to :func:`durable_sa.migrations.finish`, to be called after the commit.

    Raises:
        SchemaMismatch: a newer version of the package migrated the database.
        InvalidState: a lock was not granted in time, or the database is read-only.
    """
    # A timeout that is set for the application's statements would interrupt a long migration.
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    if works_with(connection, schema):
        return
    op = Operations(MigrationContext.configure(connection, opts={concurrent.DEFERRED: deferred}))
    try:
        connection.execute(text(f"SET LOCAL lock_timeout = '{QUEUE_SECONDS}s'"))
        _wait_for_turn(connection, schema)
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"))
        _upgrade(op, head(), BASE, schema)
    except DBAPIError as error:
        refuse_read_only(error)
        if sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
        raise InvalidState(
            "The migration of durable's tables",
            "blocked: another transaction holds a lock that it needs",
            "Nothing was changed. Repeat the migration once that transaction has ended; "
            "`SELECT * FROM pg_stat_activity WHERE xact_start < now() - interval '5 s'` shows long transactions.",
        ) from error


def configured_schema(context: MigrationContext) -> str | None:
    """Return the schema named in env.py; None if env.py is that of durable_sa itself."""
    schema: str | None = context.opts.get(SCHEMA_OPTION, SCHEMA)
    return schema


def _upgrade(op: Operations, revision: str, since: str, schema: str) -> None:
    if position(since) > position(revision):
        correct = upgrade_call(since, revision, schema)
        raise InvalidConfiguration("revision", f"{revision!r} comes before since={since!r}", f"Write `{correct}`.")
    installed = _installed(op, since, schema)
    if position(installed) < position(since):
        raise SchemaMismatch(
            None if installed == BASE else installed, since, f"First run the revision that upgrades them to {since}."
        )
    if installed == BASE:
        _create_schema(op, schema)
    for script in scripts()[position(installed) : position(revision)]:
        script.up(op, schema)
        record(op, script, schema)


def _downgrade(op: Operations, revision: str, since: str, schema: str) -> None:
    if position(since) < position(revision):
        correct = downgrade_call(since, revision, schema)
        raise InvalidConfiguration("revision", f"{revision!r} comes after since={since!r}", f"Write `{correct}`.")
    installed = _installed(op, since, schema)
    if position(installed) > position(since):
        raise SchemaMismatch(installed, since, f"First run the downgrade that takes them back to {since}.")
    chain = scripts()
    for number in range(position(installed), position(revision), -1):
        chain[number - 1].down(op, schema)
        if number > 1:
            record(op, chain[number - 2], schema)


def _installed(op: Operations, since: str, schema: str) -> str:
    """Return the revision to start from. With `--sql` there is no database to read it from."""
    if op.get_context().as_sql:
        return since
    connection = op.get_bind()
    _wait_for_turn(connection, schema)
    installed = current(connection, schema) or BASE
    if not is_known(installed):
        raise mismatch(installed, schema)
    return installed


def _wait_for_turn(connection: Connection, schema: str) -> None:
    """Let one transaction at a time migrate a schema. The lock ends with the transaction, also through a pooler."""
    key = int.from_bytes(blake2b(f"durable_sa {schema}".encode(), digest_size=8).digest(), signed=True)
    connection.execute(text("SELECT pg_catalog.pg_advisory_xact_lock(:key)"), {"key": key})


def _create_schema(op: Operations, schema: str) -> None:
    # The existence is checked first, because IF NOT EXISTS needs the privilege to create schemas in any case.
    if op.get_context().as_sql or not op.get_bind().execute(_SCHEMA_EXISTS, {"schema": schema}).scalar():
        op.execute(CreateSchema(schema, if_not_exists=True))
