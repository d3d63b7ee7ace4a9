"""Random sequences of everything that clients and workers do, against a model of what the tables must hold.

Each operation runs on the database and on the model; afterwards all rows are compared. Workers write for every run that
they ever had, so most sequences contain writes of runs that were lost long ago. The clock is moved by hand.

The sequences are the same in every run. ``DURABLE_MACHINE_EXAMPLES=5000`` tries that many others instead; what fails
prints how to repeat it, and ``--hypothesis-seed`` repeats all of them. With ``DURABLE_MACHINE_SHRINK=0`` it is shown as
it was found, at once.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import URL, Executable, Row, create_engine, select, text
from sqlalchemy.engine import Connection

from durable_sa import CancellationPolicy, Durable, RetryStrategy, TaskContext
from durable_sa.client.events import emit
from durable_sa.client.inserting import insert
from durable_sa.client.tasks import cancel, retry
from durable_sa.database.hint import Hint
from durable_sa.errors import IdempotencyConflict
from durable_sa.execution.waits import Stored, WaitSpec
from durable_sa.models import Checkpoint, Event, Run, Task, Wait, WorkerRow
from durable_sa.signals import LeaseLost
from durable_sa.spawns import prepare
from durable_sa.statements import diagnosis, spawning

from .engine_model import LOST, NEW, STORED, EngineModel, TaskModel
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

START = datetime(2030, 1, 1, tzinfo=UTC)
QUEUES = st.sampled_from(["one", "two"])
NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.sampled_from([1, 2])
INDEX = st.integers(0, 30)
RUNS = st.tuples(st.sampled_from([True, True, True, False]), INDEX)
"""Of those that still hold their task, or of all that there ever were."""
STRATEGIES = st.sampled_from(
    [RetryStrategy.fixed(4), RetryStrategy.fixed(0), RetryStrategy.exponential(2, 3, 10), RetryStrategy.none()]
)
LIMITS = st.sampled_from([None, None, None, None, 40.0, 3.0])
TIMES = st.sampled_from([None, 0.0, 3.0, 40.0])
WAITS = st.lists(st.tuples(st.sampled_from(["event", "join", "sleep"]), INDEX, TIMES), min_size=1, max_size=3)
CLAIM_TIMEOUT = 20.0

_SPECIAL = ("strategy", "output", "error", "params", "max_pending_time", "max_running_time")
_PLAIN = [name for name in TaskModel.__annotations__ if name not in _SPECIAL]
_TASKS = select(Task.__table__)
_RUNS = select(Run.task_id, Run.attempt, Run.state, Run.worker_id, Run.error)
_CHECKPOINTS = select(Checkpoint.__table__)
_WAITS = select(Wait.__table__)
_EVENTS = select(Event.__table__)
_WORKERS = select(WorkerRow.worker_id, WorkerRow.expires_at, WorkerRow.lost_at)
_WRONG = {
    name: getattr(diagnosis, name)
    for name in ("UNCLAIMED", "STUCK_WAITS", "SLEEPLESS", "UNDELIVERED", "OVERDUE", "EXPIRED_LEASES", "INCONSISTENT")
}


def _error_name(error: Any) -> Any:
    return error["name"] if isinstance(error, dict) else error


class Ids:
    """UUIDv7s that are the same in every repetition: they decide about the order of what is available at one time."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self) -> uuid.UUID:
        self.drawn += 1
        return uuid.UUID(int=((0x018000000000 + self.drawn) << 80) | (7 << 76) | (2 << 62))


