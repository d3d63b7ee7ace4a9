"""Where connections lead: to the primary of before, or to the next, and to nothing that a failover has left behind."""

from __future__ import annotations

import logging
import weakref

from sqlalchemy import text
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..database_errors import POOLER_STATES, is_lost, sqlstate

logger = logging.getLogger("durable_sa")

_ISOLATION = text("SELECT current_setting('default_transaction_isolation')")
_LOCATE = text(
    "SELECT current_setting('default_transaction_isolation'), system_identifier,"
    " CASE WHEN NOT pg_is_in_recovery() THEN pg_walfile_name(pg_current_wal_lsn()) END FROM pg_control_system()"
)
"""The isolation that a server has by default, its cluster, and the file whose name begins with its timeline."""
_SAVEPOINT = "durable_locate"


class Timeline:
    """Of the primary that the connections of an engine have led to. A failover begins the next one.

    What is read from a standby may be over: a claim that has been given up, a step that has been recorded. A primary
    that a failover has left behind even has other tasks under the same fences, and takes writes.
    """

    def __init__(self) -> None:
        self.cluster: int | None = None
        self.number = 0
        self.known = True
        """Whether the server tells."""
        self.said = False

    def follow(self, cluster: int, number: int | None) -> None:
        """Take note of where a new connection leads; a standby has no number.

        Raises:
            ConnectionError: not to the primary any more, or to one that was left behind.
        """
        if number is not None and (cluster != self.cluster or number >= self.number):
            self.cluster, self.number, self.said = cluster, number, False
        elif cluster == self.cluster:
            what = "a standby" if number is None else f"a primary that a failover has left behind (timeline {number})"
            if not self.said:
                self.said = True
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
    """What is known of where the connections of an engine lead; its variants and its next pools have its dialect."""
    return _timelines.setdefault(dialect, Timeline())


async def inspect(connection: AsyncConnection) -> str:
    """Find out where a new connection leads. Gives the isolation that it has by default. Leaves no transaction.

    Raises:
        ConnectionError: it does not lead to the primary that others of the engine have led to.
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
            # A service that is like Postgres and has no such files, or rights that were taken away.
            timeline.known = False
            await connection.rollback()
    isolation = (await connection.execute(_ISOLATION)).scalar_one() if row is None else row[0]
    await connection.rollback()
    if row is not None:
        timeline.follow(row[1], _number(row[2]))
    return str(isolation)


def locate(connection: Connection) -> None:
    """Find out where a connection leads in the transaction that it is in, and leave that as it was.

    The application has begun it when the connection left the pool, and set in it what its own statements need.

    Raises:
        ConnectionError: as :func:`inspect`, or the connection is lost.
    """
    timeline = timeline_of(connection.dialect)
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
        timeline.follow(row[1], _number(row[2]))
