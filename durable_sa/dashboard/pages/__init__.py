"""The pages of the dashboard. A new one is a `Page` in `PAGES`, with a template of its name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from ..view import View
from . import bulk, doctor, events, failures, fleet, limits, schedules, task, tasks

Load = Callable[[View], Awaitable[dict[str, Any]]]


class Page(NamedTuple):
    """A page: its data, which is also what it is as JSON, and the template that shows them."""

    path: str
    title: str
    template: str
    load: Load
    in_menu: bool = True
    about_tasks: bool = False
    """True for pages that `Access.where` restricts; others are refused if it is set."""
    all_queues: bool = False
    """True for pages that cannot be restricted to queues, and are refused if `Access.queues` is set."""
    live: bool = True
    """True for pages that refresh themselves."""


PAGES: Final = (
    Page("/", "Overview", "overview.html", fleet.overview),
    Page("/tasks", "Tasks", "tasks.html", tasks.load, about_tasks=True),
    Page("/tasks/all", "All that match", "bulk.html", bulk.load, in_menu=False, about_tasks=True, live=False),
    Page("/tasks/{task_id:uuid}", "Task", "task.html", task.load, in_menu=False, about_tasks=True),
    Page("/failures", "Failures", "failures.html", failures.load, about_tasks=True),
    Page("/queues", "Queues", "queues.html", fleet.queues),
    Page("/queues/{queue_name:path}", "Queue", "queue.html", fleet.queue, in_menu=False),
    Page("/limits", "Limits", "limits.html", limits.load),
    Page("/workers", "Workers", "workers.html", fleet.workers),
    Page("/schedules", "Schedules", "schedules.html", schedules.load),
    Page("/events", "Events", "events.html", events.load),
    Page("/doctor", "Doctor", "doctor.html", doctor.load, all_queues=True, live=False),
)
