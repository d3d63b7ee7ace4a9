"""`durable queues`: statistics, creation, pause, removal."""

from typing import Any

import pytest
from sqlalchemy import text

from durable_sa import Durable, TaskContext, task
from tests.cli.support import CommandLine


@task
async def wait(ctx: TaskContext) -> None:
    await ctx.await_event("never")


@task
async def fail(ctx: TaskContext) -> None:
    raise ValueError("no")


@pytest.mark.slow
async def test_alone_it_lists_queues_with_their_numbers(cli: CommandLine, durable: Durable) -> None:
    durable.register(wait)
    durable.register(fail)
    async with durable.worker(concurrency=2):
        failed = await durable.spawn(fail, max_attempts=1)
        await durable.wait_for_result(failed, timeout=10)
        await durable.spawn(wait)
        rows: Any = []
        while not (rows and rows[0]["scheduled"] == 1):
            rows = (await cli("queues", "--json")).json
    await durable.spawn_by_name("nobody", unchecked=True)
    (row,) = (await cli("queues", "--json")).json
    assert row["oldest_ready_seconds"] > 0
    assert row | {"oldest_ready_seconds": None} == {
        "queue_name": "default",
        "paused_at": None,
        "ready": 1,
        "scheduled": 1,
        "running": 0,
        "failed": 1,
        "oldest_ready_seconds": None,
        "limit_keys": {},
    }
    alone, listed = await cli("queues"), await cli("queues", "list")
    for result in (alone, listed):
        assert result.code == 0
        assert "default\topen\t1\t1\t0\t1\t" in result.stdout


async def test_a_queue_is_created_with_what_it_forgets(cli: CommandLine, durable: Durable) -> None:
    result = await cli("queues", "create", "mail", "--retention", "7d", "--json")
    assert result.json == {"queue_name": "mail"}
    assert (await cli("queues", "create", "mail")).code == 0
    assert await durable.list_queues() == ["default", "mail"]
    async with durable.engine.connect() as connection:
        row = (
            await connection.execute(
                text("SELECT retention, event_retention FROM durable.queues WHERE queue_name = 'mail'")
            )
        ).one()
    assert (row.retention.days, row.event_retention.days) == (7, 30)
    assert (await cli("queues", "create", "mail", "--retention", "never")).code == 0
    async with durable.engine.connect() as connection:
        row = (
            await connection.execute(
                text("SELECT retention, event_retention FROM durable.queues WHERE queue_name = 'mail'")
            )
        ).one()
    assert (row.retention, row.event_retention.days) == (None, 30)
    assert (await cli("queues", "create", "mail", "--retention", "soon")).code == 2


async def test_a_paused_queue_is_not_claimed_from_until_it_is_resumed(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def nothing(ctx: TaskContext) -> str:
        return "done"

    assert (await cli("queues", "pause", "default")).code == 0
    assert (await cli("queues", "--json")).json[0]["paused_at"] is not None
    assert "paused" in (await cli("queues")).stdout
    await durable.create_queue("open")
    async with durable.worker(queue_names=["default", "open"]):
        spawned = await durable.spawn(nothing)
        for _ in range(2):
            elsewhere = await durable.spawn(nothing, queue_name="open")
            await durable.wait_for_result(elsewhere, timeout=10)
        assert [row["task_id"] for row in (await cli("tasks", "list", "--state", "pending", "--json")).json] == [
            str(spawned.task_id)
        ]
        assert (await cli("queues", "resume", "default")).code == 0
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "done"


async def test_dropping_asks_first(cli: CommandLine, durable: Durable) -> None:
    await durable.spawn_by_name("nobody", unchecked=True)
    refused = await cli("queues", "drop", "default", stdin="n\n")
    assert refused.code == 1
    assert await durable.list_queues() == ["default"]
    agreed = await cli("queues", "drop", "default", stdin="y\n")
    assert agreed.code == 0
    assert agreed.stdout.endswith("Queue 'default' deleted.\n")
    assert await durable.list_queues() == []
    assert (await cli("tasks", "list", "--json")).json == []


async def test_options_of_a_command_are_not_passed_over_before_it(cli: CommandLine, durable: Durable) -> None:
    for option in (["--url", "postgresql://elsewhere/x"], ["--schema", "other"], ["--json"]):
        result = await cli("queues", *option, "drop", "default", "--yes")
        assert (result.code, result.stdout) == (2, "")
        assert f"durable queues drop {option[0]}" in result.stderr
    assert await durable.list_queues() == ["default"]


async def test_an_unknown_queue_is_said_to_be_unknown(cli: CommandLine) -> None:
    for command in ("pause", "resume", "drop"):
        result = await cli("queues", command, "nope", *(["--yes"] if command == "drop" else []))
        assert result.code == 1
        assert result.stderr.startswith("error: There is no queue named 'nope'.")
        assert result.stdout == ""


async def test_without_queues_it_says_how_to_make_one(cli: CommandLine, durable: Durable) -> None:
    await durable.drop_queue()
    assert "durable queues create NAME" in (await cli("queues")).stdout
    assert (await cli("queues", "--json")).json == []
