"""Errors of the database: which of them a retry may not meet, and when to retry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from .errors import InvalidState

logger = logging.getLogger("durable_sa")
T = TypeVar("T")

REMINDER_INTERVAL = 60.0
"""Seconds after which a failure that lasts is logged once more, for readers of the last lines of a log."""

LOCK_NOT_AVAILABLE = "55P03"
UNIQUE_VIOLATION = "23505"
UNTRANSLATABLE = "22P05"
"""A character that the encoding of the database does not have."""
CACHED_PLAN_STATES = frozenset({"0A000", "26000", "42P05"})
POOLER_STATES = frozenset({"26000", "42P05", "22P03"})
"""A prepared statement does not exist, exists already or takes other types: another connection has prepared it."""
DRIVERS = frozenset({"asyncpg", "psycopg", "psycopg2"})

UNDEFINED_TABLE = "42P01"
MISSING_TABLE_STATES = frozenset({UNDEFINED_TABLE, "42703", "3F000"})
"""No such table, column or schema: durable's tables are not installed, or older than this version of the package."""

MISSING_DATABASE = "3D000"

READ_ONLY = "25006"
"""A standby, or a server, database or role whose transactions are read-only by default."""

_REFUSED_VALUES = (ValueError, TypeError, ArithmeticError)
_TRANSIENT_CLASSES = ("08", "53", "57", "58")
_TRANSIENT_STATES = frozenset({"40001", "40P01", LOCK_NOT_AVAILABLE, READ_ONLY, "25P03", "XX000"})
_CONFLICT_STATES = frozenset({"40001", "40P01", "57P01", "57P02", "57P05"})
_LOST_STATES = frozenset({"57P01", "57P02", READ_ONLY})


def sqlstate(error: BaseException) -> str | None:
    """Return the server's five-letter code, wherever the driver keeps it; None if the server sent none."""
    cause: Any = error.orig if isinstance(error, DBAPIError) else error
    # SQLAlchemy's error for asyncpg's error about a cached plan has no code; its cause has.
    for source in (cause, getattr(cause, "__cause__", None)):
        for name in ("sqlstate", "pgcode"):
            code = getattr(source, name, None)
            if isinstance(code, str):
                return code
    return None


def is_transient(error: BaseException) -> bool:
    """Return whether the same statement may succeed later: after lost connections, restarts, deadlocks, timeouts."""
    if isinstance(error, PoolTimeout | PendingRollbackError | OSError | asyncio.TimeoutError):
        return True
    if is_about_connection(error):
        return True
    code = sqlstate(error)
    states = _TRANSIENT_STATES | CACHED_PLAN_STATES | POOLER_STATES
    return code is not None and (code[:2] in _TRANSIENT_CLASSES or code in states)


def is_about_connection(error: BaseException) -> bool:
    """Return whether the driver or the connection failed, and not the statement: the server sent no code."""
    if isinstance(error, DBAPIError):
        refused = isinstance(error.orig, _REFUSED_VALUES)
        return error.connection_invalidated or (sqlstate(error) is None and not refused)
    return sqlstate(error) is None and _is_of_driver(error)


def _is_of_driver(error: BaseException) -> bool:
    """Return whether a driver has raised an error that SQLAlchemy lets pass: its connection is in no usable state."""
    if isinstance(error, _REFUSED_VALUES) or not isinstance(error, Exception):
        return False
    module: object = type(error).__module__
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__") if type(error).__module__ == "builtins" else module
    return str(module).partition(".")[0] in DRIVERS


def is_conflict(error: BaseException) -> bool:
    """Return whether a transaction lost against another one, or lost its connection, and may be retried as a whole."""
    if not isinstance(error, DBAPIError):
        return False
    return is_lost(error) or sqlstate(error) in _CONFLICT_STATES


def is_lost(error: BaseException) -> bool:
    """Return whether the connection was lost, ended by an administrator or a crash, or leads to a read-only server.

    That server is no longer, or not yet, the primary: another connection may lead to the one that is.
    """
    if not isinstance(error, DBAPIError):
        return False
    code = sqlstate(error) or ""
    return error.connection_invalidated or code[:2] == "08" or code in _LOST_STATES


def is_mixed_up(error: BaseException) -> bool:
    """Return whether a pooler has sent a prepared statement to a server connection that does not know it.

    The transaction has failed, and another connection prepares the statement anew.
    """
    return sqlstate(error) in POOLER_STATES


def is_read_only(error: BaseException) -> bool:
    """Return whether the database takes no writes."""
    return sqlstate(error) == READ_ONLY


def is_refused(error: BaseException) -> bool:
    """Return whether the server lets no connection in: the database is missing, or the role or its password is."""
    code = sqlstate(error) or ""
    return code == MISSING_DATABASE or code[:2] == "28"


