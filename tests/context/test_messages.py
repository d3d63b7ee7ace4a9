"""Messages: received in order and exactly once, however sends, waits, crashes and lost replies meet."""

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, Row, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from durable_sa import (
    Durable,
    InvalidName,
    InvalidState,
    PayloadTooLarge,
    SerializationError,
    SyncTaskContext,
    TaskContext,
    TaskHandle,
    TaskNotFound,
    TaskTimeout,
    task,
)
from durable_sa.context import messages as conversing
from durable_sa.database.connections import HeldConnection
from durable_sa.database.hint import MAX_RECEIVERS, Hint
from durable_sa.models import Message
from durable_sa.statements import messages, suspending
from durable_sa.testing import run_until_idle, task_context, time_travel
from tests.context.support import Crash, Rows, Runner, Tally
from tests.support import eventually


@dataclass
class Approval:
    by: str
    at: int


@task
async def collect(ctx: TaskContext, count: int) -> list[Any]:
    return [await ctx.receive("in") for _ in range(count)]


async def stored(engine: AsyncEngine) -> Sequence[Row[Any]]:
    async with engine.connect() as connection:
        return (await connection.execute(select(Message.__table__).order_by(Message.seq))).all()


async def test_messages_are_received_in_order_and_once(run: Runner, engine: AsyncEngine) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found = [await ctx.receive("in"), await ctx.receive("in"), await ctx.receive("other", type=Approval)]
        if ctx.attempt == 1:
            raise Crash
        return [*found, await ctx.receive("in")]

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    for number in range(3):
        await run.durable.send(spawned, "in", number)
    await run.durable.send(spawned.task_id, "other", Approval("ann", 7))
    result = await run.wait(spawned)
    assert result.output == [0, 1, {"by": "ann", "at": 7}, 2]
    assert await stored(engine) == []
    assert await Rows(run.durable, spawned).waits() == []


async def test_sends_at_the_same_time_share_statements_and_keep_their_order(run: Runner) -> None:
    spawned = await run.spawn(collect, 200)
    await asyncio.gather(*(run.durable.send(TaskHandle(spawned.task_id), "in", number) for number in range(200)))
    assert (await run.wait(spawned)).output == list(range(200))


