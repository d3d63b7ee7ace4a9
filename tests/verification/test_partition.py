"""Workers on networks of their own that are cut off, wholly or one way: they write nothing more, and others take over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable
from durable_sa.embedded import EmbeddedServer, temporary_server

from ..support import eventually
from . import audit, workload
from .evidence import collect
from .invariants import violations
from .ledger import entries
from .nursery import Child, Nursery
from .producer import SECRET
from .server import SETTINGS
from .workload import Op

HOST = "10.213.87.254"
NOWHERE = "02:00:00:00:00:01"
"""An address that no network card has: what is sent to it is lost, and nobody is told."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Cable:
    """A network namespace, and what connects it with the host."""

    def __init__(self, number: int) -> None:
        self.namespace, self.outside, self.inside = (f"{name}{number}-{os.getpid() % 100000}" for name in "dio")
        self.here, self.there = (f"10.213.87.{4 * number + end}" for end in (1, 2))

    def plug_in(self) -> None:
        ip("link", "add", self.outside, "type", "veth", "peer", "name", self.inside, "netns", self.namespace)
        ip("addr", "add", f"{self.here}/30", "dev", self.outside)
        ip("link", "set", self.outside, "up")
        ip("-n", self.namespace, "addr", "add", f"{self.there}/30", "dev", self.inside)
        ip("-n", self.namespace, "link", "set", self.inside, "up")
        ip("-n", self.namespace, "route", "add", "default", "via", self.here)

    def cut(self, way: str) -> None:
        match way:
            case "both ways":
                ip("link", "set", self.outside, "down")
            case "from the worker":
                outwards = (self.here, "lladdr", NOWHERE, "dev", self.inside, "nud", "permanent")
                ip("-n", self.namespace, "neigh", "replace", *outwards)
            case "to the worker":
                ip("neigh", "replace", self.there, "lladdr", NOWHERE, "dev", self.outside, "nud", "permanent")

    def mend(self) -> None:
        ip("link", "set", self.outside, "up")
        for where, address, device in (
            (("-n", self.namespace), self.here, self.inside),
            ((), self.there, self.outside),
        ):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*where, "neigh", "del", address, "dev", device)


WAYS = ("both ways", "from the worker", "to the worker")


@pytest.fixture
def cables() -> Generator[dict[str, Cable]]:
    """One for each way to be cut off, from an address of the host."""
    cables = {way: Cable(number) for number, way in enumerate(WAYS)}
    with contextlib.ExitStack() as exits:
        try:
            ip("addr", "add", f"{HOST}/32", "dev", "lo")
            exits.callback(ip, "addr", "del", f"{HOST}/32", "dev", "lo")
            for cable in cables.values():
                ip("netns", "add", cable.namespace)
                exits.callback(ip, "netns", "del", cable.namespace)
                cable.plug_in()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no networks can be made here: {getattr(error, 'stderr', error)}")
        yield cables


@pytest.fixture
def server(cables: dict[str, Cable]) -> Generator[EmbeddedServer]:
    with temporary_server(settings=SETTINGS, listen=HOST) as embedded:
        with (embedded.data_dir / "pg_hba.conf").open("a") as file:
            file.write("host all all 10.213.87.0/24 scram-sha-256\n")
        embedded.restart()
        yield embedded


@pytest.fixture
async def control(server: EmbeddedServer) -> AsyncGenerator[asyncpg.Connection]:
    connection = await asyncpg.connect(server.url().set(drivername="postgresql").render_as_string(hide_password=False))
    yield connection
    connection.terminate()


@pytest.fixture
async def durable(server: EmbeddedServer, control: asyncpg.Connection) -> AsyncGenerator[Durable]:
    engine = create_async_engine(server.url())
    async with Durable(engine, tasks=workload.TASKS, queue_name="main") as durable:
        await durable.migrate()
        await durable.create_queue("main")
        await control.execute(audit.DDL)
        yield durable
    await engine.dispose()


async def test_workers_that_are_cut_off_are_taken_over_and_write_nothing_when_they_are_back(
    durable: Durable,
    control: asyncpg.Connection,
    server: EmbeddedServer,
    cables: dict[str, Cable],
    tmp_path: Path,
) -> None:
    url = server.url().render_as_string(hide_password=False)

    async def start(nursery: Nursery, name: str, **settings: str) -> Child:
        common = {"url": url, "directory": str(tmp_path), "queue_names": ["main"], "concurrency": 4}
        return await nursery.fork("worker", name, tmp_path / f"{name}.log", claim_timeout=1.0, **common, **settings)

    async def registered(name: str, times: int) -> bool:
        count = "SELECT count(*) FROM audit.log WHERE relation = 'workers' AND was IS NULL AND became->>'name' = $1"
        return int(await control.fetchval(count, name)) >= times

    async def all_ended() -> bool:
        return await control.fetchval("SELECT 1 FROM durable.tasks WHERE outcome IS NULL LIMIT 1") is None

    async with Nursery() as nursery:
        workers = {way: await start(nursery, way, network=cable.namespace) for way, cable in cables.items()}
        for way in WAYS:
            await eventually(lambda: registered(way, 1))  # noqa: B023 - done before the next
        ops = [Op(op=f"tour-{number}", secret=SECRET, number=number, seconds=0.2) for number in range(12)]
        await durable.spawn_many([(workload.tour, op) for op in ops])

        def all_busy() -> bool:
            pids = {entry["pid"] for entry in entries(tmp_path) if entry["what"] == "step"}
            return pids >= {worker.pid for worker in workers.values()}

        await eventually(all_busy)
        for way, cable in cables.items():
            cable.cut(way)
        other = await start(nursery, "other")
        await eventually(all_ended, within=30)
        for cable in cables.values():
            cable.mend()
        # They are back, and workers like any other.
        for way in WAYS:
            await eventually(lambda: registered(way, 2), within=30)  # noqa: B023
            assert "lost its lease" in (tmp_path / f"{way}.log").read_text()
        other.send(signal.SIGTERM)
        assert await other.ended == 0
        await durable.spawn_many([(workload.leaf, op.model_copy(update={"op": f"{op.op}-again"})) for op in ops])
        await eventually(all_ended, within=30)
        for worker in workers.values():
            worker.send(signal.SIGTERM)
            assert await worker.ended == 0
    found = await collect(control, tmp_path, secrets=(SECRET, str(server.url().password)))
    # The test has spawned, and noted nothing.
    del (broken := violations(found))["every_acknowledged_spawn_has_one_task"]
    assert broken == {}
    taken_over = {change.row["name"] for change in found.by_relation["workers"] if change.was and change.became}
    assert taken_over == set(WAYS)
    assert all(task["outcome"] == "completed" for task in found.tasks.values())
    assert len(found.tasks) == 36
