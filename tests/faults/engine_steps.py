"""The engine's own operations as sequences of statements, for tests that decide what happens between two of them.

What a worker does is written as coroutines that await a database. Here they await a channel that sends nothing but
hands each statement to whoever drives the sequence, which runs it, on any connection and at any moment, and answers
with the rows. So the code under test is the engine's, and the only thing that is simulated is the passing of time.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import Engine, Executable, Row, event

from durable_sa import Durable
from durable_sa.clock import LocalClock
from durable_sa.ids import child_id, new_id, step_key
from durable_sa.lanes import BOTTOM
from durable_sa.retention import delete_tasks
from durable_sa.signals import LeaseLost
from durable_sa.spawns import prepare
from durable_sa.statements import claiming, queues
from durable_sa.tender import Tender
from durable_sa.worker import Worker
from durable_sa.writer import Kind, WaitSpec, Write, Writer

T = TypeVar("T")


class Held(NamedTuple):
    """Stands between statements where somebody else's lock makes the engine wait and try again."""


HELD = Held()
Step = tuple[Executable, Mapping[str, Any]] | Held
Steps = Generator[Step, Sequence[Row[Any]], T]

LANES = (("one", 0), ("one", 1), ("two", 0), ("two", 1))
"""Queues and priorities that simulated workers serve, in this order."""


class _Awaited:
    def __init__(self, step: Step) -> None:
        self._step = step

    def __await__(self) -> Generator[Step, Any, Any]:
        return (yield self._step)


class SteppedChannel:
    """Takes the place of a connection."""

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Any:
        return await _Awaited((statement, parameters or {}))


def steps(coroutine: Coroutine[Any, Any, T]) -> Steps[T]:
    """The statements of a coroutine whose channels are stepped."""
    rows: Any = None
    try:
        while True:
            step = coroutine.send(rows)
            if isinstance(step, asyncio.Future):
                # A pause, such as between two tries: whoever drives decides how long it is.
                step.set_result(None)
                step = HELD
            rows = yield step
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        coroutine.close()


class _SteppedWriter(Writer):
    """A writer that is told when to try again, instead of by a timer."""

    def _delay(self, write: Write) -> None:
        write.tries += 1


