"""Threads of `def` runs that go on after their run: counted, logged, and no more than there are slots."""

import asyncio
import logging
import threading
from collections.abc import Generator
from functools import partial

import pytest

from durable_sa import Durable, InvalidState, RetryStrategy, SpawnResult, SyncTaskContext, TaskContext, TaskStatus
from durable_sa.context import thread

from ..support import eventually


@pytest.fixture
def enough(monkeypatch: pytest.MonkeyPatch) -> Generator[threading.Event]:
    """Set at the end, for the threads that wait for it. They are left behind sooner than usual."""
    monkeypatch.setattr(thread, "UNWINDING_GRACE", 0.1)
    enough = threading.Event()
    yield enough
    enough.set()


async def _runs(durable: Durable, spawned: SpawnResult[None]) -> bool:
    return (await durable.get_task_result(spawned)).status is TaskStatus.RUNNING


def _has_abandoned(durable: Durable, count: int) -> bool:
    return all(worker.abandoned_threads == count for worker in durable.workers)


@pytest.mark.slow
async def test_a_worker_with_more_of_them_than_slots_gives_its_runs_back_and_ends(
    durable: Durable, enough: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    @durable.task
    def stuck(_: SyncTaskContext) -> None:
        enough.wait()

    @durable.task
    async def long(_: TaskContext) -> None:
        await asyncio.sleep(600)

    working = asyncio.create_task(durable.run_worker(concurrency=2, signals=False))
    other = await durable.spawn(long)
    for number in range(1, 4):
        spawned = await durable.spawn(stuck)
        await eventually(partial(_runs, durable, spawned))
        await durable.cancel_task(spawned)
        await eventually(partial(_has_abandoned, durable, number))
    with pytest.raises(InvalidState, match="3 threads execute code of `def` runs that have ended, more than its 2"):
        await asyncio.wait_for(working, 20)
    assert (await durable.get_task_result(other)).status is TaskStatus.PENDING
    stacks = [record.getMessage() for record in caplog.records if "its code goes on in thread" in record.getMessage()]
    assert len(stacks) == 3
    assert "enough.wait()" in stacks[0]
    assert "(stuck)" in stacks[0]
    assert "(1 such threads, at most 2)" in stacks[0]
    assert not durable.workers


async def test_one_that_ends_later_does_not_count(durable: Durable, enough: threading.Event) -> None:
    @durable.task
    def stuck(_: SyncTaskContext) -> None:
        enough.wait()

    async with durable.worker() as worker:
        spawned = await durable.spawn(stuck)
        await eventually(partial(_runs, durable, spawned))
        await durable.cancel_task(spawned)
        await eventually(lambda: worker.abandoned_threads == 1)
        enough.set()
        await eventually(lambda: worker.abandoned_threads == 0)


@pytest.mark.parametrize(("timeout", "hard_timeout"), [(None, 0.05), (600, 0.05), (0.05, 600)])
async def test_a_hard_timeout_without_a_watcher_is_a_timeout_and_is_said_once(
    durable: Durable, caplog: pytest.LogCaptureFixture, timeout: float | None, hard_timeout: float
) -> None:
    @durable.task(timeout=timeout, hard_timeout=hard_timeout, max_attempts=2, retry_strategy=RetryStrategy.fixed(0))
    async def hangs(_: TaskContext) -> None:
        await asyncio.sleep(600)

    with caplog.at_level(logging.WARNING, "durable_sa"):
        async with durable.worker():
            result = await durable.wait_for_result(await durable.spawn(hangs), timeout=20)
    assert result.error is not None
    assert (result.error.name, result.error.message) == ("TaskTimeout", "Task 'hangs' took longer than 0.05 s")
    warned = [record for record in caplog.records if "has a hard_timeout" in record.getMessage()]
    assert len(warned) == 1
