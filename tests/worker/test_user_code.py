"""Whatever a task does, its worker goes on, and the tasks beside it do not notice."""

import asyncio
import ctypes
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from durable_sa import Durable, RetryStrategy, SyncTaskContext, TaskContext, TaskStatus
from durable_sa.signals import LeaseLost, Suspended, TaskCancelled

from ..support import eventually
from . import program
from .conftest import Rows, Start
from .program import Work


class Odd(Exception):
    """It cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


def _recurse() -> int:
    return _recurse() + 1


def _raise(error: Any) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


CHAIN = ValueError("first")
CHAIN.__cause__ = CHAIN

BEHAVIOURS: dict[str, Callable[[], Any]] = {
    "an exception": _raise(ValueError("x")),
    "a class": _raise(ValueError),
    "NUL in the text": _raise(ValueError("a\x00b")),
    "a lone surrogate in the text": _raise(ValueError("\ud800")),
    "a text of megabytes": _raise(ValueError("x" * 5_000_000)),
    "no text at all": _raise(Odd()),
    "a chain that is a ring": _raise(CHAIN),
    "a group": _raise(ExceptionGroup("many", [ValueError(1), TypeError(2)])),
    "a base group": _raise(BaseExceptionGroup("many", [SystemExit(1), KeyboardInterrupt()])),
    "SystemExit": _raise(SystemExit(3)),
    "sys.exit": sys.exit,
    "KeyboardInterrupt": _raise(KeyboardInterrupt()),
    "GeneratorExit": _raise(GeneratorExit()),
    "StopIteration": _raise(StopIteration(1)),
    "StopAsyncIteration": _raise(StopAsyncIteration()),
    "CancelledError": _raise(asyncio.CancelledError()),
    "MemoryError": _raise(MemoryError()),
    "RecursionError": _recurse,
    "a base exception of its own": _raise(type("Own", (BaseException,), {})()),
    "an exception named with an umlaut": _raise(type("Fehlermöglichkeit\N{SNOWMAN}", (Exception,), {})()),
    "TimeoutError": _raise(TimeoutError()),
    "OSError": _raise(OSError(5, "disk")),
    "a signal of the engine": _raise(Suspended()),
    "another signal of the engine": _raise(LeaseLost()),
    "a third signal of the engine": _raise(TaskCancelled()),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["body", "step", "thread", "synchronous", "branch", "finally"])
async def test_nothing_that_a_task_raises_ends_its_worker(durable: Durable, where: str, sql: Rows) -> None:
    def act(name: str) -> None:
        BEHAVIOURS[name]()

    async def act_later(name: str) -> None:
        await asyncio.sleep(0)
        BEHAVIOURS[name]()

    @durable.task(max_attempts=1)
    async def body(ctx: TaskContext, name: str) -> None:
        await act_later(name)

    @durable.task(max_attempts=1)
    async def step(ctx: TaskContext, name: str) -> None:
        await ctx.step("act", act_later, name)

    @durable.task(max_attempts=1)
    async def thread(ctx: TaskContext, name: str) -> None:
        await ctx.step("act", act, name)

    @durable.task(max_attempts=1)
    def synchronous(ctx: SyncTaskContext, name: str) -> None:
        ctx.step("act", act, name)

    @durable.task(max_attempts=1)
    async def branch(ctx: TaskContext, name: str) -> None:
        await asyncio.gather(act_later(name), asyncio.sleep(0.01))

    @durable.task(max_attempts=1, name="finally")
    async def finally_(ctx: TaskContext, name: str) -> None:
        try:
            await asyncio.sleep(0)
        finally:
            act(name)

    @durable.task
    async def healthy(ctx: TaskContext) -> int:
        return await ctx.step("one", _one)

    async with durable.worker(concurrency=10) as worker:
        spawned = {name: await durable.spawn(durable.tasks[where], name) for name in BEHAVIOURS}
        for name, spawn in spawned.items():
            result = await durable.wait_for_result(spawn, timeout=15)
            assert result.status is TaskStatus.FAILED, name
            assert result.error is not None
            assert result.error.name, name
        results = [await durable.wait_for_result(await durable.spawn(healthy), timeout=5) for _ in range(3)]
        assert [result.output for result in results] == [1, 1, 1]
        assert not [service for service in worker._background.services.values() if service.done()]
    assert await sql("SELECT count(*) FROM durable.runs WHERE state = 'failed'") == [(len(BEHAVIOURS),)]


async def _one() -> int:
    return 1


async def test_outputs_and_results_that_cannot_be_stored_fail_their_task_alone(durable: Durable) -> None:
    values: dict[str, Any] = {
        "an object": object(),
        "a function": _one,
        "NaN": float("nan"),
        "a surrogate": "\ud800",
        "a set of objects": {object()},
        "itself": [],
    }
    values["itself"].append(values["itself"])

    async def give(name: str) -> Any:
        return values[name]

    @durable.task(max_attempts=3)
    async def output(ctx: TaskContext, name: str) -> Any:
        return values[name]

    @durable.task(max_attempts=3)
    async def result(ctx: TaskContext, name: str) -> Any:
        await ctx.step("give", give, name)

    async with durable.worker(concurrency=5):
        spawned = [
            await durable.spawn(task, name) for task in (output, result) for name in values if name != "a coroutine"
        ]
        for spawn in spawned:
            outcome = await durable.wait_for_result(spawn, timeout=10)
            assert outcome.status is TaskStatus.FAILED
            assert outcome.error is not None
            assert outcome.error.name == "SerializationError"


async def test_fast_tasks_are_not_held_behind_slow_ones(durable: Durable, sql: Rows) -> None:
    release = asyncio.Event()

    @durable.task
    async def slow(ctx: TaskContext) -> None:
        await release.wait()

    @durable.task
    async def fast(ctx: TaskContext) -> None:
        return None

    await durable.spawn_many([(slow, None)] * 3)
    spawned = await durable.spawn_many([(fast, None)] * 50)
    async with durable.worker(concurrency=4):
        for spawn in spawned:
            await durable.wait_for_result(spawn, timeout=5)
        assert await sql("SELECT count(*) FROM durable.tasks WHERE state = 'running'") == [(3,)]
        release.set()


@pytest.mark.slow
async def test_code_that_blocks_the_event_loop_for_a_while_costs_only_time(durable: Durable, sql: Rows) -> None:
    @durable.task
    async def blocking(ctx: TaskContext) -> None:
        time.sleep(0.7)  # noqa: ASYNC251 - what this is about

    @durable.task
    async def other(ctx: TaskContext) -> int:
        return 1

    async with durable.worker(concurrency=5, claim_timeout=5):
        spawned = [await durable.spawn(blocking), await durable.spawn(other), await durable.spawn(blocking)]
        for spawn in spawned:
            await durable.wait_for_result(spawn, timeout=10)
    assert await sql("SELECT DISTINCT attempt, failures, lease_losses FROM durable.tasks") == [(1, 0, 0)]


@pytest.mark.slow
async def test_threads_and_tasks_that_outlive_their_run_harm_nobody(durable: Durable, sql: Rows) -> None:
    failures: list[BaseException] = []
    background_tasks: list[asyncio.Task[None]] = []
    late = asyncio.Event()

    @durable.task
    async def leaky(ctx: TaskContext) -> int:
        async def background() -> None:
            try:
                await late.wait()
                await ctx.step("late", _one)
            except BaseException as error:
                failures.append(error)
                raise

        background_tasks.append(asyncio.create_task(background()))
        return 1

    @durable.task
    def leaky_thread(ctx: SyncTaskContext) -> int:
        def background() -> None:
            time.sleep(0.3)
            try:
                ctx.step("late", lambda: 1)
            except BaseException as error:  # noqa: BLE001 - looked at below
                failures.append(error)

        threading.Thread(target=background, daemon=True).start()
        return 1

    async with durable.worker():
        for task in (leaky, leaky_thread):
            assert (await durable.wait_for_result(await durable.spawn(task), timeout=5)).output == 1
        late.set()
        await eventually(lambda: len(failures) == 2)
    assert await sql("SELECT name FROM durable.checkpoints") == []


@pytest.mark.slow
async def test_a_task_may_take_all_file_descriptors_for_a_while(durable: Durable) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    @durable.task(max_attempts=1)
    async def greedy(ctx: TaskContext) -> int:
        taken: list[int] = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            await asyncio.sleep(0.5)
        finally:
            for descriptor in taken:
                os.close(descriptor)
        return len(taken)

    @durable.task
    async def other(ctx: TaskContext) -> int:
        await asyncio.sleep(0.1)
        return await ctx.step("one", _one)

    async with durable.worker(concurrency=5):
        assert (await durable.wait_for_result(await durable.spawn(other), timeout=5)).output == 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            spawned = [await durable.spawn(greedy), await durable.spawn(other)]
            results = [await durable.wait_for_result(spawn, timeout=10) for spawn in spawned]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (results[0].output or 0) > 100
    assert results[1].output == 1


async def test_an_exception_thrown_into_a_thread_fails_its_task_alone(durable: Durable) -> None:
    started = threading.Event()
    identity: list[int] = []

    @durable.task(max_attempts=1)
    def busy(ctx: SyncTaskContext) -> None:
        identity.append(threading.get_ident())
        started.set()
        while True:
            time.sleep(0.001)

    @durable.task
    async def healthy(ctx: TaskContext) -> int:
        return 1

    async with durable.worker():
        spawned = await durable.spawn(busy)
        await eventually(started.is_set)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity[0]), ctypes.py_object(SystemExit))
        assert (await durable.wait_for_result(spawned, timeout=5)).status is TaskStatus.FAILED
        assert (await durable.wait_for_result(await durable.spawn(healthy), timeout=5)).output == 1


@pytest.mark.parametrize("wrapping", [True, False])
async def test_a_task_factory_that_is_set_while_the_worker_runs_changes_nothing(
    durable: Durable, wrapping: bool
) -> None:
    """Neither one that hands over to the one before, nor one that takes its place."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()

    async def one() -> int:
        return 1

    @durable.task(max_attempts=1)
    async def work(ctx: TaskContext) -> list[int]:
        return list(await asyncio.gather(ctx.step("left", one), ctx.step("right", one)))

    async with durable.worker():
        previous = loop.get_task_factory()
        assert previous is not None

        def late(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
            if wrapping:
                return previous(loop, coro, **kwargs)
            return asyncio.Task(coro, loop=loop, **kwargs)

        for _ in range(3):
            loop.set_task_factory(late)
            result = await durable.wait_for_result(await durable.spawn(work), timeout=10)
            assert result.output == [1, 1]
    loop.set_task_factory(before)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
@pytest.mark.slow
async def test_what_there_is_no_memory_for_fails_alone(durable: Durable, start_process: Start, sql: Rows) -> None:
    process = await start_process("one", concurrency=4, under=("prlimit", f"--as={4 * 2**30}"))
    others = await durable.spawn_many([(program.work, Work(steps=2, seconds=0.05))] * 8)
    hoarding = await durable.spawn(program.hoard, 16 * 2**30, retry_strategy=RetryStrategy.fixed(0))
    for spawned in (*others, hoarding):
        assert (await durable.wait_for_result(spawned, timeout=30)).status is TaskStatus.COMPLETED
    assert process.process.poll() is None
    failures = await sql("SELECT task_name, failures, lease_losses FROM durable.tasks WHERE failures > 0")
    assert failures == [("hoard", 1, 0)]
    assert await sql("SELECT error ->> 'name' FROM durable.runs WHERE state = 'failed'") == [("MemoryError",)]