class Clock:
    """The time in durable's statements on one engine: it stands still unless it is moved."""

    def __init__(self, engine: Engine, now: datetime) -> None:
        self.now = now
        event.listen(engine, "before_cursor_execute", self._rewrite, retval=True)

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def _rewrite(self, _: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        for function in ("pg_catalog.clock_timestamp()", "pg_catalog.now()"):
            statement = statement.replace(function, f"TIMESTAMPTZ '{self.now.isoformat()}'")
        return statement, parameters


async def _nothing(*_: Any) -> Any:
    return ()


class SimulatedWorker:
    """A worker without user code: what it claims, writes and tends is what it is told to."""

    def __init__(self, durable: Durable, claim_timeout: float = 60.0) -> None:
        self.durable = durable
        self.claim_timeout = claim_timeout
        self.worker_id = new_id()
        self.tender = Tender(
            cast("Any", SteppedChannel()),
            self.worker_id,
            LocalClock(),
            interval=lambda: 5.0,
            announce=lambda hint: None,
            check_runs=_nothing,
            poll_runs=lambda: None,
            fire_schedules=_nothing,
            forget=_nothing,
        )
        # What a worker follows its commits up with, without the rest of a worker.
        follower = SimpleNamespace(tender=self.tender, _announce=lambda hint: None, _held_back=False)
        self._writer = _SteppedWriter(
            cast("Any", SteppedChannel()),
            on_commit=lambda kind, writes, rows: Worker._committed(cast("Any", follower), kind, writes, rows),
        )

    def register(self) -> Steps[None]:
        yield (
            claiming.REGISTER_WORKER,
            {
                "worker_id": self.worker_id,
                "name": "simulated",
                "queue_names": ["one", "two"],
                "claim_timeout": self.claim_timeout,
            },
        )

    def claim(self, wanted: int = 1) -> Steps[list[tuple[uuid.UUID, int]]]:
        """The claimed tasks with their fences, in the order of their ids."""
        rows = yield (
            claiming.CLAIM,
            {
                "worker_id": self.worker_id,
                "wanted": wanted,
                "task_names": list(self.durable.tasks),
                "queue_names": [queue for queue, _ in LANES],
                "priorities": [priority for _, priority in LANES],
                "floor_times": [BOTTOM[0]] * len(LANES),
                "floor_ids": [BOTTOM[1]] * len(LANES),
            },
        )
        return sorted((row.task_id, row.fence) for row in rows)

    def heartbeat(self) -> Steps[bool]:
        rows = yield claiming.HEARTBEAT, {"beating_id": self.worker_id}
        return bool(rows)

    def write(
        self,
        kind: Kind,
        task_id: uuid.UUID,
        fence: int,
        key: uuid.UUID | None = None,
        values: tuple[Any, ...] = (),
        waits: Iterable[WaitSpec] = (),
    ) -> Steps[Any]:
        """What the write's run is told: a value, or the class of an error."""
        told: list[Any] = []
        write = Write(
            kind,
            task_id,
            fence,
            lambda value, error: told.append(value if error is None else type(error)),
            key,
            values,
            list(waits),
        )

        async def flush() -> None:
            while not write.over:
                await self._writer._flush([write])
                if not write.over:
                    await _Awaited(HELD)

        yield from steps(flush())
        return told[0]

    def checkpoint(self, task_id: uuid.UUID, fence: int, name: str, value: str) -> Steps[Any]:
        values = ("step", name, "completed", value, None)
        return self.write(Kind.CHECKPOINT, task_id, fence, step_key("step", name, "", (), 0), values)

    def spawn_child(self, task_id: uuid.UUID, fence: int, name: str, **options: Any) -> Steps[Any]:
        key = step_key("spawn", name, "", (), 0)
        child = child_id(task_id, key)
        prepared = prepare(self.durable, "child", None, cast("Any", options), task_id=child, parent_task_id=task_id)
        return self.write(
            Kind.CHILD, task_id, fence, key, (("spawn", name, "completed", '"digest"', child), prepared.values)
        )

    def emit(self, task_id: uuid.UUID, fence: int, name: str, payload: str) -> Steps[Any]:
        key = step_key("emit", name, "", (), 0)
        values = ("emit", name, "completed", None, None, name, payload, None)
        return self.write(Kind.EVENT, task_id, fence, key, values)

    def register_waits(self, task_id: uuid.UUID, fence: int, waits: Iterable[WaitSpec]) -> Steps[Any]:
        return self.write(Kind.WAITS, task_id, fence, waits=waits)

    def suspend(self, task_id: uuid.UUID, fence: int, waits: Iterable[WaitSpec]) -> Steps[Any]:
        return self.write(Kind.SUSPENSION, task_id, fence, values=(True,), waits=waits)

    def complete(self, task_id: uuid.UUID, fence: int, output: str = "1") -> Steps[Any]:
        return self.write(Kind.COMPLETION, task_id, fence, values=(output, True))

    def fail(self, task_id: uuid.UUID, fence: int, *, retryable: bool = True) -> Steps[Any]:
        error = '{"name": "ValueError", "message": "no"}'
        return self.write(Kind.FAILURE, task_id, fence, values=(error, retryable, new_id(), True))

    def release(self, task_id: uuid.UUID, fence: int) -> Steps[Any]:
        return self.write(Kind.RELEASE, task_id, fence, values=('{"name": "Released"}', new_id()))

    def tend(self) -> Steps[None]:
        """Follow up on what was committed."""
        return steps(self.tender._do_asked())

    def take_over(self) -> Steps[None]:
        return steps(self.tender._take_over())

    def cancel_overdue(self) -> Steps[None]:
        return steps(self.tender._cancel_overdue())

    def repair(self) -> Steps[None]:
        """Everything that a worker looks for by itself, whatever was asked of it."""

        async def look() -> None:
            self.tender.hurry()
            await self.tender._look()
            await self.tender._do_asked()

        return steps(look())


def wait_for_event(name: str, *, due_at: datetime | None = None, timeout: float | None = None) -> WaitSpec:
    return WaitSpec(step_key("event", name, "", (), 0), "event", name, name, None, due_at, timeout)


def wait_for_child(child: uuid.UUID, *, due_at: datetime | None = None, timeout: float | None = None) -> WaitSpec:
    name = str(child)
    return WaitSpec(step_key("join", name, "", (), 0), "join", name, None, child, due_at, timeout)


def sleep(name: str, *, due_at: datetime | None = None, delay: float | None = None) -> WaitSpec:
    return WaitSpec(step_key("sleep", name, "", (), 0), "sleep", name, None, None, due_at, delay)


def clean_up_tasks(queue_name: str, age: float) -> Steps[int]:
    """As `Durable.cleanup_tasks`."""

    async def clean_up() -> int:
        deleted = 0
        while more := await delete_tasks(SteppedChannel(), queue_name, age, 1000):
            deleted += more
        return deleted

    return steps(clean_up())


def clean_up_events(queue_name: str, age: float) -> Steps[int]:
    rows = yield queues.DELETE_EVENTS, {"queue_name": queue_name, "age": age, "wanted": 1000}
    return len(rows)


def pause(queue_name: str, *, paused: bool) -> Steps[None]:
    yield queues.PAUSE_QUEUE, {"name": queue_name, "paused": paused}


def lost(outcome: Any) -> bool:
    """Whether a write's run was told that it is no longer the task's."""
    return outcome is LeaseLost
