"""Queues with limits: what workers claim from them, and what gives back the slots."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    Durable,
    InvalidConfiguration,
    Limit,
    LimitKeyInfo,
    Rate,
    RateLimited,
    RetryStrategy,
    TaskContext,
    TaskRow,
    TaskStatus,
    task,
)
from durable_sa.ids import new_id
from durable_sa.models import LimitArrivalRow, LimitKeyRow, LimitTotalRow, RunRow
from durable_sa.statements import limits
from durable_sa.statements.sql import Sql

from ..support import eventually

Rows = Callable[..., Awaitable[list[Any]]]

running: Counter[str] = Counter()
peak: Counter[str] = Counter()
started: list[str] = []


class Gate:
    """What the tasks of a test wait for."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def set(self) -> None:
        self.event.set()

    async def wait(self) -> None:
        await self.event.wait()


release = Gate()


@pytest.fixture(autouse=True)
def forget() -> None:
    release.event = asyncio.Event()
    running.clear()
    peak.clear()
    started.clear()


@task("hold", limit_key=lambda key: key)
async def hold(ctx: TaskContext, key: str | None) -> None:
    """Run until released."""
    name = str(key)
    started.append(name)
    running[name] += 1
    peak[name] = max(peak[name], running[name])
    try:
        await release.wait()
    finally:
        running[name] -= 1


@task("quick", limit_key=lambda key: key)
async def quick(ctx: TaskContext, key: str | None) -> None:
    started.append(str(key))


@task("nap", limit_key=lambda key: key)
async def nap(ctx: TaskContext, key: str | None) -> None:
    """Sleep once, durably."""
    started.append(str(key))
    await ctx.await_event("woken")
    await release.wait()


@task("flaky", limit_key=lambda key: key, max_attempts=3, retry_strategy=RetryStrategy.fixed(0.01))
async def flaky(ctx: TaskContext, key: str | None) -> int:
    if ctx.attempt == 1:
        raise RuntimeError("planned")
    await release.wait()
    return ctx.attempt


@task("refused", limit_key=lambda key: key, max_attempts=1)
async def refused(ctx: TaskContext, key: str | None) -> int:
    started.append(str(key))
    if ctx.attempt == 1:
        raise RateLimited(retry_after=0.3)
    return ctx.attempt


TASKS = [hold, quick, nap, flaky, refused]


@pytest.fixture
async def client(engine: AsyncEngine) -> Any:
    async with Durable(engine, tasks=TASKS, queue_name="q") as durable:
        yield durable


async def held(sql: Rows) -> dict[str, int]:
    """Return the slots of each key that tasks hold, as the keys and the tasks say it, which must agree."""
    rows = await sql(
        "SELECT limit_key, sum(slots)::int AS slots FROM ("
        " SELECT limit_key, running AS slots FROM durable.limit_keys"
        " UNION ALL SELECT limit_key, slots FROM durable.limit_arrivals) s GROUP BY limit_key"
    )
    counted = {row.limit_key: row.slots for row in rows if row.slots}
    rows = await sql(
        "SELECT limit_key, count(*)::int AS slots FROM durable.tasks"
        " WHERE finished_at IS NULL AND slot IS NOT NULL GROUP BY limit_key"
    )
    assert counted == {row.limit_key: row.slots for row in rows}
    return counted


async def states(sql: Rows) -> Counter[str]:
    return Counter(row.state for row in await sql(select(TaskRow.state)))


