"""The actions of users: each goes through the client, is logged, and is passed to the application's hooks."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from pydantic_core import from_json
from starlette.exceptions import HTTPException

from ..client.bulk import Act, Deletion, cancel_batch, retry_batch, run
from .forms import FIELDS, Fields, limit_of, query, seconds, whole
from .pages.bulk import STATES, apt
from .view import View

logger = logging.getLogger("durable_sa")

SLICE: Final = 8.0
"""Seconds after which an action on many tasks answers; the page then sends it once more for the rest."""


class _SliceOver(Exception):  # noqa: N818 - no error
    """An action on many tasks has taken its time, between two batches."""


@dataclass
class Outcome:
    """The outcome of an action."""

    message: str
    task_ids: list[uuid.UUID] = field(default_factory=list[uuid.UUID])
    done: int | None = None
    skipped: int = 0
    complete: bool = True
    """False for an action on many tasks that has not come to its end."""
    back: str = "/"
    """The page to show, unless the form names one."""
    limit_key: str | None = None
    """The limit key that was changed, for the log."""

    @property
    def number(self) -> int:
        """The number of things that were changed."""
        return len(self.task_ids) if self.done is None else self.done


class Interrupted(Exception):  # noqa: N818 - its cause is the error
    """An action on many tasks has failed after it had changed some of them."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


Perform = Callable[[View, Fields], Awaitable[Outcome]]


class Action(NamedTuple):
    """A path that changes something."""

    path: str
    needs: str
    """The action that `Access.actions` must contain."""
    perform: Perform
    about_tasks: bool = False
    """True for actions that `Access.where` restricts; others are refused if it is set."""


def _tasks(action: str) -> Perform:
    async def perform(view: View, form: Fields) -> Outcome:
        task_ids = form.ids("task_id")
        await view.require_tasks(task_ids)
        done = await _act(view, action)(task_ids)
        back = f"/tasks/{task_ids[0]}" if len(task_ids) == 1 and action != "delete" else "/tasks"
        return _told(action, done, len(task_ids) - len(done), back=back)

    return perform


def _all_tasks(action: str) -> Perform:
    async def perform(view: View, form: Fields) -> Outcome:
        chosen = apt(action, form, form.required("until"))
        back = f"/tasks?{query(form.only(FIELDS))}"
        if chosen is None:
            return Outcome("No task is in a state for that.", back=back)
        done: list[uuid.UUID] = []
        where = view.access.tasks(chosen)
        end = time.monotonic() + SLICE

        def note(task_ids: Sequence[uuid.UUID]) -> None:
            done.extend(task_ids)
            if time.monotonic() >= end:
                raise _SliceOver

        complete = True
        try:
            await run(view.durable, _act(view, action), where, on_done=note)
        except _SliceOver:
            complete = False
        except Exception as error:
            raise Interrupted(_told(action, done, 0, back=back)) from error
        outcome = _told(action, done, 0, back=back)
        # Without this a filter that matches only what cannot be changed would be tried without an end.
        outcome.complete = complete or not done
        return outcome

    return perform


