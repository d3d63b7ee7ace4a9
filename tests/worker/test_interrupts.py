"""Signals: whose they are, and the end of a process that a task does not let end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Generator
from types import FrameType
from typing import Any

import pytest

from durable_sa import Durable, Task, TaskContext, TaskStatus
from durable_sa.errors import InvalidConfiguration

from ..support import eventually
from . import program
from .conftest import Ledger, Rows, Start


@pytest.fixture
def received() -> Generator[list[int]]:
    """The signals that the application's own handler has received."""
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = [signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)]
    yield received
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), previous, strict=True):
        signal.signal(number, handler)


async def running(durable: Durable, **options: Any) -> asyncio.Task[None]:
    task = asyncio.create_task(durable.run_worker(**options))
    await eventually(lambda: durable.workers or task.done())
    return task


async def test_a_handler_that_is_in_place_keeps_its_signals(durable: Durable, received: list[int]) -> None:
    working = await running(durable)
    os.kill(os.getpid(), signal.SIGTERM)
    await eventually(lambda: received == [signal.SIGTERM])
    await asyncio.sleep(0.05)
    assert not working.done()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert not durable.workers


async def test_a_worker_that_is_told_to_takes_signals_and_passes_them_on(durable: Durable, received: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    working = await running(durable, signals=True)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(working, 20)
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


async def test_signals_can_be_left_alone(durable: Durable) -> None:
    before = signal.getsignal(signal.SIGTERM)
    working = await running(durable, signals=False)
    assert signal.getsignal(signal.SIGTERM) is before
    working.cancel()
    await asyncio.wait([working])


async def test_other_threads_take_no_signals(durable: Durable) -> None:
    with pytest.raises(InvalidConfiguration, match="main thread"):
        await asyncio.to_thread(asyncio.run, durable.run_worker(signals=True))


@pytest.fixture
def default(number: signal.Signals) -> Generator[None]:
    """Leave the signal to its default, as a shell that starts the tests in the background may have it ignored."""
    previous = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, previous)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
async def test_sighup_waits_for_runs_and_sigquit_gives_them_back_at_once(
    durable: Durable, default: None, number: signal.Signals
) -> None:
    release = asyncio.Event()

    @durable.task
    async def waits(_: TaskContext) -> str:
        await release.wait()
        return "ended"

    working = await running(durable, shutdown_timeout=600)
    spawned = await durable.spawn(waits)

    async def runs() -> bool:
        return (await durable.get_task_result(spawned)).status is TaskStatus.RUNNING

    await eventually(runs)
    os.kill(os.getpid(), number)
    if number == signal.SIGHUP:
        (worker,) = durable.workers
        await eventually(lambda: not worker._registration.active)
        release.set()
    await asyncio.wait_for(working, 20)
    expected = TaskStatus.COMPLETED if number == signal.SIGHUP else TaskStatus.PENDING
    assert (await durable.get_task_result(spawned)).status is expected
    assert signal.getsignal(number) is signal.SIG_DFL


async def test_sighup_that_is_ignored_stays_ignored(durable: Durable) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        working = await running(durable, signals=True)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        working.cancel()
        await asyncio.wait([working])
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("code", [program.insatiable, program.hog], ids=["swallows", "blocks the loop"])
@pytest.mark.slow
async def test_a_task_that_does_not_let_the_process_end_is_named_and_the_process_is_ended(
    durable: Durable, start_process: Start, ledger: Ledger, sql: Rows, code: Task[None, None]
) -> None:
    process = await start_process("one", shutdown_timeout=0.2, ending_timeout=12)
    spawned = await durable.spawn(code)
    await eventually(lambda: ledger.entries("begin"))
    process.send(signal.SIGTERM)
    await process.exit_code(20)
    log = process.log.read_text()
    assert f"{spawned.task_id} ({code.name})" in log


APPLICATION = """
import asyncio, os
from contextlib import asynccontextmanager
from durable_sa import Durable

durable = Durable()

@asynccontextmanager
async def lifespan(app):
    working = asyncio.create_task(durable.run_worker())
    while not durable.workers:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    yield
    working.cancel()
    await asyncio.wait([working])
    await durable.close()
    print("lifespan ended", flush=True)

async def app(scope, receive, send):
    assert scope["type"] == "lifespan"
    await receive()
    async with lifespan(app):
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})

import uvicorn
uvicorn.run(app, port=int(os.environ["PORT"]), log_level="warning")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_uvicorn_stops_with_a_worker_in_its_background(
    durable: Durable, sql: Rows, number: signal.Signals
) -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = durable.engine.url.render_as_string(hide_password=False)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", APPLICATION),
        env={**os.environ, "DURABLE_DATABASE_URL": url, "PORT": str(port)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            assert await process.stdout.readline() == b"lifespan ended\n"
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert await sql("SELECT worker_id FROM durable.workers") == []
