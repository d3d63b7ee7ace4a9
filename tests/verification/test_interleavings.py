"""Pairs of operations that race, in every order within a bound: what comes of it is what comes of one after the other."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import URL, Executable, Row, event, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable, TaskContext
from durable_sa.client.events import emit
from durable_sa.client.inserting import insert
from durable_sa.client.tasks import cancel, retry
from durable_sa.database.hint import Hint
from durable_sa.models import Checkpoint, Event, Run, Task, Wait
from durable_sa.results import SpawnResult
from durable_sa.signals import LeaseLost
from durable_sa.spawns import prepare
from durable_sa.statements import diagnosis, waits

from ..support import eventually
from .engine_steps import (
    HELD,
    Clock,
    SimulatedWorker,
    Steps,
    clean_up_events,
    clean_up_tasks,
    pause,
    sleep,
    wait_for_child,
    wait_for_event,
)
from .interleavings import Explorer, Operation, Order, stopped_before_its_locks

START = datetime(2030, 1, 1, tzinfo=UTC)
INTERRUPTIONS = int(os.environ.get("DURABLE_INTERRUPTIONS", "1"))
"""More of them make for more orders, of which the first few are by far the most telling."""
TABLES = ("tasks", "runs", "checkpoints", "waits", "events", "workers", "queues")
CLEAR = text(f"WITH {', '.join(f'_{t} AS (DELETE FROM durable.{t})' for t in TABLES)} SELECT 1")
WRONG = {
    name: getattr(diagnosis, name)
    for name in ("STUCK_WAITS", "SLEEPLESS", "UNDELIVERED", "EXPIRED_LEASES", "INCONSISTENT", "ORPHANS")
}


SEEN = {
    "tasks": select(
        *(Task.task_id, Task.state, Task.outcome, Task.attempt, Task.failures, Task.lease_losses),
        *(
            Task.claimed_by,
            func.date_trunc("second", Task.available_at),
            Task.cancelled_by,
            Task.output,
            Task.error["name"].as_string(),
        ),
    ),
    "runs": select(Run.task_id, Run.attempt, Run.state, Run.worker_id, Run.error["name"].as_string()),
    "checkpoints": select(Checkpoint.task_id, Checkpoint.kind, Checkpoint.status, Checkpoint.value),
    "waits": select(Wait.task_id, Wait.kind, Wait.due_at),
    "events": select(Event.name, Event.payload, Event.delivered_at),
}


WRITTEN = {
    "complete": ("tasks", "'completed'"),
    "fail": ("tasks", "'ValueError'"),
    "suspend": ("checkpoints", "'sleep'"),
    "checkpoint": ("checkpoints", "'step'"),
    "emit": ("checkpoints", "'emit'"),
    "book": ("checkpoints", "'transaction'"),
}
"""Where one sees what a run has written."""


class Stage:
    """Where two operations meet: a database whose clock stands still, two workers, and a client."""

    def __init__(self, connection: AsyncConnection, clock: Clock, explorer: Explorer) -> None:
        self.clock = clock
        self.durable = Durable(queue_name="one")
        self.names: dict[Any, str] = {}
        self.workers: list[SimulatedWorker] = []
        self._connection = connection
        self._explorer = explorer

        @self.durable.task(name="child")
        async def child(ctx: TaskContext) -> None: ...

        self.task = child

    async def drive(self, steps: Steps[Any]) -> Any:
        """Run an operation to its end, with nobody else there."""
        step = next(steps, None)
        try:
            while step is not None:
                assert step is not HELD
                statement, parameters = step  # type: ignore[misc]
                result = await self._connection.execute(statement, parameters)
                step = steps.send(result.all() if result.returns_rows else ())
        except StopIteration as end:
            return end.value

    async def begin(self) -> None:
        """An empty database with two queues and two workers."""
        await self._connection.execute(CLEAR)
        await self._connection.execute(text("INSERT INTO durable.queues (queue_name) VALUES ('one'), ('two')"))
        self.clock.now = START
        self.names = {None: "nobody"}
        self.workers = [SimulatedWorker(self.durable, 20.0) for _ in range(2)]
        for number, worker in enumerate(self.workers):
            await self.drive(worker.register())
            self.names[worker.worker_id] = f"worker {number}"

    def spawning(self, name: str, **options: Any) -> Steps[Any]:
        prepared = prepare(self.durable, self.task, None, options)  # type: ignore[arg-type]
        self.names[prepared.task_id] = name
        return insert([prepared], Hint(), set())  # type: ignore[return-value]

    async def rows(self, statement: Executable) -> list[Row[Any]]:
        return list((await self._connection.execute(statement)).all())

    async def spawn(self, name: str, **options: Any) -> uuid.UUID:
        (spawned,) = await self.drive(self.spawning(name, **options))
        return spawned.task_id

    async def claimed(self, name: str, worker: int = 0) -> tuple[uuid.UUID, int]:
        """A task that a worker runs, and its fence."""
        await self.spawn(name)
        ((task_id, fence),) = await self.drive(self.workers[worker].claim())
        return task_id, fence

    async def child_of(self, parent: tuple[uuid.UUID, int]) -> uuid.UUID:
        await self.drive(self.workers[0].spawn_child(*parent, "child"))
        rows = await self._connection.execute(select(Task.task_id).where(Task.parent_task_id == parent[0]))
        child: uuid.UUID = rows.scalar_one()
        self.names[child] = "child"
        return child

    def writing(self, worker: SimulatedWorker, run: tuple[uuid.UUID, int], what: str) -> Operation:
        """One of the things that a run writes, with what follows from it."""
        make: dict[str, Callable[[], Steps[Any]]] = {
            "complete": lambda: worker.complete(*run),
            "fail": lambda: worker.fail(*run),
            "suspend": lambda: worker.suspend(*run, [sleep("nap", delay=9.0), wait_for_event("e")]),
            "checkpoint": lambda: worker.checkpoint(*run, "step", "1"),
            "emit": lambda: worker.emit(*run, "e", "1"),
            "book": lambda: worker.book(*run, "book"),
        }
        return Operation(what, make[what], transaction=what == "book", then=worker.tend)

    @staticmethod
    def written_or_lost(what: str, orders: Sequence[Order]) -> None:
        """Of each order: what the run wrote is there, or the run was told that it had lost its task by then."""
        table, sign = WRITTEN[what]
        for order in orders:
            lost = order.outcome["results"][0] in (str(LeaseLost), "False")
            assert lost is not any(sign in row for row in order.outcome[table]), order.told
            if order.chosen[0] == 1 and not order.interruptions():
                assert lost, "the other one had come to its end before"
            if what in ("complete", "fail"):
                taken = any("'LeaseLost'" in row or "'cancelled'" in row for row in order.outcome["runs"])
                assert lost is taken, order.told

    async def expire(self) -> None:
        """Let the lease of the first worker end."""
        self.clock.advance(19)
        await self.drive(self.workers[1].heartbeat())
        self.clock.advance(2)

    async def seen(self, results: Sequence[Any]) -> Any:
        """All that there is after the next look of a worker, by names instead of ids, and what of it is wrong."""
        await self.drive(self.workers[1].look())
        seen: dict[str, Any] = {"results": [self._named(result) for result in results]}
        for name, statement in SEEN.items():
            rows = (await self._connection.execute(statement)).all()
            seen[name] = sorted(repr(self._named(row)) for row in rows)
        self.clock.advance(1)
        wrong = {
            name: (await self._connection.execute(statement, {"grace": 0.0, "wanted": 9})).all()
            for name, statement in WRONG.items()
        }
        seen["wrong"] = {name: self._named(rows) for name, rows in wrong.items() if rows}
        return seen

    def _named(self, value: Any) -> Any:
        if isinstance(value, SpawnResult):
            return self._named([value.task_id, value.created])
        if isinstance(value, Row | list | tuple):
            return [self._named(item) for item in value]
        if value is None or isinstance(value, uuid.UUID):
            return self.names.get(value, "another")
        return str(value)

    async def only_serial(
        self,
        begin: Callable[[], Any],
        *,
        beside: Sequence[str] = (),
        cut: bool = True,
        interruptions: int = INTERRUPTIONS,
    ) -> list[Order]:
        """Whatever overlaps, what comes of it is what comes of the same transactions one by one, and all is well.

        Rows of the tables in `beside` may differ.
        """

        async def fresh() -> Any:
            await self.begin()
            return await begin()

        orders = await self._explorer.orders(fresh, self.seen, interruptions=interruptions, cut=cut)
        for order in orders:
            assert order.conflicts == 0, order.told
            assert order.outcome["wrong"] == {}, order.told
            for name in beside:
                order.outcome.pop(name)
        serial = [order.outcome for order in orders if not order.overlapping]
        assert len(serial) >= 2
        for order in orders:
            assert order.outcome in serial, order.told
        return orders


@pytest.fixture
async def stage(durable_database_url: URL) -> AsyncGenerator[Stage]:
    engine = create_async_engine(durable_database_url, poolclass=NullPool)
    connections = [await engine.connect() for _ in range(3)]
    monitor = await engine.connect()
    await monitor.execution_options(isolation_level="AUTOCOMMIT")
    explorer = Explorer(connections, monitor)
    yield Stage(monitor, Clock(engine.sync_engine, START), explorer)
    for connection in (*connections, monitor):
        await connection.close()
    await engine.dispose()


async def test_emit_and_await(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        return [
            Operation("await", lambda: one.suspend(*run, [wait_for_event("e")]), then=one.tend),
            Operation("emit", lambda: emit("one", "e", "1")(Hint()), transaction=True, then=two.deliver),
        ]

    await stage.only_serial(begin)


async def test_emit_and_emit_in_a_run(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        return [
            Operation("emit", lambda: emit("one", "e", "1")(Hint()), transaction=True, then=two.deliver),
            Operation("emit in a run", lambda: one.emit(*run, "e", "2"), then=one.deliver),
        ]

    await stage.only_serial(begin)


async def test_emit_await_and_cancel(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        return [
            Operation("await", lambda: one.suspend(*run, [wait_for_event("e")]), then=one.tend),
            Operation("emit", lambda: emit("one", "e", "1")(Hint()), transaction=True, then=two.deliver),
            Operation("cancel", lambda: cancel(run[0])(Hint()), transaction=True),
        ]

    await stage.only_serial(begin, cut=False)


async def test_await_and_retention_of_events(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        await stage.drive(emit("one", "e", "1")(Hint()))
        await stage.drive(two.deliver())
        stage.clock.advance(1)
        return [
            Operation("await", lambda: one.suspend(*run, [wait_for_event("e")]), then=one.tend),
            Operation("clean up", lambda: clean_up_events("one", 0)),
        ]

    await stage.only_serial(begin)


async def test_suspend_and_delivery_to_a_run_that_goes_on(stage: Stage) -> None:
    """One of its waits is stored already, and what it waits for has come."""

    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        awaited = [wait_for_event("came"), wait_for_event("never")]
        await stage.drive(one.register_waits(*run, awaited[:1]))
        await stage.drive(emit("one", "came", "1")(Hint()))
        return [
            Operation("suspend", lambda: one.suspend(*run, awaited), then=one.tend),
            Operation("deliver", two.deliver),
        ]

    for order in await stage.only_serial(begin, beside=["results"], interruptions=max(2, INTERRUPTIONS)):
        assert any("2030" in row for row in order.outcome["tasks"]), ("it sleeps for ever", order.told)


async def test_timeout_and_emit(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        await stage.drive(one.suspend(*run, [wait_for_event("e", timeout=1.0)]))
        stage.clock.advance(1)
        return [
            Operation("wake", one.claim_at_last, then=lambda: one.look_at_waits(run[0])),
            Operation("emit", lambda: emit("one", "e", "1")(Hint()), transaction=True, then=two.deliver),
        ]

    await stage.only_serial(begin)


async def test_join_and_finish(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        parent = await stage.claimed("parent")
        child = await stage.child_of(parent)
        ((_, fence),) = await stage.drive(two.claim())
        return [
            Operation("join", lambda: one.suspend(*parent, [wait_for_child(child)]), then=one.tend),
            Operation("finish", lambda: two.complete(child, fence), then=two.tend),
        ]

    await stage.only_serial(begin)


async def test_join_and_retention(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        parent = await stage.claimed("parent")
        child = await stage.child_of(parent)
        ((_, fence),) = await stage.drive(two.claim())
        await stage.drive(two.complete(child, fence))
        stage.clock.advance(1)
        return [
            Operation("join", lambda: one.suspend(*parent, [wait_for_child(child)]), then=one.tend),
            Operation("clean up", lambda: clean_up_tasks("one", 0)),
        ]

    for order in await stage.only_serial(begin):
        assert any("'join', 'completed'" in row for row in order.outcome["checkpoints"]), order.told


async def test_complete_and_retention_of_its_children(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        parent = await stage.claimed("parent")
        child = await stage.child_of(parent)
        ((_, fence),) = await stage.drive(two.claim())
        await stage.drive(two.complete(child, fence))
        stage.clock.advance(1)
        return [
            Operation("complete", lambda: one.complete(*parent), then=one.tend),
            Operation("clean up", lambda: clean_up_tasks("one", 0)),
        ]

    await stage.only_serial(begin)


async def test_retry_and_retention(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, _ = stage.workers
        run = await stage.claimed("task")
        await stage.drive(one.checkpoint(*run, "step", "1"))
        await stage.drive(one.fail(*run, retryable=False))
        stage.clock.advance(1)
        return [
            Operation("retry", lambda: retry(run[0], None)(Hint()), transaction=True),
            Operation("clean up", lambda: clean_up_tasks("one", 0)),
        ]

    await stage.only_serial(begin)


async def test_retry_and_the_cascade_of_its_end(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, _ = stage.workers
        parent = await stage.claimed("parent")
        await stage.child_of(parent)
        await stage.drive(one.fail(*parent, retryable=False))
        return [
            Operation("retry", lambda: retry(parent[0], None)(Hint()), transaction=True),
            Operation("cascade", one.tend),
        ]

    orders = await stage.only_serial(begin)
    # Cancelled before and put back with its parent, or never cancelled.
    assert {repr(order.outcome["tasks"]).count("'pending'") for order in orders} == {2}


@pytest.mark.parametrize("outcome", ["complete", "fail", "suspend", "checkpoint", "emit", "book"])
async def test_cancel_and_what_a_run_writes(stage: Stage, outcome: str) -> None:
    async def begin() -> list[Operation]:
        one, _ = stage.workers
        run = await stage.claimed("task")
        return [
            stage.writing(one, run, outcome),
            Operation("cancel", lambda: cancel(run[0])(Hint()), transaction=True),
        ]

    stage.written_or_lost(outcome, await stage.only_serial(begin))


async def test_cancel_and_spawn_of_a_child(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, _ = stage.workers
        parent = await stage.claimed("parent")
        return [
            Operation("spawn", lambda: one.spawn_child(*parent, "child")),
            Operation("cancel", lambda: cancel(parent[0])(Hint()), transaction=True),
        ]

    await stage.only_serial(begin)


async def test_cancel_and_the_end_of_a_child(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        parent = await stage.claimed("parent")
        child = await stage.child_of(parent)
        ((_, fence),) = await stage.drive(two.claim())
        await stage.drive(one.suspend(*parent, [wait_for_child(child)]))
        return [
            Operation("finish", lambda: two.complete(child, fence), then=two.tend),
            Operation("cancel", lambda: cancel(parent[0])(Hint()), transaction=True),
        ]

    await stage.only_serial(begin)


async def test_fail_and_claim_of_a_child(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        parent = await stage.claimed("parent")
        await stage.child_of(parent)
        return [
            Operation("fail", lambda: one.fail(*parent, retryable=False), then=one.tend),
            Operation("claim", two.claim),
        ]

    for order in await stage.only_serial(begin):
        assert any("'child', 'cancelled'" in row for row in order.outcome["tasks"]), order.told


async def test_two_that_cancel_parent_and_child(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, _ = stage.workers
        parent = await stage.claimed("parent")
        child = await stage.child_of(parent)
        await stage.drive(one.suspend(*parent, [wait_for_child(child)]))
        return [
            Operation("cancel parent", lambda: cancel(parent[0])(Hint()), transaction=True),
            Operation("cancel child", lambda: cancel(child)(Hint()), transaction=True),
        ]

    # Whether the parent was woken by the end of its child before it was cancelled is nobody's concern.
    await stage.only_serial(begin, beside=["checkpoints", "tasks"])


async def test_claim_and_cancel(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        task_id = await stage.spawn("task")
        return [
            Operation("claim", stage.workers[0].claim),
            Operation("cancel", lambda: cancel(task_id)(Hint()), transaction=True),
        ]

    await stage.only_serial(begin)


async def test_claim_and_claim(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        for name in ("first", "second", "third"):
            await stage.spawn(name)
        one, two = stage.workers
        return [Operation("one", lambda: one.claim(2)), Operation("two", lambda: two.claim(2))]

    await stage.only_serial(begin)


async def test_claim_and_pause(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        await stage.spawn("task")
        return [
            Operation("claim", stage.workers[0].claim),
            Operation("pause", lambda: pause("one", paused=True)),
        ]

    await stage.only_serial(begin)


async def test_two_spawns_with_one_key(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        return [
            Operation("one", lambda: stage.spawning("one", idempotency_key="x"), transaction=True),
            Operation("two", lambda: stage.spawning("two", idempotency_key="x")),
        ]

    for order in await stage.only_serial(begin):
        assert sorted(created for ((_, created),) in order.outcome["results"]) == ["False", "True"], order.told
        assert len({name for ((name, _),) in order.outcome["results"]}) == 1, order.told


async def test_spawn_with_a_key_and_retention_of_the_one_that_has_it(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        task_id = await stage.spawn("task", idempotency_key="x")
        await stage.drive(cancel(task_id)(Hint()))
        stage.clock.advance(1)
        return [
            Operation("spawn", lambda: stage.spawning("another", idempotency_key="x")),
            Operation("clean up", lambda: clean_up_tasks("one", 0)),
        ]

    await stage.only_serial(begin)


async def test_heartbeat_and_takeover(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        await stage.claimed("task")
        await stage.expire()
        return [Operation("beat", one.heartbeat), Operation("take over", two.take_over)]

    for order in await stage.only_serial(begin):
        beaten = order.outcome["results"][0] == "True"
        assert beaten is any("'running'" in row for row in order.outcome["tasks"]), order.told


@pytest.mark.parametrize("outcome", ["complete", "fail", "suspend", "checkpoint", "emit", "book"])
async def test_takeover_and_what_a_run_writes(stage: Stage, outcome: str) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        run = await stage.claimed("task")
        await stage.expire()
        return [stage.writing(one, run, outcome), Operation("take over", two.take_over)]

    stage.written_or_lost(outcome, await stage.only_serial(begin))


async def test_claim_by_a_worker_that_is_taken_over(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        await stage.spawn("task")
        await stage.expire()
        return [Operation("claim", one.claim), Operation("take over", two.take_over)]

    await stage.only_serial(begin)


async def test_two_that_take_over(stage: Stage) -> None:
    async def begin() -> list[Operation]:
        one, two = stage.workers
        await stage.claimed("task")
        third = SimulatedWorker(stage.durable, 1e6)
        await stage.expire()
        await stage.drive(third.register())
        return [Operation("one", two.take_over), Operation("two", third.take_over)]

    await stage.only_serial(begin)


async def test_a_wake_up_that_began_before_the_task_went_to_sleep(stage: Stage, durable_database_url: URL) -> None:
    """It has a snapshot in which the task still runs, and gets the row's lock when it sleeps already."""
    await stage.begin()
    one, two = stage.workers
    run = await stage.claimed("task")
    awaited = [wait_for_event("came"), wait_for_event("never")]
    await stage.drive(one.register_waits(*run, awaited[:1]))
    await stage.drive(emit("one", "came", "1")(Hint()))
    await stage.rows(text("SELECT pg_advisory_lock(1)"))
    engine = create_async_engine(durable_database_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    Clock(engine.sync_engine, START)

    @event.listens_for(engine.sync_engine, "before_cursor_execute", retval=True)
    def stop(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return stopped_before_its_locks(statement, 1), parameters

    async with engine.connect() as connection:
        waking = asyncio.create_task(connection.execute(waits.RESOLVE, {"task_ids": [run[0]]}))
        waiting = text("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        await eventually(lambda: stage.rows(waiting))
        await stage.drive(one.suspend(*run, awaited))
        await stage.rows(text("SELECT pg_advisory_unlock(1)"))
        await waking
    await engine.dispose()
    assert await stage.rows(text("SELECT state, available_at IS NOT NULL FROM durable.tasks")) == [("sleeping", True)]
    assert await stage.drive(two.claim()) != []
