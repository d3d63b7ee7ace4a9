"""Queues: creating and dropping them, pausing them, and their retention."""

from __future__ import annotations

import functools
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, overload

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import Unpack

from ..database.hint import Hint
from ..database.scripts import Script, SessionOrConnection, drive_async, perform, perform_within
from ..errors import InvalidState, QueueNotFound
from ..names import validate_name
from ..policies import Limit
from ..results import QueueStatistics
from ..schedules import pgcron
from ..statements import limiting, queues, spawning
from ..validation import Duration, instance, integer, seconds
from .limits import Limits, creation, require_limits


class QueuePolicy(TypedDict, total=False):
    """Retention of a queue: 30 days by default. None keeps everything."""

    retention: Duration | None
    """Age, since their end, at which finished tasks are deleted: seconds or a `timedelta`."""
    event_retention: Duration | None
    """Age at which emitted events are deleted."""
    limit: Limit | None
    """The limit of the queue as a whole. None removes it."""
    limit_per_key: Limit | None
    """The limit of each key of the queue. None removes it."""


class Queues(Limits):
    """The part of a client that deals with queues."""

    async def create_queue(self, name: str | None = None, **policy: Unpack[QueuePolicy]) -> None:
        """Create a queue; if it exists, only the policies that are given change.

        `retention` is the age at which finished tasks are deleted, `event_retention` the age of events, in seconds or
        as a `timedelta`: 30 days for a new queue unless given. None keeps them. Workers delete in the background.

        `limit` is that of the queue as a whole, `limit_per_key` that of each of its keys; see :meth:`set_limit`.

        Raises:
            InvalidName: a name that breaks the rules.
            InvalidConfiguration: an age below 0 or above 100 years.
            InvalidState: it is to have limits while workers of a version that knows none are alive.
        """
        parameters, limits = self._queue_params(name, policy)
        if not limits:
            await self.database.execute(queues.CREATE_QUEUE, parameters)
        elif not await perform(self.database, creation(parameters, limits)):
            for scope, limit in limits.items():
                await self.set_limit(parameters["queue_name"], limit, per_key=scope == "per_key")

    @overload
    def create_queue_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str | None = None,
        **policy: Unpack[QueuePolicy],
    ) -> Coroutine[Any, Any, None]: ...
    @overload
    def create_queue_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        name: str | None = None,
        **policy: Unpack[QueuePolicy],
    ) -> None: ...
    def create_queue_with(
        self, session: SessionOrConnection, name: str | None = None, **policy: Unpack[QueuePolicy]
    ) -> Any:
        """Create a queue as :meth:`create_queue` does, in the caller's transaction.

        The limits of a queue that exists are changed by :meth:`set_limit` alone, which commits by itself: until the
        transaction ends, claims of all queues would wait for it.

        Raises:
            InvalidState: the queue exists, and its limits are others.
        """
        parameters, limits = self._queue_params(name, policy)

        def script(hint: Hint) -> Script[None]:
            if not (yield from creation(parameters, limits)(hint)) and limits:
                yield from require_limits(parameters["queue_name"], limits)

        return perform_within(session, self.schema, script)

    def _queue_params(self, name: str | None, policy: QueuePolicy) -> tuple[dict[str, Any], dict[str, Limit | None]]:
        """Return the parameters of the statement, and the limits that are given, by their scope."""
        if unknown := policy.keys() - QueuePolicy.__annotations__.keys():
            raise TypeError(f"create_queue() got an unexpected keyword argument {min(unknown)!r}")
        parameters: dict[str, Any] = {"queue_name": self._queue(name)}
        for key in ("retention", "event_retention"):
            value = policy.get(key)
            parameters[f"set_{key}"] = key in policy
            parameters[key] = None if value is None else seconds(value, key)
        limits: dict[str, Limit | None] = {}
        for scope, limit in (("queue", policy.get("limit")), ("per_key", policy.get("limit_per_key"))):
            key = "limit" if scope == "queue" else "limit_per_key"
            if limit is not None:
                instance(limit, Limit, key)
            if key in policy:
                limits[scope] = limit
        return parameters, limits

    async def drop_queue(self, name: str | None = None) -> None:
        """Delete a queue with its tasks, events and schedules. Nothing happens if there is none of that name.

        Tasks that open transactions have spawned into it are not visible yet: drop it once more after they end.

        Raises:
            InvalidState: rows of the application refer to some of its tasks, which are left; all others are deleted.
        """
        queue = self._queue(name)
        async with self.database.transaction() as connection:
            # The queue comes first: a transaction that creates a schedule in it holds its row until it has committed.
            await connection.execute(queues.DROP_QUEUE, {"queue_name": queue})
            for row in await connection.execute(queues.DROP_SCHEDULES, {"queue_name": queue}):
                remove = pgcron.remove_job(row.pgcron_job_name)
                await drive_async(functools.partial(self.database.execute_on, connection), remove)
            await connection.execute(queues.DELETE_QUEUE_EVENTS, {"queue_name": queue})
            for statement in limiting.DROP_LIMITS:
                await connection.execute(statement, {"queue_name": queue})
        try:
            while await self.database.execute(queues.DELETE_QUEUE_TASKS, {"queue_name": queue, "wanted": 1000}):
                pass
        except IntegrityError as error:
            raise InvalidState(
                f"Queue {queue!r}",
                "dropped except for tasks that rows of the application refer to",
                "Delete those rows, or give their foreign keys ondelete='SET NULL', and drop it once more.",
            ) from error
        while await self.database.execute(queues.DELETE_QUEUE_MINUTES, {"queue_name": queue, "wanted": 1000}):
            pass
        for statement in limiting.DROP_LIMITS:
            # Runs that ended meanwhile gave slots back.
            await self.database.execute(statement, {"queue_name": queue})
        self._sender().send(Hint(cancelled=True))

    async def list_queues(self) -> list[str]:
        """Return the names of all queues, sorted."""
        return [row.queue_name for row in await self.database.execute(queues.LIST_QUEUES)]

    async def queue_statistics(self, name: str | None = None) -> list[QueueStatistics]:
        """Return statistics of all queues, sorted by name, or of the one of that name.

        Unfinished and failed tasks are counted in their indexes: the more there are, the longer it takes.

        Raises:
            QueueNotFound: there is no queue of that name.
        """
        names = None if name is None else [validate_name("queue", name)]
        rows = await self.database.execute(queues.QUEUE_STATISTICS, {"queue_names": names})
        if name is not None and not rows:
            raise QueueNotFound(name)
        keys = await self.count_limit_keys([row.queue_name for row in rows if row.limited])
        return [
            QueueStatistics(
                row.queue_name,
                row.paused_at is not None,
                row.ready,
                row.scheduled,
                row.running,
                row.failed,
                None if row.oldest_ready_seconds is None else timedelta(seconds=float(row.oldest_ready_seconds)),
                keys.get(row.queue_name, {}),
            )
            for row in rows
        ]

    async def pause_queue(self, name: str | None = None) -> None:
        """Let no worker claim from a queue until it is resumed; running tasks continue.

        Raises:
            QueueNotFound: there is no such queue.
        """
        await self._pause(name, paused=True)

    async def resume_queue(self, name: str | None = None) -> None:
        """Resume a paused queue: workers claim from it as before.

        Raises:
            QueueNotFound: there is no such queue.
        """
        await self._pause(name, paused=False)

    async def _pause(self, name: str | None, *, paused: bool) -> None:
        queue = self._queue(name)
        if not await self.database.execute(queues.PAUSE_QUEUE, {"name": queue, "paused": paused}):
            raise QueueNotFound(queue)
        if not paused:
            hint = Hint()
            hint.add(queue, 0, datetime(1970, 1, 1, tzinfo=UTC))
            self._sender().send(hint)

    async def count_unclaimed_ready_tasks(self, queue_name: str | None = None) -> int:
        """Count the tasks of a queue that are due and that no worker has; 0 if it is paused or does not exist.

        Tasks that have to wait for a limit, because their key or queue is full, throttled or closed, are counted, too.
        It counts rows: ask every few seconds, not with every request.
        """
        queue = self._queue(queue_name)
        rows = await self.database.execute(spawning.COUNT_READY, {"queue_name": queue})
        return int(rows[0][0])

    async def cleanup_tasks(self, older_than: Duration, *, limit: int = 1000, queue_name: str | None = None) -> int:
        """Delete up to `limit` tasks that ended longer ago than `older_than`, with their runs and checkpoints.

        Tasks that a live ancestor, a child or a waiting task still needs stay, and so do those that a foreign key of
        the application refers to. Returns the number deleted: fewer than `limit` if no others are to be deleted.

        Raises:
            InvalidConfiguration: an age below 0 or above 100 years, a `limit` below 1.
        """
        from ..worker.retention import delete_tasks

        queue, age = self._queue(queue_name), seconds(older_than, "older_than")
        _check_limit(limit)
        deleted = 0
        # Parents stay until their children have been deleted.
        while deleted < limit and (more := await delete_tasks(self.database, queue, age, limit - deleted)):
            deleted += more
        return deleted

    async def cleanup_events(self, older_than: Duration, *, limit: int = 1000, queue_name: str | None = None) -> int:
        """Delete up to `limit` events emitted longer ago than `older_than` that no task waits for.

        Their names can be used for new events. Returns the number deleted.
        """
        queue, age = self._queue(queue_name), seconds(older_than, "older_than")
        _check_limit(limit)
        parameters = {"queue_name": queue, "age": age, "wanted": limit}
        return len(await self.database.execute(queues.DELETE_EVENTS, parameters))


def _check_limit(limit: int) -> None:
    integer(limit, "limit", minimum=1, maximum=2**31 - 1)
