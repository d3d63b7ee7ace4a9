"""Fences: whatever a run has lost its task by, nothing that it sends afterwards changes anything."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from durable_sa import Durable, TaskContext
from durable_sa.database.channel import DedicatedConnection
from durable_sa.execution.waits import WaitSpec
from durable_sa.execution.writer import Writer
from durable_sa.execution.writes import (
    BlockValues,
    CheckpointValues,
    ChildValues,
    ClosingValues,
    CompletionValues,
    EventValues,
    FailureValues,
    ItemsValues,
    Kind,
    LinesValues,
    MessageValues,
    PublicationValues,
    RaceValues,
    ReceiptValues,
    ReleaseValues,
    SuspensionValues,
    Values,
    Write,
)
from durable_sa.ids import child_id, new_id
from durable_sa.signals import LeaseLost
from durable_sa.spawns import prepare
from durable_sa.statements import checkpoints, claiming, outcomes

from ..support import eventually
from . import program
from .conftest import Rows
from .test_claims import Claimer

ERROR = '{"name": "ValueError", "message": "no"}'


class Holder:
    """A run that holds its task under fence 1, and what it may write."""

    def __init__(self, durable: Durable, claimer: Claimer, task_id: Any) -> None:
        self.durable = durable
        self.claimer = claimer
        self.task_id = task_id
        self.block_id = new_id()
        """Of an open stream, in which an earlier try has written something."""
        self.position = 0

    def write(self, kind: Kind, told: Any, fence: int = 1) -> Write:
        key = new_id()
        values: Values = None
        waits: list[WaitSpec] = []
        match kind:
            case Kind.CHECKPOINT:
                values = CheckpointValues("step", "name", "completed", "1")
            case Kind.CHILD:
                child = child_id(self.task_id, key)
                prepared = prepare(self.durable, program.count, None, {}, task_id=child, parent_task_id=self.task_id)
                values = ChildValues(
                    CheckpointValues("spawn", "name", "completed", '"digest"', child), prepared.all_values
                )
            case Kind.EVENT:
                values = EventValues(CheckpointValues("emit", "name", "completed", None), f"event-{key}", "1", None)
            case Kind.MESSAGE:
                sent = CheckpointValues("send", "note", "completed", None)
                values = MessageValues(sent, new_id(), self.task_id, "note", "2", None)
            case Kind.RECEIPT:
                values = ReceiptValues("note")
            case Kind.RACE:
                values = RaceValues(
                    CheckpointValues("race", "name", "completed", '"note"'), new_id(), "note", [new_id()]
                )
            case Kind.PUBLICATION:
                values = PublicationValues({"name": "1"})
            case Kind.OPENING | Kind.SUPERSESSION:
                key, values = self.block_id, BlockValues("stream", self.block_id, self.block_id)
            case Kind.ITEMS:
                self.position += 1
                values = ItemsValues("stream", self.block_id, self.position, self.block_id, new_id(), "[1]", None)
            case Kind.LINES:
                values = LinesValues('[{"message":"said"}]', 1)
            case Kind.CLOSING:
                values = ClosingValues("stream", self.block_id, 1, ends=True, checkpoint_key=new_id())
            case Kind.WAITS | Kind.SUSPENSION:
                waits = [
                    WaitSpec(key, "event", "name", "some", None, None, 60.0),
                    WaitSpec(new_id(), "sleep", "nap", None, None, None, 60.0),
                ]
                values = SuspensionValues(True) if kind is Kind.SUSPENSION else None
            case Kind.FAILURE:
                values = FailureValues(ERROR, True, new_id(), True)
            case Kind.RELEASE:
                values = ReleaseValues(ERROR, new_id())
            case Kind.COMPLETION:
                values = CompletionValues("1", True)
        return Write(kind, self.task_id, fence, told, values, key, waits)

    async def send(self, kind: Kind, fence: int = 1) -> BaseException | None:
        """Write through a writer; the error that it tells."""
        future: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        channel = DedicatedConnection(self.durable.database)
        writer = Writer(channel, on_commit=lambda *_: None)
        running = asyncio.create_task(writer.run())
        try:
            writer.submit(self.write(kind, lambda _, error: future.set_result(error), fence))
            async with asyncio.timeout(10):
                return await future
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await channel.close()


@pytest.fixture
async def holder(durable: Durable) -> Holder:
    claimer = Claimer(durable.database)
    await claimer.register()
    spawned = await durable.spawn(program.count, max_attempts=5)
    assert await claimer.claim(1, "count") == [spawned.task_id]
    await durable.send(spawned, "note", 1)
    holder = Holder(durable, claimer, spawned.task_id)
    for kind in (Kind.OPENING, Kind.ITEMS):
        assert await holder.send(kind) is None
    return holder


async def _complete(holder: Holder) -> None:
    assert await holder.send(Kind.COMPLETION) is None


async def _fail(holder: Holder) -> None:
    assert await holder.send(Kind.FAILURE) is None


async def _release(holder: Holder) -> None:
    assert await holder.send(Kind.RELEASE) is None


async def _suspend(holder: Holder) -> None:
    assert await holder.send(Kind.SUSPENSION) is None


async def _wake(holder: Holder) -> None:
    await _suspend(holder)
    async with holder.durable.database.transaction() as connection:
        await connection.exec_driver_sql("UPDATE durable.tasks SET available_at = now() - interval '1 s'")


async def _claim_again(holder: Holder) -> None:
    await _wake(holder)
    assert await holder.claimer.claim(1, "count") == [holder.task_id]


async def _cancel(holder: Holder) -> None:
    await holder.durable.cancel_task(holder.task_id)


async def _retry(holder: Holder) -> None:
    await holder.durable.cancel_task(holder.task_id)
    await holder.durable.retry_task(holder.task_id)


async def _take_over(holder: Holder) -> None:
    async with holder.durable.database.transaction() as connection:
        await connection.exec_driver_sql("UPDATE durable.workers SET lost_at = clock_timestamp()")
    rows = await holder.durable.database.execute(
        outcomes.take_over(),
        {"task_ids": [holder.task_id], "next_run_ids": [new_id()], "worker_ids": [holder.claimer.worker_id]},
    )
    assert len(rows) == 1


async def _another_runs_it(holder: Holder) -> None:
    await _take_over(holder)
    other = Claimer(holder.durable.database)
    await other.register()
    assert await other.claim(1, "count") == [holder.task_id]


async def _same_worker_runs_it(holder: Holder) -> None:
    await _release(holder)
    assert await holder.claimer.claim(1, "count") == [holder.task_id]


async def _delete(holder: Holder) -> None:
    await holder.durable.drop_queue()
    await holder.durable.create_queue()


LOSSES: dict[str, Callable[[Holder], Awaitable[None]]] = {
    "completed": _complete,
    "failed and to be retried": _fail,
    "released": _release,
    "suspended": _suspend,
    "awake": _wake,
    "claimed after a sleep": _claim_again,
    "cancelled": _cancel,
    "put back by hand": _retry,
    "taken over": _take_over,
    "run by another worker": _another_runs_it,
    "run by the same worker": _same_worker_runs_it,
    "deleted": _delete,
}


async def dump(sql: Rows) -> list[Any]:
    tables = (
        "tasks",
        "runs",
        "checkpoints",
        "waits",
        "events",
        "messages",
        "task_values",
        "streams",
        "stream_items",
    )
    return await sql(
        " UNION ALL ".join(f"SELECT '{table}', t::text FROM durable.{table} AS t" for table in tables)
        + " ORDER BY 1, 2"
    )


@pytest.mark.parametrize("kind", Kind)
async def test_a_run_writes_under_its_own_fence(holder: Holder, sql: Rows, kind: Kind) -> None:
    before = await dump(sql)
    assert await holder.send(kind) is None
    assert await dump(sql) != before


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
async def test_nothing_is_written_under_a_fence_that_was_lost(holder: Holder, sql: Rows, loss: str) -> None:
    await LOSSES[loss](holder)
    before = await dump(sql)
    for kind in Kind:
        assert isinstance(await holder.send(kind), LeaseLost), kind
        assert await dump(sql) == before, kind
    async with holder.durable.database.transaction() as connection:
        fence = {"task_id": holder.task_id, "fence": 1}
        assert (await connection.execute(checkpoints.LOCK_UNDER_FENCE, fence)).all() == []
    assert await dump(sql) == before


async def test_old_and_new_writes_of_one_batch_are_told_apart(holder: Holder, sql: Rows) -> None:
    """A worker that lost a run and claimed it again sends both in one statement."""
    await _same_worker_runs_it(holder)
    told: dict[int, BaseException | None] = {}
    channel = DedicatedConnection(holder.durable.database)
    writer = Writer(channel, on_commit=lambda *_: None)
    ((fence,),) = await sql("SELECT fence FROM durable.tasks")
    for number in (1, fence):
        writer.submit(holder.write(Kind.CHECKPOINT, lambda _, error, n=number: told.update({n: error}), number))
    running = asyncio.create_task(writer.run())
    await eventually(lambda: len(told) == 2)
    running.cancel()
    await asyncio.wait([running])
    await channel.close()
    assert isinstance(told[1], LeaseLost)
    assert told[fence] is None
    assert await sql("SELECT count(*) FROM durable.checkpoints") == [(1,)]


async def _claim(holder: Holder) -> None:
    assert await holder.claimer.claim(1, "count") == [holder.task_id]


async def _put_back(holder: Holder) -> None:
    await holder.durable.retry_task(holder.task_id)


async def test_a_fence_rises_with_every_change_of_hands(holder: Holder, sql: Rows) -> None:
    fence = 1
    for change in (Kind.RELEASE, _claim, Kind.SUSPENSION, _claim, Kind.FAILURE, _claim, _cancel, _put_back, _claim):
        if isinstance(change, Kind):
            assert await holder.send(change, fence) is None
            # What sleeps until then is awake.
            await sql("UPDATE durable.tasks SET available_at = now() - interval '1 s'")
        else:
            await change(holder)
        ((now,),) = await sql("SELECT fence FROM durable.tasks")
        assert now > fence, change
        fence = now


@pytest.mark.slow
async def test_a_transaction_of_a_run_that_was_taken_over_is_rolled_back(durable: Durable, sql: Rows) -> None:
    await sql("CREATE TABLE ledger (attempt integer)")
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def record(session: AsyncSession, attempt: int) -> None:
        await session.execute(text("INSERT INTO ledger VALUES (:attempt)"), {"attempt": attempt})
        if attempt == 1:
            inside.set()
            await go_on.wait()

    @durable.task
    async def booking(ctx: TaskContext) -> int:
        await ctx.transaction("record", record, ctx.attempt)
        return ctx.attempt

    spawned = await durable.spawn(booking)
    async with durable.worker() as first:
        await inside.wait()
        await sql("UPDATE durable.workers SET lost_at = clock_timestamp()")
        async with durable.worker():

            async def taken_over() -> bool:
                first._agenda.look_within(0.0)
                return await sql("SELECT lease_losses FROM durable.tasks") == [(1,)]

            await eventually(taken_over)
            go_on.set()
            assert (await durable.wait_for_result(spawned, timeout=10)).output == 2
    assert await sql("SELECT attempt FROM ledger") == [(2,)]
    assert await sql("SELECT count(*) FROM durable.checkpoints") == [(1,)]


async def test_a_lost_worker_cannot_beat(holder: Holder) -> None:
    await _take_over(holder)
    beat = {"beating_id": holder.claimer.worker_id}
    assert list(await holder.durable.database.execute(claiming.HEARTBEAT, beat)) == []
