"""The schedules that tasks declare, which workers keep in step with the code."""

from __future__ import annotations

import logging
import re
from datetime import datetime, timedelta
from typing import Any

from ..app import App
from ..database.channel import DedicatedConnection
from ..database.scripts import perform
from ..errors import DurableError
from ..ids import digest
from ..schedules import store
from ..statements import scheduling
from ..tasks import DeclaredSchedule, Task

logger = logging.getLogger("durable_sa")

CONFIRMATION_INTERVAL = timedelta(minutes=2)
"""Time between the confirmations of a declared schedule by one worker."""
UNDECLARED_AFTER = timedelta(minutes=10)
"""Time without a confirmation, while a worker of its queue has been running, after which a schedule is removed."""

_REFUSED = re.compile(r"[^A-Za-z0-9_-]")


def schedule_name(task_name: str) -> str:
    """Return the name of the schedule that a task declares: its own as far as a schedule may have it."""
    allowed = _REFUSED.sub("-", task_name)
    return allowed if allowed == task_name else f"{allowed[:180]}-{digest(task_name)[:8]}"


class Declarations:
    """Creates, changes and confirms the schedules that the tasks of a worker declare, and removes those of none."""

    def __init__(self, app: App, connection: DedicatedConnection, queue_names: tuple[str, ...]) -> None:
        self._app = app
        self._connection = connection
        self._queue_names = queue_names
        self._began: datetime | None = None
        self._next: datetime | None = None
        self._tasks: dict[str, Task[Any, Any]] = {}
        """The tasks whose schedules this worker has tried to store, by name."""
        self._failing: set[str] = set()
        """Tasks whose schedule cannot be stored. Each is logged once."""

    async def keep(self, now: datetime) -> bool:
        """Do what is due at a time of the database. Return whether a schedule was stored."""
        if self._began is None:
            self._began = now
        declaring = [task for task in self._app.tasks.values() if task.schedule is not None]
        if self._next is None or now >= self._next:
            self._next = now + CONFIRMATION_INTERVAL
            remove = now - self._began >= UNDECLARED_AFTER
        else:
            # A task that was registered, or defined anew, since the last time.
            declaring = [task for task in declaring if self._tasks.get(task.name) is not task]
            remove = False
        stored = False
        for task in declaring:
            if task.schedule is not None:
                stored |= await self._keep_one(task, task.schedule)
        if remove:
            await self._remove()
        return stored

    async def _keep_one(self, task: Task[Any, Any], schedule: DeclaredSchedule) -> bool:
        queue_name, name = task.queue_name or self._app.queue_name, schedule_name(task.name)
        identity = {"schedule_queue": queue_name, "schedule_name": name}
        values = {"declared": store.DECLARED, "schedule_task": task.name, "cron": schedule[0], "zone": schedule[1]}
        first = self._tasks.get(task.name) is not task
        self._tasks[task.name] = task
        if not first and await self._connection.execute(scheduling.CONFIRM_DECLARED, {**identity, **values}):
            return False
        found = await self._connection.execute(scheduling.FIND_SCHEDULE, {**identity, "declared": store.DECLARED})
        try:
            if found and not found[0].declared:
                self._log_once(
                    task, "a schedule of that name exists that no task declares: delete it, or rename the task"
                )
                return False
            if found and not first:
                # A worker that started later has another definition of it.
                return False
            now = (await self._connection.execute(scheduling.DATABASE_TIME, {}))[0].now
            script = store.create(
                self._app,
                name,
                task=task,
                params=None,
                cron_expression=schedule[0],
                timezone=schedule[1],
                metadata={store.DECLARED: now.timestamp()},
                backend="worker",
                misfire=None,
                overlap="allow",
                options={},
            )
            await perform(self._app.database, script)
        except DurableError as error:
            self._log_once(task, str(error))
            return False
        self._failing.discard(task.name)
        return True

    def _log_once(self, task: Task[Any, Any], why: str) -> None:
        if task.name not in self._failing:
            self._failing.add(task.name)
            logger.error("the schedule of task %s is not kept: %s", task.name, why)

    async def _remove(self) -> None:
        parameters = {
            "declared": store.DECLARED,
            "queue_names": list(self._queue_names),
            "age": UNDECLARED_AFTER.total_seconds(),
        }
        for row in await self._connection.execute(scheduling.DELETE_UNDECLARED, parameters):
            logger.info("removed schedule %s of queue %s: no task declares it any more", row.name, row.queue_name)
