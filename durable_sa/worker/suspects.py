"""Room for suspects: tasks that have lost two workers in a row, and are claimed by a worker that runs nothing else.

A worker without runs takes a suspect when it finds no other task. Where all workers are always busy, none of them would
take it. So a busy worker looks for suspects at the heads of its lanes, and makes room for one that has waited for
`PATIENCE` seconds: it claims nothing until its runs have ended, and then the suspect. One worker of the queue makes
room first, chosen by the ids of task and workers, so that they need not agree on it; one more joins it each time that
the wait has doubled, in case those before do not get free. A worker that does not get free within `FIRST_DRAIN` seconds
goes on claiming for three times as long, and waits twice as long the next time: so runs that never end cost it a
quarter of its time at most.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Collection
from hashlib import blake2b

from ..app import App
from ..database.channel import DedicatedConnection
from ..statements import claiming, limits
from .agenda import Agenda
from .registration import Registration
from .slots import Slots

PATIENCE = 5.0
"""Seconds for which a suspect waits for a worker without runs, before a busy one makes room."""
SEARCH_INTERVAL = 5.0
"""Seconds between a busy worker's searches for suspects: each costs as much as one claim."""
FIRST_DRAIN = 30.0
"""Seconds for which a worker makes room at first."""
PAUSE_RATIO = 3
"""Seconds of claiming after each second of making room in vain."""


class Suspects:
    """Decides when a worker makes room for a suspect."""

    def __init__(
        self, app: App, connection: DedicatedConnection, registration: Registration, agenda: Agenda, slots: Slots
    ) -> None:
        self._app = app
        self._connection = connection
        self._registration = registration
        self._agenda = agenda
        self._slots = slots
        self._next_search = 0.0
        self._seen: dict[uuid.UUID, float] = {}
        """When each suspect that waits was seen first, on the local monotonic clock."""
        self._drain = FIRST_DRAIN
        self._drain_until = 0.0
        self._pause_until = 0.0

    async def make_room(self) -> None:
        """Look for suspects if it is time, and stop or resume claiming."""
        now = time.monotonic()
        if self._slots.makes_room:
            if now >= self._drain_until:
                self._pause_until = now + PAUSE_RATIO * self._drain
                self._drain *= 2
                self._slots.makes_room = False
                self._agenda.claim.set()
                return
        elif not self._slots.taken or self._slots.alone or now < max(self._next_search, self._pause_until):
            return
        self._next_search = now + SEARCH_INTERVAL
        worker_id = self._registration.worker_id
        rows = await self._connection.execute(
            claiming.WAITING_SUSPECTS,
            {
                "worker_id": worker_id,
                "task_names": list(self._app.tasks),
                **self._agenda.cursors.parameters(full_scan=True),
            },
        )
        if self._agenda.limited.queues:
            parameters = {"queue_names": list(self._agenda.limited.queues), "task_names": list(self._app.tasks)}
            rows = [*rows, *await self._connection.execute(limits.WAITING_LIMITED_SUSPECTS, parameters)]
        self._seen = {row.task_id: self._seen.get(row.task_id, now) for row in rows}
        chosen = any(
            is_chosen(worker_id, row.task_id, row.worker_ids, waited=now - self._seen[row.task_id]) for row in rows
        )
        if chosen and not self._slots.makes_room:
            self._drain_until = now + self._drain
        if self._slots.makes_room and not chosen:
            # Another worker has taken it.
            self._agenda.claim.set()
        self._slots.makes_room = chosen

    def asked(self, *, found: bool) -> None:
        """Take note that this worker, without runs, has asked for a suspect, and whether it got one."""
        self._slots.makes_room = False
        if found:
            self._drain = FIRST_DRAIN


def is_chosen(worker_id: uuid.UUID, task_id: uuid.UUID, worker_ids: Collection[uuid.UUID], *, waited: float) -> bool:
    """Return whether a worker is among those that make room for a suspect which has waited for so many seconds."""
    if waited < PATIENCE:
        return False
    own = _rank(worker_id, task_id)
    before = sum(_rank(other, task_id) < own for other in worker_ids)
    return before <= math.log2(waited / PATIENCE)


def _rank(worker_id: uuid.UUID, task_id: uuid.UUID) -> bytes:
    return blake2b(worker_id.bytes + task_id.bytes, digest_size=8).digest()