async def test_no_more_of_a_key_and_of_the_queue_run_than_their_limits_say(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit=Limit(concurrency=7), limit_per_key=Limit(concurrency=2))
    spawned = await client.spawn_many([(hold, f"k{n % 4}") for n in range(16)] + [(hold, None) for _ in range(2)])
    async with client.worker(concurrency=20):
        await eventually(lambda: sum(running.values()) == 7)
        await asyncio.sleep(0.05)
        assert sum(running.values()) == 7
        assert max(peak.values()) <= 2
        assert sum((await held(sql)).values()) == 7
        release.set()
        for task_ in spawned:
            assert (await client.wait_for_result(task_, timeout=10)).status is TaskStatus.COMPLETED
    assert max(peak[f"k{n}"] for n in range(4)) == 2
    assert await held(sql) == {}
    (total,) = await sql(select(LimitTotalRow.running))
    (pending,) = await sql("SELECT coalesce(sum(slots), 0)::int AS slots FROM durable.limit_arrivals")
    assert total.running + pending.slots == 0


async def test_a_queue_limit_holds_for_tasks_without_keys(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit=Limit(concurrency=1))
    await client.spawn_many([(hold, None)] * 3)
    async with client.worker(concurrency=10):
        await eventually(lambda: running["None"] == 1)
        assert await client.list_limit_keys("q") == [LimitKeyInfo(None, "open", 1, 2, None)]
        release.set()
        await eventually(lambda: _states(sql, completed=3))


async def _states(sql: Rows, **wanted: int) -> bool:
    return await states(sql) == wanted


@pytest.mark.parametrize("ending", ["cancel", "shutdown", "takeover", "sleep", "failure", "drop"])
async def test_every_way_out_gives_the_slot_back(client: Durable, engine: AsyncEngine, sql: Rows, ending: str) -> None:
    await client.create_queue("q", limit=Limit(concurrency=3), limit_per_key=Limit(concurrency=1))
    which = {"sleep": nap, "failure": flaky}.get(ending, hold)
    first = await client.spawn(which, "a")
    worker = await client.start_worker(concurrency=5, shutdown_timeout=0, claim_timeout=30)
    other: Durable | None = None
    try:
        if ending == "cancel":
            await eventually(lambda: len(started) == 1)
            async with engine.begin() as connection:
                await client.cancel_task_with(connection, first)
                # A transaction of the application holds no key locked.
                later = await client.spawn(quick, "b")
                await client.wait_for_result(later, timeout=5)
            second = await client.spawn(quick, "a")
            await client.wait_for_result(second, timeout=5)
        elif ending == "shutdown":
            await eventually(lambda: len(started) == 1)
            await worker.shutdown()
            assert await held(sql) == {}
            assert await states(sql) == {"pending": 1}
        elif ending == "takeover":
            await eventually(lambda: len(started) == 1)
            await sql("UPDATE durable.workers SET expires_at = now() - interval '1 s'")
            other = Durable(engine, tasks=TASKS, queue_name="q")
            async with other.worker(concurrency=5):
                # The zombie is one of two runs in this process, and one of them holds the slot.
                await eventually(lambda: len(started) == 2)
                assert await held(sql) == {"a": 1}
                release.set()
                await client.wait_for_result(first, timeout=10)
            assert await held(sql) == {}
        elif ending == "sleep":
            await eventually(lambda: _states(sql, sleeping=1))
            assert await held(sql) == {}
            second = await client.spawn(quick, "a")
            await client.wait_for_result(second, timeout=5)
            await client.emit_event("woken", queue_name="q")
            release.set()
            assert (await client.wait_for_result(first, timeout=5)).status is TaskStatus.COMPLETED
        elif ending == "failure":
            release.set()
            assert (await client.wait_for_result(first, timeout=5)).output == 2
        else:
            await eventually(lambda: len(started) == 1)
            await client.drop_queue("q")
            for model in (LimitKeyRow, LimitTotalRow):
                assert await sql(select(model)) == []
        release.set()
    finally:
        await worker.shutdown()
        if other is not None:
            await other.close()
    if ending != "drop":
        assert await held(sql) == {}


