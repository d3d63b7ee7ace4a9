"""What a spawn stores, when it can be claimed, and what is refused before anything is written."""

from __future__ import annotations

import asyncio
import json
import math
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, cast

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    CancellationPolicy,
    Durable,
    IdempotencyConflict,
    InvalidConfiguration,
    InvalidName,
    InvalidTaskParams,
    PayloadTooLarge,
    QueueNotFound,
    RetryStrategy,
    SerializationError,
    Spawn,
    TaskAlreadyRegistered,
    TaskNotRegistered,
    TaskRow,
    task,
)
from tests.client.support import count, read


class Colour(Enum):
    RED = "red"


@dataclass
class Item:
    price: Decimal
    due: date


class Order(BaseModel):
    number: int
    items: list[Item] = []
    colour: Colour = Colour.RED


@task
async def anything(ctx: Any, params: Any = None) -> None: ...


@task
async def ship(ctx: Any, params: Order) -> None: ...


@task
async def tick(ctx: Any) -> None: ...


async def test_a_spawned_task_is_pending_and_can_be_claimed_at_once(durable: Durable, engine: AsyncEngine) -> None:
    spawned = await durable.spawn(tick)
    row = await read(engine, spawned.task_id)
    assert (row.state, row.attempt, row.queue_name, row.task_name) == ("pending", 0, "default", "tick")
    assert (row.params_text, row.headers, row.priority, row.parent_task_id) == (None, None, 0, None)
    assert row.run_id == spawned.run_id
    assert (spawned.attempt, spawned.created) == (1, True)
    assert row.first_started_at is row.finished_at is row.outcome is row.claimed_by is None
    assert row.created_at <= row.available_at
    assert await durable.count_unclaimed_ready_tasks() == 1


async def test_ids_are_version_7_and_grow_with_time(durable: Durable) -> None:
    ids = [(await durable.spawn(tick)).task_id for _ in range(3)]
    many = await durable.spawn_many([(tick, None)] * 500)
    ids += [spawned.task_id for spawned in many]
    assert all(task_id.version == 7 for task_id in ids)
    assert ids == sorted(ids)
    assert not {spawned.run_id for spawned in many} & set(ids)


async def test_a_thousand_spawns_at_once_are_a_thousand_tasks(durable: Durable, engine: AsyncEngine) -> None:
    spawned = await asyncio.gather(*(durable.spawn(anything, number) for number in range(1000)))
    assert len({result.task_id for result in spawned}) == len({result.run_id for result in spawned}) == 1000
    async with engine.connect() as connection:
        rows = await connection.execute(sa.select(TaskRow.task_id, TaskRow.params))
        stored = {row.task_id: row.params for row in rows}
    assert [stored[result.task_id] for result in spawned] == list(range(1000))


async def test_defaults_come_from_the_task_then_from_the_client(engine: AsyncEngine) -> None:
    fast = CancellationPolicy(max_pending_time=1)
    slow = CancellationPolicy(max_pending_time=9)

    @task(max_attempts=3, retry_strategy=RetryStrategy.fixed(1.5), cancellation=slow, queue_name="mails")
    async def mail(ctx: Any) -> None: ...

    durable = Durable(engine, queue_name="orders", default_max_attempts=2, default_cancellation=fast)
    plain = Durable(engine)
    for name in ("orders", "mails", "other"):
        await durable.create_queue(name)

    async def stored(client: Durable, *args: Any, **options: Any) -> Any:
        row = await read(engine, (await client.spawn(*args, **options)).task_id)
        delays = (row.retry_kind, row.retry_base_delay)
        return row.queue_name, row.max_attempts, *delays, row.max_pending_time

    second = timedelta(seconds=1)
    assert await stored(plain, tick) == ("default", 5, "fixed", 5.0, None)
    assert await stored(durable, tick) == ("orders", 2, "fixed", 5.0, second)
    assert await stored(durable, mail) == ("mails", 3, "fixed", 1.5, 9 * second)
    own = {"queue_name": "other", "max_attempts": 1, "retry_strategy": RetryStrategy.none(), "cancellation": fast}
    assert await stored(durable, mail, **own) == ("other", 1, "none", 0.0, second)
    await durable.close()


