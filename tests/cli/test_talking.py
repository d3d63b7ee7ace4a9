"""`durable tasks send` and `durable tasks values`; what waits for a message in `show` and `doctor`."""

import logging
import uuid
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, TaskContext
from tests.cli.support import CommandLine
from tests.support import eventually


async def test_a_message_is_sent_by_id_or_key(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def collect(ctx: TaskContext) -> list[Any]:
        return [await ctx.receive("note") for _ in range(3)]

    async with durable.worker():
        spawned = await durable.spawn(collect, idempotency_key="order-7")
        first = await cli("tasks", "send", spawned.task_id, "note", '{"by": "ann"}', "--json")
        assert first.json == {"task_id": str(spawned.task_id), "topic": "note"}
        for _ in range(2):
            second = await cli("tasks", "send", "order-7", "note", "-q", "default", "--key", "once")
            assert second.stdout == f"Message sent to task {spawned.task_id}.\n"
        shown = await cli("tasks", "show", spawned.task_id)
        assert await cli("tasks", "send", spawned.task_id, "note", "@-", stdin="[1]")
        assert (await durable.wait_for_result(spawned, timeout=10)).output == [{"by": "ann"}, None, [1]]
    assert "note" in shown.stdout
    ended = await cli("tasks", "send", spawned.task_id, "note")
    assert (ended.code, "is completed" in ended.stderr) == (1, True)
    unknown = await cli("tasks", "send", uuid.uuid4(), "note")
    assert unknown.code == 1
    bad = await cli("tasks", "send", spawned.task_id, "$note")
    assert bad.code == 2
    assert bad.stderr.startswith("error: The topic name '$note' is not valid")


async def test_values_are_listed_and_shown_only_when_asked_for(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None:
        await ctx.publish("card", {"number": "hunter2"})

    async with durable.worker():
        spawned = await durable.spawn(work)
        await durable.wait_for_result(spawned, timeout=10)
    plain = await cli("tasks", "values", spawned.task_id)
    assert "card" in plain.stdout
    assert "hunter2" not in plain.stdout + (await cli("tasks", "values", spawned.task_id, "--json")).stdout
    assert "hunter2" in (await cli("tasks", "values", spawned.task_id, "--payloads")).stdout
    [value] = (await cli("tasks", "values", spawned.task_id, "--payloads", "--json")).json
    assert (value["name"], value["value"]) == ("card", {"number": "hunter2"})
    none = await durable.spawn(work, delay=3600)
    assert (await cli("tasks", "values", none.task_id)).stdout == "The task has published no values.\n"


async def test_doctor_finds_messages_and_values_of_no_task_and_missed_ones(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def wait(ctx: TaskContext) -> Any:
        race = await ctx.race("race", a=ctx.receive("a"), b=ctx.receive("b"))
        return race.value

    async with durable.worker():
        spawned = await durable.spawn(wait)

        async def asleep() -> bool:
            result = await durable.get_task_result(spawned)
            return result is not None and result.status == "sleeping"

        await eventually(asleep)
    assert "\nmessage\ta\t" in (await cli("tasks", "show", spawned.task_id)).stdout
    missing = uuid.uuid4()
    async with durable.engine.begin() as connection:
        for task_id in (spawned.task_id, missing):
            await connection.execute(
                text(
                    "INSERT INTO durable.messages (task_id, message_id, topic, sent_at)"
                    " VALUES (:task_id, gen_random_uuid(), 'a', now() - interval '1 hour')"
                ),
                {"task_id": task_id},
            )
        await connection.execute(
            text("INSERT INTO durable.task_values (task_id, name) VALUES (:task_id, 'a')"), {"task_id": missing}
        )
        await connection.execute(
            text(
                "INSERT INTO durable.streams (task_id, name, step_key, try_id)"
                " VALUES (:task_id, 'a', gen_random_uuid(), gen_random_uuid())"
            ),
            {"task_id": missing},
        )
        await connection.execute(
            text(
                "INSERT INTO durable.stream_items (task_id, name, position, step_key, try_id, items)"
                " VALUES (:task_id, 'b', 1, gen_random_uuid(), gen_random_uuid(), '[1]')"
            ),
            {"task_id": spawned.task_id},
        )
        await connection.execute(text("UPDATE durable.waits SET created_at = now() - interval '1 hour'"))
    report = (await cli("doctor", "--grace", "1s", "--json")).stdout
    assert f"message to a task that does not exist: {missing}" in report
    assert f"value of a task that does not exist: {missing}" in report
    assert f"stream of a task that does not exist: {missing}" in report
    assert f"items of a stream that does not exist: {spawned.task_id}" in report
    assert f"task {spawned.task_id} waits for race message 'a', but a message was sent" in report
    # A worker repairs the wait.
    async with durable.worker() as worker:
        worker.maintenance.look_at_everything()
        assert (await durable.wait_for_result(spawned, timeout=10)).output is None


async def test_a_stream_is_printed_and_followed(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None:
        async with ctx.stream("answer") as stream:
            for word in ("a", "b"):
                await stream.write(word)

    async with durable.worker():
        spawned = await durable.spawn(work)
        followed = await cli("tasks", "stream", spawned.task_id, "answer", "--follow", "--payloads")
    assert followed.stdout == '1  "a"\n2  "b"\n'
    assert (await cli("tasks", "stream", spawned.task_id, "answer")).stdout == "1\n2\n"
    printed = await cli("tasks", "stream", spawned.task_id, "answer", "--after", 1, "--payloads", "--json")
    assert printed.json == {"position": 2, "value": "b"}
    assert (await cli("tasks", "stream", spawned.task_id, "other")).stdout == ""


async def test_lines_of_a_task_are_printed(cli: CommandLine, engine: AsyncEngine) -> None:
    async with Durable(engine, keep_logs=logging.INFO) as durable:

        @durable.task
        async def work(ctx: TaskContext) -> None:
            ctx.logger.warning("low on %s", "paper\x1b[31m")

        async with durable.worker():
            spawned = await durable.spawn(work, idempotency_key="order-7")
            await durable.wait_for_result(spawned, timeout=10)
    plain = await cli("tasks", "logs", "order-7")
    assert " WARNING  low on paper" in plain.stdout
    assert "\x1b" not in plain.stdout
    line = (await cli("tasks", "logs", spawned.task_id, "--follow", "--json")).json
    assert (line["position"], line["level"], line["attempt"]) == (1, "WARNING", 1)