async def test_a_slot_may_be_kept_from_the_first_start_to_the_end(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=2, hold="task"))
    sleepers = await client.spawn_many([(nap, "a"), (nap, "a")])
    async with client.worker(concurrency=10):
        await eventually(lambda: _states(sql, sleeping=2))
        assert await held(sql) == {"a": 2}
        # These are ahead of the sleepers in the order of time, and must not keep them from going on.
        waiting = await client.spawn_many([(quick, "a")] * 30)
        await asyncio.sleep(0.05)
        assert started == ["a", "a"]
        assert [info.state for info in await client.list_limit_keys("q")] == ["full"]
        await client.emit_event("woken", queue_name="q")
        release.set()
        for task_ in [*sleepers, *waiting]:
            assert (await client.wait_for_result(task_, timeout=10)).status is TaskStatus.COMPLETED
    assert await held(sql) == {}


async def test_attempts_keep_a_slot_that_is_kept(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit=Limit(concurrency=1, hold="task"))
    first = await client.spawn(flaky, "a")
    await client.spawn_many([(quick, "b")] * 5)
    async with client.worker(concurrency=10):
        await eventually(lambda: _attempt(sql, first.task_id, 2))
        assert started == []
        release.set()
        await eventually(lambda: _states(sql, completed=6))


async def _attempt(sql: Rows, task_id: uuid.UUID, wanted: int) -> bool:
    rows = await sql(select(TaskRow.attempt).where(TaskRow.task_id == task_id))
    return bool(rows[0].attempt == wanted)


async def test_no_window_has_more_starts_than_the_rate_allows(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(rate=Rate(50, per=1, burst=4)))
    await client.spawn_many([(quick, "a")] * 30)
    async with client.worker(concurrency=20):
        await eventually(lambda: _states(sql, completed=30))
    times = sorted(row.started_at for row in await sql(select(RunRow.started_at)))
    assert len(times) == 30
    for i in range(30):
        for j in range(i + 1, 30):
            window = (times[j] - times[i]) / timedelta(seconds=1)
            assert j - i + 1 <= 4 + int(window * 50 + 1e-9), (i, j, window)
    # Most of the rate is used: 26 starts after the burst take 0.52 seconds.
    assert (times[-1] - times[0]) / timedelta(seconds=1) < 0.75


async def test_a_start_takes_its_weight(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit=Limit(rate=Rate(20, per=1, burst=2)))
    free = [await client.spawn(quick, "a", weight=0) for _ in range(10)]
    async with client.worker(concurrency=20):
        for task_ in free:
            await client.wait_for_result(task_, timeout=5)
        heavy = await client.spawn(quick, "a", weight=4)
        await client.wait_for_result(heavy, timeout=5)
        after = await client.spawn(quick, "b")
        await client.wait_for_result(after, timeout=5)
    rows = await sql(select(TaskRow.task_id, TaskRow.started_at))
    at = {row.task_id: row.started_at for row in rows}
    # Heavier than the burst, it has left the bucket in debt: 4 - 2 + 1 tokens at 20 a second.
    assert at[after.task_id] - at[heavy.task_id] >= timedelta(seconds=0.15)


async def test_sleepers_that_go_on_count_as_no_start(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(rate=Rate(1, per=3600)))
    sleeper = await client.spawn(nap, "a")
    async with client.worker(concurrency=5):
        await eventually(lambda: _states(sql, sleeping=1))
        await client.spawn_many([(quick, "a")] * 10)
        await client.emit_event("woken", queue_name="q")
        release.set()
        assert (await client.wait_for_result(sleeper, timeout=5)).status is TaskStatus.COMPLETED
        (info,) = await client.list_limit_keys("q")
        assert (info.state, info.running, info.waiting) == ("throttled", 0, 10)
        assert info.opens_at is not None


async def test_keys_take_turns(client: Durable) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=100))
    await client.spawn_many([(quick, "whale")] * 300)
    await client.spawn_many([(quick, f"small{n}") for n in range(40)])
    async with client.worker(concurrency=4):
        await eventually(lambda: len(started) == 340)
    last_small = max(position for position, key in enumerate(started) if key != "whale")
    assert started[: last_small + 1].count("whale") <= 60


