"""Creating and changing cron schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ..database.hint import Hint
from ..names import validate_name
from ..options import SpawnOptions
from ..results import ScheduleFilter, ScheduleInfo, SpawnResult
from ..schedules import firing, store
from ..schedules.cron import Misfire
from ..schedules.store import Backend, Overlap
from ..spawns import SpawnCall
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
        """Create a schedule that spawns a task at each tick of a cron expression, or replace the one of that name.

        Workers fire it, each tick once across the fleet, in the queue given by `queue_name`. Five fields, or six with
        seconds first. `misfire` is for ticks that no worker fired within a minute: `skip` them, `run_once` for the
        latest, which is the default, or `run_all`, up to the latest hundred. `overlap="skip"` leaves out ticks while
        the task of the previous tick has not ended, and of several that are due at once all but the latest. The options
        of the task and of this client are stored with it; those of the process that fires it do not count.

        `backend="pg_cron"` hands the schedule to the extension; see :func:`durable_sa.setup_pgcron`. It uses the
        server's time zone, takes five fields without `L`, `W` and `#`, and never fires missed ticks.

        Raises:
            InvalidCron: an expression that cannot be parsed, or has no tick.
            InvalidName, InvalidTaskParams, InvalidConfiguration, TaskNotRegistered: as for a spawn.
            QueueNotFound: there is no such queue.
        """
        await store.create(
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
        self._sender().send(Hint(limits=True))

    async def delete_schedule(self, name: str) -> None:
        """Delete a schedule; tasks that it has spawned continue.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await store.delete(self.database, validate_name("schedule", name))

    async def list_schedules(self, filter: ScheduleFilter | None = None) -> list[ScheduleInfo]:  # noqa: A002
        """Return the schedules that match everything in `filter`, sorted by name."""
        return await store.list_schedules(self.database, filter or ScheduleFilter())

    async def pause_schedule(self, name: str) -> None:
        """Pause a schedule until it is resumed. Ticks of the pause are never fired.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await store.pause(self.database, validate_name("schedule", name), paused=True)

    async def resume_schedule(self, name: str) -> None:
        """Resume a paused schedule, from its next tick on.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        await store.pause(self.database, validate_name("schedule", name), paused=False)
        self._sender().send(Hint(limits=True))

    async def trigger_schedule(self, name: str) -> SpawnResult[Any]:
        """Spawn a schedule's task now, independently of its ticks.

        Raises:
            ScheduleNotFound: there is none of that name.
        """
        with SpawnCall(self) as call:
            prepared = await firing.prepare_trigger(self, validate_name("schedule", name), call)
            return await self._spawn(prepared, call)
