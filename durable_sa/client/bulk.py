"""Cancelling, retrying and deleting many tasks: batch by batch, each a transaction of its own.

The tasks are found page by page, so that neither a statement nor the memory grows with their number; of a select that
can be executed only once, 16 bytes are kept of each. A run that is interrupted has done whole batches, and the same
call later goes on with what is left, because tasks that are done either match no longer or are skipped.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable, Select
from sqlalchemy.sql.selectable import CompoundSelect

from ..app import App
from ..database.connections import Database
from ..database.hint import Hint
from ..database.scripts import Script, perform, read
from ..database_errors import backoff
from ..errors import InvalidConfiguration, InvalidState, TaskNotFound
from ..ids import new_id
from ..options import MAX_ATTEMPTS
from ..results import BulkResult, TaskFilter, TaskStatus
from ..statements import cancelling, reading
from ..validation import integer
from .reading import check_where, fetch
from .tasks import after_cancel, cancel, retry

if TYPE_CHECKING:
    from ..statements.reading import Where

Progress = Callable[[int, int], object]
"""A function that is called with the numbers of tasks that are done or skipped, and that match."""
Act = Callable[[Sequence[uuid.UUID]], Awaitable[list[uuid.UUID]]]
"""A function that acts on a batch, and returns the ids of the tasks that it has changed."""

PAGE = 10_000
"""Ids that are read at once, and tasks that are looked through for them."""
BATCH = 500
"""Tasks that are changed by one transaction, which takes some 20 ms."""
LOCK_PATIENCE = 10.0
"""Seconds for which a batch waits for rows that other transactions have locked; then it skips them."""
_FAMILY_BYTES = 6
"""Bytes that the id of a subtask has in common with that of the task at its root."""


class Bulk(App):
    """The part of a client that acts on all tasks that match a filter."""

    async def cancel_tasks(
        self, where: Where, *, dry_run: bool = False, progress: Progress | None = None
    ) -> BulkResult:
        """Cancel all unfinished tasks that match, with their unfinished descendants; ended ones are skipped.

        `where` is a :class:`TaskFilter` or a select of ids, `select(TaskRow.task_id)`, also joined with tables of the
        application. A select with a LIMIT, groups or another select in it is executed once, at the beginning.
        `progress` is called after each batch with the number of tasks that are done or skipped, and the number of all
        that match. A `dry_run` only counts. Tasks that another transaction keeps locked for ten seconds are skipped.
        """
        return await run(self, functools.partial(cancel_batch, self), where, dry_run=dry_run, progress=progress)

    async def retry_tasks(
        self,
        where: Where,
        *,
        max_attempts: int | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> BulkResult:
        """Retry all failed and cancelled tasks that match, as :meth:`retry_task` does; others are skipped.

        For `where`, `dry_run` and `progress` see :meth:`cancel_tasks`.
        """
        if max_attempts is not None:
            integer(max_attempts, "max_attempts", minimum=1, maximum=MAX_ATTEMPTS)
        act = functools.partial(retry_batch, self, max_attempts=max_attempts)
        return await run(self, act, where, dry_run=dry_run, progress=progress)

    async def delete_tasks(
        self, where: Where, *, dry_run: bool = False, progress: Progress | None = None
    ) -> BulkResult:
        """Delete all ended tasks that match, with their runs and checkpoints; unfinished ones are skipped.

        Skipped are also those that a live ancestor, a child that stays, a waiting task or a foreign key of the
        application needs. For `where`, `dry_run` and `progress` see :meth:`cancel_tasks`.
        """
        return await run(self, Deletion(self), where, dry_run=dry_run, progress=progress)


async def cancel_batch(app: App, task_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Cancel tasks, and return the ids of those that were unfinished."""
    return await _change(app.database, task_ids, _cancel_many, cancel, ended=False)


async def retry_batch(app: App, task_ids: Sequence[uuid.UUID], *, max_attempts: int | None = None) -> list[uuid.UUID]:
    """Retry tasks, and return the ids of those that had failed or been cancelled."""
    many = functools.partial(_retry_many, max_attempts=max_attempts)
    return await _change(app.database, task_ids, many, lambda task_id: retry(task_id, max_attempts), ended=True)


async def _change(
    database: Database,
    task_ids: Sequence[uuid.UUID],
    many: Callable[[Sequence[uuid.UUID], Hint], Script[list[uuid.UUID]]],
    one: Callable[[uuid.UUID], Callable[[Hint], Script[TaskStatus]]],
    *,
    ended: bool,
) -> list[uuid.UUID]:
    """Change tasks by one statement, and by itself each that has children, or a unique key to be taken anew."""
    done: list[uuid.UUID] = []
    left, tries, deadline = list(task_ids), 0, time.monotonic() + LOCK_PATIENCE
    while True:
        changed = await perform(database, functools.partial(many, left))
        done += changed
        rows = await database.execute(cancelling.TASK_STATES, {"task_ids": sorted(set(left).difference(changed))})
        apt = [row for row in rows if _is_apt(TaskStatus(row.state), ended=ended)]
        for row in apt:
            if row.alone and await _change_one(database, row.task_id, one):
                done.append(row.task_id)
        left = [row.task_id for row in apt if not row.alone]
        if not left or time.monotonic() >= deadline:
            return done
        await asyncio.sleep(backoff(tries))
        tries += 1


