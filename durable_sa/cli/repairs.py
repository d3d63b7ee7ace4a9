"""`durable tasks cancel` and `durable tasks retry`: for single tasks, or for all that match filters."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy import func, select

from .. import TaskStatus
from ..errors import InvalidState, TaskNotFound
from ..statements import inspection
from .invocation import FAILED, USAGE, Invocation, connected, examples, fail
from .messages import message
from .selection import ErrorName, Filters, Key, Name, Queue, Since, States, TaskNames, Until, matching, resolve

_MOST = 2**31 - 1
_UNFINISHED = tuple(state for state in TaskStatus if not state.finished)
_RETRIED = (TaskStatus.FAILED, TaskStatus.CANCELLED)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the tasks, and change nothing.")]
MaxAttempts = Annotated[
    int | None, typer.Option(help="Number of failures of the task's own code after which it fails.")
]


class Action(NamedTuple):
    """An action on tasks, and the tasks that it is done to."""

    doing: str
    done: str
    states: Sequence[TaskStatus]
    """The states in which a task can be acted on."""
    act: Callable[[uuid.UUID], Awaitable[TaskStatus]]


@connected
async def cancel(
    invocation: Invocation,
    tasks: TaskNames = None,
    every: Annotated[bool, typer.Option("--all", help="All unfinished tasks that match the filters.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    error: ErrorName = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    dry_run: DryRun = False,
) -> None:
    """Cancel tasks with their unfinished descendants. Ended tasks are not changed."""
    filters = Filters(queue_name, tuple(states or ()), name, error, key, since, until)
    if not _is_clear(tasks, every, filters) or (every and not filters.anything):
        fail("Name tasks, or give --all with --queue, --state, --name, --error, --key, --since or --until.", USAGE)
    if any(state.finished for state in filters.states):
        fail("Only unfinished tasks can be cancelled: --state pending, running or sleeping.", USAGE)
    action = Action("Cancelling", "cancelled", _UNFINISHED, invocation.durable.cancel_task)
    await _do(invocation, tasks, filters.among(_UNFINISHED), action, dry_run=dry_run)


@connected
async def retry(
    invocation: Invocation,
    tasks: TaskNames = None,
    every: Annotated[bool, typer.Option("--all", help="All failed tasks, or those that match the filters.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    error: ErrorName = None,
    key: Key = None,
    since: Since = None,
    until: Until = None,
    max_attempts: MaxAttempts = None,
    dry_run: DryRun = False,
) -> None:
    """Retry failed or cancelled tasks. They keep their checkpoints; failures are counted from zero."""
    filters = Filters(queue_name, tuple(states or ()), name, error, key, since, until)
    if not _is_clear(tasks, every, filters):
        fail("Name tasks, or give --all with --queue, --state, --name, --error, --key, --since or --until.", USAGE)
    if set(filters.states) - set(_RETRIED):
        fail("Only failed and cancelled tasks can be retried: --state failed, --state cancelled.", USAGE)
    retry_task = functools.partial(invocation.durable.retry_task, max_attempts=max_attempts)
    action = Action("Retrying", "retried", _RETRIED, retry_task)
    await _do(invocation, tasks, filters.among([TaskStatus.FAILED]), action, dry_run=dry_run)


CANCEL_EXAMPLES = examples(
    "durable tasks cancel 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa",
    "durable tasks cancel order-17",
    "durable tasks cancel --all --name send --state pending --since 2h --dry-run",
)
RETRY_EXAMPLES = examples(
    "durable tasks retry 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa",
    "durable tasks retry --all --name send --error ConnectError --since 2h --dry-run",
)


def _is_clear(tasks: Sequence[str] | None, every: bool, filters: Filters) -> bool:
    """Return whether either tasks are named, perhaps with their queue, or `--all` is given."""
    return not filters._replace(queue_name=None).anything if tasks and not every else every and not tasks


async def _do(
    invocation: Invocation, tasks: Sequence[str] | None, filters: Filters, action: Action, *, dry_run: bool
) -> None:
    await filters.check(invocation)
    if tasks:
        await _do_each(invocation, tasks, filters.queue_name, action, dry_run=dry_run)
    else:
        await _do_all(invocation, filters, action, dry_run=dry_run)


async def _do_each(
    invocation: Invocation, names: Sequence[str], queue_name: str | None, action: Action, *, dry_run: bool
) -> None:
    """Act on each of these tasks, and report the refused ones at the end."""
    act = functools.partial(_pretend, invocation, action) if dry_run else action.act
    results: list[dict[str, Any]] = []
    refusals: list[str] = []
    for name in names:
        try:
            task_id = await resolve(invocation, name, queue_name)
            results.append({"task_id": task_id, "state": await act(task_id)})
        except (InvalidState, TaskNotFound) as error:
            refusals.append(message(error))
        except LookupError as error:
            refusals.append(str(error))
    if results:
        invocation.output.table(results, {"task_id": "task", "state": "state"}, empty="")
    if dry_run and not invocation.output.as_json:
        invocation.output.note("Nothing was changed: --dry-run.")
    if refusals:
        fail("\nerror: ".join(refusals), FAILED)


async def _pretend(invocation: Invocation, action: Action, task_id: uuid.UUID) -> TaskStatus:
    """Return the present state of a task that could be acted on.

    Raises:
        InvalidState: the action would be refused, or would change nothing.
    """
    rows = await invocation.durable.database.execute(inspection.KNOWN_TASK, {"task_id": task_id})
    if not rows:
        raise TaskNotFound(task_id)
    state = TaskStatus(rows[0].state)
    if state not in action.states:
        raise InvalidState(f"Task {task_id}", state, f"It would not be {action.done}.")
    return state


async def _do_all(invocation: Invocation, filters: Filters, action: Action, *, dry_run: bool) -> None:
    """Act on all matching tasks, and print their ids and their number."""
    output = invocation.output
    changed: list[uuid.UUID] = []
    passed_over = 0
    every = filters.query(limit=_MOST).order_by(None).subquery()
    total = (await invocation.durable.database.execute(select(func.count()).select_from(every)))[0][0]
    if not total:
        await filters.check_name(invocation)
    with output.progress(action.doing, total) as advance:
        async for task_id in matching(invocation, filters):
            try:
                if not dry_run:
                    await action.act(task_id)
            except (InvalidState, TaskNotFound):
                # Another command changed the task first, or its parent was retried with all descendants.
                passed_over += 1
            else:
                changed.append(task_id)
            advance(1)
    if output.as_json:
        counts = {action.done: 0 if dry_run else len(changed), "passed_over": passed_over}
        output.json({**counts, "dry_run": dry_run, "matched": total, "task_ids": changed})
        return
    for task_id in changed:
        output.say(str(task_id))
    output.say(f"Tasks {'that would be ' if dry_run else ''}{action.done}: {len(changed)}.")
