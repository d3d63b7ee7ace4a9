"""Streams: each item reaches a reader once and in order, and a step that runs once more never mixes with its past."""

import asyncio
import uuid
from contextlib import suppress
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import (
    Durable,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    PayloadTooLarge,
    SerializationError,
    StreamItem,
    StreamRestart,
    SyncTaskContext,
    TaskContext,
    TaskNotFound,
    current_context,
    step,
    task,
)
from durable_sa.execution.streaming import BUFFER_BYTES
from durable_sa.execution.writes import ItemsValues, Kind, Write, statement_of
from durable_sa.models import Stream, StreamItems
from durable_sa.statements.streams import WRITE_ITEMS
from durable_sa.testing import task_context
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


class Token(BaseModel):
    text: str


async def read(durable: Durable, task: Any, name: str = "answer", **options: Any) -> list[Any]:
    """All entries: values of items, and restarts as they are."""
    async with asyncio.timeout(20):
        return [
            entry if isinstance(entry, StreamRestart) else entry.value
            async for entry in durable.read_stream(task, name, **options)
        ]


async def test_items_of_the_body_and_of_steps_are_read_in_order(run: Runner, engine: AsyncEngine) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async def body() -> None:
            async with ctx.stream("tokens", Token) as stream:
                for word in ("a", "b"):
                    await stream.write(Token(text=word))

        await ctx.step("body", body)
        async with ctx.stream("answer") as stream:
            for number in range(1000):
                await stream.write(number)
            await stream.write(None)

    spawned = await run.spawn(work)
    assert await read(run.durable, spawned) == [*range(1000), None]
    await run.wait(spawned)
    entries = [entry async for entry in run.durable.read_stream(spawned.task_id, "tokens", type=Token)]
    assert entries == [StreamItem(1, Token(text="a")), StreamItem(2, Token(text="b"))]
    assert await read(run.durable, spawned, after=998) == [998, 999, None]
    assert await read(run.durable, spawned, "other") == []
    async with engine.connect() as connection:
        rows = (await connection.execute(select(StreamItems.position).where(StreamItems.name == "answer"))).all()
    assert len(rows) < 20


async def test_a_reader_follows_what_is_written(run: Runner) -> None:
    go_on = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write("first")
            async with asyncio.timeout(10):
                await ctx.step("wait", go_on.wait)
            await stream.write("second")

    spawned = await run.spawn(work)
    seen: list[Any] = []
    async for entry in run.durable.read_stream(spawned, "answer"):
        assert isinstance(entry, StreamItem)
        seen.append((entry.position, entry.value))
        go_on.set()
    assert seen == [(1, "first"), (2, "second")]
    assert await read(run.durable, spawned, after=1) == ["second"]


async def test_a_step_that_runs_once_more_supersedes_its_items(run: Runner) -> None:
    seen: list[Any] = []
    tries = 0

    @step(max_attempts=3)
    async def talk() -> None:
        nonlocal tries
        tries += 1
        async with current_context().stream("answer") as stream:
            for number in range(3):
                await stream.write([tries, number])
            if tries < 3:
                await eventually(lambda: seen.count([tries, 2]) == 1)
                raise Crash

    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer", keep_open=True) as stream:
            await stream.write("prologue")
        await talk()

    spawned = await run.spawn(work)
    positions: list[int] = []
    async for entry in run.durable.read_stream(spawned, "answer"):
        seen.append(entry.position if isinstance(entry, StreamRestart) else entry.value)
        if isinstance(entry, StreamItem):
            positions.append(entry.position)
    attempts = [[[number, item] for item in range(3)] for number in (1, 2, 3)]
    assert seen == ["prologue", *attempts[0], 1, *attempts[1], 1, *attempts[2]]
    assert positions == sorted(set(positions))
    # A later reader sees no restart; one that comes back at a superseded position does.
    assert await read(run.durable, spawned) == ["prologue", *attempts[2]]
    for position in positions[1:7]:
        assert await read(run.durable, spawned, after=position) == [StreamRestart(1), *attempts[2]]
    assert await read(run.durable, spawned, after=positions[7]) == attempts[2][1:]


