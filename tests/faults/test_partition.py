"""A worker on a network of its own that is cut off: it writes nothing more, and others take over."""

import contextlib
import os
import subprocess
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable
from durable_sa.embedded import EmbeddedServer, temporary_server

from ..support import eventually
from ..worker import program
from ..worker.conftest import Ledger
from ..worker.processes import WorkerProcess
from ..worker.program import Work

HOST, GUEST, PREFIX = "10.213.87.1", "10.213.87.2", 30


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Generator[tuple[str, str]]:
    """A network namespace, and the host's end of the cable to it."""
    namespace, outside, inside = (f"{name}{os.getpid() % 100000}" for name in ("dur", "duro", "duri"))
    try:
        ip("netns", "add", namespace)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    try:
        ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", namespace)
        ip("addr", "add", f"{HOST}/{PREFIX}", "dev", outside)
        ip("link", "set", outside, "up")
        ip("-n", namespace, "addr", "add", f"{GUEST}/{PREFIX}", "dev", inside)
        ip("-n", namespace, "link", "set", inside, "up")
        yield namespace, outside
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual cables here: {error.stderr}")
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", outside)
        ip("netns", "del", namespace)


@pytest.fixture
def server(network: tuple[str, str]) -> Generator[EmbeddedServer]:
    with temporary_server(settings={"fsync": "off"}, listen=HOST) as embedded:
        with (embedded.data_dir / "pg_hba.conf").open("a") as file:
            file.write(f"host all all {HOST}/{PREFIX} scram-sha-256\n")
        embedded.restart()
        yield embedded


@pytest.fixture
async def durable(server: EmbeddedServer) -> AsyncGenerator[Durable]:
    engine = create_async_engine(server.url())
    async with Durable(engine, tasks=program.TASKS) as durable:
        await durable.migrate()
        yield durable
    await engine.dispose()


async def test_a_worker_that_is_cut_off_is_taken_over_and_writes_nothing_when_it_is_back(
    durable: Durable, server: EmbeddedServer, network: tuple[str, str], tmp_path: Path
) -> None:
    namespace, cable = network
    ledger = Ledger(tmp_path / "ledger")
    under = ("ip", "netns", "exec", namespace)
    cut_off = WorkerProcess(server.url(), ledger.path, "cut-off", claim_timeout=1.5, under=under)
    try:
        spawned = await durable.spawn(program.work, Work(steps=8, seconds=0.4))
        await eventually(lambda: ledger.entries("end", step=1))
        ip("link", "set", cable, "down")
        other = WorkerProcess(server.url(), ledger.path, "other", claim_timeout=1.5)
        try:
            result = await durable.wait_for_result(spawned, timeout=30)
        finally:
            other.end()
            ip("link", "set", cable, "up")
        assert result.error is None
        assert set(result.output or []) == {cut_off.process.pid, other.process.pid}
        # It is back, and a worker like any other.
        again = await durable.spawn(program.count)
        assert (await durable.wait_for_result(again, timeout=30)).output == cut_off.process.pid
        assert "has lost its lease" in cut_off.log.read_text()
    finally:
        cut_off.end()
    steps = [entry["step"] for entry in ledger.entries("begin")]
    # What was being done when the cable was cut was done twice; nothing else was.
    assert sorted(set(steps)) == list(range(8))
    assert len(steps) <= 9
    first, second = ([entry["at"] for entry in ledger.entries("begin", attempt=attempt)] for attempt in (1, 2))
    assert max(first) < min(second)
