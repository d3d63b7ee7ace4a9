"""Steps that run for more than a second are shown in the worker's row, in one write for all of them."""

import asyncio
import json
import threading
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import Durable, RetryStrategy, SyncTaskContext, TaskContext, step
from durable_sa.database.channel import DedicatedConnection
from durable_sa.models import WorkerRow
from durable_sa.statements import claiming
from durable_sa.worker import long_steps
from tests.cli.support import CommandLine
from tests.support import eventually

Shown = Callable[[], Awaitable[list[dict[str, Any]]]]


@pytest.fixture
def shown(engine: AsyncEngine) -> Shown:
    async def read() -> list[dict[str, Any]]:
        async with engine.connect() as connection:
            return await connection.scalar(sa.select(WorkerRow.long_steps)) or []

    return read


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The writes of long steps."""
    found: list[Any] = []
    execute = DedicatedConnection.execute

    async def noting(self: DedicatedConnection, statement: Any, parameters: Any = None) -> Any:
        if statement is claiming.SHOW_LONG_STEPS:
            found.append(parameters)
        return await execute(self, statement, parameters)

    monkeypatch.setattr(DedicatedConnection, "execute", noting)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_steps, "LONG_AFTER", 0.1)


@pytest.mark.slow
async def test_steps_of_every_kind_are_shown_until_they_end(durable: Durable, shown: Shown, writes: list[Any]) -> None:
    release, in_thread = asyncio.Event(), threading.Event()

    async def slow(number: int) -> int:
        await release.wait()
        return number

    async def writing(session: AsyncSession) -> None:
        await release.wait()

    @durable.task
    async def several(ctx: TaskContext) -> None:
        await asyncio.gather(
            ctx.step("charge", slow, 1),
            ctx.step("charge", slow, 2),
            ctx.transaction("book", writing),
            ctx.step("in a thread", in_thread.wait),
        )

    @durable.task
    def plain(ctx: SyncTaskContext) -> None:
        ctx.step("plain", in_thread.wait)

    before = datetime.now(UTC)
    async with durable.worker(concurrency=5):
        first, second = await durable.spawn(several), await durable.spawn(plain)

        async def all_there() -> list[dict[str, Any]] | None:
            rows = await shown()
            return rows if len(rows) == 5 else None

        rows = await eventually(all_there, within=5) or []
        assert sorted((row["task_id"], row["step"]) for row in rows) == sorted(
            [(str(first.task_id), name) for name in ("charge", "charge", "book", "in a thread")]
            + [(str(second.task_id), "plain")]
        )
        charges = [row["arguments"] for row in rows if row["step"] == "charge"]
        assert sorted(charges) == ["[[1],{}]", "[[2],{}]"]
        in_progress = [entry for entry in await durable.get_history(first, payloads=True) if entry.name == "charge"]
        assert sorted(entry.detail["arguments"]["args"] for entry in in_progress) == [[1], [2]]
        for row in rows:
            assert before - timedelta(seconds=1) < datetime.fromisoformat(row["started_at"]) <= datetime.now(UTC)
        # Nothing changes, and nothing is written.
        written = len(writes)
        assert written <= 3
        await asyncio.sleep(0.5)
        assert len(writes) == written
        assert await shown() == rows
        release.set()
        in_thread.set()
        for spawned in (first, second):
            await durable.wait_for_result(spawned, timeout=5)

        async def none_there() -> bool:
            return await shown() == []

        await eventually(none_there, within=5)


@pytest.mark.slow
async def test_short_steps_write_nothing(durable: Durable, writes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_steps, "LONG_AFTER", 1.0)

    async def short(number: int) -> int:
        return number

    @durable.task
    async def many(ctx: TaskContext) -> None:
        for number in range(100):
            await ctx.step("short", short, number)

    async with durable.worker():
        await durable.wait_for_result(await durable.spawn(many), timeout=10)
        await asyncio.sleep(1.1)
    assert writes == []


async def test_a_thousand_long_steps_are_shown_in_part(
    durable: Durable, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_steps, "MAX_SHOWN", 3)
    release = asyncio.Event()

    async def slow(number: int) -> None:
        await release.wait()

    @durable.task
    async def many(ctx: TaskContext) -> None:
        await asyncio.gather(*(ctx.step(f"step-{number}", slow, number) for number in range(20)))

    async with durable.worker():
        await durable.spawn(many)
        rows = await eventually(shown, within=5)
        # Those that have run for longest.
        assert [row["step"] for row in rows] == ["step-0", "step-1", "step-2"]
        release.set()


async def test_a_retried_step_is_shown_with_the_start_of_its_try(durable: Durable, shown: Shown) -> None:
    release, tries = asyncio.Event(), 0

    @step("fetch", max_attempts=3, retry_strategy=RetryStrategy.fixed(0))
    async def fetch() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ValueError
        await release.wait()

    @durable.task
    async def one(ctx: TaskContext) -> None:
        await fetch()

    async with durable.worker():
        await durable.spawn(one)
        (row,) = await eventually(shown, within=5)
        assert row["step"] == "fetch"
        release.set()


@pytest.mark.slow
async def test_an_operator_sees_what_hangs(durable: Durable, database_url: sa.URL, shown: Shown) -> None:
    cli, release = CommandLine(database_url), asyncio.Event()

    async def hang() -> None:
        await release.wait()

    @durable.task
    async def hanging(ctx: TaskContext) -> None:
        await ctx.step("charge-card", hang)

    @durable.task
    async def waiting(ctx: TaskContext) -> None:
        await release.wait()

    async with durable.worker(concurrency=2, worker_id="the-worker"):
        old = await durable.spawn(hanging)
        young = await durable.spawn(waiting)
        pending = await durable.spawn_by_name("elsewhere", unchecked=True)
        await eventually(shown, within=5)
        data = (await cli("tasks", "show", str(old.task_id), "--json")).json
        (step,) = [entry for entry in data["history"] if entry["status"] == "running" and entry["kind"] == "step"]
        assert (step["name"], data["task"]["worker"]) == ("charge-card", "the-worker")
        assert datetime.fromisoformat(step["began_at"]) < datetime.now(UTC)
        printed = (await cli("tasks", "show", str(old.task_id))).stdout
        assert "steps in progress" in printed
        assert "charge-card" in printed
        assert (await cli("tasks", "show", str(young.task_id), "--json")).json["history"][1:] == []

        async with durable.engine.begin() as connection:
            statement = "UPDATE durable.tasks SET started_at = started_at - interval '1 h' WHERE task_id = :id"
            await connection.execute(text(statement), {"id": young.task_id})

        async def listed(*options: object) -> list[uuid.UUID]:
            rows = (await cli("tasks", "list", "--json", *options)).json
            return [uuid.UUID(row["task_id"]) for row in rows]

        ids = [old.task_id, young.task_id, pending.task_id]
        assert await listed() == ids[::-1]
        assert await listed("--sort", "oldest") == ids
        assert await listed("--sort", "running") == [ids[1], ids[0]]
        assert await listed("--running-longer-than", "30m") == [ids[1]]
        assert await listed("--running-longer-than", "2h") == []
        assert "running for" in (await cli("tasks", "list", "--running-longer-than", "30m")).stdout

        found = await cli("doctor", "--long-step", "0s", "--json")
        (finding,) = json.loads(found.stdout)["findings"]
        assert (found.code, finding["subject"]) == (1, "steps")
        assert finding["problems"][0].startswith(f"task {old.task_id} (hanging) has been in step 'charge-card' for")
        assert "the-worker" in finding["problems"][0]
        assert (await cli("doctor", "--json")).json["findings"] == []
        release.set()