async def _change_one(
    database: Database, task_id: uuid.UUID, one: Callable[[uuid.UUID], Callable[[Hint], Script[TaskStatus]]]
) -> bool:
    try:
        await perform(database, one(task_id))
    except (InvalidState, TaskNotFound):
        # Another process has changed or deleted it since.
        return False
    return True


def _is_apt(state: TaskStatus, *, ended: bool) -> bool:
    return state in (TaskStatus.FAILED, TaskStatus.CANCELLED) if ended else not state.finished


def _cancel_many(task_ids: Sequence[uuid.UUID], hint: Hint) -> Script[list[uuid.UUID]]:
    rows = yield cancelling.cancel_many(), {"task_ids": task_ids}
    yield from after_cancel(hint, rows)
    return [row.task_id for row in rows]


def _retry_many(task_ids: Sequence[uuid.UUID], hint: Hint, max_attempts: int | None) -> Script[list[uuid.UUID]]:
    parameters = {
        "task_ids": task_ids,
        "next_run_ids": [new_id() for _ in task_ids],
        "new_max_attempts": max_attempts,
    }
    rows = yield cancelling.RETRY_MANY, parameters
    hint.add_rows(rows)
    return [row.task_id for row in rows]


async def run(
    app: App,
    act: Act,
    where: Where,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_done: Callable[[Sequence[uuid.UUID]], object] | None = None,
) -> BulkResult:
    """Act on all tasks that match, and report the ids of those that are done to `on_done`, batch by batch."""
    where = check_where(where)
    if progress is not None and not callable(progress):  # pyright: ignore[reportUnnecessaryComparison]
        raise InvalidConfiguration("progress", f"it must be callable, not {type(progress).__name__}")
    found = Found(app, where)
    if dry_run:
        matched = await found.count()
        if progress is not None:
            progress(matched, matched)
        return BulkResult(matched, 0, matched)
    total = await found.count() if progress is not None else 0
    seen = done = 0
    async for page in found.pages():
        for begin in range(0, len(page), BATCH):
            batch, began = page[begin : begin + BATCH], time.monotonic()
            changed = await act(batch)
            seen, done = seen + len(batch), done + len(changed)
            if on_done is not None:
                on_done(changed)
            if progress is not None:
                progress(seen, max(total, seen))
            # Other work gets its turn.
            await asyncio.sleep(time.monotonic() - began)
    return BulkResult(seen, done, seen - done)


class Found:
    """The tasks that match, as they are found: pages of ids in the order of the ids."""

    def __init__(self, app: App, where: Where) -> None:
        self._app = app
        self._where = where
        self._ids: list[bytes] | None = None
        """Pages of a select that is executed once."""

    async def count(self) -> int:
        """Count the tasks."""
        return sum([len(page) async for page in self.pages()])

    async def pages(self) -> AsyncIterator[list[uuid.UUID]]:
        """Yield the ids, those of tasks that are spawned meanwhile excluded if there are many.

        A few are found by an index. Many, or those that no index knows, are found by going through all tasks, window by
        window. A select whose windows would depend on what was changed before is executed once instead.
        """
        if not isinstance(self._where, TaskFilter) and not reading.is_by_task(self._where):
            for page in await self._chosen(self._where):
                yield [uuid.UUID(bytes=page[begin : begin + 16]) for begin in range(0, len(page), 16)]
            return
        few = reading.some(self._where, PAGE + 1)
        if few is not None and len(ids := await self._read(few)) <= PAGE:
            # An outer join may return NULL.
            yield sorted(set(filter(None, ids)))
            return
        begin, last = uuid.UUID(int=0), await self._read(reading.LAST_TASK)
        while last and begin < last[0]:
            end = min([*await self._read(reading.WINDOW_END, begin=begin, size=PAGE - 1), *last])
            yield await self._read(reading.window(self._where, begin, end))
            begin = end

    async def _chosen(self, where: Select[Any] | CompoundSelect[Any]) -> list[bytes]:
        """Return the ids that a select returns at the first call, 16 bytes each."""
        if self._ids is None:
            self._ids = await self._read(reading.chosen_ids(where, PAGE))
        return self._ids

    async def _read(self, statement: Executable, **parameters: Any) -> list[Any]:
        rows = await read(
            self._app.database, lambda connection: fetch(connection, self._app.schema, statement, parameters)
        )
        return [row[0] for row in rows]


class Deletion:
    """Deletes batches of ended tasks, the children before their parents."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._left: set[uuid.UUID] = set()
        """Tasks that could not be deleted, and whose children may be in the next batch."""

    async def __call__(self, task_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
        # Imported late, with the connections of workers that it needs, because most processes delete nothing.
        from ..database.deletion import delete_ended

        done: list[uuid.UUID] = []
        left = self._left.union(task_ids)
        while left and (deleted := await delete_ended(self._app.database, sorted(left))):
            left.difference_update(deleted)
            done += deleted
        # The ids of a whole family begin alike.
        beginning = task_ids[-1].bytes[:_FAMILY_BYTES]
        self._left = {task_id for task_id in left if task_id.bytes[:_FAMILY_BYTES] == beginning}
        return done
