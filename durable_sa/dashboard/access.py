"""Who may see and do what: the answer of an application's `auth`, and the limits that it puts on statements."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from sqlalchemy import Select, Text, bindparam, false, func, select, union_all
from sqlalchemy.dialects.postgresql import ARRAY

from ..client.reading import check_where
from ..errors import InvalidConfiguration
from ..models import TaskRow
from ..names import validate_name
from ..results import TaskFilter, TaskStatus
from ..statements.expressions import constant
from ..statements.reading import Where, by_index, conditions, matching
from ..validation import instance

ACTIONS: Final = frozenset({"cancel", "retry", "rewind", "fork", "send", "emit", "pause", "trigger", "limit", "delete"})
"""The names of what a user may be allowed to do. Not all of them have a button yet."""


@dataclass(frozen=True)
class Access:
    """The permissions of a user in the dashboard, as `auth` returns them for a request.

    Raises:
        InvalidConfiguration, InvalidName: a user without a name, an action that does not exist, a bad queue name.
        TypeError: `where` is neither a filter nor a select of task ids.
    """

    user: str
    """The name that is logged with each action."""
    actions: Collection[str] = frozenset()
    """Out of cancel, retry, rewind, fork, send, emit, pause, trigger, limit, delete; none by default."""
    queues: Collection[str] | None = None
    """The queues whose tasks, events and schedules are shown; None for all."""
    payloads: bool = False
    """Show params, headers, results, payloads of events and messages, published values, items of streams, lines of
    logs, and the values in errors."""
    where: Where | None = None
    """The tasks that are shown: a `TaskFilter`, or a `select(TaskRow.task_id)`. Pages that are not about tasks are
    refused if it is set."""

    def __post_init__(self) -> None:
        instance(self.user, str, "user")
        if not self.user:
            raise InvalidConfiguration("user", "it is empty", "Give the user's name or id as a text.")
        for name, given in (("actions", self.actions), ("queues", self.queues)):
            if isinstance(given, str):
                raise InvalidConfiguration(name, f"{given!r} is a text", f"Give a set: {name}={{{given!r}}}.")
        actions = frozenset(self.actions)
        if unknown := actions - ACTIONS:
            raise InvalidConfiguration(
                "actions", f"{min(map(str, unknown))!r} is none", f"There are {', '.join(sorted(ACTIONS))}."
            )
        object.__setattr__(self, "actions", actions)
        if self.queues is not None:
            object.__setattr__(self, "queues", frozenset(validate_name("queue", name) for name in self.queues))
        if self.where is not None:
            check_where(self.where)

    def may(self, action: str) -> bool:
        """Return whether an action is allowed."""
        return action in self.actions

    @property
    def only_tasks(self) -> bool:
        """True if pages and actions that are not about tasks are refused."""
        return self.where is not None

    def sees_queue(self, name: str) -> bool:
        """Return whether what belongs to a queue is shown."""
        return self.queues is None or name in self.queues

    @property
    def queue_names(self) -> list[str] | None:
        """The queues as a parameter of a statement; None for all."""
        return None if self.queues is None else sorted(self.queues)

    def tasks(self, chosen: TaskFilter | None = None) -> Where:
        """Restrict a filter to the tasks that are shown."""
        chosen = TaskFilter() if chosen is None else chosen
        if self.queues is not None and chosen.queue_name is None and len(self.queues) == 1:
            chosen = replace(chosen, queue_name=next(iter(self.queues)))
        inside = self.queues is None or chosen.queue_name in self.queues
        if self.where is None and inside:
            # A filter alone is looked up by indexes; see `statements.reading`.
            return chosen
        if self.where is None and self.queues and chosen.queue_name is None and _is_rare(chosen):
            return _by_queue(chosen, self.queues)
        found = select(TaskRow.task_id).where(*matching(chosen))
        if not inside:
            found = found.where(_among(self.queues or ()) if chosen.queue_name is None else false())
        return found if self.where is None else found.where(*conditions(self.where))

    def those_of(self, task_ids: Iterable[uuid.UUID]) -> Where:
        """Return the tasks of these ids that are shown."""
        wanted = TaskRow.task_id.in_(list(task_ids))
        where = self.tasks()
        if isinstance(where, TaskFilter):
            return select(TaskRow.task_id).where(wanted, *matching(where))
        return cast("Select[Any]", where).where(wanted)


def _is_rare(chosen: TaskFilter) -> bool:
    """Return whether an index finds the tasks of a filter, and few of them are among all tasks."""
    return chosen.error_name is not None or (bool(chosen.states) and TaskStatus.COMPLETED not in chosen.states)


def _by_queue(chosen: TaskFilter, queues: Collection[str]) -> Select[Any]:
    """Select the tasks of a filter in several queues, each by the index that begins with its name."""
    parts = [by_index(replace(chosen, queue_name=name)) for name in sorted(queues)]
    every = union_all(*(part for part in parts if part is not None)).subquery("every")
    # OFFSET keeps the planner from walking through all tasks in the order of their ids instead.
    return select(every.c.task_id).offset(constant(0))


def _among(queues: Collection[str]) -> Any:
    return TaskRow.queue_name == func.any(bindparam(None, sorted(queues), type_=ARRAY(Text())))
