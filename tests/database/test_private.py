"""Without one of SQLAlchemy's private attributes, SQLAlchemy executes the statements."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from durable_sa import Durable, task
from durable_sa.database import direct, private


@task
async def noop(ctx: Any) -> None: ...


@pytest.mark.parametrize("owner", [None, "CONNECTION", "ADAPTED", "METADATA"])
async def test_sqlalchemy_executes_where_an_attribute_has_another_name(
    database_url: URL, owner: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "_complete", {})
    if owner is not None:
        monkeypatch.setattr(private, owner, getattr(private, owner) | {"_of_another_version"})
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        assert connection.sync_connection is not None
        alone = direct.leads_directly(connection.sync_connection)
        await connection.execute(sa.text("SELECT 1"))
        within = direct.leads_directly(connection.sync_connection, alone=False)
    assert alone is within is (owner is None)
    async with Durable(engine, tasks=[noop]) as durable:
        await durable.create_queue()
        spawned = [await durable.spawn(noop) for _ in range(2)]
        async with AsyncSession(engine) as session, session.begin():
            spawned += [await durable.spawn_with(session, noop) for _ in range(2)]
        for each in spawned:
            assert await durable.get_task_result(each) is not None
    await engine.dispose()
