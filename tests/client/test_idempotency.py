"""Spawns with an idempotency key make one task, however many there are and wherever they come from."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable, IdempotencyConflict, InvalidName, Spawn, TaskRow, TaskStatus, task
from tests.client.support import Gate, count
from tests.support import eventually


@task
async def ship(ctx: Any, params: Any) -> None: ...


@task
async def bill(ctx: Any, params: Any) -> None: ...


class Labels(BaseModel):
    labels: set[str]
    weight: float


@task
async def label(ctx: Any, params: Labels) -> None: ...


async def test_a_second_spawn_with_the_same_key_returns_the_first_ids(durable: Durable, engine: AsyncEngine) -> None:
    first = await durable.spawn(ship, {"order": 1}, idempotency_key="order 1", priority=3)
    second = await durable.spawn(ship, {"order": 1}, idempotency_key="order 1", priority=5, delay=60)
    assert first.created
    assert not second.created
    assert (second.task_id, second.run_id, second.attempt) == (first.task_id, first.run_id, 1)
    assert await count(engine) == 1
    assert await count(engine, where="priority = 3 AND available_at <= now()") == 1


async def test_the_same_key_in_another_queue_is_another_task(durable: Durable) -> None:
    await durable.create_queue("mails")
    first = await durable.spawn(ship, 1, idempotency_key="k")
    second = await durable.spawn(bill, 2, idempotency_key="k", queue_name="mails")
    assert second.created
    assert second.task_id != first.task_id


@pytest.mark.parametrize(
    ("other", "params"),
    [
        (bill, {"n": 1}),
        (ship, {"n": 2}),
        (ship, {"n": True}),
        (ship, {"n": 1.0}),
        (ship, {"n": "1"}),
        (ship, {"n": 1, "m": None}),
        (ship, [{"n": 1}]),
        (ship, None),
    ],
)
async def test_another_name_or_other_params_are_a_conflict(
    durable: Durable, engine: AsyncEngine, other: Any, params: Any
) -> None:
    first = await durable.spawn(ship, {"n": 1}, idempotency_key="order 1")
    with pytest.raises(IdempotencyConflict, match="'order 1'") as raised:
        await durable.spawn(other, params, idempotency_key="order 1")
    assert raised.value.task_id == first.task_id
    assert str(first.task_id) in str(raised.value)
    assert "'default'" in str(raised.value)
    assert await count(engine) == 1


async def test_no_params_and_null_are_told_apart(durable: Durable) -> None:
    @task("optional")
    async def optional(ctx: Any, params: int | None = None) -> None: ...

    @task("optional")
    async def without(ctx: Any) -> None: ...

    await durable.spawn(optional, None, idempotency_key="k")
    assert not (await durable.spawn(optional, None, idempotency_key="k")).created
    with pytest.raises(IdempotencyConflict):
        await durable.spawn(without, idempotency_key="k")


async def test_params_that_mean_the_same_are_the_same(durable: Durable) -> None:
    await durable.spawn(ship, {"a": 1, "b": [1.5, None]}, idempotency_key="k")
    assert not (await durable.spawn(ship, {"b": [1.5, None], "a": 1}, idempotency_key="k")).created


async def test_a_set_is_the_same_in_whatever_order_it_was_stored(durable: Durable, engine: AsyncEngine) -> None:
    labels = {f"label {n}" for n in range(10)}
    first = await durable.spawn(label, Labels(labels=labels, weight=1), idempotency_key="k")
    # As another process would have written it, where strings have other hashes.
    stored = json.dumps({"weight": 1, "labels": sorted(labels)})
    async with engine.begin() as connection:
        await connection.execute(
            sa.text("UPDATE durable.tasks SET params = cast(:params AS json) WHERE task_id = :id"),
            {"params": stored, "id": first.task_id},
        )
    assert not (await durable.spawn(label, Labels(labels=labels, weight=1.0), idempotency_key="k")).created
    with pytest.raises(IdempotencyConflict):
        await durable.spawn(label, Labels(labels=labels - {"label 3"}, weight=1), idempotency_key="k")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2, width=16) | st.sampled_from(["", "1", "é\0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
def test_a_conflict_is_what_differs_as_json(database_url: URL) -> None:
    async def spawn(one: Any, other: Any) -> None:
        key = str(uuid.uuid4())
        await durable.spawn(ship, one, idempotency_key=key)
        assert not (await durable.spawn(ship, one, idempotency_key=key)).created
        if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
            assert not (await durable.spawn(ship, other, idempotency_key=key)).created
        else:
            with pytest.raises(IdempotencyConflict):
                await durable.spawn(ship, other, idempotency_key=key)

    with asyncio.Runner() as runner:
        durable = Durable(database_url)

        @settings(deadline=None, max_examples=60, derandomize=True)
        @given(plain, plain)
        @example([1, {"a": 0.0}], [True, {"a": 0.0}])
        @example([1, {"a": 0.0}], [1.0, {"a": 0.0}])
        @example([1, {"a": 0.0}], [1, {"a": -0.0}])
        def check(one: Any, other: Any) -> None:
            runner.run(spawn(one, other))

        check()
        runner.run(durable.close())


async def test_the_first_one_counts_also_when_it_has_ended(durable: Durable) -> None:
    @durable.task("once")
    async def once(ctx: Any) -> None: ...

    first = await durable.spawn(once, idempotency_key="k")
    async with durable.worker():
        await durable.wait_for_result(first, timeout=20)
    second = await durable.spawn(once, idempotency_key="k")
    assert (second.task_id, second.created) == (first.task_id, False)


async def test_cleanup_gives_the_key_free(durable: Durable) -> None:
    first = await durable.spawn(ship, 1, idempotency_key="k")
    await durable.cancel_task(first)
    assert not (await durable.spawn(ship, 1, idempotency_key="k")).created
    assert await durable.cleanup_tasks(0) == 1
    second = await durable.spawn(ship, 2, idempotency_key="k")
    assert second.created
    assert second.task_id != first.task_id


async def test_a_rolled_back_spawn_gives_the_key_free(durable: Durable, engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await durable.spawn_with(connection, ship, 1, idempotency_key="k")
        waiting = asyncio.create_task(durable.spawn(ship, 2, idempotency_key="k"))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        await connection.rollback()
    assert (await waiting).created


async def test_many_spawns_with_one_key_at_the_same_time_in_one_process(durable: Durable, engine: AsyncEngine) -> None:
    results = await asyncio.gather(*(durable.spawn(ship, 1, idempotency_key="k") for _ in range(200)))
    assert len({result.task_id for result in results}) == 1
    assert Counter(result.created for result in results) == {True: 1, False: 199}
    assert await count(engine) == 1


async def test_a_conflict_is_that_of_its_own_spawn_only(durable: Durable, engine: AsyncEngine) -> None:
    """Those that come at the same time share a statement, and neither an error nor a transaction."""
    await durable.spawn(ship, 0, idempotency_key="taken")
    results = await asyncio.gather(
        *(durable.spawn(ship, n, idempotency_key="taken" if n % 3 == 1 else str(n)) for n in range(30)),
        durable.spawn(ship, 1, queue_name="nowhere"),
        return_exceptions=True,
    )
    refused = [result for result in results[:30] if isinstance(result, IdempotencyConflict)]
    assert len(refused) == 10
    assert type(results[30]).__name__ == "QueueNotFound"
    assert await count(engine) == 21


@pytest.mark.slow
async def test_fifty_connections_with_one_key_make_one_task(database_url: URL, engine: AsyncEngine) -> None:
    app = create_async_engine(database_url, pool_size=50)
    clients = [Durable(app) for _ in range(50)]
    results = await asyncio.gather(*(client.spawn(ship, {"n": 1}, idempotency_key="k") for client in clients))
    await clients[0].close()
    await app.dispose()
    assert len({(result.task_id, result.run_id) for result in results}) == 1
    assert sum(result.created for result in results) == 1
    assert await count(engine) == 1


PROGRAM = """
import asyncio, sys
from durable_sa import Durable, task

