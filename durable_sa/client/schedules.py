"""Creating and changing cron schedules."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import Unpack

from ..database.hint import Hint
from ..database.scripts import SessionOrConnection, perform, perform_within
from ..names import validate_name
from ..options import SpawnOptions
from ..results import ScheduleFilter, ScheduleInfo, SpawnResult
from ..schedules import firing, store
from ..spawns import SpawnCall
from ..tasks import Task
from .spawning import Spawning

if TYPE_CHECKING:
    from ..schedules.cron import Misfire
    from ..schedules.store import Backend, Overlap


class Schedules(Spawning):
    """The part of a client that deals with schedules."""

    async def create_schedule(
        self,
        name: str,
        *,
        task: Task[Any, Any] | str,
        cron_expression: str,
        params: Any = None,
        timezone: str = "UTC",
        metadata: Mapping[str, Any] | None = None,
        backend: Backend = "worker",
        misfire: Misfire | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[SpawnOptions],
    ) -> None:
        """Create a schedule that spawns a task at each tick of a cron expression, or replace the one of that name.

        It belongs to the queue into which it spawns: `queue_name`, else that of the task or of this client. Each queue
        has names of its own. Workers fire it, each tick once across the fleet. Five fields, or six with
        seconds first. `misfire` is for ticks that no worker fired within a minute: `skip` them, `run_once` for the
        latest, which is the default, or `run_all`, up to the latest hundred. `overlap="skip"` leaves out ticks while
        the task of the previous tick has not ended, and of several that are due at once all but the latest. The options
        of the task and of this client are stored with it; those of the process that fires it do not count.

        `backend="pg_cron"` hands the schedule to the extension; see :func:`durable_sa.setup_pgcron`. It uses the
        server's time zone, takes five fields without `L`, `W` and `#`, and never fires missed ticks.

        Raises:
            InvalidCron: an expression that cannot be parsed, or has no tick.
            InvalidTaskParams, SerializationError, PayloadTooLarge: params that do not fit or cannot be stored.
            InvalidName, InvalidConfiguration, TaskNotRegistered: as for a spawn.
            QueueNotFound: there is no such queue.
        """
        script = store.create(
            self,
            validate_name("schedule", name),
            task=task,
            params=params,
            cron_expression=cron_expression,
            timezone=timezone,
            metadata=metadata,
            backend=backend,
            misfire=misfire,
            overlap=overlap,
            options=options,
        )
        await perform(self.database, script)

    @overload
    def create_schedule_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str,
        *,
        task: Task[Any, Any] | str,
        cron_expression: str,
        params: Any = None,
        timezone: str = "UTC",
        metadata: Mapping[str, Any] | None = None,
        backend: Backend = "worker",
        misfire: Misfire | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[SpawnOptions],
    ) -> Coroutine[Any, Any, None]: ...
    @overload
    def create_schedule_with(
        self,
        session: Session | scoped_session[Any] | Connection,
        name: str,
        *,
        task: Task[Any, Any] | str,
        cron_expression: str,
        params: Any = None,
        timezone: str = "UTC",
        metadata: Mapping[str, Any] | None = None,
        backend: Backend = "worker",
        misfire: Misfire | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[SpawnOptions],
    ) -> None: ...
    def create_schedule_with(
        self,
        session: SessionOrConnection,
        name: str,
        *,
        task: Task[Any, Any] | str,
        cron_expression: str,
        params: Any = None,
        timezone: str = "UTC",
        metadata: Mapping[str, Any] | None = None,
        backend: Backend = "worker",
        misfire: Misfire | None = None,
        overlap: Overlap = "allow",
        **options: Unpack[SpawnOptions],
    ) -> Any:
        """Create a schedule as :meth:`create_schedule` does, in the caller's transaction."""
        script = store.create(
            self,
            validate_name("schedule", name),
            task=task,
            params=params,
            cron_expression=cron_expression,
            timezone=timezone,
            metadata=metadata,
            backend=backend,
            misfire=misfire,
            overlap=overlap,
            options=options,
        )
        return perform_within(session, self.schema, script)

    async def delete_schedule(self, name: str, *, queue_name: str | None = None) -> None:
        """Delete a schedule of a queue, by default the client's; tasks that it has spawned continue.

        Raises:
            ScheduleNotFound: the queue has none of that name.
        """
        await perform(self.database, store.delete(self._queue(queue_name), validate_name("schedule", name)))

    @overload
    def delete_schedule_with(
        self,
        session: AsyncSession | async_scoped_session[Any] | AsyncConnection,
        name: str,
        *,
        queue_name: str | None = None,
    ) -> Coroutine[Any, Any, None]: ...
    @overload
    def delete_schedule_with(
        self, session: Session | scoped_session[Any] | Connection, name: str, *, queue_name: str | None = None
    ) -> None: ...
    def delete_schedule_with(self, session: SessionOrConnection, name: str, *, queue_name: str | None = None) -> Any:
        """Delete a schedule as :meth:`delete_schedule` does, in the caller's transaction."""
        script = store.delete(self._queue(queue_name), validate_name("schedule", name))
        return perform_within(session, self.schema, script)

    async def list_schedules(self, filter: ScheduleFilter | None = None) -> list[ScheduleInfo]:  # noqa: A002
        """Return the schedules that match everything in `filter`, by default those of the client's queue, by name.

        A filter without `queue_name` is for all queues: `ScheduleFilter()` lists every schedule.
        """
        chosen = ScheduleFilter(queue_name=self.queue_name) if filter is None else filter
        return await store.list_schedules(self.database, chosen)

    async def pause_schedule(self, name: str, *, queue_name: str | None = None) -> None:
        """Pause a schedule of a queue, by default the client's, until it is resumed. Ticks of the pause are not fired.

        Raises:
            ScheduleNotFound: the queue has none of that name.
        """
        queue_name = self._queue(queue_name)
        await store.pause(self.database, queue_name, validate_name("schedule", name), paused=True)

    async def resume_schedule(self, name: str, *, queue_name: str | None = None) -> None:
        """Resume a paused schedule of a queue, by default the client's, from its next tick on.

        Raises:
            ScheduleNotFound: the queue has none of that name.
        """
        queue_name = self._queue(queue_name)
        await store.pause(self.database, queue_name, validate_name("schedule", name), paused=False)
        self._sender().send(Hint(timers=True))

    async def trigger_schedule(self, name: str, *, queue_name: str | None = None) -> SpawnResult[Any]:
        """Spawn the task of a schedule of a queue, by default the client's, now, independently of its ticks.

        Raises:
            ScheduleNotFound: the queue has none of that name.
        """
        queue_name = self._queue(queue_name)
        with SpawnCall(self) as call:
            prepared = await firing.prepare_trigger(self, queue_name, validate_name("schedule", name), call)
            return await self._spawn(prepared, call)
