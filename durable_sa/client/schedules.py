"""Cron schedules as a client defines and changes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ..database.notifier import Hint
from ..names import validate_name
from ..options import SpawnOptions
from ..results import ScheduleFilter, ScheduleInfo, SpawnResult
from ..schedules import firing, store
from ..schedules.cron import Misfire
from ..schedules.store import Backend, Overlap
from ..tasks import Task
from .spawning import Spawning


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
        """Spawn a task at each tick of a cron expression; defining a name again replaces what it stood for.

        Workers fire it, each tick once across the fleet, in the queue given by `queue_name`. Five fields, or six with
        seconds first. `misfire` is for ticks that no worker was there to fire within a minute: `skip` them, `run_once`
        for the latest, which is what happens if nothing is said, or `run_all`, up to the latest hundred.
        `overlap="skip"` leaves out ticks while the task of the one before has not ended, and of several that are due at
        once all but the latest. The options of the task and
        of this client are stored with it; those of the process that fires it do not count.

        `backend="pg_cron"` hands the schedule to the extension; see :func:`durable_sa.setup_pgcron`. It goes by the
        server's time zone and by minutes, knows five fields without `L`, `W` and `#`, and makes up for no ticks.

        Raises:
            InvalidCron: an expression that cannot be read, or never comes true.
            InvalidName, InvalidTaskParams, InvalidConfiguration, TaskNotRegistered: as for a spawn.
            QueueNotFound: there is no such queue.
        """
        await store.create(
            self,
            store.Definition(
                validate_name("schedule", name),
                task,
                params,
                cron_expression,
                timezone,
                metadata,
                backend,
                misfire,
                overlap,
                options,
            ),
        )
        self._sender().send(Hint(limits=True))

    async def delete_schedule(self, name: str) -> None:
        """Remove a schedule; tasks that it has spawned go on.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await store.delete(self.database, validate_name("schedule", name))

    async def list_schedules(self, filter: ScheduleFilter | None = None) -> list[ScheduleInfo]:  # noqa: A002
        """Schedules by name, those that match everything in `filter`."""
        return await store.list_schedules(self.database, filter or ScheduleFilter())

    async def pause_schedule(self, name: str) -> None:
        """Let a schedule not fire until it is resumed. Ticks of the pause are not made up for.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await store.pause(self.database, validate_name("schedule", name), paused=True)

    async def resume_schedule(self, name: str) -> None:
        """Let a paused schedule fire again, from its next tick on.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await store.pause(self.database, validate_name("schedule", name), paused=False)
        self._sender().send(Hint(limits=True))

    async def trigger_schedule(self, name: str) -> SpawnResult[Any]:
        """Spawn a schedule's task now, besides its ticks.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        prepared = await firing.prepare_trigger(self, validate_name("schedule", name))
        return await self._spawn(prepared)