class Machine(RuleBasedStateMachine):
    """A client, up to three workers, and the model that both answer to."""

    def __init__(self, connection: Connection, clock: Clock, ids: Ids) -> None:
        super().__init__()
        ids.drawn = 0
        self.connection = connection
        self.clock = clock
        clock.now = START
        self.model = EngineModel()
        self.workers: list[SimulatedWorker] = []
        self.runs: list[tuple[SimulatedWorker, uuid.UUID, int]] = []
        """Every run that was ever claimed."""
        self.fences: dict[uuid.UUID, int] = {}
        self.durable = Durable()

        @self.durable.task
        async def child(ctx: TaskContext) -> None: ...

        @self.durable.task
        async def other(ctx: TaskContext, number: int) -> None: ...

        tables = ("tasks", "runs", "checkpoints", "waits", "events", "workers", "queues")
        self.connection.execute(text("; ".join(f"DELETE FROM durable.{table}" for table in tables)))
        self.connection.execute(text("INSERT INTO durable.queues (queue_name) VALUES ('one'), ('two')"))
        for index in range(2):
            self.start_worker()
            self.spawn("one", None, None, 0.0, 0, 3, RetryStrategy.fixed(0), None, None)
            self.claim(index, 1)

    @property
    def now(self) -> datetime:
        return self.clock.now

    def drive(self, script: Steps[Any]) -> Any:
        """Run a sequence of statements to its end."""
        try:
            step = next(script)
            while True:
                assert step is not HELD, "nobody else is there who could hold a lock"
                statement, parameters = step  # type: ignore[misc]
                result = self.connection.execute(statement, parameters)
                step = script.send(result.all() if result.returns_rows else ())
        except StopIteration as end:
            return end.value

    def rows(self, statement: Executable, **parameters: Any) -> list[Row[Any]]:
        return list(self.connection.execute(statement, parameters).all())

    # Clients

    @rule(
        queue=QUEUES,
        key=st.sampled_from([None, None, "x", "y"]),
        number=st.one_of(st.none(), NUMBERS),
        delay=st.sampled_from([0.0, 0.0, 3.0]),
        priority=st.sampled_from([0, 1]),
        max_attempts=st.integers(1, 3),
        strategy=STRATEGIES,
        max_pending=LIMITS,
        max_running=LIMITS,
    )
    def spawn(
        self,
        queue: str,
        key: str | None,
        number: int | None,
        delay: float,
        priority: int,
        max_attempts: int,
        strategy: RetryStrategy,
        max_pending: float | None,
        max_running: float | None,
    ) -> None:
        name = "child" if number is None else "other"
        options: Any = {
            "queue_name": queue,
            "idempotency_key": key,
            "delay": delay,
            "priority": priority,
            "max_attempts": max_attempts,
            "retry_strategy": strategy,
            "cancellation": CancellationPolicy(max_pending, max_running),
        }
        prepared = prepare(self.durable, name, number, options)
        (outcome,) = self.drive(insert([prepared], Hint(), set()))  # type: ignore[arg-type]
        first = self.model.same_key(queue, key)
        if first is None:
            assert (outcome.task_id, outcome.created) == (prepared.task_id, True)
            available_at = self.now + timedelta(seconds=delay)
            task = TaskModel(
                *(prepared.task_id, queue, name, priority, max_attempts, strategy, max_pending, max_running),
                *(available_at, key, number),
            )
            self.model.spawn(task)
        elif (first.task_name, first.params) == (name, number):
            assert (outcome.task_id, outcome.created) == (first.task_id, False)
        else:
            assert isinstance(outcome, IdempotencyConflict)

    @rule(queue=QUEUES, name=NAMES, number=NUMBERS)
    def emit(self, queue: str, name: str, number: int) -> None:
        first = self.drive(emit(queue, name, str(number))(Hint()))
        assert first == self.model.emit(queue, name, str(number), self.now)

    @precondition(lambda self: self.model.tasks)
    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        task_id = list(self.model.tasks)[index % len(self.model.tasks)]
        status = self.drive(cancel(task_id)(Hint()))
        self.model.cancel(task_id, self.now)
        assert status == self.model.tasks[task_id].state

    @precondition(lambda self: self.ended_badly())
    @rule(index=INDEX, max_attempts=st.sampled_from([None, 4]))
    def retry(self, index: int, max_attempts: int | None) -> None:
        task_id = self.ended_badly()[index % len(self.ended_badly())]
        self.drive(retry(task_id, max_attempts)(Hint()))
        self.model.retry(task_id, max_attempts, self.now)

    def ended_badly(self) -> list[uuid.UUID]:
        return [t.task_id for t in self.model.tasks.values() if t.outcome in ("failed", "cancelled")]

    @rule(queue=QUEUES, paused=st.sampled_from([True, False, False]))
    def pause_or_resume(self, queue: str, paused: bool) -> None:
        self.drive(pause(queue, paused=paused))
        (self.model.paused.add if paused else self.model.paused.discard)(queue)

    @rule(queue=QUEUES, age=st.sampled_from([0.0, 10.0]))
    def clean_up_tasks(self, queue: str, age: float) -> None:
        assert self.drive(clean_up_tasks(queue, age)) == self.model.clean_up_tasks(queue, age, self.now)

    @rule(queue=QUEUES, age=st.sampled_from([0.0, 10.0]))
    def clean_up_events(self, queue: str, age: float) -> None:
        assert self.drive(clean_up_events(queue, age)) == self.model.clean_up_events(queue, age, self.now)

    # Workers

    @precondition(lambda self: sum(map(self.model.holds_lease, self.model.workers)) < 3)
    @rule()
    def start_worker(self) -> None:
        worker = SimulatedWorker(self.durable, CLAIM_TIMEOUT)
        self.workers.append(worker)
        self.drive(worker.register())
        self.model.register(worker.worker_id, CLAIM_TIMEOUT, self.now)

    @rule(index=INDEX)
    def heartbeat(self, index: int) -> None:
        worker = self.workers[index % len(self.workers)]
        assert self.drive(worker.heartbeat()) == self.model.heartbeat(worker.worker_id, self.now)

    @rule(index=INDEX, wanted=st.integers(1, 4))
    def claim(self, index: int, wanted: int) -> None:
        worker = self.workers[index % len(self.workers)]
        claimed = self.drive(worker.claim(wanted))
        assert claimed == self.model.claim(worker.worker_id, wanted, self.now)
        self.runs += [(worker, task_id, fence) for task_id, fence in claimed]

    @rule(index=INDEX)
    def claim_all(self, index: int) -> None:
        self.claim(index, 10)

    @rule(which=RUNS, name=NAMES, number=NUMBERS)
    def checkpoint(self, which: tuple[bool, int], name: str, number: int) -> None:
        worker, task_id, fence = self.run(which)
        told = self.drive(worker.checkpoint(task_id, fence, name, str(number)))
        assert _told(told) == self.model.record(task_id, fence, "step", name, number)

    def run(self, which: tuple[bool, int]) -> tuple[SimulatedWorker, uuid.UUID, int]:
        runs = (self.alive() if which[0] else []) or self.runs
        return runs[which[1] % len(runs)]

    def alive(self) -> list[tuple[SimulatedWorker, uuid.UUID, int]]:
        """Runs that still hold their tasks."""
        return [run for run in self.runs if self.model.held(run[1], run[2])]

    @rule(which=RUNS, name=NAMES, strategy=STRATEGIES)
    def spawn_child(self, which: tuple[bool, int], name: str, strategy: RetryStrategy) -> None:
        worker, task_id, fence = self.run(which)
        told = self.drive(
            worker.spawn_child(task_id, fence, name, queue_name="one", max_attempts=2, retry_strategy=strategy)
        )
        child = TaskModel(self.model.child_id(task_id, name), "one", "child", 0, 2, strategy, None, None, self.now)
        child.parent_task_id = task_id
        assert _told(told) == self.model.spawn_child(task_id, fence, name, child)

    @rule(which=RUNS, name=NAMES, number=NUMBERS)
    def emit_in_run(self, which: tuple[bool, int], name: str, number: int) -> None:
        worker, task_id, fence = self.run(which)
        expected = self.model.emit_in_run(task_id, fence, name, str(number), self.now)
        told = self.drive(worker.emit(task_id, fence, name, str(number)))
        # The writer says of an emit in either case what is stored.
        assert _told(told) == (STORED if expected == NEW else expected)

    @rule(which=RUNS, wanted=WAITS)
    def register_waits(self, which: tuple[bool, int], wanted: list[tuple[str, int, float | None]]) -> None:
        worker, task_id, fence = self.run(which)
        if waits := self.waits(task_id, wanted):
            told = self.drive(worker.register_waits(task_id, fence, waits))
            assert _told(told) == self.model.register_waits(task_id, fence, waits, self.now)

    @rule(which=RUNS, wanted=WAITS)
    def suspend(self, which: tuple[bool, int], wanted: list[tuple[str, int, float | None]]) -> None:
        worker, task_id, fence = self.run(which)
        if waits := self.waits(task_id, wanted):
            told = self.drive(worker.suspend(task_id, fence, waits))
            assert _told(told) == self.model.suspend(task_id, fence, waits, self.now)

    @rule(which=RUNS, timeout=TIMES)
    def join(self, which: tuple[bool, int], timeout: float | None) -> None:
        """Wait for a child, and for nothing else."""
        self.spawn_child(which, "a", RetryStrategy.fixed(0))
        self.suspend(which, [("join", 0, timeout)])

    def waits(self, task_id: uuid.UUID, wanted: list[tuple[str, int, float | None]]) -> list[WaitSpec]:
        """As a run asks for them: what is over is not asked for, what was stored keeps its time."""
        children = [child.task_id for child in self.model.children(task_id)]
        specs: dict[uuid.UUID, WaitSpec] = {}
        for kind, index, seconds in wanted:
            if kind == "event":
                spec = wait_for_event("abc"[index % 3], timeout=seconds)
            elif kind == "sleep":
                spec = sleep("abc"[index % 3], delay=seconds or 0.0)
            elif children:
                spec = wait_for_child(children[index % len(children)], timeout=seconds)
            else:
                continue
            key = (task_id, spec.key)
            if key in self.model.waits:
                spec = spec._replace(due_at=self.model.waits[key].due_at, delay=None)
            if key in self.model.checkpoints:
                if kind != "sleep":
                    continue
                spec = spec._replace(due_at=self.model.checkpoints[key][3], delay=None)
            specs[spec.key] = spec
        return list(specs.values())

    @rule(which=RUNS, number=NUMBERS)
    def complete(self, which: tuple[bool, int], number: int) -> None:
        worker, task_id, fence = self.run(which)
        told = self.drive(worker.complete(task_id, fence, str(number)))
        assert _told(told) == self.model.complete(task_id, fence, str(number), self.now)

    @rule(which=RUNS, retryable=st.sampled_from([True, True, False]))
    def fail(self, which: tuple[bool, int], retryable: bool) -> None:
        worker, task_id, fence = self.run(which)
        told = self.drive(worker.fail(task_id, fence, retryable=retryable))
        assert _told(told) == self.model.fail(task_id, fence, retryable, self.now)

    @rule(which=RUNS)
    def release(self, which: tuple[bool, int]) -> None:
        worker, task_id, fence = self.run(which)
        told = self.drive(worker.release(task_id, fence))
        assert _told(told) == self.model.release(task_id, fence, self.now)

    @rule(index=INDEX)
    def tend(self, index: int) -> None:
        worker = self.workers[index % len(self.workers)]
        agenda = worker.agenda
        self.model.tend(set(agenda.waits), set(agenda.ended), set(agenda.cascades), agenda.deliver, self.now)
        self.drive(worker.tend())

    @rule(index=INDEX)
    def resolve(self, index: int) -> None:
        """As when runs are taken up again, or look while they go on."""
        worker = self.workers[index % len(self.workers)]
        waiting = {task_id for task_id, _ in self.model.waits}
        worker.agenda.resolve_waits(waiting)
        self.tend(index)

    @rule(index=INDEX)
    def take_over(self, index: int) -> None:
        self.drive(self.workers[index % len(self.workers)].take_over())
        self.model.take_over(self.now)

    @rule(index=INDEX)
    def cancel_overdue(self, index: int) -> None:
        self.drive(self.workers[index % len(self.workers)].cancel_overdue())
        self.model.cancel_overdue(self.now)

    @rule(index=INDEX)
    def a_worker_dies(self, index: int) -> None:
        """Its lease ends, while the others keep theirs."""
        for _ in range(2):
            self.clock.advance(CLAIM_TIMEOUT - 1)
            for other in range(len(self.workers)):
                if other != index % len(self.workers):
                    self.heartbeat(other)
        self.take_over(index)

    @rule(seconds=st.sampled_from([0.001, 2.0, 5.0, 12.0]), tended=st.booleans(), index=INDEX, wanted=st.integers(0, 3))
    def time_passes(self, seconds: float, tended: bool, index: int, wanted: int) -> None:
        """In which workers do what they do all the time."""
        self.clock.advance(seconds)
        for other in range(len(self.workers)) if tended else ():
            self.heartbeat(other)
            self.tend(other)
        if wanted:
            self.claim(index, wanted)

    # What holds after each of them

    @invariant()
    def all_is_as_it_must_be(self) -> None:
        self.check_tasks()
        self.check_attempts()
        self.check_checkpoints()
        self.check_waits_and_events()
        self.check_leases()
        self.check_counts()

    def check_tasks(self) -> None:
        found = {row.task_id: row for row in self.rows(_TASKS)}
        assert found.keys() == self.model.tasks.keys()
        for task_id, row in found.items():
            task = self.model.tasks[task_id]
            assert {name: getattr(row, name) for name in _PLAIN} == {name: getattr(task, name) for name in _PLAIN}
            assert row.output == (None if task.output is None else json.loads(task.output))
            assert _error_name(row.error) == task.error
            # The model may be wrong as well; this holds whatever it says.
            assert row.fence >= self.fences.get(task_id, 0)
            assert row.outcome in (None, row.state)
            self.fences[task_id] = row.fence

    def check_attempts(self) -> None:
        runs = {
            (row.task_id, row.attempt): (row.state, row.worker_id, _error_name(row.error)) for row in self.rows(_RUNS)
        }
        assert runs == self.model.runs
        for task in self.model.tasks.values():
            ended = task.attempt - (task.state in ("running", "sleeping"))
            assert [attempt for task_id, attempt in sorted(runs) if task_id == task.task_id] == [*range(1, ended + 1)]

    def check_checkpoints(self) -> None:
        found = {(row.task_id, row.key): _recorded(row) for row in self.rows(_CHECKPOINTS)}
        assert found == self.model.checkpoints

    def check_waits_and_events(self) -> None:
        waits = {(row.task_id, row.key): row for row in self.rows(_WAITS)}
        assert waits.keys() == self.model.waits.keys()
        for key, wait in self.model.waits.items():
            assert {name: getattr(waits[key], name) for name in vars(wait)} == vars(wait)
            assert self.model.tasks[key[0]].outcome is None
        events = {
            (row.queue_name, row.name): (row.payload, row.emitted_at, row.delivered_at is not None)
            for row in self.rows(_EVENTS)
        }
        assert events == {
            key: (json.loads(emitted.payload), emitted.emitted_at, emitted.delivered)
            for key, emitted in self.model.events.items()
        }

    def check_leases(self) -> None:
        found = {row.worker_id: (row.expires_at, row.lost_at) for row in self.rows(_WORKERS)}
        assert found == {key: (worker.expires_at, worker.lost_at) for key, worker in self.model.workers.items()}

    def check_counts(self) -> None:
        for queue in ("one", "two"):
            ((count,),) = self.rows(spawning.COUNT_READY, queue_name=queue)
            assert count == len(self.model.ready(queue, self.now))
        assert self.rows(diagnosis.INCONSISTENT, wanted=10) == []

    def teardown(self) -> None:
        """Whatever was left undone, a worker that comes afterwards finds and does; nothing sleeps for ever."""
        self.clock.advance(100)
        worker = SimulatedWorker(self.durable, 1e6)
        self.drive(worker.register())
        for queue in ("one", "two"):
            self.drive(pause(queue, paused=False))
        for _ in range(3):
            self.drive(worker.repair())
            self.clock.advance(100)
        while self.drive(worker.claim(10)):
            pass
        for name, statement in _WRONG.items():
            found = self.rows(statement, grace=0.0, wanted=10)
            assert found == [], name
        assert self.rows(diagnosis.ORPHANS, grace=0.0, wanted=10) == []


