"""Probes: what a worker says of itself, also when its event loop says nothing any more."""

import asyncio
import contextlib
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

from durable_sa import Durable, InvalidConfiguration
from tests.cli.support import process
from tests.client.support import Gate
from tests.support import eventually

APP = """
import time
from pathlib import Path
from durable_sa import Durable, TaskContext

durable = Durable()

@durable.task
async def blocks(ctx: TaskContext) -> None:
    while not Path("enough").exists():
        time.sleep(0.05)
"""

Answer = tuple[int, dict[str, Any]]


async def ask(port: int, path: str, method: str = "GET") -> Answer:
    def send() -> Answer:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.loads(response.read() or "{}")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or "{}")

    return await asyncio.to_thread(send)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def test_a_worker_that_is_well_says_so(durable: Durable) -> None:
    async with durable.worker(health_port=0) as worker:
        assert worker.health_port is not None
        status, live = await ask(worker.health_port, "/live")
        assert (status, live["ok"]) == (200, True)
        assert 0 <= live["seconds_since_loop_turned"] < 2
        status, ready = await ask(worker.health_port, "/ready?from=kubelet")
        assert (status, ready["ok"]) == (200, True)
        assert 0 <= ready["seconds_since_heartbeat"] < 5
        assert await ask(worker.health_port, "/live", "HEAD") == (200, {})
        assert (await ask(worker.health_port, "/"))[0] == 404
        assert (await ask(worker.health_port, "/live", "POST"))[0] == 405
        for nonsense in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET  \r\n\r\n", b"\xff" * 10_000 + b"\r\n\r\n", b"GET /li"):
            reader, writer = await asyncio.open_connection("127.0.0.1", worker.health_port)
            writer.write(nonsense)
            writer.write_eof()
            await reader.read()
            writer.close()
        assert (await ask(worker.health_port, "/live"))[0] == 200
        port = worker.health_port
    with pytest.raises(OSError, match="refused"):
        await ask(port, "/live")


async def test_a_request_that_is_incomplete_when_the_worker_ends_is_cut_off(durable: Durable) -> None:
    async with durable.worker(health_port=0) as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.health_port)
        writer.write(b"GET /li")
        assert worker.health_port is not None
        # The server accepts connections in their order, so it has accepted the first one by now.
        await ask(worker.health_port, "/live")
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_without_a_port_nothing_is_served(durable: Durable) -> None:
    async with durable.worker() as worker:
        assert worker.health_port is None


async def test_a_port_that_is_taken_is_said_to_be(durable: Durable) -> None:
    async with durable.worker(health_port=0) as worker:
        with pytest.raises(InvalidConfiguration, match=f"health_port: {worker.health_port} cannot be had"):
            await durable.start_worker(health_port=worker.health_port)
        assert len(durable.workers) == 1
    with pytest.raises(InvalidConfiguration, match="health_port"):
        await durable.start_worker(health_port=70_000)


async def test_a_worker_that_is_being_shut_down_is_live_but_not_ready(durable: Durable) -> None:
    held, begun = asyncio.Event(), asyncio.Event()

    @durable.task
    async def waits(ctx: Any) -> None:
        begun.set()
        await ctx.step("wait", held.wait)

    worker = await durable.start_worker(health_port=0)
    await durable.spawn(waits)
    await begun.wait()
    ending = asyncio.create_task(worker.shutdown())
    await asyncio.sleep(0)
    assert worker.health_port is not None
    live, (status, body) = await ask(worker.health_port, "/live"), await ask(worker.health_port, "/ready")
    held.set()
    await ending
    assert live[0] == 200
    assert (status, body["problem"]) == (503, "the worker is being shut down")


@pytest.fixture
async def gate(database_url: URL) -> AsyncGenerator[Gate]:
    gate = Gate(database_url)
    await gate.open()
    yield gate
    await gate.shut()


async def test_without_a_database_it_is_live_but_not_ready(durable: Durable, gate: Gate) -> None:
    async with Durable(gate.url) as client:
        worker = await client.start_worker(health_port=0, shutdown_timeout=0)
        port = worker.health_port
        assert port is not None
        assert (await ask(port, "/ready"))[0] == 200
        await gate.shut()
        status, body = await ask(port, "/ready")
        assert status == 503
        assert body["problem"].startswith("the database does not answer: ")
        assert (await ask(port, "/live"))[0] == 200
        await gate.open()

        async def ready_again() -> bool:
            return (await ask(port, "/ready"))[0] == 200

        await eventually(ready_again)


@pytest.mark.slow
async def test_a_loop_that_a_task_blocks_is_reported_while_it_is_blocked(
    durable: Durable, database_url: URL, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    options = ["--health-port", str(port), "--claim-timeout", "1"]
    url = database_url.render_as_string(hide_password=False)
    with process("worker", "app:durable", *options, url=url, cwd=tmp_path) as worker:

        async def answers(path: str, wanted: int) -> Answer | None:
            try:
                status, body = await ask(port, path)
            except OSError:
                return None
            return (status, body) if status == wanted else None

        await eventually(lambda: answers("/ready", 200))
        await durable.spawn_by_name("blocks", unchecked=True)

        async def stuck() -> dict[str, Any] | None:
            answer = await answers("/live", 503)
            return answer[1] if answer and answer[1]["seconds_since_loop_turned"] > 1 else None  # it is rounded

        body: Any = await eventually(stuck)
        assert body["problem"] == "the event loop is stuck: a task blocks it"
        assert (await ask(port, "/ready"))[0] == 503
        (tmp_path / "enough").touch()
        await eventually(lambda: answers("/live", 200))
        await eventually(lambda: answers("/ready", 200))
        worker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait) == 0, worker.said
