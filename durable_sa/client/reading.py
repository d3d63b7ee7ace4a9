"""Reading tasks: one with its history, and lists by filters."""

from __future__ import annotations

import uuid
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast, overload

from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.sql.expression import SelectBase

from ..app import App
from ..database.scripts import SessionOrConnection, call_within, read
from ..errors import InvalidConfiguration, TaskNotFound
from ..ids import plain
from ..models import SCHEMA
from ..results import (
    HistoryEntry,
    Page,
    SpawnResult,
    TaskFilter,
    TaskHandle,
    TaskInfo,
    TaskStatus,
    id_of,
)
from ..statements import history, reading
from ..validation import integer
from .history import Records, decoded, entries, stored_error, waits_for

if TYPE_CHECKING:
    from ..statements.reading import Order, Position, Where

AnyTask = uuid.UUID | SpawnResult[Any] | TaskHandle[Any]

MAX_LIMIT = 10_000
"""Tasks of one page."""
_ORDERS = ("newest", "oldest", "running")


class Reading(App):
    """The part of a client that reads tasks."""

    async def get_task(self, task: AnyTask, *, payloads: bool = False) -> TaskInfo:
        """Return a task as it is now; its params, headers, output and whole error only with `payloads`.

        Raises:
            TaskNotFound: there is no such task.
        """
        task_id = id_of(task)
        return await read(self.database, lambda connection: self._get(connection, task_id, payloads))

    @overload
    def get_task_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        task: AnyTask,
        *,
        payloads: bool = False,
    ) -> Coroutine[Any, Any, TaskInfo]: ...
    @overload
    def get_task_with(
        self, session: Session | scoped_session[Any] | Connection, task: AnyTask, *, payloads: bool = False
    ) -> TaskInfo: ...
    def get_task_with(self, session: SessionOrConnection, task: AnyTask, *, payloads: bool = False) -> Any:
        """Return a task as :meth:`get_task` does, in the caller's transaction."""
        task_id = id_of(task)
        return call_within(session, self.schema, lambda connection: self._get(connection, task_id, payloads))

    async def get_history(self, task: AnyTask, *, payloads: bool = False) -> list[HistoryEntry]:
        """Return what happened in a task: attempts, steps with their failed tries, waits and subtasks.

        The entries are in the order of their beginnings. Values of steps and whole errors only with `payloads`.

        Raises:
            TaskNotFound: there is no such task.
        """
        task_id = id_of(task)
        return await read(
            self.database, lambda connection: read_history(connection, self.schema, task_id, payloads=payloads)
        )

    async def list_tasks(
        self, where: Where | None = None, *, order: Order = "newest", limit: int = 50, after: str | None = None
    ) -> Page[TaskInfo]:
        """Return a page of the tasks that match a :class:`TaskFilter`, or whose ids a select returns.

        The newest come first, by the time of their spawns; subtasks beside the task at whose root they are. The order
        is `newest`, `oldest`, or `running`: only running tasks, first those whose attempt has run for longest. Give
        `page.next` as `after` for the next page: each task comes once, also if others come and go meanwhile. There are
        no payloads in it, and messages of errors are without values.

        Raises:
            InvalidConfiguration: a `limit` below 1 or above 10,000, or `after` is not what a page had.
        """
        arguments = _checked(where, order, limit, after)
        return await read(self.database, lambda connection: self._list(connection, *arguments))

    @overload
    def list_tasks_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        where: Where | None = None,
        *,
        order: Order = "newest",
        limit: int = 50,
        after: str | None = None,
    ) -> Coroutine[Any, Any, Page[TaskInfo]]: ...
    @overload
    def list_tasks_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        where: Where | None = None,
        *,
        order: Order = "newest",
        limit: int = 50,
        after: str | None = None,
    ) -> Page[TaskInfo]: ...
    def list_tasks_with(
        self,
        session: SessionOrConnection,
        where: Where | None = None,
        *,
        order: Order = "newest",
        limit: int = 50,
        after: str | None = None,
    ) -> Any:
        """Return a page of tasks as :meth:`list_tasks` does, in the caller's transaction."""
        arguments = _checked(where, order, limit, after)
        return call_within(session, self.schema, lambda connection: self._list(connection, *arguments))

    def _get(self, connection: Connection, task_id: uuid.UUID, payloads: bool) -> TaskInfo:
        return info(_task(connection, self.schema, task_id, payloads=payloads))

    def _list(
        self, connection: Connection, where: Where, order: Order, limit: int, position: Position | None
    ) -> Page[TaskInfo]:
        rows: Sequence[Row[Any]] = ()
        if isinstance(where, TaskFilter) and order != "running":
            ids = reading.recent_page(where, order, position, limit + 1)
            rows = self._fetch(connection, reading.infos(ids, order))
        if len(rows) <= limit:
            ids = reading.page(where, order, position, limit + 1)
            rows = self._fetch(connection, reading.infos(ids, order))
        items = [info(row) for row in rows[:limit]]
        return Page(items, _place(items[-1], order) if len(rows) > limit else None)

    def _fetch(
        self, connection: Connection, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        return fetch(connection, self.schema, statement, parameters)


def _task(connection: Connection, schema: str, task_id: uuid.UUID, *, payloads: bool) -> Row[Any]:
    rows = fetch(connection, schema, reading.infos(None, payloads=payloads), {"task_id": task_id})
    if not rows:
        raise TaskNotFound(task_id)
    return rows[0]


def search_tasks(
    connection: Connection, schema: str, where: Where, order: Order, limit: int, after: str | None
) -> tuple[Page[TaskInfo], bool]:
    """Return a page of tasks as far as it is among the next `reading.SEARCHED`, and whether there are none behind them.

    If there are, `next` of a page that is not full is the end of what was searched. It is for the orders by ids.

    Raises:
        InvalidConfiguration: as `list_tasks`.
    """
    where, order, limit, position = _checked(where, order, limit, after)
    ends = fetch(connection, schema, reading.search_end(where, order, position))
    end = ends[0].task_id if len(ends) > 1 else None
    ids = reading.part_of_page(where, order, position, limit + 1, end)
    rows = fetch(connection, schema, reading.infos(ids, order))
    items = [info(row) for row in rows[:limit]]
    if len(rows) > limit:
        return Page(items, _place(items[-1], order)), True
    return Page(items, None if end is None else str(end)), end is None


def read_history(
    connection: Connection, schema: str, task_id: uuid.UUID, *, payloads: bool = False
) -> list[HistoryEntry]:
    """Return what happened in a task.

    Raises:
        TaskNotFound: there is no such task.
    """
    parameters = {"task_id": task_id}
    task = _task(connection, schema, task_id, payloads=False)
    runs, checkpoints, waits, children, steps = (
        fetch(connection, schema, statement, {**parameters, **more})
        for statement, more in (
            (history.RUNS, {}),
            (history.CHECKPOINTS, {"with_payloads": payloads}),
            (history.WAITS, {}),
            (history.CHILDREN, {}),
            (history.STEPS_IN_PROGRESS, {"with_payloads": payloads}),
        )
    )
    return entries(Records(task, runs, checkpoints, waits, children, steps), payloads=payloads)


def fetch(
    connection: Connection, schema: str, statement: Executable, parameters: Mapping[str, Any] | None = None
) -> Sequence[Row[Any]]:
    """Execute a statement by SQLAlchemy, because it may contain a select of the application."""
    options: dict[str, Any] = {}
    if schema != SCHEMA:
        given: dict[str, Any] = connection.get_execution_options().get("schema_translate_map") or {}
        options["schema_translate_map"] = {**given, SCHEMA: schema}
    return connection.execute(statement, parameters, execution_options=options).all()


def info(row: Row[Any]) -> TaskInfo:
    """Return a task as it was read."""
    fields = row._mapping  # pyright: ignore[reportPrivateUsage]

    whole = "params" in fields
    error = stored_error(row.error, payloads=whole)
    return TaskInfo(
        task_id=plain(row.task_id),
        task_name=row.task_name,
        version=row.version,
        queue_name=row.queue_name,
        status=TaskStatus(row.state),
        attempt=row.attempt,
        key=row.key,
        limit_key=row.limit_key,
        parent_task_id=None if row.parent_task_id is None else plain(row.parent_task_id),
        created_at=row.created_at,
        available_at=row.available_at,
        first_started_at=row.first_started_at,
        finished_at=row.finished_at,
        error=None if error is None else error.info,
        waits_for=waits_for(row),
        started_at=row.started_at,
        worker=row.worker,
        priority=row.priority,
        failures=row.failures,
        max_attempts=row.max_attempts,
        lost_workers=row.lease_losses,
        params=decoded(fields.get("params")),
        headers=decoded(fields.get("headers")),
        output=decoded(fields.get("output")),
    )


def check_where(where: object) -> Where:
    """Return a filter or a select of task ids.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(where, TaskFilter):
        return where
    if isinstance(where, SelectBase):
        if len(where.selected_columns) != 1:
            raise TypeError("the select must return ids of tasks alone: select(TaskRow.task_id)")
        return cast("Where", where)
    raise TypeError(f"tasks are chosen by a TaskFilter or a select(TaskRow.task_id), not {type(where).__name__}")


def _checked(where: object, order: Order, limit: int, after: str | None) -> tuple[Where, Order, int, Position | None]:
    if order not in _ORDERS:
        raise InvalidConfiguration("order", f"{order!r} is none of {', '.join(_ORDERS)}")
    integer(limit, "limit", minimum=1, maximum=MAX_LIMIT)
    chosen = TaskFilter() if where is None else check_where(where)
    return chosen, order, limit, None if after is None else _position(str(after), order)


def _place(task: TaskInfo, order: Order) -> str:
    if order == "running" and task.started_at is not None:
        return f"{task.started_at.isoformat()}/{task.task_id}"
    return str(task.task_id)


def _position(after: str, order: Order) -> Position:
    moment, _, task_id = after.rpartition("/")
    try:
        started_at = datetime.fromisoformat(moment) if moment else None
        if (order == "running") != (started_at is not None and started_at.tzinfo is not None):
            raise ValueError
        return started_at and started_at.astimezone(UTC), uuid.UUID(task_id)
    except (ValueError, OverflowError):
        shown = repr(after[:80])
        remedy = f"Give the `next` of the page before, which was listed with order={order!r} as well."
        raise InvalidConfiguration("after", f"{shown} is not the end of a page", remedy) from None
