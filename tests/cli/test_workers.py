"""`durable workers`, `--watch` on lists, and `--version`."""

import asyncio
import json
import uuid
from importlib.metadata import version

import pytest
from sqlalchemy import insert, text

from durable_sa import Durable, TaskContext
from durable_sa.models import WorkerRow
from tests.cli.support import CommandLine
from tests.support import eventually

AGO = text("now() - interval '1 hour'")


@pytest.mark.slow
async def test_workers_are_listed_with_their_runs(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def long(ctx: TaskContext) -> None:
        await ctx.step("sleep", asyncio.sleep, 60)

    assert (await cli("workers")).stdout == "No workers. Start one: durable worker MODULE:DURABLE\n"
    worker = await durable.start_worker(worker_id="w1", shutdown_timeout=0)
    try:
        task_id = (await durable.spawn(long)).task_id

        async def is_running() -> bool:
            rows = (await cli("workers", "--json")).json
            return any(row["running"] for row in rows if row["name"] == "w1")

        await eventually(is_running)
        (row,) = [row for row in (await cli("workers", "--json")).json if row["name"] == "w1"]
        assert (row["state"], row["running"], row["queue_names"]) == ("live", 1, ["default"])
        lines = (await cli("workers")).stdout.splitlines()
        assert lines[0] == "worker\tstate\trunning\tqueues\tstarted\tlast heartbeat\tid"
        assert any(line.startswith("w1\tlive\t1\tdefault\t") for line in lines)
        await durable.cancel_task(task_id)
    finally:
        await worker.shutdown()


async def test_silent_and_lost_workers(cli: CommandLine, durable: Durable) -> None:
    values = {"queue_names": ["default"], "claim_timeout": text("'2 min'"), "expires_at": AGO}
    async with durable.engine.begin() as connection:
        for name, more in (("silent", {}), ("lost", {"lost_at": AGO})):
            await connection.execute(insert(WorkerRow).values(worker_id=uuid.uuid4(), name=name, **values, **more))
    rows = (await cli("workers", "--json")).json
    assert {row["name"]: row["state"] for row in rows} == {"silent": "silent", "lost": "lost"}


@pytest.mark.parametrize(
    "command", [["queues"], ["queues", "list"], ["tasks", "list"], ["workers"], ["events", "list"]]
)
async def test_a_list_is_repeated_until_it_is_interrupted(
    cli: CommandLine, durable: Durable, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    rounds = 0

    async def sleep(seconds: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            raise asyncio.CancelledError  # what Ctrl-C becomes in `asyncio.run`

    monkeypatch.setattr("durable_sa.cli.invocation._pause", sleep)
    result = await cli(*command, "--watch", "--json")
    assert result.code == 0
    decoder, found, rest = json.JSONDecoder(), 0, result.stdout.strip()
    while rest:
        _, end = decoder.raw_decode(rest)
        rest = rest[end:].strip()
        found += 1
    assert found == 3


def test_the_version() -> None:
    result = CommandLine("").run("--version")
    assert (result.code, result.stdout, result.stderr) == (0, f"durable_sa {version('durable_sa')}\n", "")
