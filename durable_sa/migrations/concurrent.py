"""The indexes of limits and unique keys on `tasks`: built concurrently where the table is large.

A plain build reads the whole table while it holds up all writes: a second for some millions of tasks. One that runs
concurrently holds nothing up, but needs to be outside of any transaction.
"""

from __future__ import annotations

import time
from hashlib import blake2b
from typing import Any, Final

from alembic.operations import Operations
from sqlalchemy import Connection, text

from .sql import quoted, verbatim

LARGE_BYTES: Final = 128 * 1024 * 1024
"""Size of the table from which on its indexes are built concurrently. This much is read in a tenth of a second."""
DEFERRED: Final = "durable_deferred"
"""The option of a migration context whose caller calls :func:`finish` after the commit."""

INDEXES: Final[dict[str, tuple[bool, str]]] = {
    "tasks_limit_idx": (
        False,
        "(queue_name, limit_key, priority, available_at, task_id) WHERE finished_at IS NULL AND limit_key IS NOT NULL",
    ),
    "tasks_resuming_idx": (
        False,
        "(queue_name, limit_key, resumes_at, task_id) WHERE finished_at IS NULL AND resumes_at IS NOT NULL",
    ),
    "tasks_suspects_idx": (
        False,
        "(queue_name, limit_key) WHERE finished_at IS NULL AND limit_key IS NOT NULL AND lease_losses >= 2",
    ),
    "tasks_unique_keys_idx": (False, "(queue_name, unique_key) WHERE unique_key IS NOT NULL"),
    "tasks_unique_idx": (
        True,
        "(queue_name, unique_key) WHERE unique_key IS NOT NULL AND finished_at IS NULL",
    ),
}

_TABLE_SIZE: Final = text(
    "SELECT pg_catalog.pg_relation_size(c.oid) FROM pg_catalog.pg_class c"
    " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = :schema AND c.relname = 'tasks'"
)
_VALID: Final = text(
    "SELECT c.relname, i.indisvalid FROM pg_catalog.pg_index i"
    " JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid"
    " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = :schema AND c.relname = ANY (:names)"
)


def create_indexes(op: Operations, schema: str) -> None:
    """Create the indexes: in this transaction if the table is small, else concurrently, where that can be done.

    In a revision of the application, Alembic commits what came before. If its transaction was begun outside of Alembic,
    the build is a plain one.
    """
    context = op.get_context()
    if context.as_sql or (op.get_bind().scalar(_TABLE_SIZE, {"schema": schema}) or 0) < LARGE_BYTES:
        _create(op, schema)
    elif context.opts.get(DEFERRED):
        return
    elif _can_commit(context):
        with context.autocommit_block():
            _create(op, schema, concurrently=True)
    else:
        _create(op, schema)


def _can_commit(context: Any) -> bool:
    """Return whether the transaction is one that Alembic has begun."""
    return context._transaction is not None or not context.connection.in_transaction()


def _create(op: Operations, schema: str, *, concurrently: bool = False) -> None:
    for name in INDEXES:
        op.execute(verbatim(_creation(name, schema, concurrently=concurrently)))


def _creation(name: str, schema: str, *, concurrently: bool) -> str:
    unique, columns = INDEXES[name]
    kind = "UNIQUE INDEX" if unique else "INDEX"
    how = " CONCURRENTLY" if concurrently else ""
    return f"CREATE {kind}{how} {name} ON {quoted(schema)}.tasks {columns}"


def drop_indexes(op: Operations, schema: str) -> None:
    """Drop the indexes."""
    for name in INDEXES:
        op.execute(verbatim(f"DROP INDEX IF EXISTS {quoted(schema)}.{name}"))


def finish(connection: Connection, schema: str) -> None:
    """Build the indexes that an upgrade has deferred, on a connection in autocommit; those that exist stay."""
    found = connection.execute(_VALID, {"schema": schema, "names": list(INDEXES)})
    valid = {row.relname: row.indisvalid for row in found}
    if all(valid.get(name) for name in INDEXES):
        return
    key = int.from_bytes(blake2b(f"durable_sa indexes {schema}".encode(), digest_size=8).digest(), signed=True)
    # One that waits in the server for the lock has a snapshot, for whose end the build of the other would wait.
    while not connection.scalar(text("SELECT pg_catalog.pg_try_advisory_lock(:key)"), {"key": key}):
        time.sleep(0.1)
    try:
        connection.execute(text("SET statement_timeout = 0"))
        found = connection.execute(_VALID, {"schema": schema, "names": list(INDEXES)})
        valid = {row.relname: row.indisvalid for row in found}
        for name in INDEXES:
            if valid.get(name) is False:
                # What an interrupted build has left.
                connection.execute(verbatim(f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(schema)}.{name}"))
            if not valid.get(name):
                connection.execute(verbatim(_creation(name, schema, concurrently=True)))
        connection.execute(text("RESET statement_timeout"))
    finally:
        connection.execute(text("SELECT pg_catalog.pg_advisory_unlock(:key)"), {"key": key})
