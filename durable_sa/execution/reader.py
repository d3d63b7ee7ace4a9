"""Reads of runs in progress, batched over all runs of a worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Executable, Row

from ..database.batches import Batch, always
from ..database.channel import DedicatedConnection
from ..database_errors import retrying
from ..statements import checkpoints, claiming, messages, streams, values, waits
from .waits import Stored


class EmittedEvent(NamedTuple):
    """An event that exists already."""

    payload: str
    metadata: str | None


class JoinTarget(NamedTuple):
    """A task that another one joins."""

    parent_task_id: uuid.UUID | None
    task_name: str
    outcome: str | None
    output: str | None
    error: str | None


class Reader:
    """Reads on one connection: of what a run may have to wait for, and of waits while other branches go on."""

    def __init__(self, channel: DedicatedConnection) -> None:
        self._channel = channel
        self.event: Batch[tuple[str, str], EmittedEvent | None] = Batch(always(self._events))
        """An event, by queue and name; None if it has not been emitted."""
        self.task: Batch[uuid.UUID, JoinTarget | None] = Batch(always(self._tasks))
        """Another task, by id; None if there is no such task."""
        self.ownership: Batch[tuple[uuid.UUID, int], str | None] = Batch(always(self._ownership))
        """The state of a task whose fence is no longer the given one; None while it is."""
        self._checkpoints: Batch[tuple[uuid.UUID, uuid.UUID], Stored | None] = Batch(always(self._read_checkpoints))
        self.receiver: Batch[uuid.UUID, tuple[str, str | None] | None] = Batch(always(self._receivers))
        """The state and the outcome of a task to which a message could not be sent; None if there is no such task."""
        self.with_message: Batch[tuple[uuid.UUID, str], bool] = Batch(always(self._with_message))
        """True if there is a message to a task of a topic."""
        self.follows_loss: Batch[uuid.UUID, bool] = Batch(always(self._follow_loss))
        """True if the last run of a task before the current one was lost with its worker."""
        self._resolve: Batch[uuid.UUID, None] = Batch(always(self._resolve_waits))
        self._deliver: Batch[uuid.UUID, None] = Batch(always(self._deliver_messages))

    async def checkpoint(self, task_id: uuid.UUID, key: uuid.UUID) -> str | None:
        """Return the value of a checkpoint that was not loaded with the journal."""
        stored = await self._checkpoints((task_id, key))
        return stored.value if stored is not None else None

    async def resolved(
        self, task_id: uuid.UUID, keys: Sequence[uuid.UUID], *, messages: bool
    ) -> dict[uuid.UUID, Stored]:
        """Resolve the waits of a task that are over, and return those of `keys` that are.

        `messages` says that some of the waits are for messages.
        """
        if messages:
            await self._deliver(task_id)
        await self._resolve(task_id)
        found = await asyncio.gather(*(self._checkpoints((task_id, key)) for key in keys))
        return {key: stored for key, stored in zip(keys, found, strict=True) if stored is not None}

    async def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row[Any]]:
        """Execute a statement that may be repeated, until the database answers."""
        return await retrying(lambda: self._channel.execute(statement, parameters))

    async def _events(self, events: list[tuple[str, str]]) -> list[EmittedEvent | None]:
        rows = await self.execute(
            waits.PEEK_EVENTS,
            {"queue_names": [queue for queue, _ in events], "event_names": [name for _, name in events]},
        )
        # The payload of an event without one is NULL in the database, as an event of an application's own statement.
        found = {(row.queue_name, row.name): EmittedEvent(row.payload or "null", row.metadata) for row in rows}
        return [found.get(item) for item in events]

    async def _tasks(self, task_ids: list[uuid.UUID]) -> list[JoinTarget | None]:
        rows = await self.execute(waits.PEEK_TASKS, {"task_ids": task_ids})
        tasks = {
            row.task_id: JoinTarget(row.parent_task_id, row.task_name, row.outcome, row.output, row.error)
            for row in rows
        }
        return [tasks.get(task_id) for task_id in task_ids]

    async def _ownership(self, held: list[tuple[uuid.UUID, int]]) -> list[str | None]:
        rows = await self.execute(
            claiming.LOST_RUNS, {"task_ids": [task_id for task_id, _ in held], "fences": [fence for _, fence in held]}
        )
        states = {(row.task_id, row.fence): row.state or "deleted" for row in rows}
        return [states.get(key) for key in held]

    async def _read_checkpoints(self, items: list[tuple[uuid.UUID, uuid.UUID]]) -> list[Stored | None]:
        rows = await self.execute(
            checkpoints.READ_CHECKPOINTS,
            {"task_ids": [task_id for task_id, _ in items], "keys": [key for _, key in items]},
        )
        found = {(row.task_id, row.key): Stored(row.status, row.value, row.child_task_id) for row in rows}
        return [found.get(item) for item in items]

    async def _receivers(self, task_ids: list[uuid.UUID]) -> list[tuple[str, str | None] | None]:
        rows = await self.execute(messages.RECEIVER_STATES, {"task_ids": task_ids})
        found = {row.task_id: (row.state, row.outcome) for row in rows}
        return [found.get(task_id) for task_id in task_ids]

    async def was_sent(self, receiver_id: uuid.UUID, message_id: uuid.UUID) -> bool:
        """Return whether a message was sent before."""
        parameters = {"receiver_ids": [receiver_id], "message_ids": [message_id]}
        return bool(await self.execute(messages.SENT, parameters))

    async def overtaken(self, task_id: uuid.UUID, name: str, step_key: uuid.UUID, position: int) -> bool:
        """Return whether other steps have gone on with a stream since a step had written up to a position."""
        parameters = {"task_ids": [task_id], "names": [name], "step_keys": [step_key], "positions": [position]}
        return bool(await self.execute(streams.OVERTAKEN, parameters))

    async def _follow_loss(self, task_ids: list[uuid.UUID]) -> list[bool]:
        found = {row.task_id for row in await self.execute(values.FOLLOW_LOSS, {"task_ids": task_ids})}
        return [task_id in found for task_id in task_ids]

    async def _with_message(self, items: list[tuple[uuid.UUID, str]]) -> list[bool]:
        parameters = {"task_ids": [task_id for task_id, _ in items], "topics": [topic for _, topic in items]}
        found = {(row.task_id, row.topic) for row in await self.execute(messages.WITH_MESSAGE, parameters)}
        return [item in found for item in items]

    async def _deliver_messages(self, task_ids: list[uuid.UUID]) -> list[None]:
        await self.execute(messages.DELIVER, {"task_ids": sorted(set(task_ids))})
        return [None] * len(task_ids)

    async def _resolve_waits(self, task_ids: list[uuid.UUID]) -> list[None]:
        await self.execute(waits.RESOLVE, {"task_ids": sorted(set(task_ids))})
        return [None] * len(task_ids)
