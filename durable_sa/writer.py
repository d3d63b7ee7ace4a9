"""Group commit: what all runs of a worker write, in as few statements as there are kinds of writes.

A write goes out at once if the writer is idle; what comes while a statement is on its way gathers for the next. Nothing
ever waits for a timer or for company. Each write names its run's fence, and its future gets the outcome only after the
commit has returned. A write may be repeated at will: after a lost reply the repetition finds what was stored.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from sqlalchemy import Executable, Row

from .channels import Channel
from .database_errors import LOCK_NOT_AVAILABLE, backoff, is_transient, sqlstate
from .signals import LeaseLost
from .statements import checkpoints, outcomes
from .statements.spawning import SPAWN_COLUMNS

logger = logging.getLogger("durable_sa")

FLUSH_WRITES = 1000
FLUSH_BYTES = 4 * 1024 * 1024
REHEARSALS = 6
"""After five executions with a plan of their own the server keeps one for all."""
LOCKED_RETRY = 0.05
"""Seconds until a row that somebody else has locked is tried again."""


class Kind(Enum):
    """What a write does; one statement each, sent in this order."""

    CHECKPOINT = "checkpoint"
    CHILD = "child"
    EVENT = "event"
    WAITS = "waits"
    SUSPENSION = "suspension"
    FAILURE = "failure"
    RELEASE = "release"
    COMPLETION = "completion"


_CONTENDED = frozenset({Kind.CHILD, Kind.EVENT})
"""What may meet an insert of the same key in a transaction that is still open."""

_ORDER = {kind: position for position, kind in enumerate(Kind)}


class Stored(NamedTuple):
    """What stands in the database under a key, which may be what an earlier run wrote."""

    status: str
    value: str | None
    child_task_id: uuid.UUID | None = None


class WaitSpec(NamedTuple):
    """A wait as it is stored: by an absolute time, or by seconds from now, or without end."""

    key: uuid.UUID
    kind: str
    name: str
    event_name: str | None
    child_task_id: uuid.UUID | None
    due_at: Any
    delay: float | None


@dataclass(slots=True, eq=False)
class Write:
    """One write of one run. `told` is called once with its outcome, a value or an error, after the commit."""

    kind: Kind
    task_id: uuid.UUID
    fence: int
    told: Callable[[Any, BaseException | None], None]
    key: uuid.UUID | None = None
    values: tuple[Any, ...] = ()
    waits: Sequence[WaitSpec] = ()
    size: int = 0
    tries: int = 0
    refusals: int = 0
    over: bool = False

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        """Tell the outcome, if it has not been told."""
        if not self.over:
            self.over = True
            self.told(value, error)


class Writer:
    """Takes the writes of a worker's runs and sends them, grouped, on one connection."""

    def __init__(self, channel: Channel, *, on_commit: Callable[[Kind, list[Write], Sequence[Row[Any]]], None]) -> None:
        self._channel = channel
        self._on_commit = on_commit
        self._queue: deque[Write] = deque()
        self._wanted = asyncio.Event()
        self._abandoned = False
        self._flushing = 0
        self._delayed = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def backlog(self) -> int:
        """Writes that have not been committed yet."""
        return len(self._queue) + self._flushing + self._delayed

    def submit(self, write: Write) -> None:
        """Queue a write. Its outcome is `LeaseLost` where the fence is another by now."""
        if self._abandoned:
            write.settle(None, LeaseLost())
            return
        self._queue.append(write)
        self._wanted.set()
        self.idle.clear()

    def abandon(self) -> None:
        """Give up all writes that are not committed: the worker has no lease any more."""
        self._abandoned = True
        while self._queue:
            self._queue.popleft().settle(None, LeaseLost())
        self._wanted.set()

    def resume(self) -> None:
        """Take writes again: the worker has come back with a lease."""
        self._abandoned = False

    async def rehearse(self) -> None:
        """Have the commonest statements compiled and planned before the first run needs them: that takes 15 ms."""
        for kind in (Kind.CHECKPOINT, Kind.COMPLETION):
            statement, parameters = _STATEMENTS[kind]([])
            for _ in range(REHEARSALS):
                await self._channel.execute(statement, parameters)

    async def run(self) -> None:
        """Flush until cancelled."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while batch := self._take():
                    await self._send_all(batch)
                if not self.backlog:
                    self.idle.set()
        finally:
            self.abandon()

    async def _send_all(self, batch: list[Write]) -> None:
        self._flushing = len(batch)
        groups: dict[Kind, list[Write]] = {}
        for write in batch:
            groups.setdefault(write.kind, []).append(write)
        for kind in sorted(groups, key=_ORDER.__getitem__) if len(groups) > 1 else groups:
            await self._send(groups[kind])
        self._flushing = 0

    def _take(self) -> list[Write]:
        batch: list[Write] = []
        size = 0
        while self._queue and len(batch) < FLUSH_WRITES and size <= FLUSH_BYTES:
            write = self._queue.popleft()
            if write.over:
                continue
            size += write.size
            batch.append(write)
        return _current(batch)

    async def _send(self, writes: list[Write]) -> None:
        """One statement for all of these, repeated until the database answers; halved to find the one it refuses."""
        failures = 0
        while not self._abandoned:
            try:
                await self._flush(writes)
                return
            except Exception as error:  # noqa: BLE001 - whatever one write meets, the others go out
                contended = writes[0].kind in _CONTENDED and sqlstate(error) == LOCK_NOT_AVAILABLE
                if is_transient(error) and not contended:
                    logger.warning("writing for %d runs failed, trying again: %s", len(writes), type(error).__name__)
                    await asyncio.sleep(backoff(failures))
                    failures += 1
                    continue
                if len(writes) > 1:
                    middle = len(writes) // 2
                    await self._send(writes[:middle])
                    await self._send(writes[middle:])
                elif contended:
                    self._delay(writes[0])
                else:
                    writes[0].settle(None, error)
                return
        for write in writes:
            write.settle(None, LeaseLost())

    async def _flush(self, writes: list[Write]) -> None:
        kind = writes[0].kind
        statement, parameters = _STATEMENTS[kind](writes)
        rows = await self._channel.execute(statement, parameters)
        keyed = kind in (Kind.CHECKPOINT, Kind.CHILD, Kind.EVENT)
        missing: list[Write] = []
        if kind is Kind.WAITS:
            for write in writes:
                own = [row for row in rows if row.task_id == write.task_id]
                if own:
                    write.settle(own)
            missing = [write for write in writes if not write.over]
        elif kind is Kind.CHILD:
            born = {row.child_task_id for row in rows}
            for write in writes:
                if write.values[0][-1] in born:
                    write.settle(None)
                else:
                    missing.append(write)
        elif keyed:
            written = {(row.task_id, row.key): row for row in rows}
            for write in writes:
                row = written.get((write.task_id, write.key))
                if row is None:
                    missing.append(write)
                else:
                    write.settle(Stored("completed", row.value) if kind is Kind.EVENT else None)
        else:
            found = {row.task_id: row for row in rows}
            for write in writes:
                row = found.get(write.task_id)
                if row is None:
                    missing.append(write)
                else:
                    write.settle(row)
        if rows:
            self._on_commit(kind, writes, rows)
        if missing:
            await self._settle(missing, keyed)

    async def _settle(self, missing: list[Write], keyed: bool) -> None:
        """Find out why writes were passed over: lost fence, stored before, or a row that somebody holds locked."""
        ids = list({write.task_id: write.fence for write in missing}.items())
        rows = await self._channel.execute(
            outcomes.UNDER_FENCE, {"task_ids": [item[0] for item in ids], "fences": [item[1] for item in ids]}
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
            stored = await self._channel.execute(
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


def _current(batch: list[Write]) -> list[Write]:
    """The batch without writes of runs whose task this worker has claimed anew: a statement knows one fence a task."""
    fences: dict[uuid.UUID, int] = {}
    for write in batch:
        if write.fence > fences.get(write.task_id, -1):
            fences[write.task_id] = write.fence
    current = [write for write in batch if write.fence == fences[write.task_id]]
    if len(current) < len(batch):
        for write in batch:
            if write.fence != fences[write.task_id]:
                write.settle(None, LeaseLost())
    return current


def _columns(names: Iterable[str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows as the arrays that a statement binds."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=True)) if columns else {name: [] for name in names}


def _checkpoints(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    rows = [(write.task_id, write.fence, write.key, *write.values) for write in writes]
    return checkpoints.RECORD, _columns(checkpoints.CHECKPOINT_COLUMNS, rows)


def _children(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    parameters = _columns(
        checkpoints.CHECKPOINT_COLUMNS, [(write.task_id, write.fence, write.key, *write.values[0]) for write in writes]
    )
    parameters |= _columns(SPAWN_COLUMNS, [write.values[1] for write in writes])
    return checkpoints.RECORD_CHILDREN, parameters


def _events(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    names = [*checkpoints.CHECKPOINT_COLUMNS, "event_names", "payloads", "metadata"]
    return checkpoints.RECORD_EVENTS, _columns(
        names, [(write.task_id, write.fence, write.key, *write.values) for write in writes]
    )


def _fenced(writes: list[Write], names: Iterable[str] = ()) -> dict[str, list[Any]]:
    return _columns(("task_ids", "fences", *names), [(write.task_id, write.fence, *write.values) for write in writes])


def _wait_columns(writes: list[Write]) -> dict[str, list[Any]]:
    rows = [(write.task_id, *wait) for write in writes for wait in write.waits]
    return _columns(outcomes.SUSPEND_COLUMNS, rows)


def _suspensions(writes: list[Write]) -> tuple[Executable, dict[str, Any]]:
    rows = [
        (
            write.task_id,
            write.fence,
            *write.values,
            min((wait.due_at for wait in write.waits if wait.due_at is not None), default=None),
            min((wait.delay for wait in write.waits if wait.delay is not None), default=None),
        )
        for write in writes
    ]
    names = ("task_ids", "fences", "waited", "earliest_times", "earliest_delays")
    return outcomes.SUSPEND, _columns(names, rows) | _wait_columns(writes)


_STATEMENTS: dict[Kind, Callable[[list[Write]], tuple[Executable, dict[str, Any]]]] = {
    Kind.CHECKPOINT: _checkpoints,
    Kind.CHILD: _children,
    Kind.EVENT: _events,
    Kind.WAITS: lambda writes: (outcomes.REGISTER_WAITS, _fenced(writes) | _wait_columns(writes)),
    Kind.SUSPENSION: _suspensions,
    Kind.FAILURE: lambda writes: (outcomes.FAIL, _fenced(writes, ("errors", "retryable", "next_run_ids", "waited"))),
    Kind.RELEASE: lambda writes: (outcomes.RELEASE, _fenced(writes, ("errors", "next_run_ids"))),
    Kind.COMPLETION: lambda writes: (outcomes.COMPLETE, _fenced(writes, ("outputs", "waited"))),
}
