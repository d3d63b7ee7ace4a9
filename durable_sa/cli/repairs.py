"""`durable tasks cancel`, `retry` and `delete`: for single tasks, or for all that match filters."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from sqlalchemy import select

from .. import TaskRow, TaskStatus
from ..client import bulk
from ..errors import InvalidState, TaskNotFound
from ..options import MAX_ATTEMPTS
from ..validation import integer
from .invocation import FAILED, USAGE, Invocation, connected, examples, fail
from .messages import message
from .selection import (
    EndedAfter,
    EndedBefore,
    ErrorName,
    Filters,
    Key,
    LimitKey,
    Name,
    Parent,
    Queue,
    Since,
    SpawnedAfter,
    SpawnedBefore,
    States,
    TaskNames,
    Until,
    resolve,
)

_UNFINISHED = tuple(state for state in TaskStatus if not state.finished)
_ENDED = tuple(state for state in TaskStatus if state.finished)
_RETRIED = (TaskStatus.FAILED, TaskStatus.CANCELLED)
_PRINTED = 100
"""Ids of changed tasks that are printed on a terminal; elsewhere all are."""

Every = Annotated[bool, typer.Option("--all", help="All tasks that match the filters.")]
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
    one: Callable[[uuid.UUID], Awaitable[TaskStatus | str]]
    many: bulk.Act
    default: Sequence[TaskStatus]
    """The states of `--all`."""


@connected
async def cancel(
    invocation: Invocation,
    tasks: TaskNames = None,
    every: Every = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    error: ErrorName = None,
    key: Key = None,
    limit_key: LimitKey = None,
    parent: Parent = None,
    since: Since = None,
    until: Until = None,
    spawned_after: SpawnedAfter = None,
    spawned_before: SpawnedBefore = None,
    dry_run: DryRun = False,
) -> None:
    """Cancel tasks with their unfinished descendants. Ended tasks are not changed."""
    filters = Filters(
        queue_name,
        tuple(states or ()),
        name,
        error,
        key,
        limit_key,
        parent,
        since,
        until,
        spawned_after,
        spawned_before,
    )
    durable = invocation.durable
    action = Action(
        "Cancelling",
        "cancelled",
        _UNFINISHED,
        durable.cancel_task,
        functools.partial(bulk.cancel_batch, durable),
        _UNFINISHED,
    )
    await _do(invocation, tasks, every, filters, action, dry_run=dry_run, filtered=True)


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
    limit_key: LimitKey = None,
    parent: Parent = None,
    since: Since = None,
    until: Until = None,
    spawned_after: SpawnedAfter = None,
    spawned_before: SpawnedBefore = None,
    ended_after: EndedAfter = None,
    ended_before: EndedBefore = None,
    max_attempts: MaxAttempts = None,
    dry_run: DryRun = False,
) -> None:
    """Retry failed or cancelled tasks. They keep their checkpoints; failures are counted from zero."""
    if max_attempts is not None:
        integer(max_attempts, "max_attempts", minimum=1, maximum=MAX_ATTEMPTS)
    times = (since, until, spawned_after, spawned_before, ended_after, ended_before)
    filters = Filters(queue_name, tuple(states or ()), name, error, key, limit_key, parent, *times)
    one = functools.partial(invocation.durable.retry_task, max_attempts=max_attempts)
    many = functools.partial(bulk.retry_batch, invocation.durable, max_attempts=max_attempts)
    action = Action("Retrying", "retried", _RETRIED, one, many, [TaskStatus.FAILED])
    await _do(invocation, tasks, every, filters, action, dry_run=dry_run)


@connected
async def delete(
    invocation: Invocation,
    tasks: TaskNames = None,
    every: Annotated[bool, typer.Option("--all", help="All ended tasks that match the filters.")] = False,
    queue_name: Queue = None,
    states: States = None,
    name: Name = None,
    error: ErrorName = None,
    key: Key = None,
    limit_key: LimitKey = None,
    parent: Parent = None,
    since: Since = None,
    until: Until = None,
    spawned_after: SpawnedAfter = None,
    spawned_before: SpawnedBefore = None,
    ended_after: EndedAfter = None,
    ended_before: EndedBefore = None,
    dry_run: DryRun = False,
) -> None:
    """Delete ended tasks with their history. Tasks that others still need are not deleted."""
    times = (since, until, spawned_after, spawned_before, ended_after, ended_before)
    filters = Filters(queue_name, tuple(states or ()), name, error, key, limit_key, parent, *times)

    async def one(task_id: uuid.UUID) -> str:
        state = (await invocation.durable.get_task(task_id)).status
        found = await invocation.durable.delete_tasks(select(TaskRow.task_id).where(TaskRow.task_id == task_id))
        if not found.done:
            reason = "needed by a task or a row of the application" if state.finished else str(state)
            raise InvalidState(f"Task {task_id}", reason, "It was not deleted.")
        return "deleted"

    action = Action("Deleting", "deleted", _ENDED, one, bulk.Deletion(invocation.durable), _ENDED)
    await _do(invocation, tasks, every, filters, action, dry_run=dry_run, filtered=True)


CANCEL_EXAMPLES = examples(
    "durable tasks cancel 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa",
    "durable tasks cancel order-17",
    "durable tasks cancel --all --name send --state pending --since 2h --dry-run",
)
RETRY_EXAMPLES = examples(
    "durable tasks retry 0197c3a0-5c1e-7d1b-9a55-1d1e52a0b0aa",
    "durable tasks retry --all --name send --error ConnectError --since 2h --dry-run",
)
DELETE_EXAMPLES = examples(
    "durable tasks delete order-17",
    "durable tasks delete --all --name import --ended-before 7d --dry-run",
)


async def _do(
    invocation: Invocation,
    tasks: Sequence[str] | None,
    every: bool,
    filters: Filters,
    action: Action,
    *,
    dry_run: bool,
    filtered: bool = False,
) -> None:
    """Act on the tasks that are named, perhaps with their queue, or on all that match; `filtered` asks for filters."""
    clear = not filters._replace(queue_name=None).anything if tasks and not every else every and not tasks
    if not clear or (every and filtered and not filters.anything):
        fail(
            "Name tasks, or give --all with --queue, --state, --name, --error, --key, --limit-key, --since or --until.",
            USAGE,
        )
    if set(filters.states) - set(action.states):
        states = ", ".join(f"--state {state}" for state in action.states)
        fail(f"Only tasks in these states can be {action.done}: {states}.", USAGE)
    if tasks:
        await _do_each(invocation, tasks, filters.queue_name, action, dry_run=dry_run)
    else:
        await _do_all(invocation, filters.among(action.default), action, dry_run=dry_run)


async def _do_each(
    invocation: Invocation, names: Sequence[str], queue_name: str | None, action: Action, *, dry_run: bool
) -> None:
    """Act on each of these tasks, and report the refused ones at the end."""
    if queue_name is not None:
        await invocation.durable.require_queue(queue_name)
    act = functools.partial(_pretend, invocation, action) if dry_run else action.one
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
    state = (await invocation.durable.get_task(task_id)).status
    if state not in action.states:
        raise InvalidState(f"Task {task_id}", state, f"It would not be {action.done}.")
    return state


async def _do_all(invocation: Invocation, filters: Filters, action: Action, *, dry_run: bool) -> None:
    """Act on all matching tasks, and print their ids and their number."""
    output = invocation.output
    where = await filters.where(invocation)
    changed: list[uuid.UUID] = []
    most = None if output.as_json else _PRINTED
    number = 0

    def note(task_ids: Sequence[uuid.UUID]) -> None:
        nonlocal number
        number += len(task_ids)
        if not output.as_json and not output.console.is_terminal:
            # Printed at once, so that they do not gather in memory.
            for task_id in task_ids:
                output.say(str(task_id))
        else:
            changed.extend(task_ids[: None if most is None else max(0, most - len(changed))])

    try:
        with output.progress(action.doing) as progress:
            act = _leave if dry_run else action.many
            result = await bulk.run(invocation.durable, act, where, progress=progress, on_done=note)
    except asyncio.CancelledError:
        output.note(f"Interrupted: {number} tasks were {action.done}. The same command goes on with the rest.")
        raise
    if not result.matched:
        await filters.check_name(invocation)
    if output.as_json:
        counts = {action.done: 0 if dry_run else result.done, "passed_over": result.skipped}
        output.json({**counts, "dry_run": dry_run, "matched": result.matched, "task_ids": changed})
        return
    for task_id in changed:
        output.say(str(task_id))
    if changed and number > len(changed):
        output.say(f"and {number - len(changed)} more")
    output.say(f"Tasks {'that would be ' if dry_run else ''}{action.done}: {number}.")


async def _leave(task_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Change nothing, and return all ids."""
    return list(task_ids)
