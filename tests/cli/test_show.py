"""`durable tasks show`: what an operator with a stuck or failed task looks for."""

import asyncio
import re
import uuid
from pathlib import Path

import pytest
from pydantic import BaseModel
from sqlalchemy import select, update

from durable_sa import Durable, RetryStrategy, TaskContext, TaskRow, step
from tests.cli.support import CommandLine

SECRET = "hunter2"


class Payment(BaseModel):
    amount: int


@step(max_attempts=3, retry_strategy=RetryStrategy.fixed(0.01))
async def flaky(amount: str) -> None:
    raise ConnectionError("the bank is away")


async def check(amount: str) -> Payment:
    return Payment.model_validate({"amount": amount})


async def child(ctx: TaskContext, amount: str) -> None:
    try:
        await ctx.step("charge", flaky, amount)
    except ConnectionError:
        await ctx.step("check", check, amount)


async def many_steps(ctx: TaskContext) -> None:
    async def nothing(number: int) -> None: ...

    for number in range(100):
        await ctx.step(f"fetch-{number}", nothing, number)
        await ctx.step("store", nothing, number)


def register(durable: Durable) -> None:
    retried = RetryStrategy.fixed(0.01)
    registered = durable.task("child-task", max_attempts=2, retry_strategy=retried)(child)

    @durable.task("parent-task", max_attempts=1)
    async def parent(ctx: TaskContext, amount: str) -> None:
        await ctx.join(await ctx.spawn("pay", registered, amount))


async def failed_child(durable: Durable) -> tuple[uuid.UUID, uuid.UUID]:
    """A task that has failed in two attempts, each after three tries of a step, and its parent."""
    register(durable)
    spawned = await durable.spawn_by_name("parent-task", SECRET, idempotency_key="order-17")
    await durable.wait_for_result(spawned, timeout=20)
    async with durable.engine.connect() as connection:
        task_id = await connection.scalar(select(TaskRow.task_id).where(TaskRow.parent_task_id == spawned.task_id))
    assert task_id is not None
    return task_id, spawned.task_id


@pytest.mark.slow
async def test_attempts_tries_and_errors_without_values(cli: CommandLine, durable: Durable) -> None:
    async with durable.worker(worker_id="worker-7"):
        task_id, parent_id = await failed_child(durable)
        result = await cli("tasks", "show", task_id)
        shown = result.stdout
        whole = (await cli("tasks", "show", task_id, "--payloads")).stdout
        data = (await cli("tasks", "show", task_id, "--json")).json
    assert result.code == 0
    assert SECRET not in shown
    assert SECRET not in str(data)
    lines = shown.splitlines()
    assert f"parent\t{parent_id} (parent-task, failed)" in lines
    tries = [line.split("\t") for line in lines if "try of step" in line]
    assert [line[2:] for line in tries] == [["try of step 'charge' failed", "ConnectionError: the bank is away"]] * 6
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z", line[0]) for line in tries)
    assert all(line[1].endswith(" s") for line in tries)
    starts = [line.split("\t")[2:] for line in lines if " starts\t" in line]
    assert starts == [["attempt 1 starts", "by worker worker-7"], ["attempt 2 starts", "by worker worker-7"]]
    error = "ValidationError: 1 validation error for Payment"
    assert sum(error in line for line in lines if line.split("\t")[2:3] == ["attempt 1 failed"]) == 1
    # The traceback has its lines, and no value.
    trace = lines[lines.index("traceback of the last failure") :]
    assert trace[1] == "Traceback (most recent call last):"
    assert any("in check" in line for line in trace)
    assert '    return Payment.model_validate({"amount": amount})' in trace
    assert f"input_value='{SECRET}'" in whole
    assert whole.count(f"""\ttry of step 'charge'("{SECRET}") failed\t""") == 6
    assert whole.count(f""" in step 'check'("{SECRET}")\n""") == 2
    assert "input_value=..." in shown
    assert [entry["attempt"] for entry in data["history"]] == sorted(entry["attempt"] for entry in data["history"])
    assert data["task"]["parent_task_id"] == str(parent_id)