async def test_a_key_has_turns_by_its_weight(client: Durable) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=100))
    await client.set_limit("q", None, key="heavy", weight=3)
    await client.spawn_many([(quick, key) for key in ("heavy", "light") for _ in range(60)])
    async with client.worker(concurrency=1):
        await eventually(lambda: len(started) == 120)
    share = started[:40].count("heavy")
    assert 27 <= share <= 33, started[:40]


async def test_a_refused_call_closes_the_key_and_counts_no_failure(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    first = await client.spawn(refused, "a")
    async with client.worker(concurrency=5):
        await eventually(lambda: len(started) == 1)
        await eventually(lambda: _closed(client))
        second, other = await client.spawn(quick, "a"), await client.spawn(quick, "b")
        await client.wait_for_result(other, timeout=5)
        assert started == ["a", "b"]
        assert (await client.wait_for_result(first, timeout=5)).output == 2
        await client.wait_for_result(second, timeout=5)
    (row,) = await sql(select(TaskRow.failures).where(TaskRow.task_id == first.task_id))
    assert row.failures == 0


async def _closed(client: Durable) -> bool:
    return [info.key for info in await client.list_limit_keys("q", state="closed")] == ["a"]


async def test_a_refused_call_without_a_key_puts_off_the_task_alone(client: Durable) -> None:
    await client.create_queue("q")
    first = await client.spawn(refused, None)
    async with client.worker(concurrency=5):
        await eventually(lambda: len(started) == 1)
        other = await client.spawn(quick, None)
        await client.wait_for_result(other, timeout=5)
        assert (await client.wait_for_result(first, timeout=5)).output == 2


async def test_a_key_is_closed_and_opened_by_hand(client: Durable) -> None:
    await client.create_queue("q")
    await client.close_limit_key("q", "a", datetime.now(UTC) + timedelta(hours=1))
    first, other = await client.spawn(quick, "a"), await client.spawn(quick, "b")
    async with client.worker(concurrency=5):
        await client.wait_for_result(other, timeout=5)
        (info,) = await client.list_limit_keys("q", state="closed")
        assert (info.key, info.waiting) == ("a", 1)
        assert started == ["b"]
        await client.close_limit_key("q", "a", None)
        await client.wait_for_result(first, timeout=5)


async def test_an_opened_key_is_not_closed_by_a_refused_call_that_is_not_counted_yet(
    client: Durable, sql: Rows
) -> None:
    await client.create_queue("q")
    await client.close_limit_key("q", "a", None)
    await sql(
        "INSERT INTO durable.limit_arrivals (queue_name, limit_key, slots, closed_until)"
        " VALUES ('q', 'a', 0, now() + interval '1 hour'), ('q', 'b', 0, now() + interval '1 hour')"
    )
    await client.close_limit_key("q", "a", None)
    first = await client.spawn(quick, "a")
    async with client.worker(concurrency=5):
        await client.wait_for_result(first, timeout=5)
        assert [info.key for info in await client.list_limit_keys("q", state="closed")] == ["b"]


@pytest.mark.parametrize("per_key", [True, False])
async def test_a_changed_rate_holds_at_once(client: Durable, sql: Rows, per_key: bool) -> None:
    hourly = Limit(rate=Rate(1, per=3600))
    await client.create_queue("q", **({"limit_per_key": hourly} if per_key else {"limit": hourly}))
    async with client.worker(concurrency=5):
        await client.wait_for_result(await client.spawn(quick, "a"), timeout=5)
        second = await client.spawn(quick, "a")
        # The same rate, set once more, changes nothing.
        before = await sql("SELECT tat FROM durable.limit_keys UNION ALL SELECT tat FROM durable.limit_totals")
        await client.set_limit("q", hourly, per_key=per_key)
        assert await sql("SELECT tat FROM durable.limit_keys UNION ALL SELECT tat FROM durable.limit_totals") == before
        await client.set_limit("q", Limit(rate=Rate(100, per=1)), per_key=per_key)
        await client.wait_for_result(second, timeout=5)


async def test_the_rate_of_a_key_and_of_each_key_are_its_own(client: Durable, sql: Rows) -> None:
    hourly, fast = Limit(rate=Rate(1, per=3600)), Limit(rate=Rate(100, per=1))
    await client.create_queue("q", limit_per_key=hourly)
    await client.set_limit("q", hourly, key="own")
    async with client.worker(concurrency=5):
        for spawned in [await client.spawn(quick, key) for key in ("a", "own")]:
            await client.wait_for_result(spawned, timeout=5)
        first, waiting = [await client.spawn(quick, key) for key in ("a", "own")]
        await client.set_limit("q", fast, per_key=True)
        await client.wait_for_result(first, timeout=5)
        assert [info.key for info in await client.list_limit_keys("q", state="throttled")] == ["own"]
        await client.set_limit("q", None, key="own")
        await client.wait_for_result(waiting, timeout=5)


async def test_a_keys_own_limit_releases_what_sleepers_hold(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1, hold="task"))
    sleepers = [await client.spawn(nap, key) for key in ("a", "b")]
    async with client.worker(concurrency=10):
        await eventually(lambda: _states(sql, sleeping=2))
        await client.set_limit("q", Limit(concurrency=1), key="a")
        await client.wait_for_result(await client.spawn(quick, "a"), timeout=5)
        assert await held(sql) == {"b": 1}
        await client.emit_event("woken", queue_name="q")
        release.set()
        for sleeper in sleepers:
            await client.wait_for_result(sleeper, timeout=5)
    assert await held(sql) == {}


