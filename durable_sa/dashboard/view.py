"""One request for a page: who asks, what for, and the sections that are read for it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection
from starlette.exceptions import HTTPException

from ..client.reading import fetch
from ..results import TaskInfo
from ..statements import overview
from .access import Access
from .forms import Fields
from .reader import Sections
from .values import Redact, Values

if TYPE_CHECKING:
    from ..client import Durable

T = TypeVar("T")

DAY: Final = 86400.0


class Redirect(Exception):  # noqa: N818 - no error
    """The answer is at another path of the dashboard."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True)
class View:
    """A request for a page."""

    durable: Durable[Any]
    access: Access
    query: Fields
    path: Mapping[str, Any]
    sections: Sections
    redact: Redact | None

    async def rows(
        self,
        name: str,
        statement: Executable,
        /,
        *,
        shared: bool = True,
        within: float | None = None,
        **parameters: Any,
    ) -> list[dict[str, Any]] | None:
        """Return the rows of a statement that is restricted to the user's queues, or None if it takes too long.

        Pages of other users with the same queues may share them, unless it is restricted to something else, too.
        """
        queues = self.access.queue_names
        values = {"queue_names": queues, **parameters}
        key = (None if queues is None else tuple(queues), *sorted(parameters.items())) if shared else None

        def work(connection: Connection) -> list[dict[str, Any]]:
            return self.fetch(connection, statement, values)

        found = await self.sections.read(name, work, key=key, within=within)
        return None if found is None else [dict(row) for row in found]

    def fetch(
        self, connection: Connection, statement: Executable, parameters: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the rows of a statement on a connection of the page."""
        return as_dicts(fetch(connection, self.durable.schema, statement, parameters))

    async def read(
        self, name: str, work: Callable[[Connection], T], *, statements: int = 1, within: float | None = None
    ) -> T | None:
        """Return what a function reads with so many statements, or None if it takes too long."""
        return await self.sections.read(name, work, statements=statements, within=within)

    async def visible(self, task_ids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Place]:
        """Return the names and states of those of these tasks that the user may see."""
        wanted = set(task_ids)
        if not wanted:
            return {}
        statement = overview.visible(self.access.those_of(sorted(wanted)))
        found = await self.rows("related tasks", statement, shared=False)
        return {row["task_id"]: Place(row["task_name"], row["state"]) for row in found or ()}

    async def require_task(self, task_id: uuid.UUID) -> None:
        """Refuse a task that does not exist or that the user may not see.

        Raises:
            HTTPException: 404; 503 if it could not be found out.
        """
        await self.require_tasks([task_id])

    async def require_tasks(self, task_ids: Sequence[uuid.UUID]) -> None:
        """Refuse tasks that do not exist or that the user may not see.

        Raises:
            HTTPException: 404; 503 if it could not be found out.
        """
        found = await self.visible(task_ids)
        if self.sections.late:
            raise HTTPException(503, "The database takes too long to find the task. Try it once more.")
        if missing := set(task_ids) - found.keys():
            raise HTTPException(404, f"There is no task {min(missing)}.")

    def values(self, task_name: str) -> Values:
        """Return what prepares values of a task for being shown."""
        return Values(task_name, self.redact)


class Place(NamedTuple):
    """The name and the state of a task that another one refers to."""

    task_name: str
    state: str


def as_dicts(rows: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    """Return rows as dictionaries by column, and Decimal, the type of selected seconds, as float."""
    return [
        {name: float(value) if isinstance(value, Decimal) else value for name, value in row._mapping.items()}  # pyright: ignore[reportPrivateUsage]
        for row in rows
    ]


_PAYLOADS: Final = ("params", "headers", "output")


def task_data(task: TaskInfo) -> dict[str, Any]:
    """Return a task as data, without payloads."""
    data = {field.name: getattr(task, field.name) for field in fields(task) if field.name not in _PAYLOADS}
    error = task.error
    data["error"] = None if error is None else {"name": error.name, "message": error.message, "step": error.step}
    return data


_AWAITED: Final = re.compile(r"\btask ([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


def relatives(task: TaskInfo) -> list[uuid.UUID]:
    """Return the ids of the other tasks that a task names."""
    awaited = [uuid.UUID(found) for found in _AWAITED.findall(task.waits_for or "")]
    return awaited if task.parent_task_id is None else [task.parent_task_id, *awaited]


def without_hidden(task: TaskInfo, visible: Collection[uuid.UUID]) -> TaskInfo:
    """Return a task that names no other one that the user may not see."""

    def named(found: re.Match[str]) -> str:
        return found[0] if uuid.UUID(found[1]) in visible else "a subtask"

    return replace(
        task,
        parent_task_id=task.parent_task_id if task.parent_task_id in visible else None,
        waits_for=None if task.waits_for is None else _AWAITED.sub(named, task.waits_for),
    )


def seconds_between(begin: datetime | None, end: datetime | None) -> float | None:
    """Return the seconds between two times, if both are known."""
    return None if begin is None or end is None else (end - begin).total_seconds()