def _act(view: View, action: str) -> Act:
    durable = view.durable

    async def cancel(task_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        return await cancel_batch(durable, task_ids)

    async def retry(task_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        return await retry_batch(durable, task_ids)

    acts: dict[str, Act] = {"cancel": cancel, "retry": retry, "delete": Deletion(durable)}
    return acts[action]


_DONE: Final = {"cancel": "Cancelled", "retry": "Retried", "delete": "Deleted"}


def _told(action: str, done: list[uuid.UUID], skipped: int, *, back: str) -> Outcome:
    tasks = "1 task" if len(done) == 1 else f"{len(done):,} tasks"
    rest = f"; {skipped:,} could not be" if skipped else ""
    return Outcome(f"{_DONE[action]} {tasks}{rest}.", done, skipped=skipped, back=back)


def _queue(view: View, form: Fields) -> str:
    name = form.required("queue_name")
    if not view.access.sees_queue(name):
        raise HTTPException(404, f"There is no queue {name!r}.")
    return name


async def _pause_queue(view: View, form: Fields) -> Outcome:
    name = _queue(view, form)
    await view.durable.pause_queue(name)
    return Outcome(f"Paused queue {name!r}.", done=1, back="/queues")


async def _resume_queue(view: View, form: Fields) -> Outcome:
    name = _queue(view, form)
    await view.durable.resume_queue(name)
    return Outcome(f"Resumed queue {name!r}.", done=1, back="/queues")


async def _pause_schedule(view: View, form: Fields) -> Outcome:
    name, queue = form.required("name"), _queue(view, form)
    await view.durable.pause_schedule(name, queue_name=queue)
    return Outcome(f"Paused schedule {name!r}.", done=1, back="/schedules")


async def _resume_schedule(view: View, form: Fields) -> Outcome:
    name, queue = form.required("name"), _queue(view, form)
    await view.durable.resume_schedule(name, queue_name=queue)
    return Outcome(f"Resumed schedule {name!r}.", done=1, back="/schedules")


async def _trigger_schedule(view: View, form: Fields) -> Outcome:
    name, queue = form.required("name"), _queue(view, form)
    spawned = await view.durable.trigger_schedule(name, queue_name=queue)
    return Outcome(f"Triggered schedule {name!r}.", [spawned.task_id], back=f"/tasks/{spawned.task_id}")


async def _delete_schedule(view: View, form: Fields) -> Outcome:
    name, queue = form.required("name"), _queue(view, form)
    await view.durable.delete_schedule(name, queue_name=queue)
    return Outcome(f"Deleted schedule {name!r}.", done=1, back="/schedules")


def _payload(form: Fields) -> Any:
    text = form.text("payload")
    try:
        return None if text is None else from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"The payload is not JSON: {error}.") from None


async def _send(view: View, form: Fields) -> Outcome:
    (task_id, *others), topic = form.ids("task_id"), form.required("topic")
    if others:
        raise HTTPException(400, "A message is sent to one task.")
    await view.require_task(task_id)
    await view.durable.send(task_id, topic, _payload(form))
    return Outcome(f"Sent a message of topic {topic!r}.", [task_id], back=f"/tasks/{task_id}")


async def _set_limit(view: View, form: Fields) -> Outcome:
    queue, scope = _queue(view, form), form.text("scope") or "queue"
    if scope not in ("queue", "per_key", "key"):
        raise HTTPException(400, f"The scope is queue, per_key or key, not {scope[:80]!r}.")
    key = form.required("key") if scope == "key" else None
    weight, removed = whole(form, "weight"), form.text("clear") is not None
    weight_alone = weight is not None and form.text("concurrency") is None and form.text("rate") is None
    limit = None if removed or weight_alone else limit_of(form)
    await view.durable.set_limit(queue, limit, key=key, per_key=scope == "per_key", weight=weight)
    whose = f"key {key!r} of queue {queue!r}" if key is not None else f"queue {queue!r}"
    if weight is not None and limit is None:
        message = f"Set the weight of {whose}, which has the limit of each key."
    else:
        parts = "limit" if weight is None else "limit and the weight"
        each = "each key of " if scope == "per_key" else ""
        message = f"{'Removed' if limit is None else 'Set'} the {parts} of {each}{whose}."
    return Outcome(message, done=1, back=f"/queues/{quote(queue, safe='')}", limit_key=key)


async def _close_key(view: View, form: Fields) -> Outcome:
    queue, key, length = _queue(view, form), form.required("key"), seconds(form.required("for"), "for")
    if not length > 0:
        raise HTTPException(400, f"A key is closed for more than 0 seconds, not {length:g}. To open it, use Open.")
    try:
        until = datetime.now(UTC) + timedelta(seconds=length)
    except (OverflowError, ValueError):
        raise HTTPException(400, "The duration is too long.") from None
    await view.durable.close_limit_key(queue, key, until)
    return Outcome(
        f"Closed key {key!r} of queue {queue!r}.", done=1, back=f"/queues/{quote(queue, safe='')}", limit_key=key
    )


async def _open_key(view: View, form: Fields) -> Outcome:
    queue, key = _queue(view, form), form.required("key")
    await view.durable.close_limit_key(queue, key, None)
    return Outcome(
        f"Opened key {key!r} of queue {queue!r}.", done=1, back=f"/queues/{quote(queue, safe='')}", limit_key=key
    )


async def _emit(view: View, form: Fields) -> Outcome:
    name, queue, payload = form.required("name"), _queue(view, form), _payload(form)
    first = await view.durable.emit_event(name, payload, queue_name=queue)
    message = f"Emitted event {name!r}." if first else f"Event {name!r} was emitted before; nothing changed."
    back = f"/events?{query([('name', name), ('queue_name', queue)])}"
    return Outcome(message, done=int(first), back=back)


async def _replace(view: View, form: Fields) -> Outcome:
    name, queue = form.required("name"), _queue(view, form)
    # An empty field is refused, because it would replace the payload by null.
    form.required("payload")
    await view.durable.replace_event(name, _payload(form), queue)
    back = f"/events?{query([('name', name), ('queue_name', queue)])}"
    return Outcome(f"Replaced the payload of event {name!r}.", done=1, back=back)


ACTIONS: Final = (
    *(Action(f"/tasks/{action}", action, _tasks(action), about_tasks=True) for action in STATES),
    *(Action(f"/tasks/all/{action}", action, _all_tasks(action), about_tasks=True) for action in STATES),
    Action("/tasks/send", "send", _send, about_tasks=True),
    Action("/limits/set", "limit", _set_limit),
    Action("/limits/close", "limit", _close_key),
    Action("/limits/open", "limit", _open_key),
    Action("/queues/pause", "pause", _pause_queue),
    Action("/queues/resume", "pause", _resume_queue),
    Action("/schedules/pause", "pause", _pause_schedule),
    Action("/schedules/resume", "pause", _resume_schedule),
    Action("/schedules/trigger", "trigger", _trigger_schedule),
    Action("/schedules/delete", "delete", _delete_schedule),
    Action("/events/emit", "emit", _emit),
    Action("/events/replace", "emit", _replace),
)
"""All paths that change something. Each is a POST; its buttons are shown to those who may press them."""


def report(view: View, action: Action, outcome: Outcome, form: Fields) -> None:
    """Log an action that was done, and call the application's hooks. An error of a hook is logged."""
    named = form.text("name") or form.text("queue_name")
    target = "" if named is None else repr(named)
    if outcome.limit_key is not None:
        target = f"key {outcome.limit_key!r} of {target}"
    logger.info(
        "dashboard: %r did %s on %s",
        view.access.user,
        action.path.lstrip("/"),
        target or ", ".join(map(str, outcome.task_ids[:10])) or "nothing",
        extra={"durable_task_ids": outcome.task_ids},
    )
    for hook in view.durable.hooks.on_admin_action:
        try:
            hook(view.access.user, action.needs, list(outcome.task_ids))
        except Exception:
            logger.exception("on_admin_action failed for %s of %r", action.needs, view.access.user)


def done_before(form: Fields) -> int:
    """Return the number of tasks that were done when the page sent an action on many tasks the last time."""
    text = form.text("done") or ""
    return int(text) if text.isdecimal() and len(text) < 12 else 0


def may_go_on(outcome: Outcome, form: Fields) -> dict[str, Any]:
    """Return the fields with which the page sends an action on many tasks once more."""
    return {"done": done_before(form) + outcome.number, "fields": form.only(FIELDS), "until": form.required("until")}
