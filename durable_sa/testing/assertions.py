"""The tasks that an open transaction has spawned, which its rollback will undo."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar, cast, overload

from sqlalchemy import ColumnElement, Row, case, false, func, literal_column, null, select
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from ..app import clients
from ..client import Durable
from ..database.scripts import SessionOrConnection
from ..errors import DurableError
from ..models import SCHEMA, TaskRow
from ..options import SpawnOptions
from ..policies import MAX_LOST_WORKERS, CancellationPolicy, RetryStrategy
from ..results import TaskErrorInfo, TaskInfo, TaskStatus
from ..serialization.canonical import encode_arguments
from ..serialization.codec import UNTYPED, Codec
from ..serialization.failures import stored_failure
from ..statements.expressions import as_text
from ..tasks import Task
from ..validation import seconds

__all__ = ["assert_spawned", "spawned"]

T = TypeVar("T")

_ANY: Final[Any] = object()
_NULL: Final = "null"
_NOT_STORED: Final = ("on_conflict", "max_delay")
_WITH_DEFAULT: Final = ("max_attempts", "retry_strategy", "max_lost_workers", "queue_name", "priority", "weight")
"""Options of which each task has a value, its own or the client's if the spawn names none."""
_DELAY_TOLERANCE: Final = timedelta(seconds=1)
"""Difference of two times that one statement takes from the clock, at most."""

_task = TaskRow.__table__.alias("spawned_task")
# Of the rows that a transaction sees, those of a transaction in progress are its own. One that it has only changed was
# created before it began.
_writer: ColumnElement[Any] = literal_column(
    "(((pg_current_xact_id()::text::bigint >> 32) << 32) + spawned_task.xmin::text::bigint)::text::xid8"
)
_status = func.pg_xact_status(_writer)
_own = case((_task.c.created_at >= func.transaction_timestamp(), _status == "in progress"), else_=false())

_JSON: Final = ("params", "headers", "output", "error")
SPAWNED = (
    select(
        *(column for column in _task.c if column.name not in _JSON),
        *(as_text(_task.c[name]).label(name) for name in _JSON),
        *(null().label(name) for name in ("version",) if name not in _task.c),
    )
    .where(_own)
    .order_by(_task.c.created_at, _task.c.task_id)
)
"""The tasks that the transaction has spawned, in their order."""


def within(executor: SessionOrConnection, function: Callable[[Connection], T]) -> T | Coroutine[Any, Any, T]:
    """Call a function with the connection of an executor; with an asynchronous one, return a coroutine that does so."""
    if isinstance(executor, AsyncConnection):
        return executor.run_sync(function)
    if isinstance(executor, AsyncSession | async_scoped_session):
        session: AsyncSession = executor() if isinstance(executor, async_scoped_session) else executor
        return session.run_sync(lambda inner: function(connection_of(inner)))
    if isinstance(executor, Connection):
        return function(executor)
    if isinstance(executor, Session | scoped_session):  # pyright: ignore[reportUnnecessaryIsInstance]
        return function(connection_of(executor))
    raise not_an_executor(executor)


def not_an_executor(executor: object) -> TypeError:
    """Return the error about what is neither a session nor a connection."""
    return TypeError(
        "expected a Session, scoped_session, Connection, AsyncSession, async_scoped_session or AsyncConnection, "
        f"not {type(executor).__name__}"
    )


def connection_of(session: Session | scoped_session[Any]) -> Connection:
    """Return the session's connection for durable's tables; asking for it does not flush."""
    return session.connection(bind_arguments={"mapper": TaskRow})


@overload
def spawned(
    session: AsyncSession | async_scoped_session[Any] | AsyncConnection, *, durable: Durable[Any] | None = None
) -> Coroutine[Any, Any, list[TaskInfo]]: ...
@overload
def spawned(
    session: Session | scoped_session[Any] | Connection, *, durable: Durable[Any] | None = None
) -> list[TaskInfo]: ...
def spawned(session: SessionOrConnection, *, durable: Durable[Any] | None = None) -> Any:
    """Return the tasks that the open transaction of a session or connection has spawned, in their order.

    With an asynchronous one this is a coroutine. Tasks that were committed before are not among them. A client with a
    `schema` of its own is passed as `durable`.
    """
    return within(session, lambda connection: [task_info(row) for row in _rows(connection, durable)])