@task
async def ship(ctx, params): ...

async def main():
    async with Durable(sys.argv[1]) as durable:
        await durable.list_queues()
        print("ready", flush=True)
        sys.stdin.readline()
        result = await durable.spawn(ship, {"n": 1}, idempotency_key="k")
        print(result.task_id, result.created, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_processes_with_one_key_make_one_task(database_url: URL, engine: AsyncEngine) -> None:
    pipe = asyncio.subprocess.PIPE
    url = database_url.render_as_string(hide_password=False)
    command = (sys.executable, "-W", "error", "-c", PROGRAM, url)
    processes = await asyncio.gather(
        *(asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=dict(os.environ)) for _ in range(4))
    )
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    said = [output.decode().split() for output, _ in await asyncio.gather(*(p.communicate(b"\n") for p in processes))]
    assert len({task_id for task_id, _ in said}) == 1
    assert sorted(created for _, created in said) == ["False"] * 3 + ["True"]
    assert await count(engine) == 1


@pytest.mark.slow
async def test_bulk_spawns_with_the_same_keys_in_other_orders_do_not_deadlock(database_url: URL) -> None:
    app = create_async_engine(database_url, pool_size=8)
    keys = [f"key {n}" for n in range(300)]
    clients = [Durable(app) for _ in range(8)]
    batches = [
        client.spawn_many([Spawn(ship, 1, idempotency_key=key) for key in (keys if n % 2 else keys[::-1])])
        for n, client in enumerate(clients)
    ]
    results = await asyncio.gather(*batches)
    await clients[0].close()
    await app.dispose()
    assert sum(result.created for batch in results for result in batch) == 300
    assert len({result.task_id for batch in results for result in batch}) == 300
    for n, batch in enumerate(results):
        order = batch if n % 2 else batch[::-1]
        assert [result.task_id for result in order] == [result.task_id for result in results[1]]


