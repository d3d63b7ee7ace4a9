"""Streams: each item reaches a reader once and in order, and a step that runs once more never mixes with its past."""

import asyncio
import time
import uuid
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request

from durable_sa import (
    Durable,
    InvalidConfiguration,
    InvalidName,
    InvalidState,
    SerializationError,
    StreamItem,
    StreamRestart,
    SyncTaskContext,
    TaskContext,
    TaskNotFound,
    step,
    task,
)
from durable_sa.integrations.starlette import server_sent_events, stream_response
from durable_sa.models import StreamItems
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
        from durable_sa import current_context

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


async def test_a_run_that_was_taken_over_writes_nothing_more(run: Runner) -> None:
    begun, lost = asyncio.Event(), asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        async def body() -> None:
            async with ctx.stream("answer") as stream:
                await stream.write("old")
                if ctx.attempt == 1:
                    begun.set()
                    await lost.wait()
                await stream.write("new")

        await ctx.step("body", body)

    spawned = await run.spawn(work)
    await begun.wait()
    await eventually(lambda: read(run.durable, spawned, follow=False))
    await Rows(run.durable, spawned).take_over()
    async with run.durable.engine.begin() as connection:
        await connection.execute(text("UPDATE durable.tasks SET attempt = attempt"))
    lost.set()
    await run.wait(spawned)
    assert (await read(run.durable, spawned))[-1] == "new"


async def test_def_tasks_write_streams(run: Runner) -> None:
    @task
    def work(ctx: SyncTaskContext) -> None:
        def body() -> None:
            with ctx.stream("answer", keep_open=True) as stream:
                stream.write("step")

        ctx.step("body", body)
        with ctx.stream("answer") as stream:
            stream.write("body")

    spawned = await run.spawn(work)
    assert await read(run.durable, spawned) == ["step", "body"]


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
        await read(run.durable, uuid.uuid4(), after=-1)


async def test_readers_share_their_queries(run: Runner, engine: AsyncEngine) -> None:
    done = asyncio.Event()
    statements = 0

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        nonlocal statements
        statements += "stream_items.position > " in statement

    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write("first")
            await ctx.step("wait", done.wait)

    spawned = await run.spawn(work)
    event.listen(engine.sync_engine, "before_cursor_execute", count)
    readers = [asyncio.ensure_future(read(run.durable, spawned)) for _ in range(50)]
    began = time.monotonic()
    await asyncio.sleep(0.3)
    done.set()
    assert await asyncio.gather(*readers) == [["first"]] * 50
    took = time.monotonic() - began
    assert statements < took / 0.03 * 2 + 20
    event.remove(engine.sync_engine, "before_cursor_execute", count)


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


async def test_a_stream_is_served_as_server_sent_events(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write("a\nb")
            await stream.write({"c": 1})

    spawned = await run.spawn(work)
    events = b"".join([part async for part in server_sent_events(run.durable, spawned, "answer")])
    assert events == b'id: 1\ndata: "a\\nb"\n\nid: 2\ndata: {"c":1}\n\nevent: end\ndata:\n\n'
    for given, expected in (("1", b'id: 2\ndata: {"c":1}\n\n'), ("x", b'id: 1\ndata: "a\\nb"\n\n')):
        scope = {"type": "http", "headers": [(b"last-event-id", given.encode())]}
        response = stream_response(run.durable, spawned, "answer", Request(scope))
        assert response.media_type == "text/event-stream"
        assert await anext(aiter(response.body_iterator)) == expected


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