async def test_calls_at_the_same_time_receive_in_their_order(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        both = await asyncio.gather(ctx.receive("in"), ctx.receive("in"), ctx.receive("other"))
        return [*both, await ctx.receive("in")]

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("sleeping")
    async with AsyncSession(run.durable.engine) as session:
        for number in range(3):
            await run.durable.send_with(session, spawned, "in", number)
        await run.durable.send_with(session, spawned, "other")
        await session.commit()
    assert (await run.wait(spawned)).output == [0, 1, None, 2]


async def test_a_branch_that_waits_while_another_is_busy_receives(run: Runner, tally: Tally) -> None:
    arrived = asyncio.Event()

    async def busy() -> str:
        tally.add("busy")
        await arrived.wait()
        return "done"

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        async def listen() -> Any:
            message = await ctx.receive("in")
            arrived.set()
            return message

        return list(await asyncio.gather(ctx.step("busy", busy), listen()))

    spawned = await run.spawn(work)
    await eventually(lambda: Rows(run.durable, spawned).waits())
    await run.durable.send(spawned, "in", 5)
    assert (await run.wait(spawned)).output == ["done", 5]
    assert tally == ["busy"]


async def test_a_timeout_is_remembered_and_the_message_stays(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        try:
            await ctx.receive("in", timeout=0.05)
        except TaskTimeout as error:
            found = [str(error)]
        await ctx.await_event("go on")
        if ctx.attempt == 1:
            raise Crash
        return [*found, await ctx.receive("in")]

    spawned = await run.spawn(work)
    await eventually(lambda: Rows(run.durable, spawned).checkpoints("in"))
    await run.durable.send(spawned, "in", 1)
    await run.durable.emit_event("go on")
    [timeout, message] = (await run.wait(spawned)).output or []
    assert "A message of topic 'in'" in timeout
    assert message == 1


async def test_a_message_that_came_in_time_is_received_even_if_no_worker_saw_it_then(durable: Durable) -> None:
    @durable.task
    async def work(ctx: TaskContext) -> Any:
        return await ctx.receive("in", timeout=timedelta(hours=1))

    async with time_travel(durable) as clock:
        spawned = await durable.spawn(work)
        await run_until_idle(durable)
        await durable.send(spawned, "in", "in time")
        await clock.advance(timedelta(hours=2))
        late = await durable.spawn(work)
        await run_until_idle(durable)
        await clock.advance(timedelta(hours=2))
        await durable.send(late, "in", "late")
        await run_until_idle(durable)
        assert (await durable.wait_for_result(spawned)).output == "in time"
        # The attempts after the timeout wait anew, and find the message.
        assert (await durable.wait_for_result(late)).output == "late"


async def test_a_message_whose_hint_was_lost_is_found(run: Runner, engine: AsyncEngine) -> None:
    spawned = await run.spawn(collect, 1)
    idle = await run.spawn(collect, 1)
    await Rows(run.durable, spawned).until("sleeping")
    await Rows(run.durable, idle).until("sleeping")
    async with engine.begin() as connection:
        for task_id, topic in ((spawned.task_id, "in"), (idle.task_id, "unheard")):
            await connection.execute(
                text(
                    "INSERT INTO durable.messages (task_id, message_id, topic, payload, sent_at)"
                    " VALUES (:task_id, gen_random_uuid(), :topic, '1', now() - interval '1 min')"
                ),
                {"task_id": task_id, "topic": topic},
            )
    [worker] = run.durable.workers
    worker.maintenance.look_at_everything()
    assert (await run.wait(spawned)).output == [1]

    async def marked() -> bool:
        [message] = await stored(engine)
        return message.delivered_at is not None

    await eventually(marked)


async def test_tasks_send_to_each_other_exactly_once(run: Runner, tally: Tally) -> None:
    @task
    async def answer(ctx: TaskContext) -> None:
        for _ in range(3):
            sender, number = await ctx.receive("question")
            await ctx.send(uuid.UUID(sender), "answer", number * 2)

    @task
    async def ask(ctx: TaskContext) -> list[Any]:
        other = await ctx.spawn("other", answer)
        answers = []
        for number in range(3):
            await ctx.send(other, "question", [str(ctx.task_id), number])
            tally.add((ctx.attempt, number))
            if ctx.attempt == number + 1:
                raise Crash
            answers.append(await ctx.receive("answer", type=int))
        await ctx.join(other)
        return answers

    run.durable.register(answer)
    assert await run(ask, max_attempts=10) == [0, 2, 4]
    # An attempt that suspends, which is a matter of time, sends the same once more.
    assert set(tally) == {(1, 0), (2, 0), (2, 1), *itertools.product((3, 4), range(3))}


async def test_a_task_may_send_to_itself(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> Any:
        await ctx.send(TaskHandle[Any](ctx.task_id), "note", {"a": [1]}, idempotency_key="once")
        await ctx.send(ctx.task_id, "note", "not sent", idempotency_key="once")
        await ctx.send(ctx.task_id, "note", "second")
        return [await ctx.receive("note"), await ctx.receive("note")]

    assert await run(work) == [{"a": [1]}, "second"]


async def test_a_reply_that_comes_at_once_is_received_without_a_suspension(
    run: Runner, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversing, "PATIENCE", 20.0)

    @task
    async def answer(ctx: TaskContext) -> None:
        sender = uuid.UUID(await ctx.receive("question"))
        await ctx.send(sender, "other", "unheard")
        await ctx.send(sender, "answer", "yes")

    @task
    async def ask(ctx: TaskContext, other: uuid.UUID) -> Any:
        tally.add("begun")
        await ctx.send(other, "question", str(ctx.task_id))
        return await ctx.receive("answer")

    other = await run.spawn(answer)
    await Rows(run.durable, other).until("sleeping")
    asking = await run.spawn(ask, other.task_id)
    assert (await run.wait(asking)).output == "yes"
    assert tally == ["begun"]


async def test_a_conversation_goes_on_no_longer_than_a_timeout(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversing, "PATIENCE", 60.0)

    @task
    async def work(ctx: TaskContext) -> str:
        await ctx.send(ctx.task_id, "other")
        try:
            await ctx.receive("in", timeout=0.02)
        except TaskTimeout as error:
            return str(error)
        return "received"

    assert "longer than 0.02 s" in await run(work)


async def test_a_message_that_comes_while_a_task_suspends_is_received(
    run: Runner, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    [worker] = run.durable.workers
    execute = worker._writer_connection.execute
    sent: list[uuid.UUID] = []

    async def late(statement: Any, parameters: Any) -> Any:
        if statement is suspending.SUSPEND and not sent:
            sent.extend(parameters["task_ids"])
            async with engine.begin() as connection:
                await connection.execute(
                    text(
                        "INSERT INTO durable.messages (task_id, message_id, topic, payload)"
                        " VALUES (:task_id, gen_random_uuid(), 'in', '1')"
                    ),
                    {"task_id": sent[0]},
                )
        return await execute(statement, parameters)

    async def blind(*_: object) -> None:
        """Find no messages whose hints were lost."""

    monkeypatch.setattr(worker._writer_connection, "execute", late)
    monkeypatch.setattr(worker.maintenance._wakeups, "look_for_messages", blind)
    monkeypatch.setattr(worker.maintenance, "_repair", blind)
    spawned = await run.spawn(collect, 1)
    assert (await run.wait(spawned)).output == [1]
    assert sent == [spawned.task_id]


async def test_a_delivery_without_a_message_locks_nothing(run: Runner, engine: AsyncEngine) -> None:
    spawned = await run.spawn(collect, 1)
    await Rows(run.durable, spawned).until("sleeping")
    async with HeldConnection(run.durable.database) as held, engine.connect() as connection:
        for statement in (messages.DELIVER, messages.WAKE_RACING):
            async with connection.begin():
                await connection.execute(statement, {"task_ids": [spawned.task_id]})
                # A claim passes over a task whose row is locked, and nothing would make it come back soon.
                query = text("SELECT 1 FROM durable.tasks FOR UPDATE SKIP LOCKED")
                assert len(await held.execute(query, {})) == 1


async def test_what_cannot_be_sent_or_received_is_refused(run: Runner, engine: AsyncEngine) -> None:
    durable = run.durable
    ended = await run.spawn(collect, 0)
    await run.wait(ended)
    waiting = await run.spawn(collect, 1)
    with pytest.raises(InvalidState, match=r"is completed\. Only a task that has not ended receives"):
        await durable.send(ended, "in")
    unknown = uuid.uuid4()
    with pytest.raises(TaskNotFound, match=str(unknown)):
        await durable.send(unknown, "in")
    for topic in ("", "$in", "a\n", "x" * 201, 5):
        with pytest.raises(InvalidName):
            await durable.send(waiting, topic)  # type: ignore[arg-type]
    with pytest.raises(InvalidName):
        await durable.send(waiting, "in", idempotency_key="x" * 256)
    with pytest.raises(SerializationError):
        await durable.send(waiting, "in", float("nan"))
    with pytest.raises(PayloadTooLarge):
        await Durable(engine, max_payload_bytes=10).send(waiting, "in", "x" * 11)
    with pytest.raises(TypeError, match="a task is named by"):
        await durable.send("order-7", "in")  # type: ignore[arg-type]
    async with AsyncSession(engine) as session:
        with pytest.raises(InvalidState):
            await durable.send_with(session, ended, "in")
        with pytest.raises(TaskNotFound):
            await durable.send_with(session, unknown, "in")
        # The transaction is still usable.
        await durable.send_with(session, waiting, "in", "the only one")
        await session.commit()
    assert (await run.wait(waiting)).output == ["the only one"]
    assert await stored(engine) == []


async def test_a_task_that_sends_to_one_that_cannot_receive_is_told(run: Runner) -> None:
    ended = await run.spawn(collect, 1)
    await run.durable.send(ended, "in", idempotency_key="known")
    await run.wait(ended)

    @task
    async def work(ctx: TaskContext, receiver: uuid.UUID) -> str:
        try:
            await ctx.send(receiver, "in", idempotency_key="known")
            await ctx.send(receiver, "in", idempotency_key="new")
        except InvalidState as error:
            return str(error)
        return "sent"

    assert "is completed" in await run(work, ended.task_id)
    error = await run.failure(work, uuid.uuid4(), max_attempts=5)
    assert error.name == "TaskNotFound"


async def test_receiving_inside_a_step_is_refused(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> str:
        await ctx.send(ctx.task_id, "in", 1)

        async def body() -> None:
            await ctx.receive("in")

        try:
            await ctx.step("body", body)
        except InvalidState as error:
            return f"{error} {await ctx.receive('in')}"
        return "received"

    assert (await run(work)).startswith("Message 'in' is called inside a step or transaction")
    assert (await run(work)).endswith(" 1")


async def test_a_message_of_another_type_counts_as_received(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> int:
        while True:
            try:
                return await ctx.receive("in", type=int)
            except SerializationError:
                continue

    spawned = await run.spawn(work)
    await run.durable.send(spawned, "in", "five")
    await run.durable.send(spawned, "in", 5)
    assert (await run.wait(spawned)).output == 5


async def test_a_message_of_a_transaction_is_seen_after_its_commit_alone(
    run: Runner, engine: AsyncEngine, sync_engine: Engine
) -> None:
    spawned = await run.spawn(collect, 2)
    ending = await run.spawn(collect, 1)
    await Rows(run.durable, spawned).until("sleeping")
    async with AsyncSession(engine) as session:
        await run.durable.send_with(session, spawned, "in", "rolled back")
        await session.rollback()
        await run.durable.send_with(session, ending, "in", "uncommitted")
        # The open transaction locks no task: this one is received, and ends it.
        await run.durable.send(ending, "in", "committed")
        assert (await run.wait(ending)).output == ["committed"]
        await session.commit()
    with Session(sync_engine) as sync_session:
        run.durable.send_with(sync_session, spawned, "in", "first")
        sync_session.commit()
    with sync_engine.connect() as connection:
        run.durable.send_with(connection, spawned, "in", "second")
        connection.commit()
    assert (await run.wait(spawned)).output == ["first", "second"]


async def test_a_key_counts_once_for_a_task_also_after_it_was_received(run: Runner, engine: AsyncEngine) -> None:
    send = run.durable.send
    spawned, other = await run.spawn(collect, 2), await run.spawn(collect, 1)
    await send(spawned, "in", 1, idempotency_key="a")
    await send(spawned, "in", 1, idempotency_key="a")

    async def received() -> bool:
        return all(message.received_at is not None for message in await stored(engine))

    await eventually(received)
    [kept] = await stored(engine)
    assert (kept.payload, kept.idempotency_key) == (None, "a")
    await send(spawned, "in", 1, idempotency_key="a")
    await send(other, "in", 3, idempotency_key="a")
    await send(spawned, "in", 2, idempotency_key="b")
    assert (await run.wait(spawned)).output == [1, 2]
    assert (await run.wait(other)).output == [3]


async def test_an_open_transaction_with_the_same_key_delays_no_other_message(run: Runner, engine: AsyncEngine) -> None:
    spawned, other = await run.spawn(collect, 1), await run.spawn(collect, 2)
    async with AsyncSession(engine) as session:
        await run.durable.send_with(session, spawned, "in", "mine", idempotency_key="a")
        second = asyncio.ensure_future(run.durable.send(spawned, "in", "yours", idempotency_key="a"))
        await run.durable.send(other, "in", 1, idempotency_key="b")
        await run.durable.send(other, "in", 2)
        assert (await run.wait(other)).output == [1, 2]
        assert not second.done()
        await session.commit()
    assert (await run.wait(spawned)).output == ["mine"]
    # Its key is known, although the task has ended meanwhile.
    await second
    with pytest.raises(InvalidState):
        await run.durable.send(spawned, "in", "later", idempotency_key="b")


@pytest.mark.parametrize("fate", ["executed", "not executed"])
async def test_a_send_without_a_reply_is_not_sent_twice(
    run: Runner, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    spawned = await run.spawn(collect, 2)
    await Rows(run.durable, spawned).until("sleeping")
    execute_once = HeldConnection.execute_once
    lost: list[str] = []

    async def silent(self: HeldConnection, statement: Any, parameters: Any) -> Any:
        if lost:
            return await execute_once(self, statement, parameters)
        lost.append(fate)
        if fate == "executed":
            await execute_once(self, statement, parameters)
            [worker] = run.durable.workers
            worker.offer(Hint().add_receivers([spawned.task_id]))
            # It is received, and so deleted, before the sender tries once more.
            await eventually(lambda: Rows(run.durable, spawned).checkpoints("in"))
        raise ConnectionError

    monkeypatch.setattr(HeldConnection, "execute_once", silent)
    await run.durable.send(spawned, "in", 1)
    await run.durable.send(spawned, "in", 2)
    assert lost == [fate]
    assert (await run.wait(spawned)).output == [1, 2]


async def test_a_statement_that_is_repeated_receives_nothing_more(durable: Durable) -> None:
    durable.register(collect)
    spawned = await durable.spawn(collect, 1)
    for number in range(2):
        await durable.send(spawned, "in", number)
    parameters = {"task_ids": [spawned.task_id], "fences": [0], "keys": [uuid.uuid4()], "topics": ["in"]}
    [row] = await durable.database.execute(messages.RECEIVE, parameters)
    assert (row.found, row.value) == (True, "0")
    assert await durable.database.execute(messages.RECEIVE, parameters) == []
    lost = {**parameters, "keys": [uuid.uuid4()], "fences": [1]}
    assert await durable.database.execute(messages.RECEIVE, lost) == []
    assert len(await stored(durable.engine)) == 1


async def test_a_locked_message_is_not_passed_over(durable: Durable) -> None:
    durable.register(collect)
    spawned = await durable.spawn(collect, 1)
    for number in range(2):
        await durable.send(spawned, "in", number)
    parameters = {"task_ids": [spawned.task_id], "fences": [0], "keys": [uuid.uuid4()], "topics": ["in"]}
    async with durable.engine.begin() as connection:
        await connection.execute(text("UPDATE durable.messages SET delivered_at = now() WHERE payload::text = '0'"))
        [row] = await durable.database.execute(messages.RECEIVE, parameters)
        assert not row.found
    [row] = await durable.database.execute(messages.RECEIVE, parameters)
    assert (row.found, row.value) == (True, "0")


async def test_a_retried_task_receives_what_was_not_received(run: Runner) -> None:
    @task
    async def work(ctx: TaskContext) -> list[Any]:
        first = await ctx.receive("in")
        async with asyncio.timeout(5):
            await ctx.step("gate", gate)
        return [first, await ctx.receive("in")]

    broken = True

    async def gate() -> None:
        if broken:
            raise Crash

    spawned = await run.spawn(work, max_attempts=1)
    await Rows(run.durable, spawned).until("sleeping")
    async with AsyncSession(run.durable.engine) as session:
        for number in range(2):
            await run.durable.send_with(session, spawned, "in", number)
        await session.commit()
    assert (await run.wait(spawned)).error is not None
    broken = False
    await run.durable.retry_task(spawned)
    assert (await run.wait(spawned)).output == [0, 1]


async def test_messages_are_deleted_with_their_task(durable: Durable, engine: AsyncEngine) -> None:
    durable.register(collect)
    await durable.create_queue("west")
    every: list[Any] = [{}, {"queue_name": "west"}]
    for options in every:
        spawned = await durable.spawn(collect, 5, **options)
        await durable.send(spawned, "in", 1)
        await durable.send(spawned, "in", 2, idempotency_key="b")
        await durable.cancel_task(spawned)
    assert len(await stored(engine)) == 4
    assert await durable.cleanup_tasks(0) == 1
    assert len(await stored(engine)) == 2
    await durable.drop_queue("west")
    assert await stored(engine) == []


async def test_def_tasks_send_and_receive(run: Runner) -> None:
    @task
    def work(ctx: SyncTaskContext) -> list[Any]:
        ctx.send(ctx.task_id, "in", 1)
        found = [ctx.receive("in", type=int)]
        try:
            ctx.receive("in", timeout=0)
        except TaskTimeout:
            found.append(0)
        return [*found, ctx.receive("in")]

    spawned = await run.spawn(work)
    await eventually(lambda: Rows(run.durable, spawned).waits())
    await run.durable.send(spawned, "in", 2)
    assert (await run.wait(spawned)).output == [1, 0, 2]


async def test_a_context_without_a_database_receives_and_sends() -> None:
    other = uuid.uuid4()

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        await ctx.send(other, "news", Approval("ann", 7), idempotency_key="a")
        await ctx.send(ctx.task_id, "in", 3)
        found = [await ctx.receive("in"), await ctx.receive("in"), await ctx.receive("in")]
        with pytest.raises(TaskTimeout):
            await ctx.receive("in", timeout=60)
        return found

    ctx = task_context(messages={"in": [1, 2]})
    assert await work(ctx) == [1, 2, 3]
    sent = ctx.recorded.sent
    assert [(message.task_id, message.topic, message.payload) for message in sent] == [
        (other, "news", {"by": "ann", "at": 7}),
        (ctx.task_id, "in", 3),
    ]
    with pytest.raises(InvalidState, match=r"task_context\(messages="):
        await ctx.receive("in")


def test_a_hint_names_receivers_unless_there_are_many() -> None:
    receivers = [uuid.uuid4() for _ in range(MAX_RECEIVERS + 1)]
    hint = Hint().add_receivers(receivers[:-1])
    hint.merge(Hint(events=True))
    again = Hint.decode(hint.encode())
    assert again == hint
    hint.merge(Hint().add_receivers(receivers[-1:]))
    assert not hint.receivers
    assert Hint.decode(hint.encode()) == Hint(events=True, messages=True)
    # Earlier versions read the payloads of all others.
    assert Hint(events=True).encode() == "[[],1,0,0]"
    for payload in ("[[],1,0,0,5]", "[[],1,0,0,[5],0]", '[[],1,0,0,["x"],0]'):
        assert Hint.decode(payload) is None
