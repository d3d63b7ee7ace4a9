"""A commit whose reply is lost: the caller is told what has become of it, not what a second try would find."""

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, TaskContext, TaskStatus


@pytest.fixture
def lost(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of the next commits, from the end of the list: "committed" or "aborted", without a reply."""
    fates: list[str] = []
    commit = engine.dialect.do_commit

    def silently(connection: Any) -> None:
        fate = fates.pop() if fates else None
        if fate != "aborted":
            commit(connection)
        if fate is not None:
            connection.driver_connection.terminate()
            raise engine.dialect.loaded_dbapi.InterfaceError("connection is closed")

    monkeypatch.setattr(engine.dialect, "do_commit", silently)
    return fates


@pytest.mark.parametrize("fate", ["committed", "aborted"])
async def test_an_event_of_ones_own_is_the_first(durable: Durable, lost: list[str], fate: str) -> None:
    lost.append(fate)
    assert await durable.emit_event("signal", 1)
    assert lost == []
    assert not await durable.emit_event("signal", 2)


@pytest.mark.parametrize("fate", ["committed", "aborted"])
async def test_a_retry_is_told_that_it_has_been_done(durable: Durable, lost: list[str], fate: str) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None: ...

    spawned = await durable.spawn(work)
    lost.append(fate)
    assert await durable.cancel_task(spawned) is TaskStatus.CANCELLED
    lost.append(fate)
    assert await durable.retry_task(spawned) is TaskStatus.PENDING
    assert lost == []


@pytest.mark.parametrize("fate", ["committed", "aborted"])
async def test_tasks_spawned_together_are_there_once(
    durable: Durable, engine: AsyncEngine, lost: list[str], fate: str
) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> None: ...

    lost.append(fate)
    results = await durable.spawn_many([(work, None)] * 3)
    assert [result.created for result in results] == [True] * 3
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM durable.tasks"))).scalar() == 3
