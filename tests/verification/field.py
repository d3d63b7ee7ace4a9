"""Where faults happen: a private server, proxies in front of it, workers and producers that are kept alive."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable

from . import audit, workload
from .nursery import Child, Nursery
from .pooler import Pooler
from .proxy import Proxy
from .server import CONTROL, Server, private_server

DATABASE = "faults"


@dataclass
class Slot:
    """A process that is started anew whenever it ends, each time under another name."""

    role: str
    proxy: Proxy
    nursery: Nursery
    settings: dict[str, Any]
    child: Child | None = None
    starts: int = 0


class Field:
    """One for each round."""

    database = DATABASE

    def __init__(self, server: Server, directory: Path, seed: str, exits: contextlib.AsyncExitStack) -> None:
        self.server = server
        self.directory = directory
        self.exits = exits
        self.chance = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.claim_timeout = 2.0
        self.pooler: Pooler | None = None
        self.clock: Path | None = None
        """The file that the server's clock is read from."""
        self.server_changing = asyncio.Lock()
        self.deploying = asyncio.Lock()
        self.told: dict[str, datetime] = {}
        """Since when workers that were replaced claim nothing more, by the server's clock."""
        self.slots: list[Slot] = []
        self.kept = {"worker", "producer"}
        """Roles whose processes are started again when they end."""
        self.exit_codes: Counter[tuple[str, int]] = Counter()
        self._skewed = 0
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def proxies(self) -> list[Proxy]:
        return [slot.proxy for slot in self.slots]

    def lost(self) -> int:
        """Statements that the proxies have lost, or their replies."""
        return sum(proxy.happened for proxy in self.proxies)

    def pick(self, role: str, chance: random.Random) -> Child:
        """A process of that role, which may be between two lives."""
        children = [slot.child for slot in self.slots if slot.role == role and slot.child is not None]
        return chance.choice(children)

    def any_proxy(self, chance: random.Random) -> Proxy:
        return chance.choice([proxy for proxy in self.proxies if proxy.links] or self.proxies)

    def serve(self, server: Server) -> None:
        """Let all connections go to another server."""
        self.server = server
        self.mislead(server)

    def mislead(self, server: Server) -> None:
        """Let them go to a server that is not the one."""
        for proxy in self.proxies:
            proxy.target = server.address
            proxy.cut_all()

    def count_skewed(self) -> int:
        """Starts of processes with a wrong clock since the last call."""
        starts = sum(slot.starts for slot in self.slots if slot.settings.get("skewed"))
        new, self._skewed = starts - self._skewed, starts
        return new

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncGenerator[asyncpg.Connection[Any]]:
        """A connection to the database that does not pass a proxy."""
        connection = await self.server.connect(self.database)
        try:
            yield connection
        finally:
            connection.terminate()

    async def connect_once(self) -> asyncpg.Connection[Any]:
        """As `connection`, if the server has one left."""
        url = self.server.url(self.database)
        return await asyncpg.connect(
            host=url.host,
            port=url.port,
            user=url.username,
            password=url.password,
            database=url.database,
            timeout=2,
            server_settings=CONTROL,
        )

    async def prepare(self, *, retention: bool) -> None:
        """Make the database with its tables and triggers, the queues, and a schedule of every second."""
        await self.server.sql(f"CREATE DATABASE {self.database}")
        engine = create_async_engine(self.server.url(self.database))
        async with Durable(engine, tasks=workload.TASKS) as durable:
            await durable.migrate()
            async with self.connection() as connection:
                await connection.execute(audit.DDL)
            policy: dict[str, Any] = {"retention": 0.5, "event_retention": 10} if retention else {}
            for queue_name in workload.QUEUES:
                await durable.create_queue(queue_name, **policy)
            await durable.create_schedule(
                "ticks", task=workload.tick, cron_expression="* * * * * *", misfire="run_all", queue_name="main"
            )
        await engine.dispose()

    async def add(self, role: str, nursery: Nursery, **settings: Any) -> Slot:
        """A process behind a proxy of its own."""
        host, port = self.server.address
        proxy = await self.exits.enter_async_context(Proxy(host, port if self.pooler is None else self.pooler.port))
        url = self.server.url(self.database, proxy.port).render_as_string(hide_password=False)
        common = {"url": url, "directory": str(self.directory), "claim_timeout": self.claim_timeout}
        slot = Slot(role, proxy, nursery, {**common, "pooled": self.pooler is not None, **settings})
        self.slots.append(slot)
        return slot

    async def staff(self) -> None:
        """Start all processes, and start them again when they end, from now on."""
        for number, slot in enumerate(self.slots):
            await self._start(slot, f"{slot.role[0]}{number}")
            self._keepers.append(asyncio.create_task(self._keep(slot, f"{slot.role[0]}{number}")))

    async def _start(self, slot: Slot, base: str) -> None:
        slot.starts += 1
        name = f"{base}-{slot.starts}"
        settings = {**slot.settings, "seed": f"{self.chance.random()}"}
        slot.child = await slot.nursery.fork(slot.role, name, self.directory / f"{base}.log", **settings)

    async def _keep(self, slot: Slot, base: str) -> None:
        while True:
            assert slot.child is not None
            self.exit_codes[slot.role, await slot.child.ended] += 1
            await asyncio.sleep(self.chance.uniform(0.05, 0.3))
            if slot.role not in self.kept:
                return
            await self._start(slot, base)

    async def replace(self, slot: Slot, **settings: Any) -> bool:
        """End a worker as a deployment does, and wait until another one works in its place; False if that takes long."""
        slot.settings |= settings
        former = slot.child
        assert former is not None
        at_work = "SELECT 1 FROM durable.workers WHERE name = $1 AND lost_at IS NULL"
        self.told.setdefault(former.name, (await self.server.sql("SELECT clock_timestamp()"))[0][0])
        former.send(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(15), self.connection() as connection:
                while slot.child is former or not await connection.fetchval(at_work, slot.child.name):
                    await asyncio.sleep(0.02)
                return True
        return False

    async def finished(self, role: str) -> None:
        """Wait until all processes of a role have ended by themselves."""
        self.kept.discard(role)
        await asyncio.wait([slot.child.ended for slot in self.slots if slot.role == role and slot.child])

    async def dismiss(self, role: str, within: float) -> list[str]:
        """End all processes of a role by SIGTERM; complaints about those that do not end in time, or not well."""
        self.kept.discard(role)
        children = [slot.child for slot in self.slots if slot.role == role and slot.child and slot.child.alive]
        if not children:
            return []
        for child in children:
            child.send(signal.SIGCONT)
            child.send(signal.SIGTERM)
        await asyncio.wait([child.ended for child in children], timeout=within)
        complaints = [f"{child.name} does not end within {within} s" for child in children if child.alive]
        for child in children:
            child.send(signal.SIGKILL)
            # One that had just started may not have known the signal yet; one that was taken over ends with 1.
            if not complaints and (code := await child.ended) not in (0, 1, -signal.SIGTERM):
                complaints.append(f"{child.name} ended with {code}")
        return complaints

    def set_clock(self, offset: int) -> None:
        """Move the server's clock; it takes up to a second to be seen."""
        assert self.clock is not None
        self.clock.write_text(f"{offset:+d}")

    async def heal(self) -> None:
        """Undo whatever a fault may have left behind."""
        for proxy in self.proxies:
            proxy.heal()
        for slot in self.slots:
            if slot.child is not None:
                slot.child.send(signal.SIGCONT)
        async with self.server_changing:
            await self.server.start()
        await self.server.sql(f"ALTER DATABASE {self.database} RESET ALL")
        for setting in ("default_transaction_read_only", "default_transaction_isolation"):
            await self.server.configure(setting, None)
        async with self.connection() as connection:
            for table in ("tasks", "checkpoints", "waits", "events"):
                await connection.execute(f"DROP TRIGGER IF EXISTS failing ON durable.{table}")
        for slot in self.slots:
            if slot.settings.get("version") == 1:
                # Everything is to end, and there are tasks that only the second one knows.
                await self.replace(slot, version=2)

    async def close(self) -> None:
        """End everything that still runs."""
        self.kept.clear()
        for keeper in self._keepers:
            keeper.cancel()
        for slot in self.slots:
            if slot.child is not None and slot.child.alive:
                slot.child.send(signal.SIGKILL)
                await asyncio.wait([slot.child.ended], timeout=5)


@contextlib.asynccontextmanager
async def opened(
    directory: Path, seed: str, *, pooled: bool, retention: bool, clock: bool, **settings: str | int
) -> AsyncGenerator[Field]:
    """A field with its server, ready to be staffed."""
    async with contextlib.AsyncExitStack() as exits:
        file = directory / "clock" if clock else None
        if file is not None:
            file.write_text("+0")
        server = await exits.enter_async_context(private_server(clock=file, **settings))
        field = Field(server, directory, seed, exits)
        field.clock = file
        await field.prepare(retention=retention)
        if pooled:
            scratch = directory / "pgbouncer"
            scratch.mkdir()
            field.pooler = await exits.enter_async_context(Pooler(server, scratch))
        try:
            yield field
        finally:
            await field.close()
