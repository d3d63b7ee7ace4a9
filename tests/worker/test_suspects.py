"""Suspects: tasks that have lost two workers in a row run alone, so that what they end is theirs to answer for."""

import asyncio
import uuid
from typing import Any

import pytest

from durable_sa import Durable, Hooks, InvalidConfiguration, RetryStrategy, TaskContext, TaskEnded, task
from durable_sa.ids import new_id
from durable_sa.worker import suspects
from durable_sa.worker.suspects import PATIENCE, is_chosen

from ..support import eventually
from .conftest import Rows
from .test_claims import Claimer

SUSPECTED = "UPDATE durable.tasks SET lease_losses = 2, available_at = now() WHERE task_id = :task_id"


class Busy:
    """Which tasks run, and which have run beside one another."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.order: list[str] = []
        self.beside: set[frozenset[str]] = set()

    async def run(self, name: str, seconds: float = 0.03) -> None:
        self.running.add(name)
        self.order.append(name)
        self.beside |= {frozenset({name, other}) for other in self.running - {name}}
        try:
            await asyncio.sleep(seconds)
        finally:
            self.running.discard(name)


class Watch(Hooks):
    """Notes the tasks that have failed."""

    def __init__(self) -> None:
        self.ended: list[TaskEnded] = []

    def on_failed(self, ended: TaskEnded) -> None:
        self.ended.append(ended)


@pytest.fixture
def busy() -> Busy:
    return Busy()


@pytest.fixture
def named(durable: Durable, busy: Busy) -> Any:
    @durable.task
    async def named(ctx: TaskContext, name: str) -> None:
        await busy.run(name)

    return named


@pytest.mark.slow
async def test_a_suspect_runs_alone_after_what_is_ready(durable: Durable, sql: Rows, busy: Busy, named: Any) -> None:
    names = ["first", "second", "suspect", "third", "accused"]
    spawned = {name: await durable.spawn(named, name) for name in names}
    for name in ("suspect", "accused"):
        await sql(SUSPECTED, task_id=spawned[name].task_id)
    async with durable.worker(concurrency=10):
        for result in spawned.values():
            assert (await durable.wait_for_result(result, timeout=10)).status == "completed"
    assert busy.order[-2:] == ["suspect", "accused"]
    together = set().union(*busy.beside)
    assert together == {"first", "second", "third"}


async def test_nothing_is_claimed_beside_a_suspect(durable: Durable, sql: Rows, busy: Busy, named: Any) -> None:
    async def work() -> None:
        for name in ("later", "later still"):
            await durable.spawn(named, name)
        await busy.run("suspect", 0.3)

    @durable.task
    async def suspect(ctx: TaskContext) -> None:
        await ctx.step("work", work)
        await ctx.sleep_for("pause", 0.05)

    spawned = await durable.spawn(suspect)
    await sql(SUSPECTED, task_id=spawned.task_id)
    async with durable.worker(concurrency=10):
        await durable.wait_for_result(spawned, timeout=10)
        await eventually(lambda: {"later", "later still"} <= set(busy.order))
    assert not any("suspect" in pair for pair in busy.beside)
    # Its suspension was the end of the row: it is like any other now.
    assert await sql("SELECT DISTINCT lease_losses FROM durable.tasks") == [(0,)]


@pytest.mark.slow
async def test_a_worker_that_is_always_busy_makes_room(
    durable: Durable, sql: Rows, busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "PATIENCE", 0.01)
    monkeypatch.setattr(suspects, "SEARCH_INTERVAL", 0.0)
    ended = asyncio.Event()

    @durable.task
    async def endless(ctx: TaskContext, name: str) -> None:
        await busy.run(name)
        if not ended.is_set():
            await durable.spawn_many([(endless, f"{name}.")])

    @durable.task
    async def suspect(ctx: TaskContext) -> None:
        await busy.run("suspect")
        ended.set()

    for number in range(4):
        await durable.spawn(endless, str(number))
    async with durable.worker(concurrency=2) as worker:
        await eventually(lambda: len(busy.order) > 4)
        assert not worker._slots.empty
        spawned = await durable.spawn(suspect, delay=3600)
        await sql(SUSPECTED, task_id=spawned.task_id)

        async def look() -> bool:
            worker._agenda.look_within(0.0)
            return ended.is_set()

        await eventually(look)
    assert not any("suspect" in pair for pair in busy.beside)


async def test_a_worker_whose_runs_do_not_end_goes_on_claiming(
    durable: Durable, sql: Rows, busy: Busy, named: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "PATIENCE", 0.01)
    monkeypatch.setattr(suspects, "SEARCH_INTERVAL", 0.0)
    monkeypatch.setattr(suspects, "FIRST_DRAIN", 0.1)
    never = asyncio.Event()

    @durable.task
    async def service(ctx: TaskContext) -> None:
        busy.running.add("service")
        await never.wait()

    await durable.spawn(service)
    async with durable.worker(concurrency=3, shutdown_timeout=0) as worker:
        await eventually(lambda: "service" in busy.running)
        suspect = await durable.spawn(named, "suspect", delay=3600)
        await sql(SUSPECTED, task_id=suspect.task_id)

        async def drains() -> bool:
            worker._agenda.look_within(0.0)
            return worker._slots.makes_room

        await eventually(drains)
        other = await durable.spawn(named, "other")

        async def done() -> bool:
            worker._agenda.look_within(0.0)
            return "other" in busy.order

        await eventually(done)
        await durable.wait_for_result(other, timeout=10)
        assert "suspect" not in busy.order


@pytest.mark.parametrize("place", ["client", "task", "spawn", "none"])
async def test_the_limit_is_an_option_of_spawn_task_or_client(durable: Durable, sql: Rows, place: str) -> None:
    of_client: dict[str, Any] = {"max_lost_workers": 3} if place == "client" else {}
    of_spawn: dict[str, Any] = {"max_lost_workers": 1} if place == "spawn" else {}
    watch = Watch()
    client = Durable(durable.engine, hooks=[watch], **of_client)
    limit_of_task = 2 if place in ("task", "spawn") else None
    lethal = client.register(task("lethal", max_lost_workers=limit_of_task, on_failure="alert")(_nothing))
    spawned = await client.spawn(lethal, **of_spawn)
    limit = {"client": 3, "task": 2, "spawn": 1, "none": 5}[place]
    stored = None if limit == 5 else limit
    assert await sql("SELECT max_lost_workers FROM durable.tasks") == [(stored,)]
    await sql("UPDATE durable.tasks SET lease_losses = :losses", losses=limit)
    async with client.worker(queue_names=["default"], concurrency=1) as worker:
        # This worker does not get it.
        worker._app.tasks.clear()
        for number in (limit, limit + 1):
            claimer = Claimer(client.database)
            await claimer.register()
            assert await claimer.claim(1, "lethal", suspect=number > 1) == [spawned.task_id]
            await sql("UPDATE durable.workers SET expires_at = clock_timestamp() WHERE name = 'claimer'")

            async def taken_over(losses: int = number + 1) -> bool:
                worker._agenda.look_within(0.0)
                return await sql("SELECT lease_losses FROM durable.tasks WHERE task_name = 'lethal'") == [(losses,)]

            await eventually(taken_over)
            state = "pending" if number == limit else "failed"
            assert await sql("SELECT state FROM durable.tasks WHERE task_name = 'lethal'") == [(state,)]
    (message,) = (await sql("SELECT error ->> 'message' FROM durable.tasks WHERE task_name = 'lethal'"))[0]
    assert message.endswith(f"ran attempt 2 alone (loss {limit} of {limit} in a row)")
    assert await sql("SELECT params -> 'error' ->> 'message' FROM durable.tasks WHERE task_name = 'alert'") == [
        (message,)
    ]
    assert [(ended.task_id, ended.error and ended.error.message) for ended in watch.ended] == [
        (spawned.task_id, message)
    ]


async def _nothing(ctx: TaskContext) -> None:
    """Do nothing."""


@pytest.mark.parametrize("limit", [0, -1, True, "5", 2.0, 1_000_001])
async def test_a_limit_that_cannot_work_is_refused(durable: Durable, limit: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="max_lost_workers"):
        task(max_lost_workers=limit)
    with pytest.raises(InvalidConfiguration, match="max_lost_workers"):
        Durable(durable.engine, max_lost_workers=limit)
    with pytest.raises(InvalidConfiguration, match="max_lost_workers"):
        await durable.spawn_by_name("any", unchecked=True, max_lost_workers=limit)


async def test_children_and_schedules_take_the_option(durable: Durable, sql: Rows) -> None:
    @durable.task(max_lost_workers=7)
    async def child(ctx: TaskContext) -> None:
        """Do nothing."""

    @durable.task
    async def parent(ctx: TaskContext) -> None:
        await ctx.spawn("first", child)
        await ctx.spawn("second", child, max_lost_workers=8)

    await durable.create_schedule("tick", task=child, cron_expression="0 0 1 1 *", max_lost_workers=9)
    await durable.create_schedule("tock", task=parent, cron_expression="0 0 1 1 *")
    await sql("UPDATE durable.schedules SET next_tick_at = now()")
    await durable.spawn(parent)
    other = Durable(durable.engine, tasks=durable.tasks, max_lost_workers=3)
    async with other.worker():

        async def limits() -> bool:
            rows = await sql(
                "SELECT task_name, max_lost_workers FROM durable.tasks ORDER BY task_name, max_lost_workers"
            )
            return [tuple(row) for row in rows] == [
                *([("child", 7)] * 2),
                *([("child", 8)] * 2),
                ("child", 9),
                *([("parent", None)] * 2),
            ]

        await eventually(limits)


@pytest.mark.parametrize("end", ["fail", "release"])
async def test_any_other_end_of_a_run_begins_the_row_anew(durable: Durable, sql: Rows, end: str) -> None:
    started = asyncio.Event()

    @durable.task(retry_strategy=RetryStrategy.fixed(3600))
    async def suspect(ctx: TaskContext) -> None:
        started.set()
        if end == "release":
            await asyncio.sleep(3600)
        raise ValueError

    spawned = await durable.spawn(suspect)
    await sql("UPDATE durable.tasks SET lease_losses = 5")
    async with durable.worker(shutdown_timeout=0):
        await asyncio.wait_for(started.wait(), 10)
    assert await sql("SELECT state, lease_losses FROM durable.tasks WHERE task_id = :id", id=spawned.task_id) == [
        ("pending", 0)
    ]


async def test_a_suspect_whose_claim_was_not_answered_is_given_back_if_others_run(
    durable: Durable, sql: Rows, busy: Busy, named: Any
) -> None:
    suspect = await durable.spawn(named, "suspect", delay=3600)
    async with durable.worker(concurrency=5) as worker:
        release = asyncio.Event()

        @durable.task
        async def other(ctx: TaskContext) -> None:
            busy.running.add("other")
            await release.wait()
            busy.running.discard("other")

        await durable.spawn(other)
        await eventually(lambda: "other" in busy.running)
        # Nothing is claimed meanwhile: a release begins the row of lost workers anew.
        await durable.pause_queue()
        await sql(
            "UPDATE durable.tasks SET state = 'running', claimed_by = :worker, fence = 1, attempt = 1,"
            " available_at = now(), started_at = now(), lease_losses = 2 WHERE task_id = :task_id",
            worker=worker.worker_id,
            task_id=suspect.task_id,
        )
        worker._claimer.expect_unreported()
        worker._agenda.claim.set()

        async def given_back() -> bool:
            return bool(await sql("SELECT 1 FROM durable.runs WHERE error ->> 'name' = 'Released'"))

        await eventually(given_back)
        release.set()
        await eventually(lambda: not busy.running)
        await durable.resume_queue()
        await durable.wait_for_result(suspect, timeout=10)
    assert not busy.beside


def test_workers_make_room_one_after_the_other() -> None:
    task_id = new_id()
    workers = [uuid.uuid4() for _ in range(10)]

    def chosen(waited: float) -> set[uuid.UUID]:
        return {worker for worker in workers if is_chosen(worker, task_id, workers, waited=waited)}

    assert chosen(PATIENCE - 0.1) == set()
    groups = [chosen(PATIENCE * 2**doublings) for doublings in range(10)]
    assert [len(group) for group in groups] == list(range(1, 11))
    assert all(smaller < larger for smaller, larger in zip(groups, groups[1:], strict=False))
    # Other suspects choose other workers.
    others = [new_id() for _ in range(50)]
    first = [[w for w in workers if is_chosen(w, other, workers, waited=PATIENCE)] for other in others]
    assert len({worker for (worker,) in first}) > 3
