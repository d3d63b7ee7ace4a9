"""`Durable(keep_logs=...)`: lines of `ctx.logger` are kept as the stream `$log`, and no task waits for them or fails."""

import asyncio
import logging
import threading
import uuid
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import (
    Durable,
    InvalidConfiguration,
    InvalidName,
    RetryStrategy,
    StreamItem,
    StreamRestart,
    SyncTaskContext,
    TaskContext,
    UserError,
    current_context,
    task,
)
from durable_sa.execution import kept_lines
from durable_sa.execution.writes import Kind, LinesValues, Write, statement_of
from durable_sa.models import Stream, StreamItems
from durable_sa.testing import task_context
from tests.context.support import Rows, Runner
from tests.support import eventually


@pytest.fixture
async def durable(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    retries = RetryStrategy.fixed(0)
    async with Durable(engine, default_retry_strategy=retries, keep_logs=logging.INFO) as durable:
        yield durable


async def lines(durable: Durable, task: Any, **options: Any) -> list[dict[str, Any]]:
    async with asyncio.timeout(20):
        entries = [entry async for entry in durable.read_stream(task, "$log", **options)]
    assert not any(isinstance(entry, StreamRestart) for entry in entries)
    return [entry.value for entry in entries if isinstance(entry, StreamItem)]


async def messages(durable: Durable, task: Any) -> list[str]:
    return [line["message"] for line in await lines(durable, task)]


async def test_lines_of_all_runs_are_kept_once_and_in_order(run: Runner) -> None:
    logging.getLogger("durable_sa.tasks").setLevel(logging.WARNING)

    @task
    async def work(ctx: TaskContext) -> None:
        ctx.logger.info("begins with %s", "care")
        ctx.logger.debug("too low")

        def step() -> None:
            current_context().logger.warning("in the step's thread %s", threading.current_thread() is not None)

        await ctx.step("step", step)
        ctx.logger.info("before the nap")
        await ctx.sleep_for("nap", 0.01)
        ctx.logger.info("attempt %d", ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError("once")
        try:
            raise KeyError("hunter2")
        except KeyError:
            ctx.logger.exception("caught")
        ctx.logger.error("the last")

    try:
        spawned = await run.spawn(work)
        await run.wait(spawned)
    finally:
        logging.getLogger("durable_sa.tasks").setLevel(logging.NOTSET)
    kept = await lines(run.durable, spawned)
    assert [(line["level"], line["message"], line["attempt"]) for line in kept] == [
        ("INFO", "begins with care", 1),
        ("WARNING", "in the step's thread True", 1),
        ("INFO", "before the nap", 1),
        ("INFO", "attempt 1", 1),
        ("INFO", "attempt 2", 2),
        ("ERROR", "caught (KeyError)", 2),
        ("ERROR", "the last", 2),
    ]
    for line in kept:
        assert abs(datetime.now(UTC) - datetime.fromisoformat(line["time"])) < timedelta(seconds=30)


async def test_def_tasks_and_failing_ones_keep_their_last_lines(run: Runner) -> None:
    @task
    def work(ctx: SyncTaskContext) -> None:
        ctx.logger.info("begins")
        ctx.step("step", lambda: ctx.logger.info("in the step"))
        ctx.logger.info("fails")
        raise UserError("no")

    spawned = await run.spawn(work)
    await run.wait(spawned)
    assert await messages(run.durable, spawned) == ["begins", "in the step", "fails"]


async def test_a_reader_follows_the_lines_of_a_task_that_runs(run: Runner) -> None:
    go_on = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        ctx.logger.info("one")
        await ctx.step("step", go_on.wait)
        ctx.logger.info("two")

    spawned = await run.spawn(work)
    seen: list[str] = []
    async with asyncio.timeout(20):
        async for entry in run.durable.read_stream(spawned, "$log"):
            assert isinstance(entry, StreamItem)
            seen.append(entry.value["message"])
            go_on.set()
    assert seen == ["one", "two"]


async def stored(durable: Durable, *columns: Any) -> list[Any]:
    async with durable.engine.connect() as connection:
        return list((await connection.execute(select(*columns))).all())


async def test_what_the_database_does_not_take_in_time_is_dropped_and_counted(
    run: Runner, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_lines, "BUFFER_BYTES", 1000)
    locked, logged, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        ctx.logger.info("first")
        await locked.wait()
        for number in range(100):
            ctx.logger.info("line %d", number)
        logged.set()
        await go_on.wait()
        ctx.logger.info("last")

    spawned = await run.spawn(work)
    await eventually(lambda: stored(run.durable, StreamItems.position))
    async with engine.connect() as connection:
        # Nothing of the task can be written while another transaction holds its row, and the task goes on.
        await connection.execute(
            text("SELECT 1 FROM durable.tasks WHERE task_id = :id FOR UPDATE"), {"id": spawned.task_id}
        )
        locked.set()
        await logged.wait()

    async def dropped() -> bool:
        return any(line["level"] == "WARNING" for line in await lines(run.durable, spawned, follow=False))

    await eventually(dropped)
    go_on.set()
    await run.wait(spawned)
    first, *kept, count, last = await messages(run.durable, spawned)
    assert (first, last) == ("first", "last")
    assert kept == [f"line {number}" for number in range(len(kept))]
    assert len(kept) < 30
    assert count == f"{100 - len(kept)} lines were dropped here, because the database did not take them as fast"


async def test_a_row_is_written_once_and_under_the_fence_alone(run: Runner, engine: AsyncEngine) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        begun.set()
        await go_on.wait()

    spawned = await run.spawn(work)
    await begun.wait()
    fence = (await Rows(run.durable, spawned).task()).fence

    def write(lines: str, fence: int) -> Write:
        return Write(Kind.LINES, spawned.task_id, fence, lambda *_: None, LinesValues(lines, 2), uuid.uuid4())

    first, lost = write('[{"n":1},{"n":2}]', fence), write('[{"n":5},{"n":6}]', fence - 1)
    both = [write('[{"n":3},{"n":4}]', fence), write('[{"n":5},{"n":6}]', fence)]
    async with engine.connect() as connection:
        for writes, changed in (([first], 1), ([first], 1), ([lost], 0), (both, 1), (both, 1)):
            rows = (await connection.execute(*statement_of(Kind.LINES, writes))).all()
            assert len(rows) == changed
        await connection.commit()
    entries = [entry async for entry in run.durable.read_stream(spawned, "$log", follow=False)]
    assert [(entry.position, entry.value) for entry in entries if isinstance(entry, StreamItem)] == [
        (number, {"n": number}) for number in range(1, 7)
    ]
    go_on.set()
    await run.wait(spawned)


async def test_a_run_that_lost_its_task_writes_no_lines_and_the_next_one_goes_on(run: Runner) -> None:
    begun = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        ctx.logger.info("attempt %d", ctx.attempt)
        if not begun.is_set():
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ctx.logger.info("of a run that has lost its task")

    spawned = await run.spawn(work)
    await begun.wait()
    rows = Rows(run.durable, spawned)
    await eventually(lambda: lines(run.durable, spawned, follow=False))
    await rows.take_over()
    await run.wait(spawned)
    assert await messages(run.durable, spawned) == ["attempt 1", "attempt 2"]


async def test_lines_never_fail_a_task(run: Runner) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError

    @task
    async def work(ctx: TaskContext) -> str:
        for argument in (Hostile(), "\x00", "\ud800", "<script>", "x" * 100_000):
            ctx.logger.info("%s", argument)
        ctx.logger.info("%d", "no number")
        return "done"

    logging.getLogger("durable_sa.tasks").disabled = True  # its handlers would refuse them, too
    try:
        spawned = await run.spawn(work)
        result = await run.wait(spawned)
    finally:
        logging.getLogger("durable_sa.tasks").disabled = False
    assert result.output == "done"
    kept = await messages(run.durable, spawned)
    assert kept[:4] == ["a message that cannot be formatted: RuntimeError", "\\x00", "\\ud800", "<script>"]
    assert len(kept[4]) < 9000
    assert kept[5] == "a message that cannot be formatted: TypeError"


async def test_lines_that_the_database_refuses_fail_no_task(
    run: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_lines.KeptLines, "_line", lambda *_: "no JSON")

    @task
    async def work(ctx: TaskContext) -> str:
        ctx.logger.info("a line")
        return "done"

    assert await run(work) == "done"
    assert sum("the database refuses to keep" in record.getMessage() for record in caplog.records) == 1


async def test_without_the_option_nothing_is_stored(engine: AsyncEngine) -> None:
    async with Durable(engine) as durable:

        @durable.task
        async def work(ctx: TaskContext) -> None:
            ctx.logger.error("not kept")

        async with durable.worker():
            await durable.wait_for_result(await durable.spawn(work), timeout=10)
        assert await stored(durable, Stream.name) == []


async def test_lines_are_deleted_with_their_task(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        ctx.logger.info("a line")

    await run(work)
    assert len(await stored(run.durable, StreamItems.position)) == 1
    assert await run.durable.cleanup_tasks(0) == 1
    assert await stored(run.durable, StreamItems.position) == await stored(run.durable, Stream.name) == []


async def test_the_name_is_reserved_and_the_level_is_checked(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        ctx.stream("$log")

    assert (await run.failure(work)).name == InvalidName.__name__
    with pytest.raises(InvalidConfiguration, match="keep_logs"):
        Durable(keep_logs="INFO")  # type: ignore[arg-type]
    with pytest.raises(InvalidName):
        task_context().stream("$log")
