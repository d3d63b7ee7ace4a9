"""Checks that connections lead to the same primary as before or to its successor, never to one that was left behind."""

from __future__ import annotations

import logging
import weakref

from sqlalchemy import text
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..database_errors import POOLER_STATES, is_lost, sqlstate
from . import citus

logger = logging.getLogger("durable_sa")

_ISOLATION = text(f"SELECT current_setting('default_transaction_isolation'), {citus.INSTALLED}")
_LOCATE = text(
    f"{_ISOLATION}, system_identifier,"
    " CASE WHEN NOT pg_is_in_recovery() THEN pg_walfile_name(pg_current_wal_lsn()) END FROM pg_control_system()"
)
"""As `_ISOLATION`, and a server's cluster, and the WAL file whose name begins with its timeline."""
_SAVEPOINT = "durable_locate"


class Timeline:
    """The timeline of the primary that the connections of an engine lead to. A failover begins the next one.

    Rows that a standby returns may be out of date: a claim that has been given up, a step that is not recorded yet. A
    primary that a failover has left behind even has other runs under the same fences, and takes writes.
    """

    def __init__(self) -> None:
        self.cluster: int | None = None
        self.number = 0
        self.known = True
        """True if the server reports it."""
        self.logged = False

    def follow(self, cluster: int, number: int | None) -> None:
        """Follow to the server that a new connection leads to; a standby has no number.

        Raises:
            ConnectionError: the server is a standby, or a primary that was left behind.
        """
        if number is not None and (cluster != self.cluster or number >= self.number):
            self.cluster, self.number, self.logged = cluster, number, False
        elif cluster == self.cluster:
            what = "a standby" if number is None else f"a primary that a failover has left behind (timeline {number})"
            if not self.logged:
                self.logged = True
                logger.warning(
                    "the database's address leads to %s, after timeline %d, and is not used; if it was restored to an "
                    "earlier state on purpose, restart this process",
                    what,
                    self.number,
                )
            raise ConnectionError(f"the database's address leads to {what}")


_timelines: weakref.WeakKeyDictionary[Dialect, Timeline] = weakref.WeakKeyDictionary()


def _number(file: str | None) -> int | None:
    return None if file is None else int(file[:8], 16)


def timeline_of(dialect: Dialect) -> Timeline:
    """Return the timeline of an engine, of its variants and of its later pools, which share its dialect."""
    return _timelines.setdefault(dialect, Timeline())


async def inspect(connection: AsyncConnection) -> str:
    """Check which server a new connection leads to, and return its default isolation. Leaves no transaction.

    Raises:
        ConnectionError: it does not lead to the primary of the engine's other connections.
    """
    timeline = timeline_of(connection.dialect)
    row = None
    if timeline.known:
        try:
            row = (await connection.execute(_LOCATE)).one()
        except DBAPIError as error:
            state = sqlstate(error) or ""
            if is_lost(error) or state[:2] in ("", "53", "57") or state in POOLER_STATES:
                raise
            # A service that resembles Postgres has no such files, or the right to read them was revoked.
            timeline.known = False
            await connection.rollback()
    isolation, has_citus, *place = (await connection.execute(_ISOLATION)).one() if row is None else row
    await connection.rollback()
    if has_citus:
        citus.notice(connection.dialect)
    if place:
        timeline.follow(place[0], _number(place[1]))
    return str(isolation)


def locate(connection: Connection, timeline: Timeline | None = None) -> None:
    """Check which server a connection leads to, in the transaction that it is in, and leave that unchanged.

    The application has begun the transaction at checkout, and has set in it what its own statements need. The timeline
    is that of the connection's engine if none is given.

    Raises:
        ConnectionError: as :func:`inspect`, or the connection is lost.
    """
    timeline = timeline or timeline_of(connection.dialect)
    if not timeline.known:
        return
    row = None
    failure: type[Exception] = connection.dialect.loaded_dbapi.Error
    try:
        cursor = connection.connection.cursor()
        cursor.execute(f"SAVEPOINT {_SAVEPOINT}")
        try:
            cursor.execute(str(_LOCATE))
            row = cursor.fetchone()
        except failure:
            timeline.known = False
        cursor.execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
        cursor.execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")
        cursor.close()
    except failure as error:
        raise ConnectionError("a connection was lost before its first transaction") from error
    if row is not None:
        if row[1]:
            citus.notice(connection.dialect)
        timeline.follow(row[2], _number(row[3]))
