"""Firing of schedules: the spawns of their ticks, made by workers or by hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from ..app import App
from ..database.channel import Executing
from ..serialization.codec import UNTYPED
from ..spawns import Prepared, SpawnCall, prepare
from ..statements import scheduling
from ..statements.expressions import arrays
from ..statements.spawning import LIMITED_SPAWN_COLUMNS
from . import store
from .cron import due_ticks

logger = logging.getLogger("durable_sa")

PAGE = 100
_FIRST_PAGE = (datetime(1, 1, 2, tzinfo=UTC), "", "")


def tick_key(name: str, tick: datetime) -> str:
    """Return the idempotency key of a tick, which keeps it from being spawned twice in the schedule's queue."""
    return f"durable::{name}:{tick.isoformat()}"[-255:]


def prepare_tick(app: App, row: Row[Any], tick: datetime | None, call: SpawnCall | None = None) -> Prepared:
    """Prepare the spawn of a tick, the same in every process; without a tick, a spawn by hand."""
    options = store.decode_options(row.spawn_options)
    options["queue_name"] = row.queue_name
    if tick is not None:
        options["idempotency_key"] = tick_key(row.name, tick)
    params = None if row.params is None else UNTYPED.decode(row.params, "the params of a schedule")
    headers = {store.SCHEDULED_BY: row.name, store.CRON: row.cron_expression}
    return prepare(app, row.task_name, params, options, as_stored=True, internal_headers=headers, call=call)


async def prepare_trigger(app: App, queue_name: str, name: str, call: SpawnCall) -> Prepared:
    """Prepare a spawn by hand of a schedule's task.

    Raises:
        ScheduleNotFound: the queue has no schedule of that name.
    """
    return prepare_tick(app, await store.read(app.database, queue_name, name), None, call)


class Firing:
    """Fires due schedules. Any number of workers may do so at the same time: each tick is spawned once."""

    def __init__(self, app: App, connection: Executing) -> None:
        self._app = app
        self._connection = connection
        self._failing: set[tuple[str, str]] = set()
        """Schedules that this worker cannot fire. Each is logged once."""

    async def fire_due(self) -> tuple[list[Row[Any]], bool]:
        """Fire all due schedules. Return the spawned tasks, and whether any schedule has moved to its next tick.

        A schedule that cannot be fired here, because of its time zone or a hook, is logged and passed over.
        """
        spawned: list[Row[Any]] = []
        moved = False
        tick, name, queue_name = _FIRST_PAGE
        while True:
            rows = await self._connection.execute(
                scheduling.DUE_SCHEDULES,
                {"wanted": PAGE, "after_tick": tick, "after_name": name, "after_queue": queue_name},
            )
            for row in rows:
                call = SpawnCall(self._app)
                try:
                    fired, following = due_ticks(
                        row.cron_expression, row.timezone, row.next_tick_at, row.now, row.misfire
                    )
                    # Several tasks at once would overlap, so only the latest tick is spawned.
                    ticks = fired[-1:] if row.overlap == "skip" else fired
                    prepared = [prepare_tick(self._app, row, each, call) for each in ticks]
                except Exception as error:
                    if (row.queue_name, row.name) not in self._failing:
                        self._failing.add((row.queue_name, row.name))
                        logger.exception(
                            "schedule %s of queue %s cannot be fired by this worker", row.name, row.queue_name
                        )
                    call.end(error)
                    continue
                with call:
                    spawned.extend(await self._fire(row, fired, following, prepared, call))
                self._failing.discard((row.queue_name, row.name))
                moved = True
            if len(rows) < PAGE:
                return spawned, moved
            tick, name, queue_name = rows[-1].next_tick_at, rows[-1].name, rows[-1].queue_name

    async def _fire(
        self,
        row: Row[Any],
        fired: list[datetime],
        following: datetime | None,
        prepared: list[Prepared],
        call: SpawnCall,
    ) -> Sequence[Row[Any]]:
        spawns = arrays(LIMITED_SPAWN_COLUMNS, [item.all_values for item in prepared])
        parameters = {
            "schedule_queue": row.queue_name,
            "schedule_name": row.name,
            "fired_tick": row.next_tick_at,
            "read_as_of": row.updated_at,
            "next_tick": following,
            "last_tick": fired[-1] if fired else None,
            "last_task": prepared[-1].task_id if prepared else None,
            **{f"tick_{name}": values for name, values in spawns.items()},
        }
        rows = await self._connection.execute(scheduling.FIRE, parameters)
        if not rows:
            # Another worker was faster, so there is nothing for a span to show.
            call.drop()
        created = {row.task_id for row in rows}
        for item in prepared:
            if item.task_id in created:
                call.created(item)
        return rows