def refuse_read_only(error: BaseException) -> None:
    """Raise an error of ours if a call has failed because the database takes no writes.

    Raises:
        InvalidState: the call failed for that.
    """
    if is_read_only(error):
        raise InvalidState(
            "the database",
            "read-only: a standby, or default_transaction_read_only is on",
            "Connect to the primary (target_session_attrs in the URL finds it among several hosts), or call again once "
            "the database takes writes. Workers wait for that by themselves.",
        ) from error


def without_values(error: BaseException) -> BaseException:
    """Return the error as it may be logged and stored: with the server's first line, and no values.

    Values of rows are in the lines that follow, and SQLAlchemy adds those of parameters unless the engine hides them.
    """
    if not isinstance(error, DBAPIError):
        return error
    lines = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
    said: Any = Exception(lines[0])
    said.sqlstate = sqlstate(error)
    bare = type(error)(None, None, said, connection_invalidated=error.connection_invalidated)
    return bare.with_traceback(error.__traceback__)


def reason(error: BaseException) -> str:
    """Describe for the log why a statement failed: the kind of error, and the server's first line.

    The line is left out unless it is about the state of the database, as it may contain values.
    """
    name = type(error).__name__
    if is_read_only(error):
        return "the database is read-only"
    if not (is_transient(error) or is_refused(error)):
        return name
    cause = error.orig if isinstance(error, DBAPIError) else error
    # The driver's message, which its adapter repeats with the name of a class in front.
    lines = str(getattr(cause, "__cause__", None) or cause).strip().splitlines()
    return f"{name}: {lines[0][:300]}" if lines else name


def backoff(attempt: int, *, base: float = 0.05, most: float = 5.0) -> float:
    """Return the seconds to wait before the next try, with jitter, so that a fleet does not come back all at once."""
    return min(most, base * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.0)  # noqa: S311


async def retrying(
    call: Callable[[], Awaitable[T]],
    *,
    tries: int | None = None,
    when: Callable[[BaseException], bool] = is_transient,
    most: float = 5.0,
) -> T:
    """Make a call, up to `tries` times (None: any number) as long as it fails with errors that `when` accepts.

    The pauses in between grow from 0.05 seconds to `most`.
    """
    failures = 0
    while True:
        try:
            return await call()
        except Exception as error:
            failures += 1
            if failures == tries or not when(error):
                raise
        await asyncio.sleep(backoff(failures - 1, most=most))


class Outage:
    """A time in which the database does not answer several loops of a worker: its end is logged once."""

    def __init__(self) -> None:
        self._began: float | None = None

    def begin(self) -> None:
        """Note that a failure has been logged."""
        if self._began is None:
            self._began = time.monotonic()

    def end(self) -> None:
        """Log that the database answers, if a failure has been logged before."""
        if self._began is not None:
            logger.info("the database answers again, after %.1f seconds", time.monotonic() - self._began)
            self._began = None


class FailureLog:
    """Logs the failures of a loop that retries: each kind of them once, and once a minute for as long as they last.

    `what` is the subject of its lines. The first `patience` failures in a row that come from the state of the database
    are not logged.
    """

    def __init__(self, what: str, outage: Outage | None = None, *, patience: int = 0) -> None:
        self._what = what
        self._outage = outage or Outage()
        self._patience = patience
        self._failures = 0
        self._silent_until: dict[str, float] = {}

    def failed(self, error: BaseException, *, logged: bool = False) -> None:
        """Log a failure unless the caller, or this object, has logged one of its kind."""
        self._failures += 1
        outage = is_transient(error) or is_refused(error)
        if logged or (outage and self._failures <= self._patience):
            return
        kind = reason(error)
        now = time.monotonic()
        if now < self._silent_until.get(kind, 0.0):
            return
        self._silent_until[kind] = now + REMINDER_INTERVAL
        if outage:
            self._outage.begin()
            logger.warning("%s failed (%s), retrying", self._what, kind)
        else:
            logger.error("%s failed, retrying", self._what, exc_info=without_values(error))

    def succeeded(self) -> None:
        """Note a success, after which every kind of failure is logged again."""
        if self._failures:
            self._failures = 0
            self._silent_until.clear()
            self._outage.end()


class RetryPauses:
    """The pauses of a loop that retries until it succeeds, and what it logs; `what` is the subject of its log lines.

    A pause ends early when `stop` is set. A failure that comes from the state of the database is logged once it lasts.
    """

    def __init__(self, what: str, stop: asyncio.Event | None = None, outage: Outage | None = None) -> None:
        self._log = FailureLog(what, outage, patience=3)
        self._stop = stop
        self._failures = 0

    def reset(self) -> None:
        """Begin with short pauses anew, after a success."""
        self._failures = 0
        self._log.succeeded()

    async def pause(self, error: Exception, *, logged: bool = False) -> None:
        """Wait before the next try. Log the error unless the caller has logged it."""
        self._log.failed(error, logged=logged)
        seconds = backoff(self._failures)
        self._failures += 1
        if self._stop is None:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()
