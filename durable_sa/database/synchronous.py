"""Synchronous sessions on the durable tables: for transactions in threads, and for polls without an event loop."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final, NoReturn, TypeAlias, cast

from sqlalchemy import Executable, Row, create_engine, event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from ..database_errors import UNDEFINED_TABLE, sqlstate
from ..errors import InvalidConfiguration
from ..models import SCHEMA, TaskRow
from . import direct, private
from .connections import is_autocommit
from .engines import Bind, set_date_style
from .failover import Timeline, locate
from .rendering import Translations
from .urls import default_bind, dial, synchronous_url

SyncBind: TypeAlias = sessionmaker[Any] | scoped_session[Any] | Engine

_LISTENERS: Final = ("connect", "first_connect", "checkout")
"""Events of a pool at which applications set up connections."""
_LOCATED = "durable_located"
"""Key in a connection's `info`: present if it is known which server it leads to."""


class SyncDatabase:
    """The application's synchronous sessions, and the scoped sessions that are to be the same ones."""

    def __init__(
        self, factory: Callable[[], Session], schema: str, scopes: Sequence[scoped_session[Any]], owned: Engine | None
    ) -> None:
        self.schema = schema
        self._factory = factory
        self._scopes = scopes
        self._owned = owned
        """The engine, if it was made here."""
        self._translations: Translations | None = None if schema == SCHEMA else {SCHEMA: schema}

    def begin(self, timeline: Timeline | None = None) -> tuple[Session, Connection]:
        """Make a session, and begin its transaction, at the isolation of its engine; at read committed for autocommit.

        Returns the session and its connection for durable's tables, which has to lead to the server of the timeline.
        """
        session = self._factory()
        try:
            # The transaction may span only one connection, so it need not be prepared.
            session.twophase = False
            connection = self._connect(session)
            if is_autocommit(connection):
                session.rollback()
                connection = self._connect(session, isolation_level="READ COMMITTED")
            if timeline is not None and _LOCATED not in connection.info:
                locate(connection, timeline)
                connection.info[_LOCATED] = True
        except BaseException:
            session.invalidate()
            raise
        return session, connection

    def _connect(self, session: Session, **options: Any) -> Connection:
        if not session.in_transaction():
            session.begin()
        engine = session.get_bind(mapper=TaskRow)
        if engine.dialect.is_async:
            refuse_asynchronous("sync_bind", f"{engine.dialect.driver} has no synchronous form")
        if self._translations is not None:
            known = engine.get_execution_options().get("schema_translate_map")
            options["schema_translate_map"] = {**(known or {}), **self._translations}
        return session.connection(bind_arguments={"mapper": TaskRow}, execution_options=options)

    def execute(
        self, connection: Connection, statement: Executable, parameters: Mapping[str, Any]
    ) -> Sequence[Row[Any]]:
        """Execute a statement of durable in the transaction of a connection.

        Raises:
            SchemaMismatch: the tables do not exist.
        """
        try:
            return direct.execute_within(connection, statement, parameters, self._translations)
        except DBAPIError as error:
            if sqlstate(error) == UNDEFINED_TABLE and f"{self.schema}." in str(error.orig):
                from ..migrations.version import mismatch

                raise mismatch(None, self.schema) from error
            raise

    def read(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """Execute a statement that reads, on a connection that is returned at once."""
        session, connection = self.begin()
        try:
            return self.execute(connection, statement, parameters)
        finally:
            session.close()

    @contextmanager
    def scoped(self, session: Session) -> Generator[None]:
        """Make a session that of the scoped sessions, in the scope of the caller, for the block."""
        with ExitStack() as stack:
            for scope in self._scopes:
                stack.enter_context(session_scoped(scope, session))
            yield

    def close(self) -> None:
        """Dispose of the engine if it was made here."""
        if self._owned is not None:
            self._owned.dispose()


class _HeldRegistry(ScopedRegistry[Any]):
    """The registry of a scoped session, which holds a session for the code of a block, whatever scope that enters.

    Flask-SQLAlchemy has a scope for each application context. In one that the function of a transaction enters, it
    would make another session, whose writes nothing commits.
    """

    __slots__ = ("_held",)

    def __init__(self, former: ScopedRegistry[Any]) -> None:
        super().__init__(former.createfunc, former.scopefunc)
        self.registry = former.registry
        self._held: ContextVar[tuple[Any, Session] | None] = ContextVar("durable_sa_session", default=None)

    @contextmanager
    def holding(self, session: Session) -> Generator[None]:
        token = self._held.set((self.scopefunc(), session))
        try:
            yield
        finally:
            self._held.reset(token)

    def _of_outer_scope(self) -> Session | None:
        held = self._held.get()
        return None if held is None or held[0] == self.scopefunc() else held[1]

    def __call__(self) -> Any:
        held = self._of_outer_scope()
        return super().__call__() if held is None else held

    def has(self) -> bool:
        # False in an inner scope, whose end removes its session: the one held is not its own.
        return self._of_outer_scope() is None and super().has()


_registry_lock = threading.Lock()


@contextmanager
def session_scoped(scope: scoped_session[Any], session: Session, *, hold: bool = True) -> Generator[None]:
    """Make a session that of a scoped session for the block, in the caller's scope, and with `hold` in inner ones."""
    with _registry_lock:
        if hold and type(scope.registry) is ScopedRegistry:  # not of threads, each of which is one scope
            scope.registry = _HeldRegistry(scope.registry)
    registry = scope.registry
    with registry.holding(session) if hold and isinstance(registry, _HeldRegistry) else nullcontext():
        former = registry() if registry.has() else None
        registry.set(session)
        try:
            yield
        finally:
            if former is None:
                registry.clear()
            else:
                registry.set(former)


def resolve_sync_bind(
    bind: Bind | None, sync_bind: SyncBind | None, schema: str, scopes: Sequence[scoped_session[Any]] = ()
) -> SyncDatabase | None:
    """Return the synchronous sessions of a client; None if its driver has only an asynchronous form.

    They are those of `sync_bind`, or of a synchronous `bind`. Of a URL or an engine of a driver that has both forms, an
    engine is made here. A scoped session among `scopes` is the one in use if no `sync_bind` is given.

    Raises:
        InvalidConfiguration: it is not a bind, or not one of PostgreSQL.
    """
    if sync_bind is None and isinstance(bind, Engine | sessionmaker | scoped_session):
        sync_bind = bind
    if sync_bind is not None:
        check_sync_bind(sync_bind)
        return _given(sync_bind, schema, scopes)
    factory: type[Session] = Session
    options: dict[str, Any] = {}
    url = _url_of(bind)
    if url is None:
        return None
    if scopes:
        return _given(scopes[0], schema, scopes)
    if isinstance(bind, async_sessionmaker):
        options = dict(bind.kw)
        engine_of_sessions = options.pop("bind", None)
        factory = options.pop("sync_session_class", None) or bind.class_.sync_session_class
        if "binds" in options or factory.get_bind is not Session.get_bind:
            return None  # they choose among asynchronous engines
        bind = engine_of_sessions
    engine = _make_engine(url, bind if isinstance(bind, AsyncEngine) else None)
    if engine is None:
        return None
    return SyncDatabase(functools.partial(factory, engine, **options), schema, scopes, engine)


def _given(bind: SyncBind, schema: str, scopes: Sequence[scoped_session[Any]]) -> SyncDatabase:
    if isinstance(bind, Engine):
        return SyncDatabase(functools.partial(Session, bind), schema, scopes, None)
    if isinstance(bind, scoped_session):
        others = (scope for scope in scopes if scope is not bind)
        return SyncDatabase(bind.session_factory, schema, (bind, *others), None)
    return SyncDatabase(bind, schema, scopes, None)


def check_sync_bind(bind: object) -> None:
    """Check what an application gives as `sync_bind`, without connecting.

    Raises:
        InvalidConfiguration: it is not a bind of synchronous sessions, or not one of PostgreSQL.
    """
    if not isinstance(bind, Engine | sessionmaker | scoped_session):
        raise InvalidConfiguration(
            "sync_bind",
            f"it cannot be of type {type(bind).__name__}",
            "Give a sessionmaker, a scoped_session or an Engine of a synchronous driver, such as psycopg.",
        )
    given = cast("Any", bind)
    factory: Any = getattr(given, "session_factory", given)
    engine: Any = given if isinstance(bind, Engine) else getattr(factory, "kw", {}).get("bind")
    if isinstance(engine, Connection):
        raise InvalidConfiguration(
            "sync_bind", "its sessions share one connection", "Give sessions that are bound to an Engine."
        )
    if not isinstance(engine, Engine):
        return  # the sessions choose their engine by themselves
    if engine.dialect.name != "postgresql":
        raise InvalidConfiguration("sync_bind", f"durable_sa needs PostgreSQL, not {engine.dialect.name}")
    if engine.dialect.is_async:
        refuse_asynchronous("sync_bind", f"{engine.dialect.driver} has no synchronous form")


def refuse_asynchronous(what: str, why: str) -> NoReturn:
    """Refuse what has no synchronous form.

    Raises:
        InvalidConfiguration: with what has one.
    """
    raise InvalidConfiguration(
        what,
        f"{why}, which this needs",
        "Use postgresql+psycopg:// in the URL of Durable, or give it sync_bind=, a sessionmaker, scoped_session or "
        "Engine of psycopg or psycopg2.",
    )


def is_asynchronous_only(bind: Bind) -> bool:
    """Return whether a bind is one of asyncpg, without connecting."""
    return not isinstance(bind, Engine | sessionmaker | scoped_session) and _url_of(bind) is None


def _url_of(bind: object) -> URL | None:
    """Return the URL of a bind for a synchronous engine; None if its driver has no such form."""
    if bind is None:
        bind = default_bind()
    if isinstance(bind, async_sessionmaker):
        bind = bind.kw.get("bind")
    if isinstance(bind, AsyncEngine):
        bind = bind.url
    return synchronous_url(bind) if isinstance(bind, str | URL) else None


def _make_engine(url: URL, source: AsyncEngine | None) -> Engine | None:
    """Make an engine; None if the application's engine of the same URL connects in a way of its own."""
    dialed = dial(url)
    arguments = dialed.connect_args if source is None else private.connect_arguments(source.sync_engine)
    if arguments is None:
        return None
    engine = create_engine(dialed.url, connect_args=arguments, hide_parameters=True)
    if source is None:
        event.listen(engine, "connect", set_date_style)
    else:
        for listener in source.sync_engine.dialect.dispatch.do_connect:
            event.listen(engine, "do_connect", listener)
        if any(_number(source.sync_engine, name) > _number(engine, name) for name in _LISTENERS):
            # They set up a connection in a way that its transactions rely on, and take the driver's asynchronous one.
            return None
    return engine


def _number(engine: Engine, name: str) -> int:
    """Return how many listeners an engine's pool has, with those of its dialect."""
    return len(list(getattr(engine.pool.dispatch, name)))
