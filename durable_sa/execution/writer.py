"""Group commit: what all runs of a worker write, in as few statements as there are kinds of writes.

A write goes out at once if the writer is idle; what comes while a statement is on its way gathers for the next. Nothing
ever waits for a timer or for company. Each write names its run's fence, and its future gets the outcome only after the
commit has returned. A write may be repeated at will: after a lost reply the repetition finds what was stored.

Runs that wait for their checkpoints do nothing meanwhile, so many at once would work in step, the worker's process and
the server in turns. Therefore large batches of checkpoints are sent in two halves, on two connections: while one half
is written, the runs of the other go on. The second connection is that of the claims, when it has nothing to do.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from ..database.channel import DedicatedConnection
from ..database_errors import (
    LOCK_NOT_AVAILABLE,
    backoff,
    is_read_only,
    is_transient,
    reason,
    sqlstate,
    without_values,
)
from ..signals import LeaseLost
from ..statements import checkpoints, fencing
from .writes import (
    ALONE,
    CONTENDED,
    KEYED,
    TALLIED,
    Kind,
    Stored,
    Write,
    answers,
    current,
    identify,
    statement_of,
    statement_of_many,
)

logger = logging.getLogger("durable_sa")

FLUSH_WRITES = 1000
FLUSH_BYTES = 4 * 1024 * 1024
PIPELINED = 32
"""From so many checkpoints on, two connections share them."""
REHEARSALS = 6
"""After five executions with a plan of their own the server keeps one for all."""
LOCKED_RETRY = 0.05
"""Seconds until a row that somebody else has locked is tried again."""

_ORDER = {kind: position for position, kind in enumerate(Kind)}


class _Pipe:
    """A connection that writes go out on, one statement at a time, with the tasks that those on their way are of."""

    def __init__(self, channel: DedicatedConnection) -> None:
        self.channel = channel
        self.wanted = asyncio.Event()
        self.flushing = 0
        self.task_ids: set[uuid.UUID] = set()


class Writer:
    """Takes the writes of a worker's runs and sends them, grouped. It may use `spare` while nobody else does."""

    def __init__(
        self,
        channel: DedicatedConnection,
        spare: DedicatedConnection | None = None,
        *,
        on_commit: Callable[[Kind, list[Write], Sequence[Row[Any]]], None],
    ) -> None:
        self._main = _Pipe(channel)
        self._beside = None if spare is None else _Pipe(spare)
        self._on_commit = on_commit
        self._queue: deque[Write] = deque()
        self._abandoned = False
        self._delayed = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def backlog(self) -> int:
        """Writes that have not been committed yet."""
        beside = 0 if self._beside is None else self._beside.flushing
        return len(self._queue) + self._main.flushing + beside + self._delayed

    def submit(self, write: Write) -> None:
        """Queue a write. Its outcome is `LeaseLost` where the fence is another by now."""
        if self._abandoned:
            write.settle(None, LeaseLost())
            return
        self._queue.append(write)
        self._main.wanted.set()
        if self._beside is not None and self._main.flushing and len(self._queue) >= PIPELINED:
            self._beside.wanted.set()
        self.idle.clear()

    def abandon(self) -> None:
        """Give up all writes that are not committed: the worker has no lease any more."""
        self._abandoned = True
        while self._queue:
            self._queue.popleft().settle(None, LeaseLost())
        self._main.wanted.set()

    def resume(self) -> None:
        """Take writes again: the worker has come back with a lease."""
        self._abandoned = False

    async def warm_up(self) -> None:
        """Have the commonest statements compiled and planned before the first run needs them: that takes 15 ms.

        They write nothing, but a database that is read-only does not know that.
        """
        try:
            for kind, alone in ALONE.items():
                many, none = statement_of_many(kind, [])
                for _ in range(REHEARSALS):
                    await self._main.channel.execute(many, none)
                    await self._main.channel.execute(alone, dict.fromkeys(none))
        except SQLAlchemyError as error:
            if not is_read_only(error):
                raise

    async def run(self) -> None:
        """Flush until cancelled."""
        try:
            await self._serve(self._main)
        finally:
            self.abandon()

    async def run_beside(self) -> None:
        """Flush, on the spare connection and until cancelled, half of the checkpoints where there are many."""
        if self._beside is not None:
            await self._serve(self._beside)

    async def _serve(self, lane: _Pipe) -> None:
        while True:
            await lane.wanted.wait()
            lane.wanted.clear()
            while batch := self._take(lane):
                try:
                    await self._send_all(lane, batch)
                except BaseException:
                    # Whoever has cancelled this: what was sent may be sent again, and nobody else would tell the runs.
                    self._queue.extendleft(write for write in reversed(batch) if not write.over)
                    self._main.wanted.set()
                    raise
                finally:
                    lane.flushing = 0
                    lane.task_ids.clear()
                if lane is self._beside and self._queue:
                    # What the other has passed over because of this.
                    self._main.wanted.set()
            if not self.backlog:
                self.idle.set()

    async def _send_all(self, lane: _Pipe, batch: list[Write]) -> None:
        groups: dict[Kind, list[Write]] = {}
        for write in batch:
            groups.setdefault(write.kind, []).append(write)
        for kind in sorted(groups, key=_ORDER.__getitem__) if len(groups) > 1 else groups:
            await self._send(lane.channel, groups[kind])

    def _take(self, lane: _Pipe) -> list[Write]:
        """What goes into the next statements of a lane, in the order of the writes of each task."""
        batch: list[Write] = []
        most, size = FLUSH_WRITES, 0
        other: _Pipe | None = self._beside if lane is self._main else self._main
        # The two would lock the same rows, and pass over each other's.
        passed = set(other.task_ids) if other is not None else set[uuid.UUID]()
        left: list[Write] = []
        if lane is self._beside:
            if lane.channel.busy:
                return []
        elif other is not None and not other.flushing and self._many_checkpoints:
            most = min(FLUSH_WRITES, (len(self._queue) + 1) // 2)
            other.wanted.set()
        while self._queue and len(batch) < most and size <= FLUSH_BYTES:
            write = self._queue.popleft()
            if write.over:
                continue
            if write.task_id in passed or (lane is self._beside and write.kind is not Kind.CHECKPOINT):
                passed.add(write.task_id)
                left.append(write)
                continue
            size += write.size
            batch.append(write)
        self._queue.extendleft(reversed(left))
        batch = current(batch)
        lane.flushing = len(batch)
        if other is not None:
            lane.task_ids.update(write.task_id for write in batch)
        return batch

    @property
    def _many_checkpoints(self) -> bool:
        """Whether there are enough to be shared, to all appearances of different tasks."""
        if len(self._queue) < PIPELINED:
            return False
        first, last = self._queue[0], self._queue[-1]
        return first.kind is last.kind is Kind.CHECKPOINT and first.task_id != last.task_id

    async def _send(self, channel: DedicatedConnection, writes: list[Write]) -> None:
        """One statement for all of these, repeated until the database answers; halved to find the one it refuses."""
        failures = 0
        while not self._abandoned:
            try:
                await self._flush(channel, writes)
                return
            except Exception as error:  # noqa: BLE001 - whatever one write meets, the others go out
                contended = writes[0].kind in CONTENDED and sqlstate(error) == LOCK_NOT_AVAILABLE
                if is_transient(error) and not contended:
                    logger.warning("writing for %d runs failed, trying again: %s", len(writes), reason(error))
                    await asyncio.sleep(backoff(failures))
                    failures += 1
                    continue
                if len(writes) > 1:
                    middle = len(writes) // 2
                    await self._send(channel, writes[:middle])
                    await self._send(channel, writes[middle:])
                elif contended:
                    self._delay(writes[0])
                else:
                    writes[0].settle(None, without_values(error))
                return
        for write in writes:
            write.settle(None, LeaseLost())

    async def _flush(self, channel: DedicatedConnection, writes: list[Write]) -> None:
        kind = writes[0].kind
        statement, parameters = statement_of(kind, writes)
        rows = await channel.execute(statement, parameters)
        missing: list[Write] = []
        if kind in TALLIED and rows[0].written == len(writes):
            for write in writes:
                write.settle(None)
        else:
            told = answers(kind, rows)
            for write in writes:
                identity = identify(write)
                if identity in told:
                    write.settle(told[identity])
                else:
                    missing.append(write)
        if len(missing) < len(writes):
            self._on_commit(kind, writes, rows)
        if missing:
            await self._settle(channel, missing, keyed=kind in KEYED)

    async def _settle(self, channel: DedicatedConnection, missing: list[Write], *, keyed: bool) -> None:
        """Find out why writes were passed over: lost fence, stored before, or a row that somebody holds locked."""
        ids = list({write.task_id: write.fence for write in missing}.items())
        rows = await channel.execute(
            fencing.FENCE_STATUS, {"task_ids": [item[0] for item in ids], "fences": [item[1] for item in ids]}
        )
        fences = {row.task_id: row.fence for row in rows}
        free = {row.task_id for row in rows if row.free}
        held: list[Write] = []
        for write in missing:
            if fences.get(write.task_id) == write.fence:
                held.append(write)
            else:
                write.settle(None, LeaseLost())
        if held and keyed:
            stored = await channel.execute(
                checkpoints.READ_CHECKPOINTS,
                {"task_ids": [write.task_id for write in held], "keys": [write.key for write in held]},
            )
            values = {(row.task_id, row.key): Stored(row.status, row.value, row.child_task_id) for row in stored}
            still: list[Write] = []
            for write in held:
                if (entry := values.get((write.task_id, write.key))) is not None:
                    write.settle(entry)
                else:
                    still.append(write)
            held = still
        for write in held:
            write.refusals += write.task_id in free
            if write.kind is Kind.CHILD and write.refusals > 1:
                # Nothing stood in its way: what is taken is the child's idempotency key, or its queue is gone.
                write.settle(Stored("refused", None))
            else:
                self._delay(write)

    def _delay(self, write: Write) -> None:
        """Try again in a moment: somebody holds what it needs."""
        write.tries += 1
        self._delayed += 1
        asyncio.get_running_loop().call_later(min(1.0, LOCKED_RETRY * write.tries), self._again, write)

    def _again(self, write: Write) -> None:
        self._delayed -= 1
        self.submit(write)
