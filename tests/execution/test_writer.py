"""The writer's two connections: shared by large batches of checkpoints, and never by the writes of one task."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from sqlalchemy import Executable

from durable_sa import Durable
from durable_sa.database.channel import DedicatedConnection
from durable_sa.execution.writer import SPLIT_WRITES, Writer
from durable_sa.execution.writes import Kind
from durable_sa.signals import LeaseLost
from durable_sa.statements import claiming

from ..support import eventually
from ..worker import program
from ..worker.conftest import Rows
from ..worker.test_claims import Claimer
from ..worker.test_fences import Holder

TASKS = 2 * SPLIT_WRITES


class Traffic:
    """Which tasks each statement is about, and how many statements are on their way."""

    def __init__(self) -> None:
        self.on_their_way: list[set[uuid.UUID]] = []
        self.most = 0
        self.shared = 0
        """Statements that were sent while another one was about one of their tasks."""
        self.gate = asyncio.Event()
        self.gate.set()


class Watched(DedicatedConnection):
    def __init__(self, durable: Durable, traffic: Traffic) -> None:
        super().__init__(durable.database)
        self.traffic = traffic
        self.statements = 0

    async def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Any:
        ids = (parameters or {}).get("task_ids")
        tasks = {ids} if isinstance(ids, uuid.UUID) else set(ids or ())
        self.traffic.shared += any(tasks & others for others in self.traffic.on_their_way)
        self.traffic.on_their_way.append(tasks)
        self.traffic.most = max(self.traffic.most, len(self.traffic.on_their_way))
        self.statements += 1
        try:
            await self.traffic.gate.wait()
            return await super().execute(statement, parameters)
        finally:
            self.traffic.on_their_way.remove(tasks)


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
async def holders(durable: Durable) -> list[Holder]:
    """Runs that hold their tasks under fence 1."""
    claimer = Claimer(durable.database)
    await claimer.register()
    spawned = await durable.spawn_many([(program.count, None)] * TASKS)
    assert len(await claimer.claim(TASKS, "count")) == TASKS
    return [Holder(durable, claimer, each.task_id) for each in spawned]


@pytest.fixture
async def channels(durable: Durable, traffic: Traffic) -> AsyncGenerator[tuple[Watched, Watched]]:
    pair = Watched(durable, traffic), Watched(durable, traffic)
    yield pair
    for channel in pair:
        await channel.close()


@pytest.fixture
def running() -> list[asyncio.Task[None]]:
    """The two parts of the writer."""
    return []


@pytest.fixture
async def writer(channels: tuple[Watched, Watched], running: list[asyncio.Task[None]]) -> AsyncGenerator[Writer]:
    writer = Writer(*channels, on_commit=lambda *_: None)
    running += [asyncio.create_task(writer.run()), asyncio.create_task(writer.run_second())]
    yield writer
    for task in running:
        task.cancel()
    await asyncio.wait(running)


async def test_many_checkpoints_are_shared_by_two_connections(
    writer: Writer, channels: tuple[Watched, Watched], traffic: Traffic, holders: list[Holder], sql: Rows
) -> None:
    told: list[BaseException | None] = []
    for holder in holders:
        writer.submit(holder.write(Kind.CHECKPOINT, lambda _, error: told.append(error)))
    await eventually(lambda: len(told) == TASKS)
    assert told == [None] * TASKS
    assert [channel.statements for channel in channels] == [1, 1]
    assert traffic.most == 2
    await asyncio.wait_for(writer.idle.wait(), 5)
    assert await sql("SELECT count(*) FROM durable.checkpoints") == [(TASKS,)]


async def test_what_a_connection_has_of_a_task_the_other_waits_for(
    writer: Writer, traffic: Traffic, holders: list[Holder], sql: Rows
) -> None:
    """A completion that overtook a checkpoint of its run would take its fence away."""
    told: list[BaseException | None] = []

    def submit(holder: Holder, kind: Kind) -> None:
        writer.submit(holder.write(kind, lambda _, error: told.append(error)))

    traffic.gate.clear()
    for holder in holders:
        submit(holder, Kind.CHECKPOINT)
    await eventually(lambda: len(traffic.on_their_way) == 2)
    for holder in holders:
        submit(holder, Kind.CHECKPOINT)
        submit(holder, Kind.COMPLETION)
    assert writer.backlog == 3 * TASKS
    traffic.gate.set()
    await eventually(lambda: len(told) == 3 * TASKS)
    assert told == [None] * 3 * TASKS
    assert traffic.shared == 0
    assert await sql("SELECT count(*) FROM durable.tasks WHERE outcome = 'completed'") == [(TASKS,)]
    assert await sql("SELECT count(*) FROM durable.checkpoints") == [(2 * TASKS,)]


async def test_a_connection_that_is_in_use_is_left_alone(
    writer: Writer, channels: tuple[Watched, Watched], holders: list[Holder], sql: Rows
) -> None:
    told: list[BaseException | None] = []
    async with channels[1]._database.transaction() as connection:
        await connection.exec_driver_sql("LOCK TABLE durable.workers IN ACCESS EXCLUSIVE MODE")
        claiming_ = asyncio.create_task(channels[1].execute(claiming.LOST_WORKERS, {}))
        await eventually(lambda: channels[1].busy)
        for holder in holders:
            writer.submit(holder.write(Kind.CHECKPOINT, lambda _, error: told.append(error)))
        await eventually(lambda: len(told) == TASKS)
        assert not claiming_.done()
    await claiming_
    assert channels[1].statements == 1
    assert told == [None] * TASKS


async def on_both_connections(writer: Writer, traffic: Traffic, holders: list[Holder]) -> list[BaseException | None]:
    """Have a checkpoint of each holder on its way, held up; what they are told of it."""
    told: list[BaseException | None] = []
    traffic.gate.clear()
    for holder in holders:
        writer.submit(holder.write(Kind.CHECKPOINT, lambda _, error: told.append(error)))
    await eventually(lambda: len(traffic.on_their_way) == 2)
    return told


async def test_what_the_second_connection_had_is_sent_by_the_first_if_it_ends(
    writer: Writer, running: list[asyncio.Task[None]], traffic: Traffic, holders: list[Holder], sql: Rows
) -> None:
    told = await on_both_connections(writer, traffic, holders)
    running[1].cancel()
    await asyncio.wait([running[1]])
    traffic.gate.set()
    await eventually(lambda: len(told) == TASKS)
    assert told == [None] * TASKS
    assert await sql("SELECT count(*) FROM durable.checkpoints") == [(TASKS,)]


async def test_writes_that_are_given_up_are_told_so_on_both_connections(
    writer: Writer, traffic: Traffic, holders: list[Holder]
) -> None:
    told = await on_both_connections(writer, traffic, holders)
    for holder in holders:
        writer.submit(holder.write(Kind.COMPLETION, lambda _, error: told.append(error)))
    writer.abandon()
    assert len(told) == TASKS
    assert all(isinstance(error, LeaseLost) for error in told)
    traffic.gate.set()
    await asyncio.wait_for(writer.idle.wait(), 5)
    assert len(told) == 2 * TASKS


async def test_a_connection_is_not_closed_under_a_statement(durable: Durable) -> None:
    """The claims end before the writes, and with them the connection that both may use."""
    channel = DedicatedConnection(durable.database)
    async with durable.database.transaction() as connection:
        await connection.exec_driver_sql("LOCK TABLE durable.workers IN ACCESS EXCLUSIVE MODE")
        executing = asyncio.create_task(channel.execute(claiming.LOST_WORKERS, {}))
        await eventually(lambda: channel.busy)
        closing = asyncio.create_task(channel.close())
        await asyncio.sleep(0)
        assert not closing.done()
    assert await executing == []
    await closing
    assert not channel.busy
    assert durable.engine.pool.checkedout() == 0