def _told(outcome: Any) -> str:
    if outcome is LeaseLost:
        return LOST
    assert not isinstance(outcome, type), outcome
    return STORED if isinstance(outcome, Stored | Row | list) else NEW


def _recorded(row: Row[Any]) -> tuple[Any, ...]:
    value = row.value
    if row.kind == "spawn":
        value = "digest"
    elif row.kind == "sleep":
        value = datetime.fromisoformat(value)
    elif row.status in ("failed", "cancelled"):
        value = _error_name(value)
    return row.kind, row.name, row.status, value, row.child_task_id


@pytest.fixture
def connection(durable_database_url: URL) -> Generator[Connection]:
    engine = create_engine(durable_database_url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def make_machine(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Machine]:
    ids = Ids()
    monkeypatch.setattr("durable_sa.ids.uuid_utils.uuid7", ids)
    clock = Clock(connection.engine, START)
    return lambda: Machine(connection, clock, ids)


ALIVE = (True, 0)
"""The run that has been going on for longest."""


@pytest.mark.parametrize(("after", "status"), [(2.0, "completed"), (5.0, "timeout")])
@pytest.mark.parametrize("kind", ["event", "join"])
def test_what_comes_in_time_counts_whenever_somebody_looks_and_nothing_else(
    make_machine: Callable[[], Machine], kind: str, after: float, status: str
) -> None:
    """The timeout is 3 seconds."""
    machine = make_machine()
    parent = machine.runs[0][1]
    if kind == "join":
        machine.join(ALIVE, 3.0)
        machine.claim_all(0)
        machine.time_passes(after, tended=False, index=0, wanted=0)
        child = machine.model.children(parent)[0].task_id
        machine.complete((True, [run[1] for run in machine.alive()].index(child)), 1)
    else:
        machine.suspend(ALIVE, [("event", 0, 3.0)])
        machine.time_passes(after, tended=False, index=0, wanted=0)
        machine.emit("one", "a", 1)
    machine.time_passes(7.0, tended=False, index=0, wanted=0)
    machine.resolve(0)
    machine.all_is_as_it_must_be()
    recorded = [entry[2] for (task_id, _), entry in machine.model.checkpoints.items() if entry[0] == kind]
    assert recorded == [status]
    machine.teardown()


def test_children_of_what_has_completed_go_on_whatever_is_searched_for(make_machine: Callable[[], Machine]) -> None:
    machine = make_machine()
    machine.spawn_child(ALIVE, "a", RetryStrategy.fixed(0))
    machine.complete(ALIVE, 1)
    machine.drive(machine.workers[1].repair())
    machine.all_is_as_it_must_be()


def test_whatever_happens_the_tables_hold_what_they_must(make_machine: Callable[[], Machine]) -> None:
    wanted = os.environ.get("DURABLE_MACHINE_EXAMPLES")
    run_state_machine_as_test(
        make_machine,
        settings=settings(
            max_examples=int(wanted) if wanted else 45,
            stateful_step_count=40,
            derandomize=wanted is None,
            database=None,
            deadline=None,
            print_blob=True,
            phases=[Phase.generate]
            if os.environ.get("DURABLE_MACHINE_SHRINK") == "0"
            else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
