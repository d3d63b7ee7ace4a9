"""Streams as server-sent events."""

import asyncio
import uuid

import pytest

from durable_sa import TaskContext, TaskNotFound, task
from tests.context.support import Runner

requests = pytest.importorskip("starlette.requests", reason="starlette is not installed")
sse = pytest.importorskip("durable_sa.integrations.starlette")


async def test_a_stream_is_served_as_server_sent_events(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            await stream.write("a\nb")
            await stream.write({"c": 1})

    spawned = await run.spawn(work)
    events = b"".join([part async for part in sse.server_sent_events(run.durable, spawned, "answer")])
    assert events == b'id: 1\ndata: "a\\nb"\n\nid: 2\ndata: {"c":1}\n\nevent: end\ndata:\n\n'
    for given, expected in (("1", b'id: 2\ndata: {"c":1}\n\n'), ("x", b'id: 1\ndata: "a\\nb"\n\n')):
        scope = {"type": "http", "headers": [(b"last-event-id", given.encode())]}
        response = await sse.stream_response(run.durable, spawned, "answer", requests.Request(scope))
        assert response.media_type == "text/event-stream"
        body = response.body_iterator
        assert await anext(aiter(body)) == expected
        await body.aclose()
    with pytest.raises(TaskNotFound):
        await sse.stream_response(
            run.durable, uuid.uuid4(), "answer", requests.Request({"type": "http", "headers": []})
        )


async def test_a_quiet_stream_is_pinged_until_its_reader_leaves(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable_sa.integrations.starlette.PING_INTERVAL", 0.02)

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.receive("never")

    spawned = await run.spawn(work)
    events = sse.server_sent_events(run.durable, spawned, "answer")
    assert [await anext(events) for _ in range(3)] == [b": ping\n\n"] * 3
    await events.aclose()
    assert not [task for task in asyncio.all_tasks() if "_next" in repr(task)]