async def test_params_are_stored_exactly(durable: Durable, engine: AsyncEngine) -> None:
    for value, text in [
        (
            {"b": 1, "a": [2**63, -(2**70), 1e-300, -0.0, 1.5]},
            '{"b":1,"a":[9223372036854775808,-1180591620717411303424,1e-300,-0.0,1.5]}',
        ),
        ("NUL \0, quote ', \\ and é\U0001f600\u2028", '"NUL \\u0000, quote \', \\\\ and é\U0001f600\u2028"'),
        ({"": None}, '{"":null}'),
        (None, "null"),
        (False, "false"),
        ([], "[]"),
        ("%s %(a)s :a $1 {} ?", '"%s %(a)s :a $1 {} ?"'),
        ("null", '"null"'),
    ]:
        assert (await read(engine, (await durable.spawn(anything, value)).task_id)).params_text == text
    typed = await durable.spawn(ship, Order(number=1, items=[Item(Decimal("1.10"), date(2026, 1, 2))]))
    text = '{"number":1,"items":[{"price":"1.10","due":"2026-01-02"}]}'
    assert (await read(engine, typed.task_id)).params_text == text
    # What the model makes an order of is one. Only the fields that were set are stored.
    assert (await read(engine, (await durable.spawn(cast(Any, ship), {"number": "1"})).task_id)).params_text == (
        '{"number":1}'
    )


async def test_a_task_without_params_is_told_from_one_with_null(durable: Durable, engine: AsyncEngine) -> None:
    assert (await read(engine, (await durable.spawn(tick)).task_id)).params_text is None
    assert (await read(engine, (await durable.spawn(anything, None)).task_id)).params_text == "null"


jsons = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=10,
)


@pytest.mark.slow
def test_whatever_is_json_comes_back_as_it_was(database_url: URL) -> None:
    async def round_trip(value: Any) -> None:
        spawned = await durable.spawn(anything, value, headers={"value": "x"})
        row = await read(durable.engine, spawned.task_id)
        assert json.dumps(json.loads(row.params_text)) == json.dumps(value)

    with asyncio.Runner() as runner:
        durable = Durable(database_url)

        @settings(deadline=None, max_examples=80, derandomize=True)
        @given(jsons)
        def check(value: Any) -> None:
            runner.run(round_trip(value))

        check()
        runner.run(durable.close())


async def test_headers_are_stored_as_an_object(durable: Durable, engine: AsyncEngine) -> None:
    headers = {"trace-id": "é'\"\\", "n": [1, 2.5, None, {"deep": True}]}
    row = await read(engine, (await durable.spawn(tick, headers=headers)).task_id)
    assert row.headers == headers
    assert (await read(engine, (await durable.spawn(tick, headers={})).task_id)).headers is None
    async with engine.connect() as connection:
        found = sa.select(TaskRow.task_id).where(TaskRow.headers["n"][0].as_integer() == 1)
        assert await connection.scalar(found) == row.task_id


