"""A call that holds the event loop is logged with its task and line."""

import asyncio
import logging
import subprocess
import time
from typing import Any

import pytest

from durable_sa import Durable, SyncTaskContext, TaskContext
from durable_sa.worker import blocked

from ..support import eventually


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(blocked, "BLOCKED_AFTER", 0.2)
    monkeypatch.setattr(blocked, "SIGN_INTERVAL", 0.02)
    blocked._silent_until.clear()
    caplog.set_level(logging.WARNING, "durable_sa")
    return lambda: [record for record in caplog.records if "held the event loop" in record.getMessage()]


@pytest.mark.slow
async def test_a_task_that_blocks_is_logged_with_its_line_once(durable: Durable, lines: Any) -> None:
    @durable.task
    async def blocking(ctx: TaskContext) -> None:
        await ctx.step("nap", nap)

    async def nap() -> None:
        time.sleep(0.5)  # noqa: ASYNC251 - this very line

    @durable.task
    def in_a_thread(ctx: SyncTaskContext) -> None:
        time.sleep(0.5)

    async with durable.worker():
        for function in (blocking, blocking, in_a_thread):
            spawned = await durable.spawn(function)
            await durable.wait_for_result(spawned, timeout=10)
            if function is blocking and lines():
                first = lines()[0]
    (record,) = lines()
    assert record is first
    line = nap.__code__.co_firstlineno + 1
    message = record.getMessage()
    assert message.startswith(f"task {record.task_id} (blocking) has held the event loop for more than 0.2 s, at ")
    assert f"at {__file__}:{line} in {nap.__qualname__}()" in message
    assert record.task_name == "blocking"


async def test_a_line_of_a_library_is_named_beside_the_applications(durable: Durable, lines: Any) -> None:
    @durable.task
    async def blocking(ctx: TaskContext) -> None:
        subprocess.run(["sleep", "0.5"], check=True)  # noqa: ASYNC221

    async with durable.worker():
        await durable.wait_for_result(await durable.spawn(blocking), timeout=10)
    (record,) = lines()
    assert f"at {__file__}:" in record.getMessage()
    assert "subprocess.py:" in record.getMessage()


@pytest.mark.slow
async def test_code_beside_tasks_is_named_as_such(durable: Durable, lines: Any) -> None:
    async with durable.worker(), durable.worker():
        await asyncio.sleep(0.1)
        time.sleep(0.5)  # noqa: ASYNC251
        await eventually(lines)
    (record,) = lines()
    assert record.getMessage().startswith("code outside of tasks has held the event loop")
