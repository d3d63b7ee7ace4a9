"""The private attributes of SQLAlchemy and asyncpg that the engine uses, all of them in one list.

Statements go to asyncpg without SQLAlchemy only by way of these. A version of SQLAlchemy in which one of them has
another name costs speed and nothing else: every statement is then executed by SQLAlchemy (see `direct.leads_directly`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, cast

from sqlalchemy.engine import Connection
from sqlalchemy.engine.result import SimpleResultMetaData

ATTRIBUTES: Final[dict[str, str]] = {
    # Of Connection and Engine: True if it ever had a listener. The dispatcher answers as well, but takes a tenth of a
    # spawn's time on a new connection.
    "has_events": "_has_events",
    # Of Connection: True if statements are logged.
    "echo": "_echo",
    # Of Connection: raises what an error of the driver becomes, and invalidates the connection and its pool.
    "handle_dbapi_exception": "_handle_dbapi_exception",
    # Of asyncpg's adapted connection: None if the application has turned prepared statements off, for a pooler that
    # loses them.
    "prepared_statement_cache": "_prepared_statement_cache",
    # Of the same: None until SQLAlchemy has begun its transaction on the server, which its first statement does.
    "transaction": "_transaction",
    # Of the same: held during a statement, as several of the application's tasks may share a connection.
    "execute_mutex": "_execute_mutex",
    # Of the same: raises what an error of asyncpg becomes.
    "handle_exception": "_handle_exception",
    # Of SimpleResultMetaData: the third argument of Row. A Result sets it as well, but takes longer than the row.
    "key_to_index": "_key_to_index",
}
"""Name of each attribute by the name that it has here."""

ASYNCPG_ATTRIBUTES: Final[dict[str, str]] = {
    # Of asyncpg's own connection: its socket, which `close` and `terminate` leave open if another close is in progress.
    "transport": "_transport",
    # Of the same: the event loop that the connection belongs to.
    "loop": "_loop",
}
"""The same of asyncpg. Without them its connections are ended and refused less thoroughly."""


_checked: set[type] = set()
"""Classes of adapted connections on which all attributes have been found."""


class Missing(Exception):  # noqa: N818
    """This version of SQLAlchemy does not have an attribute of the list."""


def _get(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, ATTRIBUTES[name])
    except AttributeError:
        raise Missing(name) from None


def has_events(target: Any) -> bool:
    """Return whether a connection or an engine has, or has had, listeners of any kind."""
    return bool(_get(target, "has_events"))


def echoes(connection: Connection) -> bool:
    """Return whether a connection logs its statements."""
    return bool(_get(connection, "echo"))


def keeps_prepared_statements(connection: Connection) -> bool:
    """Return whether the application lets asyncpg's connection reuse prepared statements."""
    return _get(connection.connection.dbapi_connection, "prepared_statement_cache") is not None


def has_server_transaction(connection: Connection) -> bool:
    """Return whether SQLAlchemy's transaction has begun on the server."""
    return _get(connection.connection.dbapi_connection, "transaction") is not None


def has_all(connection: Connection) -> bool:
    """Check, once for each class of connection, the attributes that are used while a statement is executed.

    Raises:
        Missing: one of them does not exist.
    """
    adapted = connection.connection.dbapi_connection
    if type(adapted) not in _checked:
        _get(connection, "handle_dbapi_exception")
        _get(adapted, "execute_mutex")
        _get(adapted, "handle_exception")
        _get(SimpleResultMetaData(()), "key_to_index")
        _checked.add(type(adapted))
    return True


def execute_mutex(connection: Connection) -> AbstractAsyncContextManager[Any]:
    """Return the lock that asyncpg's connection holds during a statement."""
    return cast("AbstractAsyncContextManager[Any]", _get(connection.connection.dbapi_connection, "execute_mutex"))


def raise_as_sqlalchemy(connection: Connection, error: Exception, statement: str, parameters: Any) -> None:
    """Raise what SQLAlchemy makes of an error of asyncpg, and let it invalidate the connection and its pool."""
    dialect: Any = connection.dialect
    try:
        _get(connection.connection.dbapi_connection, "handle_exception")(error)
    except dialect.loaded_dbapi.Error as translated:
        _get(connection, "handle_dbapi_exception")(translated, statement, parameters, None, None)


def row_metadata(keys: Sequence[str]) -> tuple[SimpleResultMetaData, Any]:
    """Return what Row takes besides its values: the metadata, and the indexes of its keys."""
    metadata = SimpleResultMetaData(keys)
    return metadata, _get(metadata, "key_to_index")


def transport_of(driver: Any) -> Any:
    """Return the transport of asyncpg's own connection, or None for another driver or version."""
    return getattr(driver, ASYNCPG_ATTRIBUTES["transport"], None)


def loop_of(driver: Any) -> Any:
    """Return the event loop of asyncpg's own connection, or None for another driver, whose connections have none."""
    return getattr(driver, ASYNCPG_ATTRIBUTES["loop"], None)