def _rows(connection: Connection, durable: Durable[Any] | None) -> Sequence[Row[Any]]:
    options: dict[str, Any] = {}
    if durable is not None and durable.schema != SCHEMA:
        options["schema_translate_map"] = {SCHEMA: durable.schema}
    return connection.execute(SPAWNED, execution_options=options).all()


@overload
def assert_spawned(
    session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
    task: Task[Any, Any] | str,
    params: Any = ...,
    *,
    durable: Durable[Any] | None = None,
    **options: Any,
) -> Coroutine[Any, Any, TaskInfo]: ...
@overload
def assert_spawned(
    session: Session | scoped_session[Any] | Connection,
    task: Task[Any, Any] | str,
    params: Any = ...,
    *,
    durable: Durable[Any] | None = None,
    **options: Any,
) -> TaskInfo: ...
def assert_spawned(
    session: SessionOrConnection,
    task: Task[Any, Any] | str,
    params: Any = _ANY,
    *,
    durable: Durable[Any] | None = None,
    **options: Any,
) -> Any:
    """Assert that the open transaction has spawned a task, and return it.

    With an asynchronous session this is a coroutine. `params` are compared as the task encodes them. The options are
    those of a spawn; what is not named matches anything. Headers that are named must be among those of the task. None
    stands for no value, as in `idempotency_key=None`; it matches anything where the task or the client has a value.
    `on_conflict` and `max_delay` match anything, because a task does not show them. A client with a `schema` of its own
    is passed as `durable`.

    Raises:
        AssertionError: it has not; the message lists the tasks that it has spawned.
        TypeError: there is no such option, or `task` is neither a task nor a name.
    """
    if not isinstance(task, Task | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        shown = getattr(task, "__name__", type(task).__name__)
        raise TypeError(f"assert_spawned() takes a task, made by @task, or the name of one, not {shown}")
    expected = _Expected(task, params, options, durable)

    def look(connection: Connection) -> TaskInfo:
        rows = _rows(connection, durable)
        for row in rows:
            if expected.matches(row):
                return task_info(row)
        raise AssertionError(f"{expected} was not spawned; spawned were {_listed(rows)}")

    return within(session, look)


class _Expected:
    """A task that a test expects to be spawned."""

    def __init__(
        self, task: Task[Any, Any] | str, params: Any, options: dict[str, Any], durable: Durable[Any] | None
    ) -> None:
        self._name = task if isinstance(task, str) else task.name
        self._options = options
        self._any_params = params is _ANY
        self._codec: Codec[Any] = UNTYPED
        if not self._any_params:
            found = _task_of(task, durable) if isinstance(task, str) else task
            self._params = self._encoded(found, params, by_name=isinstance(task, str))
        known = {*SpawnOptions.__annotations__, *_task.c.keys()}
        if unknown := options.keys() - known:
            raise TypeError(f"assert_spawned() got an unexpected keyword argument {min(unknown)!r}")

    def _encoded(self, task: Task[Any, Any] | None, params: Any, *, by_name: bool) -> str:
        if task is not None:
            with suppress(*((DurableError,) if by_name else ())):  # plain JSON, as it may be given by name
                text = task.encode_params(params) or _NULL
                self._codec = task.params_codec if task.takes_params else UNTYPED
                return text
        return UNTYPED.encode(params, "params")

    def __str__(self) -> str:
        shown = [repr(self._name)]
        if not self._any_params:
            shown.append(f"params={self._params}")
        return ", ".join([*shown, *(f"{name}={value!r}" for name, value in self._options.items())])

    def matches(self, row: Row[Any]) -> bool:
        """Return whether a stored task is the expected one."""
        if row.task_name != self._name:
            return False
        if not self._any_params and not self._has_params(row.params):
            return False
        return all(_has_option(row, name, value) for name, value in self._options.items())

    def _has_params(self, stored: str | None) -> bool:
        if stored is None or _NULL in (stored, self._params):
            return (stored or _NULL) == self._params
        # By meaning: members of a set may be in another order.
        texts = (self._codec.decode(text, "params") for text in (stored, self._params))
        first, second = (encode_arguments([value], {}, "params") for value in texts)
        return first == second


def _task_of(name: str, durable: Durable[Any] | None) -> Task[Any, Any] | None:
    """Return the task of a name, of the client or of the first one of the process that knows it."""
    apps = [app for _, app in sorted(clients.items())] if durable is None else [durable]
    return next((app.tasks[name] for app in apps if name in app.tasks), None)


def _has_option(row: Row[Any], name: str, value: Any) -> bool:
    if name in _NOT_STORED or (value is None and name in _WITH_DEFAULT):
        return True
    match name:
        case "headers":
            return dict(value or {}).items() <= _headers(row).items()
        case "delay" | "available_at" if name == "delay" or value is None:
            begins: datetime | None = row.available_at
            delay = timedelta(seconds=0.0 if value is None else seconds(value, "delay"))
            return begins is not None and abs(begins - row.created_at - delay) <= _DELAY_TOLERANCE
        case "retry_strategy":
            stored = RetryStrategy(
                row.retry_kind, row.retry_base_delay, row.retry_factor, row.retry_max_backoff, row.retry_jitter
            )
            return bool(stored == value)
        case "cancellation":
            limits = cast("CancellationPolicy", value or CancellationPolicy())
            # Checked policies hold seconds.
            pairs = (
                (row.max_pending_time, cast("float | None", limits.max_pending_time)),
                (row.max_running_time, cast("float | None", limits.max_running_time)),
            )
            return all(limit == (None if part is None else timedelta(seconds=part)) for limit, part in pairs)
        case "unique":
            return bool(row.unique_key == value)
        case "limit_key":
            return bool((row.limit_key or None) == value)
        case "max_lost_workers":
            return bool((MAX_LOST_WORKERS if row.max_lost_workers is None else row.max_lost_workers) == value)
        case "weight":
            return bool((1 if row.weight is None else row.weight) == value)
        case _:
            return bool(getattr(row, name) == value)


def _headers(row: Row[Any]) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(row.headers or "{}")
    return {name: value for name, value in found.items() if not name.startswith("durable::")}


def _listed(rows: Any) -> str:
    shown = [
        f"{row.task_name!r} (params={row.params}, queue_name={row.queue_name!r}, "
        f"key={_key(row)!r}, limit_key={row.limit_key or None!r})"
        for row in rows
    ]
    return "; ".join(shown) or "none"


def _key(row: Row[Any]) -> str | None:
    """Return the idempotency key of a task, or its unique key: it has one of them at most."""
    key: str | None = row.idempotency_key
    return row.unique_key if key is None else key


def task_info(row: Row[Any]) -> TaskInfo:
    """Return the description of a task, from a row of :data:`SPAWNED`."""
    what = f"task {row.task_id}"
    return TaskInfo(
        task_id=row.task_id,
        task_name=row.task_name,
        version=row.version,
        queue_name=row.queue_name,
        status=TaskStatus(row.state),
        attempt=row.attempt,
        key=_key(row),
        limit_key=row.limit_key or None,
        parent_task_id=row.parent_task_id,
        created_at=row.created_at,
        available_at=row.available_at,
        first_started_at=row.first_started_at,
        finished_at=row.finished_at,
        error=None if row.error is None else TaskErrorInfo(*stored_failure(row.error, what)),
        waits_for=None,
        started_at=row.started_at,
        priority=row.priority,
        failures=row.failures,
        max_attempts=row.max_attempts,
        params=None if row.params is None else UNTYPED.decode(row.params, what),
        headers=_headers(row),
        output=None if row.output is None else UNTYPED.decode(row.output, what),
    )
