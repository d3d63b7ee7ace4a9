"""The engine's own operations as sequences of statements, for tests that decide what happens between two of them.

What a worker does is written as coroutines that await a database. Here they await a channel that sends nothing but
hands each statement to whoever drives the sequence, which runs it, on any connection and at any moment, and answers
with the rows. So the code under test is the engine's, and the only thing that is simulated is the passing of time.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

from sqlalchemy import Engine, Executable, Row, event
from sqlalchemy.exc import DBAPIError

from durable_sa import Durable
from durable_sa.database.clock import LocalClock
from durable_sa.database_errors import LOCK_NOT_AVAILABLE, sqlstate
from durable_sa.execution.waits import WaitSpec
from durable_sa.execution.writer import Writer
from durable_sa.execution.writes import (
    CheckpointValues,
    ChildValues,
    CompletionValues,
    EventValues,
    FailureValues,
    Kind,
    ReleaseValues,
    SuspensionValues,
    Values,
    Write,
)
from durable_sa.ids import child_id, new_id, step_key
from durable_sa.spawns import prepare
from durable_sa.statements import checkpoints, claiming, queues
from durable_sa.worker.agenda import Agenda
from durable_sa.worker.cursors import LANE_START
from durable_sa.worker.dispatcher import Dispatcher
from durable_sa.worker.maintenance import Maintenance
from durable_sa.worker.minutes import Minutes
from durable_sa.worker.retention import delete_tasks
from durable_sa.worker.settings import Settings
from durable_sa.worker.slots import Slots
from durable_sa.worker.suspects import Suspects
from durable_sa.worker.wakeups import LOCKED_RETRY_DELAY

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
    resume: Callable[[Any], Any] = coroutine.send
    outcome: Any = None
    try:
        while True:
            step = resume(outcome)
            if isinstance(step, asyncio.Future):
                # A pause, such as between two tries: whoever drives decides how long it is.
                step.set_result(None)
                step = HELD
            try:
                resume, outcome = coroutine.send, (yield step)
            except DBAPIError as error:
                resume, outcome = coroutine.throw, error
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        coroutine.close()


class _SteppedWriter(Writer):
    """A writer that is told when to try again, instead of by a timer."""

    def _delay(self, write: Write) -> None:
        write.delays += 1


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


class _Executor:
    """Takes the place of an executor: it has no runs."""

    busy = False

    def __init__(self, minutes: Minutes) -> None:
        self.minutes = minutes

    async def check(self) -> None: ...

    def poll(self) -> None: ...

    def failed_by_takeover(self, rows: Any) -> None: ...

    def messages_came(self, task_ids: Any) -> set[uuid.UUID]:
        return set()


class _Retention:
    """Takes the place of a retention that has nothing to delete, as these tests delete by hand."""

    async def delete_expired(self) -> bool:
        return False


class _HintSender:
    """Takes the place of a sender of hints: no other worker is notified."""

    def send(self, hint: Any) -> None: ...


class SimulatedWorker:
    """A worker without user code: what it claims, writes and tends is what it is told to."""

    def __init__(self, durable: Durable, claim_timeout: float = 60.0) -> None:
        self.durable = durable
        self.claim_timeout = claim_timeout
        self.worker_id = new_id()
        settings = Settings.resolve({"queue_names": ["one", "two"]}, "default")
        registration = cast("Any", SimpleNamespace(worker_id=self.worker_id, active=True))
        clock = LocalClock()
        self.agenda = Agenda(settings.queue_names, clock)
        self._channel = cast("Any", SteppedChannel())
        slots = Slots(settings)
        dispatcher = Dispatcher(settings, self.agenda, slots, registration, cast("Any", _HintSender()))
        self._writer = _SteppedWriter(self._channel, on_commit=dispatcher.committed)
        self._maintenance = Maintenance(
            durable,
            self._channel,
            registration,
            clock,
            self.agenda,
            dispatcher,
            cast("Any", _Executor(Minutes(self._channel, registration, clock))),
            Suspects(durable, self._channel, registration, self.agenda, slots),
            listening=lambda: True,
            queue_names=settings.queue_names,
        )
        self._maintenance._retention = cast("Any", _Retention())

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
        """The claimed tasks with their fences, in the order of their ids; a suspect if there are no others."""
        parameters = {
            "worker_id": self.worker_id,
            "wanted": wanted,
            "task_names": list(self.durable.tasks),
            "queue_names": [queue for queue, _ in LANES],
            "priorities": [priority for _, priority in LANES],
            "cursor_times": [LANE_START[0]] * len(LANES),
            "cursor_ids": [LANE_START[1]] * len(LANES),
        }
        rows = yield claiming.CLAIM, parameters
        if not rows:
            rows = yield claiming.CLAIM_SUSPECT, parameters
        return sorted((row.task_id, row.fence) for row in rows)

    def claim_at_last(self) -> Steps[list[tuple[uuid.UUID, int]]]:
        """Claim until there is something."""
        while not (claimed := (yield from self.claim())):
            yield HELD
        return claimed

    def heartbeat(self) -> Steps[bool]:
        rows = yield claiming.HEARTBEAT, {"beating_id": self.worker_id}
        return bool(rows)

    def write(
        self,
        kind: Kind,
        task_id: uuid.UUID,
        fence: int,
        key: uuid.UUID | None = None,
        values: Values = None,
        waits: Iterable[WaitSpec] = (),
    ) -> Steps[Any]:
        """What the write's run is told: a value, or the class of an error."""
        told: list[Any] = []
        write = Write(
            kind,
            task_id,
            fence,
            lambda value, error: told.append(value if error is None else type(error)),
            values,
            key,
            list(waits),
        )

        async def flush() -> None:
            while not write.over:
                try:
                    await self._writer._flush(self._channel, [write])
                except DBAPIError as error:
                    if sqlstate(error) != LOCK_NOT_AVAILABLE:
                        raise
                if not write.over:
                    await _Awaited(HELD)

        yield from steps(flush())
        return told[0]

    def checkpoint(self, task_id: uuid.UUID, fence: int, name: str, value: str) -> Steps[Any]:
        values = CheckpointValues("step", name, "completed", value)
        return self.write(Kind.CHECKPOINT, task_id, fence, step_key("step", name, "", (), 0), values)

    def spawn_child(self, task_id: uuid.UUID, fence: int, name: str, **options: Any) -> Steps[Any]:
        key = step_key("spawn", name, "", (), 0)
        child = child_id(task_id, key)
        prepared = prepare(self.durable, "child", None, cast("Any", options), task_id=child, parent_task_id=task_id)
        values = ChildValues(CheckpointValues("spawn", name, "completed", '"digest"', child), prepared.all_values)
        return self.write(Kind.CHILD, task_id, fence, key, values)

    def emit(self, task_id: uuid.UUID, fence: int, name: str, payload: str) -> Steps[Any]:
        key = step_key("emit", name, "", (), 0)
        values = EventValues(CheckpointValues("emit", name, "completed", None), name, payload, None)
        return self.write(Kind.EVENT, task_id, fence, key, values)

    def register_waits(self, task_id: uuid.UUID, fence: int, waits: Iterable[WaitSpec]) -> Steps[Any]:
        return self.write(Kind.WAITS, task_id, fence, waits=waits)

    def suspend(self, task_id: uuid.UUID, fence: int, waits: Iterable[WaitSpec]) -> Steps[Any]:
        return self.write(Kind.SUSPENSION, task_id, fence, values=SuspensionValues(True), waits=waits)

    def complete(self, task_id: uuid.UUID, fence: int, output: str = "1") -> Steps[Any]:
        return self.write(Kind.COMPLETION, task_id, fence, values=CompletionValues(output, True))

    def fail(self, task_id: uuid.UUID, fence: int, *, retryable: bool = True) -> Steps[Any]:
        error = '{"name": "ValueError", "message": "no"}'
        return self.write(Kind.FAILURE, task_id, fence, values=FailureValues(error, retryable, new_id(), True))

    def release(self, task_id: uuid.UUID, fence: int) -> Steps[Any]:
        return self.write(Kind.RELEASE, task_id, fence, values=ReleaseValues('{"name": "Released"}', new_id()))

    def book(self, task_id: uuid.UUID, fence: int, name: str) -> Steps[bool]:
        """What a transaction step adds to the transaction of its function, at its end."""
        held = yield checkpoints.LOCK_UNDER_FENCE, {"task_id": task_id, "fence": fence}
        if not held:
            return False
        key = step_key("transaction", name, "", (), 0)
        rows = yield (
            checkpoints.RECORD_IN_TRANSACTION,
            {"task_id": task_id, "key": key, "name": name, "value": "1", "duration": 0.0, "arguments": None},
        )
        return bool(rows)

    def tend(self) -> Steps[None]:
        """Do what the agenda lists, and retry as long as another transaction holds descendants locked."""

        async def until_done() -> None:
            await self._maintenance._do_listed()
            while deferred := self.agenda._deferred_cascades:
                await asyncio.sleep(LOCKED_RETRY_DELAY)
                self.agenda.cascade(deferred)
                deferred.clear()
                await self._maintenance._do_listed()

        return steps(until_done())

    def deliver(self) -> Steps[None]:
        """What a hint about an emitted event leads to."""
        self.agenda.deliver_events()
        return self.tend()

    def take_over(self) -> Steps[None]:
        return steps(self._maintenance._takeover.search())

    def cancel_overdue(self) -> Steps[None]:
        async def cancel_overdue() -> None:
            await self._maintenance._cancellations.cancel_overdue()

        return steps(cancel_overdue())

    def look_at_waits(self, *task_ids: uuid.UUID) -> Steps[None]:
        """What a worker does before it starts runs that it has claimed again."""
        self.agenda.resolve_waits(task_ids)
        return self.tend()

    def look(self) -> Steps[None]:
        """What a worker looks for every few seconds."""

        async def look() -> None:
            # By the time of a look, the retry of events whose waiters were locked is due.
            self._maintenance._wakeups._retry_locked_at = 0.0
            await self._maintenance._look()
            await self._maintenance._do_listed()

        return steps(look())

    def repair(self) -> Steps[None]:
        """Everything that a worker ever looks for."""
        self._maintenance.look_at_everything()
        return self.look()


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