@pytest.mark.slow
async def test_what_failed_and_the_last_attempt(cli: CommandLine, durable: Durable) -> None:
    async with durable.worker():
        task_id, parent_id = await failed_child(durable)
    failures = (await cli("tasks", "show", task_id, "--failed")).stdout
    assert "attempt 1 starts" not in failures
    assert failures.count("try of step 'charge' failed") == 6
    assert "traceback of attempt 1" in failures
    assert "traceback of attempt 2" in failures
    last = (await cli("tasks", "show", task_id, "--last")).stdout
    assert "attempt 1 failed" not in last
    assert last.count("try of step 'charge' failed") == 3
    # Without a task, they choose one.
    assert f"task\t{task_id}" in (await cli("tasks", "show", "--last")).stdout
    assert f"task\t{parent_id}" in (await cli("tasks", "show", "--failed")).stdout
    assert (await cli("tasks", "show")).code == 2
    assert "key\torder-17\n" in (await cli("tasks", "show", "order-17")).stdout


async def test_workers_that_were_lost_with_a_task(cli: CommandLine, durable: Durable) -> None:
    spawned = await durable.spawn_by_name("lethal", unchecked=True)
    assert "lost workers" not in (await cli("tasks", "show", spawned.task_id)).stdout
    for losses, text in ((1, "1 in a row"), (3, "3 in a row, so it runs alone")):
        async with durable.engine.begin() as connection:
            await connection.execute(update(TaskRow).values(lease_losses=losses))
        assert f"lost workers\t{text}\n" in (await cli("tasks", "show", spawned.task_id)).stdout


async def test_without_tasks_there_is_no_last_one(cli: CommandLine, durable: Durable) -> None:
    assert (await cli("tasks", "show", "--last")).stderr == "error: There are no tasks.\n"
    assert (await cli("tasks", "show", "--failed")).stderr == "error: No task has failed.\n"


@pytest.mark.slow
async def test_a_task_of_200_steps_fits_a_screen(cli: CommandLine, durable: Durable, tmp_path: Path) -> None:
    task = durable.task("many", max_attempts=1)(many_steps)
    async with durable.worker():
        spawned = await durable.spawn(task)
        await durable.wait_for_result(spawned, timeout=30)
    text = (await cli("tasks", "show", spawned.task_id)).stdout
    assert "step 'fetch-#', 100 times" in text
    assert "step 'store', 100 times" in text
    assert len(text.splitlines()) < 24
    for width in (80, 200):
        assert len((await cli.at(width, "tasks", "show", spawned.task_id)).stdout.splitlines()) < 24
    every = (await cli("tasks", "show", spawned.task_id, "--all")).stdout
    assert every.count("step 'store'") == 100
    # Longer than the terminal, it goes through the pager.
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat >{tmp_path / 'paged'}\n")
    pager.chmod(0o755)
    paged = await cli.at(200, "tasks", "show", spawned.task_id, "--all", PAGER=str(pager))
    assert paged.stdout == ""
    assert (tmp_path / "paged").read_text().count("step 'store'") == 100
    unpaged = await cli.at(200, "tasks", "show", spawned.task_id, "--all", "--no-pager", PAGER=str(pager))
    assert unpaged.stdout.count("step 'store'") == 100


async def test_parallel_steps_have_their_own_durations(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def both(ctx: TaskContext) -> None:
        await asyncio.gather(ctx.step("long", asyncio.sleep, 0.3), ctx.step("short", asyncio.sleep, 0.0))

    async with durable.worker():
        spawned = await durable.spawn(both)
        await durable.wait_for_result(spawned, timeout=10)
    lines = (await cli("tasks", "show", spawned.task_id)).stdout.splitlines()
    took = {line.split("\t")[2]: line.split("\t")[1] for line in lines if line.count("\t") == 3}
    assert (took["step 'long'"], took["step 'short'"], took["spawned"]) == ("0.3 s", "0.0 s", "")