async def test_a_block_in_the_body_that_was_left_is_skipped_by_a_replay_and_a_cut_one_is_superseded(
    run: Runner, tally: Tally
) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("first") as stream:
            tally.add(ctx.attempt)
            await stream.write(ctx.attempt)
        async with ctx.stream("second") as stream:
            await stream.write(ctx.attempt)
            if ctx.attempt < 3:
                raise Crash

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert tally == [1, 2, 3]
    assert await read(run.durable, spawned, "first") == [1]
    assert await read(run.durable, spawned, "second") == [3]
    assert (await read(run.durable, spawned, "second", after=1))[0] == StreamRestart(0)


async def test_a_run_that_takes_over_gives_a_reader_one_restart_and_then_the_new_items_alone(run: Runner) -> None:
    taken = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        async def body(attempt: int) -> None:
            async with ctx.stream("answer") as stream:
                for number in range(500):
                    await stream.write([attempt, number])
                if attempt == 1:
                    await taken.wait()
                    while True:
                        await stream.write("late")
                        await asyncio.sleep(0)

        await ctx.step("prologue", prologue)
        await ctx.step("body", lambda: body(ctx.attempt))

    async def prologue() -> None:
        async with current_context().stream("answer", keep_open=True) as stream:
            await stream.write("prologue")

    spawned = await run.spawn(work)
    entries: list[Any] = []

    async def follow() -> None:
        async for entry in run.durable.read_stream(spawned, "answer"):
            entries.append(entry)  # noqa: PERF401 - a list is not extended before all entries have come

    reader = asyncio.ensure_future(follow())
    await eventually(lambda: len(entries) == 501)
    await Rows(run.durable, spawned).take_over()
    taken.set()
    await run.wait(spawned)
    async with asyncio.timeout(10):
        await reader
    (restart,) = (index for index, entry in enumerate(entries) if isinstance(entry, StreamRestart))
    assert entries[restart] == StreamRestart(1)
    assert [entry.value for entry in entries[1:restart] if entry.value != "late"] == [
        [1, number] for number in range(500)
    ]
    assert [entry.value for entry in entries[restart + 1 :]] == [[2, number] for number in range(500)]
    positions = [entry.position for entry in entries if isinstance(entry, StreamItem)]
    assert positions == sorted(set(positions))
    assert await read(run.durable, spawned) == ["prologue", *([2, number] for number in range(500))]


