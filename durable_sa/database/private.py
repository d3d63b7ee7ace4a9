"""The private attributes of SQLAlchemy and asyncpg that the engine uses, all of them in one list.

Statements go to asyncpg without SQLAlchemy only by way of these. A version of SQLAlchemy in which one of them has
another name costs speed and nothing else: every statement is then executed by SQLAlchemy (see `direct.leads_directly`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, cast

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.pool import Pool, QueuePool

CONNECTION: Final = {
    # Also of Engine: True if it ever had a listener. The dispatcher answers as well, but takes a tenth of a spawn's
    # time on a new connection.
    "_has_events",
    # True if statements are logged.
    "_echo",
    # Raises what an error of the driver becomes, and invalidates the connection and its pool.
    "_handle_dbapi_exception",
}
"""Attributes of Connection."""
ADAPTED: Final = {
    # None if the application has turned prepared statements off, for a pooler that loses them.
    "_prepared_statement_cache",
    # None until SQLAlchemy has begun its transaction on the server, which its first statement does.
    "_transaction",
    # Held during a statement, as several of the application's tasks may share a connection.
    "_execute_mutex",
    # Raises what an error of asyncpg becomes.
    "_handle_exception",
}
"""Attributes of asyncpg's adapted connection."""
SERIALIZERS: Final = {
    # Functions of the application for JSON, which a rendered statement may contain.
    "_json_serializer",
    "_json_deserializer",
}
"""Attributes of the dialect. Without them each engine renders the statements for itself."""
METADATA: Final = {
    # The third argument of Row. A Result sets it as well, but takes longer than the row.
    "_key_to_index",
}
"""Attributes of SimpleResultMetaData."""

OVERFLOW: Final = "_max_overflow"
"""Attribute of a pool: its connections beyond `pool_size`. Without it no worker warns that it takes all of them."""

_complete: dict[type, bool] = {}
"""By classes of adapted connections: True if all attributes exist."""

ASYNCPG_ATTRIBUTES: Final[dict[str, str]] = {
    # Of asyncpg's own connection: its socket, which `close` and `terminate` leave open if another close is in progress.
    "transport": "_transport",
    # Of the same: the event loop that the connection belongs to.
    "loop": "_loop",
    # Of the same: what knows the types of the connection.
    "protocol": "_protocol",
}
"""The same of asyncpg. Without them connections are ended and refused less thoroughly, and look up types of arrays."""

ARRAY_TYPES: Final = (
    ("bool", 16, 1000),
    ("int8", 20, 1016),
    ("int2", 21, 1005),
    ("int4", 23, 1007),
    ("text", 25, 1009),
    ("float8", 701, 1022),
    ("timestamptz", 1184, 1185),
    ("uuid", 2950, 2951),
)
"""Types of array elements in the statements: name, OID, OID of the array. OIDs of built-in types never change."""


def all_exist(connection: Connection) -> bool:
    """Return whether a connection that leads to asyncpg has all attributes; checked once for each class of them."""
    adapted = connection.connection.dbapi_connection
    complete = _complete.get(type(adapted))
    if complete is None:
        owners = ((connection, CONNECTION), (adapted, ADAPTED), (SimpleResultMetaData(()), METADATA))
        complete = all(hasattr(owner, name) for owner, names in owners for name in names)
        _complete[type(adapted)] = complete
    return complete


def capacity(pool: Pool) -> int | None:
    """Return the number of connections that a pool has at most; None without a limit, or if it is not known."""
    overflow: int = getattr(pool, OVERFLOW, -1)
    return pool.size() + overflow if isinstance(pool, QueuePool) and overflow >= 0 else None


def _adapted(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


has_events = operator.attrgetter("_has_events")
"""Return whether a connection or an engine has, or has had, listeners of any kind."""

echoes = operator.attrgetter("_echo")
"""Return whether a connection logs its statements."""


def keeps_prepared_statements(connection: Connection) -> bool:
    """Return whether the application lets asyncpg's connection reuse prepared statements."""
    return _adapted(connection)._prepared_statement_cache is not None


def has_server_transaction(connection: Connection) -> bool:
    """Return whether SQLAlchemy's transaction has begun on the server."""
    return _adapted(connection)._transaction is not None


def execute_mutex(connection: Connection) -> AbstractAsyncContextManager[Any]:
    """Return the lock that asyncpg's connection holds during a statement."""
    return cast("AbstractAsyncContextManager[Any]", _adapted(connection)._execute_mutex)


def raise_as_sqlalchemy(connection: Any, error: Exception, statement: str, parameters: Any) -> None:
    """Raise what SQLAlchemy makes of an error of asyncpg, and let it invalidate the connection and its pool."""
    try:
        _adapted(connection)._handle_exception(error)
    except connection.dialect.loaded_dbapi.Error as translated:
        connection._handle_dbapi_exception(translated, statement, parameters, None, None)


def has_serializers(dialect: Dialect) -> bool:
    """Return whether the application may have given its own serializers to an engine."""
    return any(getattr(dialect, name, dialect) is not None for name in SERIALIZERS)


def row_metadata(keys: Sequence[str]) -> tuple[SimpleResultMetaData, Any]:
    """Return what Row takes besides its values: the metadata, and the indexes of its keys."""
    metadata: Any = SimpleResultMetaData(keys)
    return metadata, metadata._key_to_index


def connect_arguments(engine: Engine) -> dict[str, Any] | None:
    """Return the arguments with which an engine's driver connects; None if the application connects by itself."""
    pool: Any = engine.pool
    creator: Any = getattr(pool, "_creator", None)
    if getattr(creator, "__module__", None) != "sqlalchemy.engine.create":
        return None
    arguments: Any = dict(zip(creator.__code__.co_freevars, creator.__closure__ or (), strict=True)).get("cparams")
    if arguments is None:
        return None
    return {name: value for name, value in arguments.cell_contents.items() if name != "context"}


def transport_of(driver: Any) -> Any:
    """Return the transport of asyncpg's own connection, or None for another driver or version."""
    return getattr(driver, ASYNCPG_ATTRIBUTES["transport"], None)


def loop_of(driver: Any) -> Any:
    """Return the event loop of asyncpg's own connection, or None for another driver, whose connections have none."""
    return getattr(driver, ASYNCPG_ATTRIBUTES["loop"], None)


def declare_array_types(driver: Any) -> None:
    """Describe the arrays of built-in types to asyncpg's own connection, which would search the catalog for 10 ms.

    A version of asyncpg that takes no such description searches.
    """
    types = [
        {
            "oid": array_oid,
            "ns": "pg_catalog",
            "name": f"_{name}",
            "kind": b"b",
            "basetype": None,
            "elemtype": oid,
            "elemdelim": ",",
            "range_subtype": None,
            "attrtypoids": None,
            "elemtype_name": name,
        }
        for name, oid, array_oid in ARRAY_TYPES
    ]
    with contextlib.suppress(AttributeError, LookupError, TypeError):
        getattr(driver, ASYNCPG_ATTRIBUTES["protocol"]).get_settings().register_data_types(types)


def is_invalid_statement(error: Exception) -> bool:
    """Return whether asyncpg says that a migration has changed the columns of a prepared statement."""
    # Imported here, because a process with another driver is not to load asyncpg.
    from asyncpg import InvalidCachedStatementError  # pyright: ignore[reportMissingTypeStubs] - it has no types

    return isinstance(error, InvalidCachedStatementError)