SECONDS = timedelta(seconds=1)
YEARS = timedelta(days=36_525)


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"max_attempts": 1}, {"max_attempts": 1}),
        ({"max_attempts": 2**31 - 1}, {"max_attempts": 2**31 - 1}),
        ({"priority": -(2**15)}, {"priority": -(2**15)}),
        ({"priority": 2**15 - 1}, {"priority": 2**15 - 1}),
        ({"retry_strategy": RetryStrategy.none()}, {"retry_kind": "none"}),
        (
            {"retry_strategy": RetryStrategy.fixed(YEARS, 1)},
            {"retry_base_delay": YEARS.total_seconds(), "retry_jitter": 1.0},
        ),
        (
            {"retry_strategy": RetryStrategy.exponential(0.001, 1000, YEARS, 0.25)},
            {"retry_kind": "exponential", "retry_base_delay": 0.001, "retry_factor": 1000.0, "retry_jitter": 0.25},
        ),
        (
            {"cancellation": CancellationPolicy(YEARS, YEARS)},
            {"max_pending_time": YEARS, "max_running_time": YEARS},
        ),
        (
            {"cancellation": CancellationPolicy(0, 0.000001)},
            {"max_pending_time": 0 * SECONDS, "max_running_time": 0.000001 * SECONDS},
        ),
        ({"cancellation": CancellationPolicy(1.5)}, {"max_pending_time": 1.5 * SECONDS, "max_running_time": None}),
        ({"queue_name": "mails"}, {"queue_name": "mails"}),
        ({"idempotency_key": "k" * 255}, {"idempotency_key": "k" * 255}),
        (
            {"available_at": datetime(8999, 12, 31, 23, 59, 59, 999999, UTC)},
            {"available_at": datetime(8999, 12, 31, 23, 59, 59, 999999, UTC)},
        ),
        ({"available_at": datetime(1000, 1, 1, tzinfo=UTC)}, {"available_at": datetime(1000, 1, 1, tzinfo=UTC)}),
        (
            {"available_at": datetime(2026, 7, 1, 12, 0, 0, 1, timezone(timedelta(hours=-7)))},
            {"available_at": datetime(2026, 7, 1, 19, 0, 0, 1, UTC)},
        ),
        (
            {"available_at": datetime(8999, 1, 1, tzinfo=UTC), "cancellation": CancellationPolicy(YEARS)},
            {"cancel_at": datetime(8999, 1, 1, tzinfo=UTC) + YEARS},
        ),
    ],
)
async def test_every_legal_option_is_stored(
    durable: Durable, engine: AsyncEngine, options: dict[str, Any], stored: dict[str, Any]
) -> None:
    await durable.create_queue("mails")
    row = (await read(engine, (await durable.spawn(tick, **options)).task_id))._mapping
    assert {name: row[name] for name in stored} == stored


@pytest.mark.parametrize("delay", [0, 20.25, timedelta(milliseconds=1500), timedelta(days=36_525)])
async def test_a_delay_counts_from_the_spawn_by_the_databases_clock(
    durable: Durable, engine: AsyncEngine, delay: Any
) -> None:
    before = await now(engine)
    row = await read(engine, (await durable.spawn(tick, delay=delay)).task_id)
    after = await now(engine)
    length = delay if isinstance(delay, timedelta) else timedelta(seconds=delay)
    assert before + length <= row.available_at <= after + length
    assert await durable.count_unclaimed_ready_tasks() == (not delay)


