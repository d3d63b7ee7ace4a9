"""A role that may have fewer connections than its workers need: they say so, wait, and go on when it may have more."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import URL, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import Durable
from durable_sa.migrations.roles import grants
from durable_sa.testing.database import TestServer

from ..support import eventually
from ..worker.stories import Parts, Story, create_bookings


@dataclass
class Role:
    """Of the workers: no superuser, for whom there are no limits."""

    name: str
    url: URL
    admin: AsyncEngine
    asked: list[float] = field(default_factory=list)
    """When each connection was asked for."""

    async def limit(self, connections: int) -> None:
        """Let it have so many connections, -1 for any number."""
        async with self.admin.connect() as connection:
            await connection.execute(text(f"ALTER ROLE {self.name} CONNECTION LIMIT {connections}"))

    @contextlib.asynccontextmanager
    async def others(self, number: int) -> AsyncGenerator[None]:
        """Have other processes hold so many, and the server end the rest."""
        about = {"server_settings": {"application_name": "other"}}
        async with contextlib.AsyncExitStack() as stack:
            engine = create_async_engine(self.url, poolclass=NullPool, connect_args=about)
            for _ in range(number):
                await stack.enter_async_context(engine.connect())
            await self.limit(number)
            async with self.admin.connect() as connection:
                ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = :name"
                kept = " AND application_name <> 'other'"
                await connection.execute(text(ended + kept), {"name": self.name})
            yield

    def engine(self) -> AsyncEngine:
        engine = create_async_engine(self.url)

        @event.listens_for(engine.sync_engine, "do_connect")
        def asking(*_: Any) -> None:
            self.asked.append(asyncio.get_running_loop().time())

        return engine


@pytest.fixture
async def role(durable: Durable, database_url: URL, durable_server: TestServer) -> AsyncGenerator[Role]:
    name, password = f"limited_{secrets.token_hex(4)}", secrets.token_hex()
    admin = create_async_engine(database_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    await create_bookings(admin)
    async with admin.connect() as connection:
        await connection.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
        await connection.execute(text(f"GRANT SELECT, INSERT ON public.bookings TO {name}"))
        # What tells where a connection leads is everybody's, unless it is taken away.
        await connection.execute(text("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"))
        for statement in grants({"worker": name}):
            await connection.execute(text(statement))
    yield Role(name, database_url.set(username=name, password=password), admin)
    async with admin.connect() as connection:
        await connection.execute(text(f"DROP OWNED BY {name} CASCADE"))
        await connection.execute(text(f"DROP ROLE {name}"))
    await admin.dispose()


async def test_a_worker_whose_role_may_not_have_its_connections_waits_for_them(
    role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "durable_sa")
    engine = role.engine()
    async with Durable(engine) as durable:
        story = Story(durable)
        spawned = await durable.spawn_many([(story.task, Parts(steps=4, pause=0.1))] * 10)
        async with durable.worker(concurrency=10, claim_timeout=1):
            await eventually(lambda: len(story.executed) > 10)
            async with role.others(3):
                caplog.clear()
                role.asked.clear()
                await eventually(lambda: "registration of the worker failed" in caplog.text)
                assert f'too many connections for role "{role.name}"' in caplog.text
                for complaint in ("writing failed", "heartbeat failed", "lost its lease"):
                    assert complaint in caplog.text
                seconds = role.asked[-1] - role.asked[0]
                assert len(role.asked) < 15 + 15 * seconds, seconds
                await role.limit(-1)
            for spawn in spawned:
                assert (await durable.wait_for_result(spawn, timeout=20)).output == 6
    await engine.dispose()
    async with role.admin.connect() as connection:
        ends = text("SELECT DISTINCT outcome, failures FROM durable.tasks")
        assert (await connection.execute(ends)).all() == [("completed", 0)]
