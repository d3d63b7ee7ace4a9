"""What type checkers make of the client: read by them, never run. The ignored lines must be errors."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Coroutine
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session

from durable_sa import Durable, Spawn, SpawnResult, Task, TaskContext, TaskHandle, TaskInfo, TaskPollResult, TaskStatus
from durable_sa.testing import assert_spawned, run_spawned, spawned

from .tasks import Params, Result, Special, State, bare, optional, without_params

durable = Durable[State]()


@durable.task
async def registered(ctx: TaskContext[State], params: int) -> str:
    return ""


assert_type(registered, Task[int, str])
assert_type(durable.register(bare), Task[Params, Result])


async def spawning(name: str) -> None:
    made = await durable.spawn(bare, Params(query="x"), priority=1, idempotency_key="k")
    assert_type(made, SpawnResult[Result])
    assert_type(await durable.spawn(bare, Special(query="x", more=1)), SpawnResult[Result])
    assert_type(await durable.spawn(without_params), SpawnResult[int])
    assert_type(await durable.spawn(without_params, delay=5), SpawnResult[int])
    assert_type(await durable.spawn(optional), SpawnResult[str])
    assert_type(await durable.spawn_by_name(name, {"a": 1}, unchecked=True), SpawnResult[Any])
    many = await durable.spawn_many([(bare, Params(query="x")), Spawn(without_params, delay=5)])
    assert_type(many, list[SpawnResult[Any]])

    await durable.spawn(bare)  # type: ignore[arg-type]
    await durable.spawn(bare, "x")  # type: ignore[arg-type]
    await durable.spawn(without_params, 5)  # type: ignore[arg-type]
    await durable.spawn(bare, Params(query="x"), priorty=1)  # type: ignore[call-overload]
    await durable.spawn(bare, Params(query="x"), max_attempts="3")  # type: ignore[call-overload]
    await durable.spawn("bare", Params(query="x"))  # type: ignore[call-overload]
    durable.spawn(without_params)  # type: ignore[unused-coroutine]


async def results(spawned: SpawnResult[Result], handle: TaskHandle[int], task_id: UUID) -> None:
    assert_type(await durable.get_task_result(spawned), TaskPollResult[Result] | None)
    assert_type(await durable.wait_for_result(spawned, timeout=5), TaskPollResult[Result])
    assert_type(await durable.wait_for_result(handle), TaskPollResult[int])
    assert_type(await durable.wait_for_result(task_id), TaskPollResult[Any])
    assert_type(await durable.cancel_task(handle), TaskStatus)
    _ = (await durable.get_task_result(spawned)).output  # type: ignore[union-attr]


async def in_an_asynchronous_transaction(
    session: AsyncSession, scoped: async_scoped_session[AsyncSession], connection: AsyncConnection
) -> None:
    pending: Coroutine[Any, Any, SpawnResult[Result]]
    pending = durable.spawn_with(session, bare, Params(query="x"), priority=1)
    made = await pending
    assert_type(made, SpawnResult[Result])
    assert_type(await durable.spawn_with(scoped, without_params), SpawnResult[int])
    assert_type(await durable.spawn_with(connection, optional), SpawnResult[str])
    assert_type(await durable.spawn_by_name_with(session, "bare", {}), SpawnResult[Any])
    assert_type(await durable.spawn_many_with(session, [(without_params, None)]), list[SpawnResult[Any]])
    assert_type(await durable.emit_event_with(session, "e", 1), bool)
    assert_type(await durable.cancel_task_with(session, UUID(int=1)), TaskStatus)
    assert_type(await durable.retry_task_with(scoped, UUID(int=1)), TaskStatus)
    assert_type(await durable.get_task_result_with(session, made), TaskPollResult[Result] | None)
    assert_type(await durable.get_task_result_with(connection, UUID(int=1)), TaskPollResult[Any] | None)
    assert_type(await spawned(session), list[TaskInfo])
    assert_type(await assert_spawned(connection, bare), TaskInfo)
    assert_type(await run_spawned(session, durable), list[TaskInfo])

    await durable.spawn_with(session, bare)  # type: ignore[arg-type]
    await durable.spawn_with(session, bare, "x")  # type: ignore[arg-type]
    await durable.spawn_with(session, without_params, priorty=1)  # type: ignore[call-overload]


async def without_await(
    session: AsyncSession, scoped: async_scoped_session[AsyncSession], connection: AsyncConnection, task_id: UUID
) -> None:
    """What would never be executed."""
    durable.spawn_with(session, without_params)  # type: ignore[unused-coroutine]
    durable.spawn_with(scoped, bare, Params(query="x"))  # type: ignore[unused-coroutine]
    durable.spawn_by_name_with(connection, "bare", {})  # type: ignore[unused-coroutine]
    durable.spawn_many_with(session, [(without_params, None)])  # type: ignore[unused-coroutine]
    durable.emit_event_with(session, "e")  # type: ignore[unused-coroutine]
    durable.cancel_task_with(session, task_id)  # type: ignore[unused-coroutine]
    _ = durable.spawn_with(session, without_params).task_id  # type: ignore[attr-defined]


def in_a_synchronous_transaction(
    session: Session, scoped: scoped_session[Session], connection: Connection, task_id: UUID
) -> None:
    assert_type(durable.spawn_with(session, bare, Params(query="x"), priority=1), SpawnResult[Result])
    assert_type(durable.spawn_with(scoped, without_params), SpawnResult[int])
    assert_type(durable.spawn_with(connection, optional), SpawnResult[str])
    assert_type(durable.spawn_by_name_with(session, "bare", {}), SpawnResult[Any])
    assert_type(durable.spawn_many_with(session, [(without_params, None)]), list[SpawnResult[Any]])
    assert_type(durable.emit_event_with(session, "e", 1), bool)
    assert_type(durable.cancel_task_with(session, task_id), TaskStatus)
    assert_type(durable.retry_task_with(scoped, task_id), TaskStatus)
    assert_type(durable.get_task_result_with(session, TaskHandle[int](task_id)), TaskPollResult[int] | None)
    assert_type(durable.get_task_result_with(connection, task_id), TaskPollResult[Any] | None)
    assert_type(durable.wait_for_result_sync(TaskHandle[int](task_id), timeout=1), TaskPollResult[int])
    assert_type(spawned(scoped), list[TaskInfo])
    assert_type(assert_spawned(session, "bare", {}), TaskInfo)
    assert_type(run_spawned(connection), list[TaskInfo])
    Durable[None](sync_bind=scoped)

    durable.spawn_with(session, bare)  # type: ignore[arg-type]
    durable.spawn_with(session, bare, "x")  # type: ignore[arg-type]


async def what_is_no_executor(
    engine: Engine, async_engine: AsyncEngine, maker: async_sessionmaker[AsyncSession], session: Session
) -> None:
    durable.spawn_with(engine, without_params)  # type: ignore[call-overload]
    durable.spawn_with(async_engine, without_params)  # type: ignore[call-overload]
    durable.spawn_with(maker, without_params)  # type: ignore[call-overload]
    await durable.spawn_with(session, without_params)  # type: ignore[misc]