@pytest.mark.slow
async def test_a_delayed_task_is_not_claimed_before_and_soon_after(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(tick)
    async with durable.worker():
        spawned = await durable.spawn(tick, delay=0.4)
        await durable.wait_for_result(spawned, timeout=10)
    row = await read(engine, spawned.task_id)
    waited = row.first_started_at - row.available_at
    assert timedelta(0) <= waited < timedelta(seconds=1)
    assert row.available_at - row.created_at >= timedelta(seconds=0.399)


async def test_smaller_priorities_first_and_in_order_within_one(durable: Durable) -> None:
    order = []

    @durable.task("note")
    async def note(ctx: Any, params: str) -> None:
        order.append(params)

    await durable.spawn(note, "late", priority=5)
    await durable.spawn_many([Spawn(note, f"bulk {n}", priority=1) for n in range(40)])
    await durable.spawn(note, "early", priority=-3)
    await durable.spawn(note, "after bulk", priority=1)
    last = await durable.spawn(note, "last", priority=2**15 - 1)
    async with durable.worker(concurrency=1, batch_size=1):
        await durable.wait_for_result(last, timeout=20)
    assert order == ["early", *(f"bulk {n}" for n in range(40)), "after bulk", "late", "last"]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_attempts": 0}, InvalidConfiguration, "max_attempts: 0 is not between 1 and 2147483647"),
    ({"max_attempts": 2**31}, InvalidConfiguration, "max_attempts: 2147483648"),
    ({"max_attempts": 1.0}, InvalidConfiguration, "max_attempts: it must be an int, not float"),
    ({"max_attempts": True}, InvalidConfiguration, "not bool"),
    ({"retry_strategy": "none"}, InvalidConfiguration, "retry_strategy: it must be a RetryStrategy, not str"),
    ({"cancellation": 5}, InvalidConfiguration, "cancellation: it must be a CancellationPolicy, not int"),
    ({"delay": -0.001}, InvalidConfiguration, "delay .*-0.001 is not between"),
    ({"delay": math.nan}, InvalidConfiguration, "nan is not between"),
    ({"delay": timedelta.max}, InvalidConfiguration, "is not between"),
    ({"delay": "5"}, InvalidConfiguration, "a number of seconds or a timedelta, not str"),
    ({"available_at": datetime(2026, 1, 1)}, InvalidConfiguration, "2026-01-01T00:00:00 has no time zone"),
    ({"available_at": datetime(9001, 1, 1, tzinfo=UTC)}, InvalidConfiguration, "years 1000 and 9000"),
    ({"available_at": 5}, InvalidConfiguration, "available_at: it must be a datetime, not int"),
    ({"available_at": datetime(2026, 1, 1, tzinfo=UTC), "delay": 1}, InvalidConfiguration, "Give one of them"),
    ({"priority": 2**15}, InvalidConfiguration, "priority: 32768"),
    ({"priority": 0.5}, InvalidConfiguration, "priority: it must be an int, not float"),
    ({"queue_name": ""}, InvalidName, "queue name '' is not valid: it is empty"),
    ({"queue_name": "a\x07"}, InvalidName, r"'a\\x07' .* control character U\+0007"),
    ({"queue_name": "é" * 101}, InvalidName, "202 bytes of UTF-8 and at most 200"),
    (
        {"queue_name": "nowhere"},
        QueueNotFound,
        r"'nowhere'\. Create it first: `await durable\.create_queue\('nowhere'\)`",
    ),
    ({"headers": {"durable::trace": 1}}, InvalidName, "header name 'durable::trace' is not valid: .* reserved"),
    ({"headers": {"": 1}}, InvalidName, "header name ''"),
    ({"headers": {"a": object()}}, SerializationError, "The headers"),
    ({"headers": {"a": math.inf}}, SerializationError, "The headers"),
    ({"headers": {"a": "\0"}}, SerializationError, r"U\+0000"),
    ({"headers": {"a": "x" * 16384}}, PayloadTooLarge, "The headers has 16392 bytes as JSON and at most 16384"),
    ({"headers": [("a", 1)]}, InvalidConfiguration, "headers: it must be a Mapping, not list"),
    ({"idempotency_key": ""}, InvalidName, "idempotency key '' is not valid"),
    ({"idempotency_key": 5}, InvalidName, "it must be a str, not int"),
    ({"retries": 3}, TypeError, "unexpected keyword argument 'retries'"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
async def test_what_cannot_work_is_refused_and_nothing_is_written(
    durable: Durable, engine: AsyncEngine, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await durable.spawn(tick, **options)
    with pytest.raises(error, match=message):
        await durable.spawn_many([(tick, None), Spawn(tick, **options)])
    async with engine.connect() as connection:
        with pytest.raises(error, match=message):
            await durable.spawn_with(connection, tick, **options)
        await connection.commit()
    assert await count(engine) == 0


@pytest.mark.parametrize(
    ("target", "params", "error", "message"),
    [
        (ship, {"number": "x"}, InvalidTaskParams, "do not fit task 'ship': at number: .*valid integer"),
        (ship, {}, InvalidTaskParams, "at number: Field required"),
        (ship, None, InvalidTaskParams, "none are given, and it needs some"),
        (tick, {"a": 1}, InvalidTaskParams, "'tick': it takes none"),
        (anything, math.nan, SerializationError, "params of task 'anything' cannot be stored"),
        (anything, {"a": [math.inf]}, SerializationError, r"at a\[0\]"),
        (anything, "\ud800", SerializationError, "surrogate"),
        (anything, {"key": SecretStr("hunter2")}, SerializationError, "at key"),
        (anything, object(), SerializationError, "object"),
    ],
)
async def test_params_that_do_not_fit_are_refused_without_showing_them(
    durable: Durable, engine: AsyncEngine, target: Any, params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        await durable.spawn(target, params)
    assert "hunter2" not in str(raised.value)
    assert await count(engine) == 0


async def test_the_limit_of_a_payload_is_exact_and_in_bytes(engine: AsyncEngine) -> None:
    async with Durable(engine, max_payload_bytes=100) as durable:
        assert (await durable.spawn(anything, "x" * 98)).created
        assert (await durable.spawn(anything, "é" * 49)).created
        for value in ("x" * 99, "é" * 49 + "x"):
            with pytest.raises(PayloadTooLarge, match="has 101 bytes as JSON and at most 100 .*max_payload_bytes"):
                await durable.spawn(anything, value)
        with pytest.raises(PayloadTooLarge):
            await durable.spawn_by_name("anything", "x" * 99, unchecked=True)
        with pytest.raises(PayloadTooLarge, match="event 'big'"):
            await durable.emit_event("big", "x" * 99)
    assert await count(engine) == 2


@pytest.mark.slow
async def test_the_default_limit_is_16_mebibytes(durable: Durable, engine: AsyncEngine) -> None:
    most = 16 * 1024 * 1024
    spawned = await durable.spawn(anything, "x" * (most - 2))
    async with engine.connect() as connection:
        size = sa.select(sa.func.octet_length(sa.cast(TaskRow.params, sa.Text))).where(
            TaskRow.task_id == spawned.task_id
        )
        assert await connection.scalar(size) == most
    with pytest.raises(PayloadTooLarge, match=f"{most + 1} bytes"):
        await durable.spawn(anything, "x" * (most - 1))


@pytest.mark.slow
async def test_many_large_payloads_fit_as_they_come(durable: Durable, engine: AsyncEngine) -> None:
    """They are not put into one message, which Postgres would not take."""
    spawned = await durable.spawn_many([(anything, "x" * 5_000_000) for _ in range(20)])
    assert len({result.task_id for result in spawned}) == await count(engine) == 20


async def test_by_name_the_task_must_be_registered_unless_it_need_not(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(ship)
    durable.register(tick)
    with pytest.raises(
        TaskNotRegistered, match=r"named 'sihp' is registered \(registered: 'ship', 'tick'\).*unchecked=True"
    ):
        await durable.spawn_by_name("sihp", {"number": 1})
    with pytest.raises(InvalidTaskParams):
        await durable.spawn_by_name("ship", {"number": "x"})
    with pytest.raises(InvalidName, match="task name ''"):
        await durable.spawn_by_name("", unchecked=True)
    with pytest.raises(InvalidTaskParams, match=r"have no JSON form\.$"):
        await durable.spawn_by_name("elsewhere", math.nan, unchecked=True)
    with pytest.raises(QueueNotFound):
        await durable.spawn_by_name("elsewhere", unchecked=True, queue_name="nowhere")
    assert await count(engine) == 0
    known = await durable.spawn_by_name("ship", {"number": "1"}, max_attempts=9)
    row = await read(engine, known.task_id)
    assert (row.params_text, row.max_attempts) == ('{"number":1}', 9)
    unknown = await durable.spawn_by_name("elsewhere", {"number": "1"}, unchecked=True, priority=1)
    row = await read(engine, unknown.task_id)
    assert (row.task_name, row.params_text, row.priority) == ("elsewhere", '{"number":"1"}', 1)


async def test_unchecked_leaves_it_to_the_workers_whether_params_fit(durable: Durable, engine: AsyncEngine) -> None:
    for known in (ship, tick):
        durable.register(known)
    misfits: list[tuple[str, Any, str]] = [("ship", {"number": "x"}, '{"number":"x"}'), ("tick", [1], "[1]")]
    for name, params, stored in misfits:
        with pytest.raises(InvalidTaskParams):
            await durable.spawn_by_name(name, params)
        spawned = await durable.spawn_by_name(name, params, unchecked=True)
        assert (await read(engine, spawned.task_id)).params_text == stored
    # What fits is sent as the task has it, and what is no JSON nowhere.
    fits = await durable.spawn_by_name("ship", {"number": "1"}, unchecked=True)
    assert (await read(engine, fits.task_id)).params_text == '{"number":1}'
    with pytest.raises(InvalidTaskParams, match="surrogate"):
        await durable.spawn_by_name("ship", {"number": "\ud800"}, unchecked=True)
    async with durable.worker():
        result = await durable.wait_for_result(
            await durable.spawn_by_name("ship", {"number": "x"}, unchecked=True), timeout=10
        )
    assert result.error is not None
    assert result.error.name == "InvalidTaskParams"
    assert (await read(engine, result.task_id)).failures == 1


async def test_options_of_a_named_task_count_as_if_it_was_given(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task("named", max_attempts=2, queue_name="default")
    async def named(ctx: Any) -> None: ...

    assert (await read(engine, (await durable.spawn_by_name("named")).task_id)).max_attempts == 2


async def test_a_task_need_not_be_registered_where_it_is_spawned(durable: Durable) -> None:
    assert durable.tasks == {}
    assert (await durable.spawn(tick)).created


async def test_names_are_taken_once(durable: Durable) -> None:
    durable.register(tick)
    assert durable.register(tick) is tick

    @task("tick")
    async def other(ctx: Any) -> None: ...

    with pytest.raises(TaskAlreadyRegistered, match="'tick' is already registered. Rename one"):
        durable.register(other)
    assert durable.tasks == {"tick": tick}
    with pytest.raises(TaskAlreadyRegistered):
        Durable(tasks=[tick, other])


async def test_what_is_no_task_is_not_spawned(durable: Durable, engine: AsyncEngine) -> None:
    async def function(ctx: Any) -> None: ...

    wrong: Any
    for wrong in (function, None, 5):
        with pytest.raises(TypeError, match=r"@task"):
            await durable.spawn(wrong)
        with pytest.raises(TypeError, match=r"@task"):
            await durable.spawn_many([(wrong, None)])
        with pytest.raises(TypeError, match=r"@task"):
            durable.register(wrong)
    with pytest.raises(TypeError, match=r"tuple of a task and its params, or Spawn"):
        await durable.spawn_many([tick])  # type: ignore[list-item]
    assert await count(engine) == 0


async def test_bulk_results_come_in_the_order_of_the_items(durable: Durable, engine: AsyncEngine) -> None:
    items = [Spawn(anything, n, priority=-n % 7, delay=n % 3) if n % 2 else (anything, n) for n in range(2500)]
    spawned = await durable.spawn_many(iter(items))
    async with engine.connect() as connection:
        stored = {
            row.task_id: row.params for row in await connection.execute(sa.select(TaskRow.task_id, TaskRow.params))
        }
    assert [stored[result.task_id] for result in spawned] == list(range(2500))
    assert all(result.created for result in spawned)
    assert await durable.spawn_many([]) == []


COMMITTED = (
    "CREATE TABLE public.committed AS SELECT task_id FROM durable.tasks LIMIT 0",
    """
    CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.committed SELECT task_id FROM durable.tasks WHERE task_id = NEW.task_id;
        RETURN NULL;
    END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER note AFTER INSERT ON durable.tasks DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION public.note()
    """,
)


async def test_not_even_for_a_moment_is_there_a_part_of_many(durable: Durable, engine: AsyncEngine) -> None:
    await durable.spawn(tick, idempotency_key="taken")
    async with engine.begin() as connection:
        for statement in COMMITTED:
            await connection.exec_driver_sql(statement)
    for bad in (Spawn(tick, queue_name="nowhere"), Spawn(anything, idempotency_key="taken")):
        for items in ([(tick, None), bad], [bad, (tick, None)], [(tick, None)] * 1200 + [bad]):
            with pytest.raises((QueueNotFound, IdempotencyConflict)) as raised:
                await durable.spawn_many(items)
            assert f"item {items.index(bad)} " in raised.value.__notes__[0]
    assert await count(engine, "committed") == 0
    await durable.spawn_many([(tick, None)] * 3)
    await durable.spawn_many([(tick, None)] * 1200)
    assert await count(engine, "committed") == 1203


async def test_a_bad_item_names_itself_and_spoils_all(durable: Durable, engine: AsyncEngine) -> None:
    bad: Any
    for bad, error in [
        ((ship, {"number": "x"}), InvalidTaskParams),
        (Spawn(tick, max_attempts=0), InvalidConfiguration),
        (Spawn(tick, queue_name="nowhere"), QueueNotFound),
        (Spawn(tick, max_attempt=1), TypeError),  # type: ignore[call-overload]
        (tick, TypeError),
        ((None, None), TypeError),
    ]:
        with pytest.raises(error) as raised:
            await durable.spawn_many([(tick, None)] * 1200 + [bad, (tick, None)])
        assert raised.value.__notes__ == ["It is item 1200 of those to be spawned (counted from 0); none was spawned."]
        assert await count(engine) == 0
    small = Durable(engine, max_payload_bytes=100)
    for params, error in [({"number": "x"}, InvalidTaskParams), ({"number": 10**100}, PayloadTooLarge)]:
        with pytest.raises(error) as raised:
            await small.spawn_many([(ship, {"number": 1}), (ship, {"number": 2}), (ship, params)])
        assert "item 2 " in raised.value.__notes__[0]
        assert await count(engine) == 0


async def test_a_cancelled_caller_leaves_all_or_nothing_and_the_pool_intact(
    durable: Durable, engine: AsyncEngine
) -> None:
    for round_ in range(30):
        callers = [
            asyncio.create_task(durable.spawn(tick)),
            asyncio.create_task(durable.spawn_many([(tick, None)] * 3)),
        ]
        await asyncio.sleep(round_ * 0.0003)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    before = await count(engine)
    assert (await durable.spawn(tick)).created
    await durable.close()
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert await count(engine) >= before + 1


async def test_values_appear_in_no_repr(durable: Durable) -> None:
    spawned = await durable.spawn(anything, "canary-7", headers={"h": "canary-7"})
    item = Spawn(anything, "canary-7", headers={"h": "canary-7"})
    assert "canary-7" not in repr([spawned, item, durable, await durable.get_task_result(spawned)])
    assert re.search(r"Spawn\(.*anything", repr(item))
    assert isinstance(uuid.UUID(str(spawned.task_id)), uuid.UUID)


async def now(engine: AsyncEngine) -> datetime:
    async with engine.connect() as connection:
        value: datetime = (await connection.execute(sa.text("SELECT clock_timestamp()"))).scalar_one()
        return value


def test_the_tasks_of_one_client_can_be_those_of_another() -> None:
    first = Durable(tasks=[tick])
    assert Durable(tasks=first.tasks).tasks == Durable(tasks=first.tasks.values()).tasks == {"tick": tick}


def test_a_function_that_a_reloaded_module_or_a_notebook_cell_defines_anew_replaces_its_task() -> None:
    durable = Durable()
    cell = (
        "from durable_sa import TaskContext\n@durable.task\nasync def greet(ctx: TaskContext) -> str:\n    return {!r}"
    )
    module = {"durable": durable, "__name__": "__main__"}
    exec(cell.format("Hello"), module)
    exec(cell.format("Good morning"), module)
    assert durable.tasks["greet"] is module["greet"]
    assert durable.tasks["greet"].function.__code__.co_consts[-1] == "Good morning"
    with pytest.raises(TaskAlreadyRegistered):
        exec(cell.format("Hello"), {"durable": durable, "__name__": "another_module"})


def test_functions_that_a_factory_makes_under_one_name_are_refused() -> None:
    durable = Durable()

    def make() -> None:
        @durable.task("made")
        async def made(ctx: Any) -> None: ...

    make()
    with pytest.raises(TaskAlreadyRegistered):
        make()
