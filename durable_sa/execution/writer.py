"""Group commit: the writes of all runs of a worker go out in batches, one statement for each kind of write.

A write goes out at once if the writer is idle. Writes that arrive while a statement is in flight form the next batch.
No write waits for more writes. A write waits for a timer only after a try that has written nothing: another transaction
held its row locked, or the database refused it or did not answer. Each write carries its run's fence, and its outcome
is reported after the commit has returned. Any write may be repeated: after a lost reply, the repetition finds what was
stored.

Runs that wait for their checkpoints do nothing meanwhile. If all of them were in one batch, the worker's process and
the server would work in turns. So a large batch of checkpoints is split between two connections: while one half is
written, the runs of the other half go on. The second connection is that of the claims, used while it is free.
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
    UNTRANSLATABLE,
    FailureLog,
    Outage,
    backoff,
    is_read_only,
    is_transient,
    sqlstate,
    without_values,
)
from ..signals import LeaseLost
from ..statements import checkpoints, fencing
from .waits import Stored
from .writes import (
    CONTENDED,
    COUNTED,
    ENDING,
    KEYED,
    REFUSABLE,
    Kind,
    Write,
    escape,
    identify,
    results,
    single_statements,
    statement_of,
    statement_of_many,
    without_earlier_fences,
)

logger = logging.getLogger("durable_sa")

FLUSH_WRITES = 1000
FLUSH_BYTES = 4 * 1024 * 1024
SPLIT_WRITES = 32
"""Length of the queue from which on checkpoints are split between the two connections."""
WARM_UP_EXECUTIONS = 6
"""After five executions with plans of their own, the server keeps one plan for all."""
LOCKED_RETRY_DELAY = 0.05
"""Seconds before the first retry of a write whose row another transaction has locked; they grow with each retry."""

_ORDER = {kind: position for position, kind in enumerate(Kind)}


class _Pipe:
    """A connection for writes, with the batch that is in flight on it."""

    def __init__(self, channel: DedicatedConnection) -> None:
        self.channel = channel
        self.wake = asyncio.Event()
        """Set when there may be something to send."""
        self.writes_in_flight = 0
        self.tasks_in_flight: set[uuid.UUID] = set()


class Writer:
    """Takes the writes of a worker's runs and sends them in batches. It may use `spare` while that is free.

    `on_commit` is called after each statement that has written something, with its writes and the rows it returned.
    """

    def __init__(
        self,
        channel: DedicatedConnection,
        spare: DedicatedConnection | None = None,
        *,
        on_commit: Callable[[Kind, list[Write], Sequence[Row[Any]]], None],
        outage: Outage | None = None,
    ) -> None:
        self._first = _Pipe(channel)
        self._second = None if spare is None else _Pipe(spare)
        self._on_commit = on_commit
        self._failures = FailureLog("writing", outage, patience=1)
        self._queue: deque[Write] = deque()
        self._abandoned = False
        self._delayed = 0
        """Writes that wait for a retry by timer."""
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def backlog(self) -> int:
        """The number of writes that have not been committed yet."""
        in_flight = self._first.writes_in_flight
        if self._second is not None:
            in_flight += self._second.writes_in_flight
        return len(self._queue) + in_flight + self._delayed

    def submit(self, write: Write, *, delay: float = 0.0) -> None:
        """Queue a write, after `delay` seconds. Its outcome is `LeaseLost` if the task has another fence by then."""
        if self._abandoned:
            write.settle(None, LeaseLost())
            return
        if delay:
            self._delayed += 1
            asyncio.get_running_loop().call_later(delay, self._retry, write)
            return
        self._queue.append(write)
        self._first.wake.set()
        if self._second is not None and self._first.writes_in_flight and len(self._queue) >= SPLIT_WRITES:
            self._second.wake.set()
        self.idle.clear()

    def abandon(self) -> None:
        """Settle all writes that are not committed as lost, because the worker has no lease any more."""
        self._abandoned = True
        while self._queue:
            self._queue.popleft().settle(None, LeaseLost())
        self._first.wake.set()

    def resume(self) -> None:
        """Accept writes again, because the worker has a new lease."""
        self._abandoned = False

    async def warm_up(self) -> None:
        """Have the commonest statements compiled and planned before the first run needs them, which takes 15 ms.

        They write nothing here. A read-only database refuses them all the same.
        """
        try:
            for kind, single in single_statements().items():
                many, no_rows = statement_of_many(kind, [])
                for _ in range(WARM_UP_EXECUTIONS):
                    await self._first.channel.execute(many, no_rows)
                    await self._first.channel.execute(single, dict.fromkeys(no_rows))
        except SQLAlchemyError as error:
            if not is_read_only(error):
                raise

    async def run(self) -> None:
        """Send writes until cancelled."""
        try:
            await self._serve(self._first)
        finally:
            self.abandon()

    async def run_second(self) -> None:
        """Send part of the checkpoints on the spare connection, while there are many, until cancelled."""
        if self._second is not None:
            await self._serve(self._second)

    async def _serve(self, pipe: _Pipe) -> None:
        while True:
            await pipe.wake.wait()
            pipe.wake.clear()
            while batch := self._next_batch(pipe):
                try:
                    await self._send_batch(pipe.channel, batch)
                except BaseException:
                    # This task was cancelled. The writes may be sent twice, but must be settled, so they go back.
                    self._queue.extendleft(write for write in reversed(batch) if not write.over)
                    self._first.wake.set()
                    raise
                finally:
                    pipe.writes_in_flight = 0
                    pipe.tasks_in_flight.clear()
                if pipe is self._second and self._queue:
                    # The first pipe has passed over the writes of tasks that were in flight here.
                    self._first.wake.set()
            if not self.backlog:
                self.idle.set()

    def _next_batch(self, pipe: _Pipe) -> list[Write]:
        """Take the writes of the next batch of a pipe from the queue."""
        if self._second is None:
            batch = without_earlier_fences(self._choose(pipe, set(), FLUSH_WRITES))
        else:
            if pipe is self._second and pipe.channel.busy:
                return []
            other = self._second if pipe is self._first else self._first
            # Two statements about one task would lock the same rows, and each pass over those the other has locked.
            chosen = self._choose(pipe, set(other.tasks_in_flight), self._share(pipe, other))
            batch = without_earlier_fences(chosen)
            pipe.tasks_in_flight.update(write.task_id for write in batch)
        pipe.writes_in_flight = len(batch)
        return batch

    def _share(self, pipe: _Pipe, other: _Pipe) -> int:
        """Return how many writes the pipe may take. If that is half of the queue, wake the other pipe for the rest."""
        if pipe is self._first and not other.writes_in_flight and self._many_checkpoints:
            other.wake.set()
            return min(FLUSH_WRITES, (len(self._queue) + 1) // 2)
        return FLUSH_WRITES

    def _choose(self, pipe: _Pipe, excluded: set[uuid.UUID], limit: int) -> list[Write]:
        """Take up to `limit` writes from the queue, but none of `excluded` tasks. Each task's writes keep their order.

        The second pipe takes checkpoints only. A task that has another write before them is excluded from then on.
        """
        batch: list[Write] = []
        passed_over: list[Write] = []
        size = 0
        while self._queue and len(batch) < limit and size <= FLUSH_BYTES:
            write = self._queue.popleft()
            if write.over:
                continue
            if write.task_id in excluded or (pipe is self._second and write.kind is not Kind.CHECKPOINT):
                excluded.add(write.task_id)
                passed_over.append(write)
                continue
            size += write.size
            batch.append(write)
        self._queue.extendleft(reversed(passed_over))
        return batch

    @property
    def _many_checkpoints(self) -> bool:
        """True if the queue is worth a split, judged by its length and its ends: checkpoints of different tasks."""
        if len(self._queue) < SPLIT_WRITES:
            return False
        first, last = self._queue[0], self._queue[-1]
        return first.kind is last.kind is Kind.CHECKPOINT and first.task_id != last.task_id

    async def _send_batch(self, channel: DedicatedConnection, batch: list[Write]) -> None:
        groups: dict[tuple[Kind, bool], list[Write]] = {}
        for write in batch:
            groups.setdefault((write.kind, write.limited), []).append(write)
        for group in sorted(groups, key=lambda group: _ORDER[group[0]]) if len(groups) > 1 else groups:
            await self._send(channel, groups[group])

    async def _send(self, channel: DedicatedConnection, writes: list[Write]) -> None:
        """Send writes of one kind in one statement, and retry while the database does not answer.

        If the database refuses the statement, each half of the writes is sent in turn, down to single writes.
        """
        failures = 0
        while not self._abandoned:
            try:
                await self._flush(channel, writes)
                self._failures.succeeded()
            except Exception as error:  # noqa: BLE001 - a write whose statement is refused is settled with the error
                if is_transient(error) and not _is_contended(writes, error):
                    self._failures.failed(error)
                    await asyncio.sleep(backoff(failures))
                    failures += 1
                    continue
                if len(writes) == 1 and sqlstate(error) == UNTRANSLATABLE and escape(writes[0]):
                    continue
                await self._send_apart(channel, writes, error)
            return
        for write in writes:
            write.settle(None, LeaseLost())

    async def _send_apart(self, channel: DedicatedConnection, writes: list[Write], refusal: Exception) -> None:
        if len(writes) > 1:
            middle = len(writes) // 2
            await self._send(channel, writes[:middle])
            await self._send(channel, writes[middle:])
        elif _is_contended(writes, refusal):
            self._delay(writes[0])
        else:
            writes[0].settle(None, without_values(refusal))

    async def _flush(self, channel: DedicatedConnection, writes: list[Write]) -> None:
        kind = writes[0].kind
        statement, parameters = statement_of(kind, writes)
        rows = await channel.execute(statement, parameters)
        missing: list[Write] = []
        if kind in COUNTED and rows[0].written == len(writes):
            for write in writes:
                write.settle(None)
        else:
            written = results(kind, rows)
            for write in writes:
                identity = identify(write)
                if identity in written:
                    write.settle(written[identity])
                else:
                    missing.append(write)
        if len(missing) < len(writes):
            self._on_commit(kind, writes, rows)
        if missing:
            await self._resolve_missing(channel, missing, keyed=kind in KEYED)

    async def _resolve_missing(self, channel: DedicatedConnection, missing: list[Write], *, keyed: bool) -> None:
        """Find out why writes were passed over: the fence is lost, the key is stored already, or a row is locked."""
        held = await self._without_lost(channel, missing)
        if held and keyed:
            held = await self._without_stored(channel, held)
        for write in held:
            if write.kind in REFUSABLE and write.refusals > 1:
                # No lock was in its way, so the child's idempotency key is taken, or its queue or the receiver of the
                # message does not exist.
                write.settle(Stored("refused", None))
            else:
                self._delay(write)

    async def _without_lost(self, channel: DedicatedConnection, writes: list[Write]) -> list[Write]:
        """Settle the writes whose fence is lost, and return the others."""
        fences = {write.task_id: write.fence for write in writes}
        rows = await channel.execute(fencing.FENCE_STATUS, {"task_ids": list(fences), "fences": list(fences.values())})
        found = {row.task_id: row for row in rows}
        held: list[Write] = []
        for write in writes:
            row = found.get(write.task_id)
            if row is not None and row.fence == write.fence:
                if row.slot is not None and write.kind in ENDING and not write.limited:
                    # The queue has got limits since the claim.
                    write.limited = True
                    self.submit(write)
                    continue
                write.refusals += bool(row.free)
                held.append(write)
            else:
                write.settle(None, LeaseLost())
        return held

    async def _without_stored(self, channel: DedicatedConnection, writes: list[Write]) -> list[Write]:
        """Settle the writes whose key is stored already with what is stored, and return the others."""
        rows = await channel.execute(
            checkpoints.READ_CHECKPOINTS,
            {"task_ids": [write.task_id for write in writes], "keys": [write.key for write in writes]},
        )
        stored = {(row.task_id, row.key): Stored(row.status, row.value, row.child_task_id) for row in rows}
        others: list[Write] = []
        for write in writes:
            if (entry := stored.get((write.task_id, write.key))) is not None:
                write.settle(entry)
            else:
                others.append(write)
        return others

    def _delay(self, write: Write) -> None:
        """Retry a write in a moment, because another transaction has locked a row that it needs."""
        write.delays += 1
        self.submit(write, delay=min(1.0, LOCKED_RETRY_DELAY * write.delays))

    def _retry(self, write: Write) -> None:
        self._delayed -= 1
        self.submit(write)


def _is_contended(writes: list[Write], error: Exception) -> bool:
    return writes[0].kind in CONTENDED and sqlstate(error) == LOCK_NOT_AVAILABLE