async def test_tasks_from_before_the_limit_obey_it(client: Durable, sql: Rows) -> None:
    await client.create_queue("q")
    await client.spawn_many([(hold, None)] * 6)
    async with client.worker(concurrency=4):
        await eventually(lambda: running["None"] == 4)
        await client.set_limit("q", Limit(concurrency=2))
        assert await held(sql) == {"": 4}
        late = await client.spawn(quick, None)
        release.set()
        await client.wait_for_result(late, timeout=10)
        await eventually(lambda: _states(sql, completed=7))
    assert await held(sql) == {}


async def test_tasks_of_clients_that_know_no_limits_are_adopted(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit=Limit(concurrency=1))
    await client.create_queue("other")
    spawned = await client.spawn(quick, None, queue_name="other")
    await sql("UPDATE durable.tasks SET queue_name = 'q'")
    async with client.worker(concurrency=5) as worker:
        await asyncio.sleep(0.05)
        assert started == []
        worker.maintenance.look_at_everything()
        await client.wait_for_result(spawned, timeout=10)
    assert await held(sql) == {}


async def test_keys_that_nothing_uses_are_deleted(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    await client.spawn_many([(quick, "a"), (hold, "b")])
    async with client.worker(concurrency=5) as worker:
        await eventually(lambda: _states(sql, completed=1, running=1))
        await client.spawn(quick, "c")
        await eventually(lambda: _states(sql, completed=2, running=1))
        await sql("UPDATE durable.limit_keys SET used_at = used_at - interval '2 min' WHERE limit_key <> 'c'")
        worker.maintenance.look_at_everything()

        async def keys() -> bool:
            return {row.limit_key for row in await sql(select(LimitKeyRow.limit_key))} == {"b", "c"}

        await eventually(keys)
        release.set()


async def test_limits_change_live(client: Durable) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    await client.spawn_many([(hold, "a")] * 6)
    async with client.worker(concurrency=10):
        await eventually(lambda: running["a"] == 1)
        await client.set_limit("q", Limit(concurrency=3), key="a")
        await eventually(lambda: running["a"] == 3)
        await client.set_limit("q", None, key="a")
        await client.set_limit("q", Limit(concurrency=4), per_key=True)
        await eventually(lambda: running["a"] == 4)
        await client.set_limit("q", None, per_key=True)
        await eventually(lambda: running["a"] == 6)
        release.set()


async def test_a_worker_runs_no_more_of_a_queue_than_it_is_told(client: Durable) -> None:
    await client.create_queue("q")
    await client.create_queue("other", limit_per_key=Limit(concurrency=100))
    await client.spawn_many([(hold, None)] * 8)
    for _ in range(8):
        await client.spawn(hold, "a", queue_name="other")
    with pytest.raises(InvalidConfiguration, match="mail"):
        await client.start_worker(queue_concurrency={"mail": 1})
    async with client.worker(queue_names=["q", "other"], concurrency=10, queue_concurrency={"q": 2, "other": 3}):
        await eventually(lambda: (running["None"], running["a"]) == (2, 3))
        await asyncio.sleep(0.05)
        assert (peak["None"], peak["a"]) == (2, 3)
        release.set()
        await eventually(lambda: len(started) == 16)


async def test_an_idle_key_costs_no_more_statements_than_an_idle_queue(client: Durable) -> None:
    await client.create_queue("q", limit_per_key=Limit(rate=Rate(1, per=3600)))
    await client.spawn_many([(quick, "a")] * 2)
    async with client.worker(concurrency=5) as worker:
        await eventually(lambda: len(started) == 1)
        await asyncio.sleep(0.2)
        claims = 0
        execute = worker._claims_connection.execute

        async def counting(*arguments: Any) -> Any:
            nonlocal claims
            claims += 1
            return await execute(*arguments)

        worker._claims_connection.execute = counting  # type: ignore[method-assign,assignment]
        await asyncio.sleep(1.0)
        assert claims <= 2


PARAMETERS: dict[str, Any] = {
    "queue_name": "q",
    "wanted": 5,
    "task_names": ["quick"],
    "priorities": [0],
    "ready_floor": datetime(1, 1, 2, tzinfo=UTC),
    "floors": False,
    "floor_of": 0,
}


class HeldClaim:
    """A claim that has its snapshot, and waits for a gate before it locks a key."""

    def __init__(self, client: Durable, engine: AsyncEngine, sql: Rows) -> None:
        self.client = client
        self.engine = engine
        self.sql = sql
        self.parameters = {**PARAMETERS, "worker_id": new_id()}

    async def claim(self) -> list[Any]:
        return list(await self.client.database.execute(limits.CLAIM_LIMITED, self.parameters))

    async def drain(self) -> None:
        await self.client.database.execute(limits.DRAIN_ARRIVALS, {"queue_name": "q", "floor": 0})

    async def around(self, meanwhile: Callable[[], Awaitable[Any]]) -> list[Any]:
        """Have something done between the snapshot of a claim and its locks, and return what the claim returns."""
        await self.sql(
            "INSERT INTO durable.workers (worker_id, name, queue_names, claim_timeout, expires_at)"
            " VALUES (:id, 'by hand', '{q}', '1 h', now() + interval '1 h')",
            id=self.parameters["worker_id"],
        )
        await self.sql(
            "CREATE FUNCTION durable.wait_at_gate() RETURNS boolean LANGUAGE plpgsql VOLATILE AS"
            " $$ BEGIN PERFORM pg_advisory_xact_lock(99); RETURN true; END $$"
        )
        held_up = Sql(
            limits.CLAIM_LIMITED.text.replace(
                "AND k.ready_at >= :ready_floor", "AND k.ready_at >= :ready_floor AND durable.wait_at_gate()", 1
            ),
            *limits.CLAIM_LIMITED.opaque,
            **{name: bind.type for name, bind in limits.CLAIM_LIMITED.binds.items()},
        )
        async with self.engine.connect() as gate, self.engine.connect() as slow:
            await gate.exec_driver_sql("SELECT pg_advisory_lock(99)")
            claiming = asyncio.create_task(slow.execute(held_up, self.parameters))

            await eventually(lambda: self.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'"))
            await meanwhile()
            await gate.exec_driver_sql("SELECT pg_advisory_unlock(99)")
            rows = list(await claiming)
            await slow.commit()
            return rows


async def test_a_task_that_appears_while_a_claim_looks_is_not_stranded(
    client: Durable, engine: AsyncEngine, sql: Rows
) -> None:
    """A claim finds nothing in its older snapshot, and must not park a key for which a drain has come in between."""
    await client.create_queue("q", limit_per_key=Limit(concurrency=2))
    await sql("INSERT INTO durable.limit_keys (queue_name, limit_key, ready_at) VALUES ('q', 'a', now())")
    held_claim = HeldClaim(client, engine, sql)

    async def appear() -> None:
        await client.spawn(quick, "a")
        await held_claim.drain()

    assert await held_claim.around(appear) == []
    assert len(await held_claim.claim()) == 1


async def test_a_claim_counts_what_was_claimed_after_its_snapshot(
    client: Durable, engine: AsyncEngine, sql: Rows
) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=2))
    await client.set_limit("q", None, key="a", weight=1000)
    held_claim = HeldClaim(client, engine, sql)
    await client.spawn_many([(quick, "a")] * 5)
    await held_claim.drain()
    claimed: list[Any] = []

    async def claim() -> None:
        # The key stays in front after this claim, which leaves it room for one more.
        held_claim.parameters["wanted"] = 1
        claimed.extend(await held_claim.claim())
        await sql("UPDATE durable.limit_keys SET ready_at = now() - interval '1 min'")

    claimed += await held_claim.around(claim)
    assert len(claimed) == 2
    assert await held(sql) == {"a": 2}


