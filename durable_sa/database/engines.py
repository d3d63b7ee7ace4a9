"""Engines: what an application gives as `bind`, and engines of our own."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from ..errors import InvalidConfiguration
from . import citus, private
from .closing import know_connections
from .urls import default_bind, dial, resolve_url, set_socket_options

Bind = AsyncEngine | async_sessionmaker[Any] | Engine | sessionmaker[Any] | scoped_session[Any] | URL | str
"""Synchronous ones serve the `_with` methods, and nothing that is awaited."""


class Bound(NamedTuple):
    """An engine, and what is known of where it comes from."""

    engine: AsyncEngine
    sessionmaker: async_sessionmaker[Any] | None
    owned: bool
    """True if the engine was made here, from a URL."""


def resolve_bind(bind: Bind | None) -> Bound:
    """Return the engine that a `bind` stands for; None stands for the default database.

    Raises:
        InvalidConfiguration: it is not a bind, or a synchronous one, or not one of PostgreSQL.
    """
    if isinstance(bind, Engine | sessionmaker | scoped_session):
        raise InvalidConfiguration(
            "bind",
            f"{type(bind).__name__} is synchronous, and workers and awaited calls need an asynchronous driver",
            "Give Durable a URL of postgresql+psycopg:// or postgresql+asyncpg://, or an AsyncEngine, and this one as "
            "sync_bind=; or call the `_with` methods with a Session, and wait_for_result_sync.",
        )
    sessions: async_sessionmaker[Any] | None = None
    if isinstance(bind, async_sessionmaker):
        sessions = bind
        bind = bind.kw.get("bind")
        if not isinstance(bind, AsyncEngine):
            raise InvalidConfiguration(
                "bind",
                "the async_sessionmaker is not bound to one AsyncEngine",
                "Give the engine that has the durable tables.",
            )
    if bind is None:
        bind = default_bind()
    if isinstance(bind, AsyncEngine):
        if bind.dialect.name != "postgresql":
            raise InvalidConfiguration("bind", f"durable_sa needs PostgreSQL, not {bind.dialect.name}")
        return Bound(bind, sessions, owned=False)
    if isinstance(bind, str | URL):  # pyright: ignore[reportUnnecessaryIsInstance]
        engine = _make_engine(resolve_url(bind))
        event.listen(engine.sync_engine, "connect", set_date_style)
        citus.connect_faster(engine.sync_engine)
        return Bound(engine, None, owned=True)
    raise InvalidConfiguration(
        "bind",
        f"it cannot be of type {type(bind).__name__}",
        "Give an AsyncEngine, an async_sessionmaker or a URL.",
    )


def direct_engine(url: str | URL) -> AsyncEngine:
    """Make an engine whose one connection is for LISTEN. The caller disposes of it."""
    return _make_engine(resolve_url(url), "listen_url", poolclass=NullPool)


def _make_engine(url: URL, what: str = "bind", **options: Any) -> AsyncEngine:
    dialed = dial(url, what)
    engine = create_async_engine(dialed.url, connect_args=dialed.connect_args, hide_parameters=True, **options)
    if dialed.socket_options:

        def set_options(connection: Any, _: Any) -> None:
            transport = private.transport_of(connection.driver_connection)
            if transport is not None:
                set_socket_options(transport.get_extra_info("socket"), dialed.socket_options)

        event.listen(engine.sync_engine, "connect", set_options)
    return know_connections(engine)


def check_date_style(connection: AsyncConnection) -> None:
    """Check that the driver can read times on a connection.

    Raises:
        InvalidConfiguration: it cannot.
    """
    style = _date_style(connection.sync_connection and connection.sync_connection.connection.driver_connection)
    if style is not None and not style.startswith("ISO"):
        raise InvalidConfiguration(
            "bind",
            f"its connections have the DateStyle {style!r}, in which psycopg cannot read times",
            "Give the engine connect_args={'options': '-c datestyle=ISO'}.",
        )


def _date_style(driver_connection: Any) -> str | None:
    """Return the DateStyle of psycopg's connection, which reads ISO only; None for a driver that reads them all."""
    connection = getattr(driver_connection, "pgconn", None)
    return None if connection is None else str(connection.parameter_status(b"DateStyle").decode())


def set_date_style(connection: Any, _: Any) -> None:
    """Set the DateStyle that the driver reads on a new connection of our own engine."""
    style = _date_style(getattr(connection, "driver_connection", connection))
    if style is not None and not style.startswith("ISO"):
        cursor = connection.cursor()
        cursor.execute("SET datestyle = ISO")
        cursor.close()
        connection.commit()