@pytest.mark.parametrize("committed", ["before", "after"])
async def test_what_a_lost_run_still_has_in_flight_is_found_or_refused(run: Runner, committed: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        async def body(attempt: int) -> None:
            async with ctx.stream("answer") as stream:
                await stream.write(attempt)
                if attempt == 1:
                    begun.set()
                    await go_on.wait()

        await ctx.step("body", lambda: body(ctx.attempt))

    spawned, rows = await run.spawn(work), Rows(run.durable, 0)
    rows.task_id = spawned.task_id
    await begun.wait()
    assert await eventually(lambda: read(run.durable, spawned, follow=False)) == [1]
    old = await rows.task()
    row = (await rows._all(select(Stream.__table__).where(Stream.task_id == spawned.task_id)))[0]
    values = ItemsValues("answer", row.block_id, 3, row.step_key, row.try_id, '["late", "later"]', None)
    _, late = statement_of(
        Kind.ITEMS, [Write(Kind.ITEMS, spawned.task_id, old.fence, lambda *_: None, values, uuid.uuid4())]
    )
    async with run.durable.engine.connect() as connection:
        if committed == "before":
            assert (await connection.execute(WRITE_ITEMS, late)).one().valid
        await rows.take_over()
        go_on.set()
        if committed == "before":
            await eventually(lambda: waits_for_lock(run.durable))
            await connection.commit()
        await run.wait(spawned)
        if committed == "after":
            assert (await connection.execute(WRITE_ITEMS, late)).all() == []
            await connection.execute(
                text("UPDATE durable.tasks SET fence = :fence WHERE task_id = :task_id"),
                {"fence": old.fence, "task_id": spawned.task_id},
            )
            assert not (await connection.execute(WRITE_ITEMS, late)).one().valid
            await connection.commit()
    assert await read(run.durable, spawned) == [2]
    assert await read(run.durable, spawned, after=2 if committed == "before" else 1) == [StreamRestart(0), 2]


async def waits_for_lock(durable: Durable) -> bool:
    statement = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with durable.engine.connect() as connection:
        return bool(await connection.scalar(text(statement)))


async def test_of_steps_that_take_turns_only_the_one_that_failed_is_superseded(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async def write(*values: str) -> None:
            async with ctx.stream("answer", keep_open=True) as stream:
                for value in values:
                    await stream.write(value)

        async def failing(attempt: int) -> None:
            await write(f"{attempt}a")
            await ctx.step("inner", write, "inner")
            await write(f"{attempt}b")
            if attempt == 1:
                raise Crash

        await ctx.step("first", write, "first")
        await ctx.step("failing", lambda: failing(ctx.attempt))
        await ctx.step("last", write, "last")

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert await read(run.durable, spawned) == ["first", "inner", "2a", "2b", "last"]
    assert (await read(run.durable, spawned, after=3))[0] == StreamRestart(1)


async def test_a_block_that_a_timeout_cuts_off_leaves_the_stream_to_the_next(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async def body() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1), ctx.stream("answer") as stream:
                    await stream.write("first")
                    await asyncio.sleep(10)
            async with ctx.stream("answer") as stream:
                await stream.write("second")

        await ctx.step("body", body)

    spawned = await run.spawn(work)
    assert await read(run.durable, spawned) == ["first", "second"]
    await run(work)


@pytest.mark.parametrize("failure", ["error", "error before the first item", "timeout", "cancelled"])
@pytest.mark.parametrize("keep_open", [False, True])
async def test_a_step_whose_error_was_caught_leaves_the_stream_to_the_next_also_in_replays(
    run: Runner, tally: Tally, failure: str, keep_open: bool
) -> None:
    @step(timeout=0.1 if failure == "timeout" else None)
    async def primary() -> None:
        tally.add("primary")
        async with current_context().stream("answer", keep_open=keep_open) as stream:
            if failure != "error before the first item":
                await stream.write("first")
            if failure.startswith("error"):
                raise ConnectionError
            await asyncio.sleep(10)

    async def fallback() -> None:
        async with current_context().stream("answer", keep_open=keep_open) as stream:
            await stream.write("second")

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> None:
        try:
            async with asyncio.timeout(0.1 if failure == "cancelled" else None):
                await primary()
        except (OSError, TimeoutError):
            await ctx.step("fallback", fallback)
        await ctx.sleep_for("nap", 0.01)
        if ctx.attempt == 1:
            raise Crash
        if keep_open:
            async with ctx.stream("answer") as stream:
                await stream.write("third")

    spawned = await run.spawn(work)
    result = await run.wait(spawned)
    assert result.status == "completed", result.error
    assert tally == ["primary"] * 3
    written = ["first", "second", "third"]
    assert await read(run.durable, spawned) == written[failure == "error before the first item" : 2 + keep_open]


async def test_a_block_in_the_body_whose_error_was_caught_leaves_the_stream_to_the_next_also_in_replays(
    run: Runner, tally: Tally
) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        with suppress(Crash):
            async with ctx.stream("answer", keep_open=True) as stream:
                tally.add(ctx.attempt)
                await stream.write("first")
                raise Crash
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05), ctx.stream("answer", keep_open=True) as stream:
                await ctx.step("never", asyncio.Event().wait)
        async with ctx.stream("answer", keep_open=True) as stream:
            await stream.write("second")
        async with ctx.stream("answer") as stream:
            await stream.write("third")
            if ctx.attempt == 1:
                raise Crash

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert tally == [1, 2]
    assert await read(run.durable, spawned) == ["first", "second", "third"]


async def test_a_def_task_catches_the_errors_of_steps_that_write_streams(run: Runner) -> None:
    @task
    def work(ctx: SyncTaskContext) -> None:
        def primary() -> None:
            with ctx.stream("answer") as stream:
                stream.write("first")
                raise ConnectionError

        with suppress(ConnectionError):
            ctx.step("primary", primary)
        with suppress(Crash), ctx.stream("answer", keep_open=True) as stream:
            stream.write("second")
            raise Crash
        with ctx.stream("answer") as stream:
            stream.write("third")
        ctx.sleep_for("nap", 0.01)

    spawned = await run.spawn(work)
    result = await run.wait(spawned)
    assert result.status == "completed", result.error
    assert await read(run.durable, spawned) == ["first", "second", "third"]


async def test_a_step_whose_error_fails_the_attempt_writes_anew_behind_what_came_after_it(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async def primary(attempt: int) -> None:
            async with ctx.stream("answer", keep_open=True) as stream:
                await stream.write(attempt)
                if attempt == 1:
                    raise Crash

        async def apology() -> None:
            async with ctx.stream("answer", keep_open=True) as stream:
                await stream.write("sorry")

        try:
            await ctx.step("primary", lambda: primary(ctx.attempt))
        except Crash:
            await ctx.step("apology", apology)
            raise

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert await read(run.durable, spawned) == ["sorry", 2]


async def test_a_transaction_that_is_repeated_supersedes_its_items(run: Runner) -> None:
    calls = 0

    @task
    async def work(ctx: TaskContext) -> None:
        async def body(session: AsyncSession) -> None:
            nonlocal calls
            calls += 1
            async with ctx.stream("answer") as stream:
                await stream.write(calls)
            if calls < 3:
                await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

        await ctx.transaction("body", body)

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert await read(run.durable, spawned) == [3]


async def test_a_writer_waits_for_a_slow_database_and_readers_for_no_writer(run: Runner) -> None:
    begun, wrote = asyncio.Event(), 0
    item = "x" * 1000

    @task
    async def work(ctx: TaskContext) -> None:
        nonlocal wrote
        async with ctx.stream("answer") as stream:
            await stream.write(item)
            await ctx.step("wait", begun.wait)
            for wrote in range(300):  # noqa: B007
                await stream.write(item)

    spawned = await run.spawn(work)
    assert await eventually(lambda: read(run.durable, spawned, follow=False)) == [item]
    async with run.durable.engine.begin() as connection:
        await connection.execute(text("SELECT FROM durable.streams FOR UPDATE"))
        begun.set()
        await eventually(lambda: wrote > 50)
        assert await read(run.durable, spawned, follow=False) == [item]
        assert wrote < 2 * BUFFER_BYTES / 1000
    assert await read(run.durable, spawned) == [item] * 301


async def test_positions_are_reserved_before_they_are_used(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            for number in range(3000):
                await stream.write(number)
            if ctx.attempt == 1:
                raise Crash

    spawned = await run.spawn(work)
    await run.wait(spawned)
    first = await anext(aiter(run.durable.read_stream(spawned, "answer")))
    assert isinstance(first, StreamItem)
    assert (first.value, first.position > 3000) == (0, True)
    # What a reader has seen that the server has lost with its last commits is superseded all the same.
    assert await anext(aiter(run.durable.read_stream(spawned, "answer", after=2500))) == StreamRestart(0)


async def test_hostile_items_come_back_as_they_were(run: Runner) -> None:
    hostile = ["\x00", "\u2028 \U0001f600", {"": None, "a\x00b": [1.5, -0.0, 2**62]}, "</script>", [], "x" * 40_000]

    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer \U0001f600'\"%s") as stream:
            for item in hostile:
                await stream.write(item)
            for item in ("\ud800", float("inf"), b"x", object()):
                with pytest.raises(SerializationError):
                    await stream.write(item)
            with pytest.raises(PayloadTooLarge):
                await stream.write("x" * 17 * 1024 * 1024)

    spawned = await run.spawn(work)
    assert await read(run.durable, spawned, "answer \U0001f600'\"%s") == hostile
    with pytest.raises(SerializationError):
        await read(run.durable, spawned, "answer \U0001f600'\"%s", type=int)


@pytest.mark.parametrize("items", ["{}", '"text"', "null"])
async def test_rows_that_were_changed_by_hand_are_refused_by_name(run: Runner, engine: AsyncEngine, items: str) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write(1)

    spawned = await run.spawn(work)
    await run.wait(spawned)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE durable.stream_items SET items = CAST(:items AS json)"), {"items": items})
    with pytest.raises(SerializationError, match="Items of stream 'answer'"):
        await read(run.durable, spawned)


async def test_def_tasks_write_streams(run: Runner, tally: Tally) -> None:
    @task
    def work(ctx: SyncTaskContext) -> None:
        def body() -> None:
            with ctx.stream("answer", keep_open=True) as stream:
                stream.write("step")

        ctx.step("body", body)
        with ctx.stream("body", keep_open=True) as stream:
            tally.add(ctx.attempt)
            stream.write(ctx.attempt)
        with ctx.stream("answer") as stream:
            stream.write("cut off")
            ctx.sleep_for("nap", 0.01)
            if ctx.attempt == 1:
                raise SystemExit
            stream.write("body")

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert await read(run.durable, spawned) == ["step", "cut off", "body"]
    assert await read(run.durable, spawned, "body") == [1]
    assert tally == [1, 1, 2]


async def test_what_cannot_be_written_or_read_is_refused(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> int:
        for name in ("", "$name", "a\n", "x" * 201):
            with pytest.raises(InvalidName):
                ctx.stream(name)
        stream = ctx.stream("answer")
        with pytest.raises(InvalidState, match="is not open"):
            await stream.write(1)
        async with stream:
            with pytest.raises(SerializationError):
                await stream.write(float("nan"))
            with pytest.raises(InvalidState, match="entered before"):
                await stream.__aenter__()
            with pytest.raises(InvalidState, match="open in another block"):
                async with ctx.stream("answer"):
                    pass
        with pytest.raises(InvalidState, match="is ended"):
            await stream.write(1)
        with pytest.raises(InvalidState, match="is ended"):
            async with ctx.stream("answer"):
                pass
        return 1

    assert await run(work) == 1
    with pytest.raises(TaskNotFound):
        await read(run.durable, uuid.uuid4())
    with pytest.raises(InvalidConfiguration):
        run.durable.read_stream(uuid.uuid4(), "answer", after=-1)
    with pytest.raises(InvalidName):
        run.durable.read_stream(uuid.uuid4(), "a\n")


async def test_a_hundred_readers_cost_the_database_what_one_does(run: Runner, engine: AsyncEngine) -> None:
    asked: list[int] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "octet_length(following" in statement:
            asked.append(len(parameters[0]))

    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            for number in range(20):
                await stream.write(number)
                await asyncio.sleep(0.02)

    async def looks(readers: int) -> int:
        asked.clear()
        spawned = await run.spawn(work)
        found = await asyncio.gather(*(read(run.durable, spawned) for _ in range(readers)))
        assert found == [list(range(20))] * readers
        return sum(asked)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    one, many = await looks(1), await looks(100)
    assert many < 2 * one + 10


async def test_readers_end_with_the_task_that_leaves_its_stream_open(run: Runner) -> None:
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write("a")
            raise Crash

    spawned = await run.spawn(work)
    assert await read(run.durable, spawned) == ["a"]


async def test_streams_are_deleted_with_their_task(durable: Durable, engine: AsyncEngine) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write("first")

    async with durable.worker():
        await durable.wait_for_result(await durable.spawn(work), timeout=5)
    assert await durable.cleanup_tasks(0) == 1
    async with engine.connect() as connection:
        for table in ("streams", "stream_items"):
            assert await connection.scalar(text(f"SELECT count(*) FROM durable.{table}")) == 0


def test_a_sync_context_without_a_database_records_streams() -> None:
    @task
    def work(ctx: SyncTaskContext) -> None:
        with ctx.stream("answer") as stream:
            stream.write("a")

    ctx = task_context(sync=True)
    work(ctx)
    assert ctx.recorded.streams == {"answer": ["a"]}


async def test_a_context_without_a_database_records_streams() -> None:
    ctx = task_context()
    async with ctx.stream("answer", keep_open=True) as stream:
        await stream.write(Token(text="a"))
    async with ctx.stream("answer") as stream:
        await stream.write("b")
    assert ctx.recorded.streams == {"answer": [{"text": "a"}, "b"]}
    with pytest.raises(InvalidState):
        async with ctx.stream("answer"):
            pass