async def test_a_claim_takes_as_many_of_a_key_as_there_is_room_for(
    client: Durable, engine: AsyncEngine, sql: Rows
) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=3))
    held_claim = HeldClaim(client, engine, sql)
    await client.spawn_many([(quick, "a"), (quick, "b"), (quick, None)] * 5)
    await held_claim.drain()

    async def nothing() -> None: ...

    held_claim.parameters["wanted"] = 15
    claimed = await held_claim.around(nothing)
    assert Counter(row.limit_key for row in claimed) == {"a": 3, "b": 3, "": 5}


async def test_drains_at_the_same_time_do_not_deadlock(client: Durable, engine: AsyncEngine, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=2))
    arrivals = text(
        "INSERT INTO durable.limit_arrivals (queue_name, limit_key, available_at)"
        " SELECT 'q', 'k' || (random() * 300)::int, now() FROM generate_series(1, 300)"
    )

    async def drain() -> None:
        for _ in range(25):
            async with engine.begin() as connection:
                await connection.execute(arrivals)
            async with engine.begin() as connection:
                await connection.execute(limits.DRAIN_ARRIVALS, {"queue_name": "q", "floor": 0})

    await asyncio.gather(*(drain() for _ in range(6)))
    while (await client.database.execute(limits.DRAIN_ARRIVALS, {"queue_name": "q", "floor": 0}))[0].drained:
        pass
    assert await sql(select(LimitArrivalRow)) == []


async def test_arrivals_are_appended_and_drained(client: Durable, sql: Rows) -> None:
    await client.create_queue("q", limit_per_key=Limit(concurrency=1))
    await client.spawn(quick, "a")
    assert await sql(select(LimitKeyRow)) == []
    assert len(await sql(select(LimitArrivalRow))) == 1
    began = time.monotonic()
    async with client.worker(concurrency=1):
        await eventually(lambda: _states(sql, completed=1))
    assert await sql(select(LimitArrivalRow.slots)) in ([], [(-1,)])
    assert time.monotonic() - began < 5