async def test_keys_are_taken_in_their_own_order(
    durable: Durable, engine: AsyncEngine, database_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that come from both ends do not meet each holding what the other one is after."""
    monkeypatch.setattr("durable_sa.database.scripts._TRIES", 1)
    keys = [f"key {n}" for n in range(10, 20)]
    other = Durable(database_url)

    async def waiting() -> bool:
        async with engine.connect() as observer:
            return await observer.scalar(sa.text(_WAITING)) == 2

    async with engine.connect() as holder:
        await durable.spawn_with(holder, ship, 1, idempotency_key="key 15")
        spawning = [
            asyncio.create_task(client.spawn_many([Spawn(ship, 1, idempotency_key=key) for key in order]))
            for client, order in ((durable, keys), (other, keys[::-1]))
        ]
        await eventually(waiting)
        await holder.rollback()
    first, second = await asyncio.gather(*spawning)
    await other.close()
    assert {result.created for result in first} != {result.created for result in second}
    assert [result.task_id for result in first] == [result.task_id for result in second[::-1]]
    async with engine.connect() as connection:
        ordered = sa.select(TaskRow.idempotency_key).order_by(TaskRow.available_at, TaskRow.task_id)
        rows = await connection.execute(ordered)
        assert rows.scalars().all() == (keys if first[0].created else keys[::-1])


_WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%INSERT INTO%'
"""


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_lost_reply_makes_no_second_task(gate: Gate, engine: AsyncEngine, driver: str) -> None:
    """The database has committed and nobody hears of it: the client does it again."""
    async with Durable(gate.url.set(drivername=f"postgresql+{driver}")) as client:
        await client.list_queues()
        gate.lose_reply_to = b"one of a kind"
        single = await client.spawn(ship, "one of a kind")
        assert gate.lose_reply_to is None
        assert single.created
        gate.lose_reply_to = b"of many"
        many = await client.spawn_many([(ship, "of many")] * 3)
        assert gate.lose_reply_to is None
        # What has keys, or goes to several queues, may be refused in part, and needs a transaction.
        gate.lose_reply_to = b"COMMIT"
        many += await client.spawn_many([Spawn(ship, number, idempotency_key=f"key {number}") for number in range(3)])
        assert gate.lose_reply_to is None
        assert [each.created for each in many] == [True] * 6
        gate.lose_reply_to = b"COMMIT"
        assert await client.cancel_task(single) is TaskStatus.CANCELLED
        assert gate.lose_reply_to is None
        keyed = await client.spawn(ship, 2, idempotency_key="key of many")
        gate.lose_reply_to = b"key of many"
        again = await client.spawn(ship, 2, idempotency_key="key of many")
        assert gate.lose_reply_to is None
        assert (again.task_id, again.created) == (keyed.task_id, False)
    async with engine.connect() as connection:
        stored = set(await connection.scalars(sa.select(TaskRow.task_id)))
    assert stored == {single.task_id, keyed.task_id, *(each.task_id for each in many)}


@pytest.mark.parametrize(
    ("key", "reason"), [("", "empty"), ("k" * 256, "256 bytes"), ("é" * 128, "256"), ("a\nb", "U\\+000A")]
)
async def test_keys_that_break_the_rules_are_refused(
    durable: Durable, engine: AsyncEngine, key: str, reason: str
) -> None:
    with pytest.raises(InvalidName, match=f"idempotency key .*{reason}"):
        await durable.spawn(ship, 1, idempotency_key=key)
    assert await count(engine) == 0


async def test_keys_are_taken_as_they_are(durable: Durable, engine: AsyncEngine) -> None:
    keys = [
        "k",
        "K",
        " k",
        "k ",
        "é",
        "e\u0301",
        "%s :x $1",
        "'; DROP TABLE durable.tasks; --",
        "k" * 255,
        "é" * 127,
        "0",
        "00",
    ]
    results = [await durable.spawn(ship, 1, idempotency_key=key) for key in keys]
    assert all(result.created for result in results)
    async with engine.connect() as connection:
        stored = set(await connection.scalars(sa.select(TaskRow.idempotency_key)))
    assert stored == set(keys)


async def test_what_was_retried_still_has_its_key(durable: Durable) -> None:
    first = await durable.spawn(ship, 1, idempotency_key="k")
    assert await durable.cancel_task(first) is TaskStatus.CANCELLED
    await durable.retry_task(first)
    again = await durable.spawn(ship, 1, idempotency_key="k")
    assert (again.task_id, again.created) == (first.task_id, False)
    assert again.run_id != first.run_id


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_key_in_an_open_transaction_holds_up_its_own_spawn_only(
    durable: Durable, engine: AsyncEngine, end: str
) -> None:
    @durable.task
    async def work(ctx: Any, number: int) -> None: ...

    async with engine.connect() as connection:
        transaction = await connection.begin()
        first = await durable.spawn_with(connection, work, 0, idempotency_key="contended")
        contended = asyncio.create_task(durable.spawn(work, 0, idempotency_key="contended"))
        others = [
            durable.spawn(work, number, **({"idempotency_key": f"key-{number}"} if number % 2 else {}))
            for number in range(20)
        ]
        async with asyncio.timeout(10):
            spawned = await asyncio.gather(*others)
        assert all(each.created for each in spawned)
        assert not contended.done()
        await getattr(transaction, end)()
    result = await contended
    assert result.created == (end == "rollback")
    assert (result.task_id == first.task_id) == (end == "commit")
