"""Database roles with the grants of `durable roles`: they can do what they are for, and nothing else."""

import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from durable_sa import (
    Durable,
    IdempotencyConflict,
    InvalidConfiguration,
    QueueNotFound,
    Spawn,
    TaskContext,
    TaskStatus,
    current_context,
    step,
    task,
)
from durable_sa.migrations.roles import OPERATOR, PRODUCER, ROLES, WORKER, grants
from durable_sa.migrations.sql import quoted, verbatim
from durable_sa.models import metadata
from durable_sa.statements import messages
from durable_sa.testing import run_until_idle, time_travel
from tests.cli.support import CommandLine
from tests.support import eventually

PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
PASSWORD = secrets.token_urlsafe()


@task
async def child(ctx: TaskContext, number: int) -> int:
    return await ctx.step("double", double, number)


async def double(number: int) -> int:
    return 2 * number


@task
async def everything(ctx: TaskContext, number: int) -> int:
    handle = await ctx.spawn("child", child, number)
    await ctx.sleep_for("nap", 60)
    await ctx.emit_event(f"event-{ctx.task_id}", number)
    await ctx.await_event(f"event-{ctx.task_id}")
    await ctx.transaction("note", note)
    await ctx.send(ctx.task_id, "note", number)
    await ctx.send(ctx.task_id, "note", number, idempotency_key="once")
    await ctx.receive("note")
    await ctx.race("race", note=ctx.receive("note"), late=ctx.sleep_for("late", 60))
    await ctx.publish("number", number)
    for part in ("first", "second"):
        await ctx.step(part, stream, ctx.task_id)
    return await ctx.join(handle)


@step(max_attempts=2)
async def stream(task_id: UUID) -> None:
    async with current_context().stream("stream", keep_open=True) as stream:
        await stream.write(1)
    if task_id not in tried:
        tried.add(task_id)
        raise ValueError


tried: set[UUID] = set()


async def note(session: AsyncSession) -> int:
    return int(await session.scalar(text("SELECT 1")) or 0)


@task(max_attempts=2)
async def failing(ctx: TaskContext) -> None:
    raise ValueError


@task(max_attempts=1)
async def waiting(ctx: TaskContext) -> None:
    await ctx.await_event("never", timeout=3600)


@task
async def parent(ctx: TaskContext) -> None:
    await ctx.join(await ctx.spawn("waiting", waiting))


TASKS = [everything, child, failing, waiting, parent]


@dataclass
class Database:
    """A schema of durable's tables, and roles that own it, or may use it."""

    url: URL
    schema: str
    names: dict[str, str]

    def engine(self, kind: str) -> AsyncEngine:
        return create_async_engine(self.url.set(username=self.names[kind], password=PASSWORD))

    def client(self, kind: str) -> Durable:
        url = self.url.set(username=self.names[kind], password=PASSWORD)
        return Durable(url, schema=self.schema, tasks=TASKS)

    async def as_owner(self, *statements: str) -> None:
        engine = self.engine("owner")
        async with engine.begin() as connection:
            for statement in statements:
                await connection.execute(verbatim(statement))
        await engine.dispose()

    def table(self, name: str) -> str:
        return f"{quoted(self.schema)}.{name}"


@pytest.fixture(params=["durable", 'my "jobs"'])
async def roles(request: pytest.FixtureRequest, database_url: URL) -> AsyncGenerator[Database]:
    """Set up by the command, as the owner, who is no superuser."""
    token = secrets.token_hex(4)
    names = {kind: f'{kind} "{token}"' for kind in ("owner", *ROLES)}
    admin = create_async_engine(database_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(text("DROP SCHEMA durable CASCADE"))
        for name in names.values():
            await connection.execute(verbatim(f"CREATE ROLE {quoted(name)} LOGIN PASSWORD '{PASSWORD}'"))
        await connection.execute(
            verbatim(f"GRANT CREATE ON DATABASE {quoted(str(database_url.database))} TO {quoted(names['owner'])}")
        )
    database = Database(database_url, request.param, names)
    async with database.client("owner") as owner:
        await owner.migrate()
    try:
        cli = CommandLine(database_url.set(username=names["owner"], password=PASSWORD))
        arguments = [argument for kind in ROLES for argument in (f"--{kind}", names[kind])]
        done = await cli("roles", *arguments, "--schema", database.schema, "--apply")
        assert done.code == 0, done.stderr
        yield database
    finally:
        async with admin.connect() as connection:
            for name in names.values():
                await connection.execute(verbatim(f"DROP OWNED BY {quoted(name)} CASCADE"))
                await connection.execute(verbatim(f"DROP ROLE {quoted(name)}"))
        await admin.dispose()


durable_schema = pytest.mark.parametrize("roles", ["durable"], indirect=True)


async def produce(durable: Durable) -> None:
    """All that an application does that is no worker."""
    spawned = await durable.spawn(everything, 1, idempotency_key="once")
    assert (await durable.spawn(everything, 1, idempotency_key="once")).task_id == spawned.task_id
    with pytest.raises(IdempotencyConflict):
        await durable.spawn(everything, 2, idempotency_key="once")
    with pytest.raises(QueueNotFound):
        await durable.spawn_many([Spawn(waiting), Spawn(waiting, queue_name="nowhere")])
    async with AsyncSession(durable.engine) as session, session.begin():
        await durable.spawn_with(session, waiting)
        await durable.emit_event_with(session, "in a transaction")
    assert await durable.emit_event("first", {"a": 1})
    assert not await durable.emit_event("first")
    await durable.send(spawned, "topic", {"a": 1})
    for _ in range(2):
        await durable.send(spawned, "topic", idempotency_key="once")
    asked = {"message_ids": [spawned.run_id], "receiver_ids": [spawned.task_id]}
    assert await durable.database.execute(messages.SENT, asked) == []
    assert await durable.get_value(spawned, "name") is None
    assert [item async for item in durable.read_stream(spawned, "name", follow=False)] == []
    assert await durable.cancel_task(spawned) is TaskStatus.CANCELLED
    result = await durable.wait_for_result(spawned, timeout=20)
    assert result.status is TaskStatus.CANCELLED
    assert await durable.count_unclaimed_ready_tasks() >= 1


@pytest.mark.slow
async def test_a_producer_spawns_emits_cancels_and_asks_for_results(roles: Database) -> None:
    async with roles.client("producer") as producer, roles.client("worker") as worker:
        await produce(producer)
        # One whose parent waits for it.
        family = await producer.spawn(parent)
        await run_until_idle(worker)
        async with producer.engine.connect() as connection:
            query = verbatim(f"SELECT task_id FROM {roles.table('tasks')} WHERE parent_task_id = '{family.task_id}'")
            (child_id,) = (await connection.scalars(query)).all()
        await producer.cancel_task(child_id)
        await run_until_idle(worker)
        result = await producer.get_task_result(family)
    assert result is not None
    assert result.error is not None
    assert result.error.name == "ChildCancelled"


@pytest.mark.slow
async def test_a_worker_runs_everything(roles: Database) -> None:
    async with roles.client("operator") as operator:
        await operator.create_queue("default", retention=timedelta(days=1), event_retention=timedelta(days=1))
        await operator.create_schedule("often", task=child, params=1, cron_expression="* * * * *")
    async with roles.client("producer") as producer, roles.client("worker") as worker:
        spawned = await producer.spawn(everything, 4)
        failed = await producer.spawn(failing, retry_strategy=None)
        overdue = await producer.spawn(waiting)
        await run_until_idle(worker)

        async def gone() -> bool:
            return [await producer.get_task_result(one) for one in (spawned, failed, overdue)] == [None] * 3

        async with time_travel(worker) as clock:
            # Retries, timeouts and ticks; then all of it is past its retention.
            for _ in range(2):
                await clock.advance(timedelta(hours=2))
                await run_until_idle(worker)
            assert (await producer.wait_for_result(spawned, timeout=20)).output == 8
            async with worker.worker():
                await clock.advance(timedelta(days=2))
                await eventually(gone)


async def test_a_worker_takes_over_from_one_that_fell_silent(roles: Database) -> None:
    async with roles.client("producer") as producer, roles.client("worker") as worker:
        spawned = await producer.spawn(child, 1)
        lost = "01900000-0000-7000-8000-000000000000"
        await roles.as_owner(
            f"INSERT INTO {roles.table('workers')} (worker_id, name, queue_names, claim_timeout, expires_at)"
            f" VALUES ('{lost}', 'lost', '{{default}}', '1 s', now() - interval '1 s')",
            f"UPDATE {roles.table('tasks')} SET state = 'running', claimed_by = '{lost}', fence = 1,"
            " attempt = 1, started_at = now(), first_started_at = now()",
        )
        await run_until_idle(worker)
        assert (await producer.wait_for_result(spawned, timeout=20)).output == 2


@pytest.mark.slow
async def test_an_operator_puts_things_right(roles: Database) -> None:
    url = roles.url.set(username=roles.names["operator"], password=PASSWORD)
    operator = CommandLine(url)

    async def run(*arguments: str) -> None:
        done = await operator(*arguments, "--schema", roles.schema)
        assert done.code == 0, done.stderr

    async with roles.client("producer") as producer, roles.client("worker") as worker:
        spawned = await producer.spawn(failing, retry_strategy=None, max_attempts=1)
        await run_until_idle(worker)
        await run("tasks", "retry", str(spawned.task_id))
        await run("queues", "create", "other", "--retention", "7d")
        await run("queues", "pause", "other")
        await run("queues", "drop", "other", "--yes")
        await run("tasks", "list")
        await run("tasks", "show", str(spawned.task_id))
        await run("events", "emit", "ready")
        await run_until_idle(worker)
        await run("doctor")
        await run("cleanup", "--older-than", "0s")
        await run("schedules", "list")
    async with roles.client("operator") as durable:
        await durable.create_schedule("daily", task=child, params=1, cron_expression="0 0 * * *")
        await durable.pause_schedule("daily")
        await durable.delete_schedule("daily")


@pytest.mark.parametrize("kind", ROLES)
async def test_the_grants_are_those_that_are_listed_and_no_others(roles: Database, kind: str) -> None:
    engine = roles.engine(kind)
    async with engine.connect() as connection:
        for table in (table.name for table in metadata.tables.values()):
            listed = set(ROLES[kind].get(table, "").split(", ")) - {""}
            held = {privilege for privilege in PRIVILEGES if await holds(connection, roles.table(table), privilege)}
            assert held == listed, table
        with pytest.raises(ProgrammingError, match="permission denied"):
            await connection.execute(verbatim(f"CREATE TABLE {roles.table('mine')} ()"))
    await engine.dispose()


async def holds(connection: AsyncConnection, table: str, privilege: str) -> bool:
    query = text("SELECT has_table_privilege(:name, :privilege)")
    return bool(await connection.scalar(query, {"name": table, "privilege": privilege}))


NEEDED = [(table, privilege) for table, listed in PRODUCER.items() for privilege in listed.split(", ")]


@durable_schema
@pytest.mark.slow
async def test_a_producer_has_nothing_that_it_does_not_need(roles: Database) -> None:
    """Without any of its privileges, something fails."""
    unneeded = []
    role = quoted(roles.names["producer"])
    for table, privilege in NEEDED:
        await roles.as_owner(f"TRUNCATE {roles.table('tasks')}, {roles.table('events')}")
        async with roles.client("producer") as producer, roles.client("worker") as worker:
            family = await producer.spawn(parent)
            await run_until_idle(worker)
            await roles.as_owner(f"REVOKE {privilege} ON {roles.table(table)} FROM {role}")
            try:
                await produce(producer)
                await producer.cancel_task(await child_of(worker, family.task_id))
                unneeded.append((table, privilege))
            except ProgrammingError as error:
                assert "permission denied" in str(error)
            await roles.as_owner(f"GRANT {privilege} ON {roles.table(table)} TO {role}")
    assert unneeded == []


async def child_of(durable: Durable, task_id: UUID) -> UUID:
    async with durable.engine.connect() as connection:
        query = text("SELECT task_id FROM durable.tasks WHERE parent_task_id = :id")
        found: UUID = (await connection.scalars(query, {"id": task_id})).one()
        return found


async def test_the_command_prints_what_it_would_do(database_url: URL) -> None:
    cli = CommandLine(database_url)
    printed = (await cli("roles", "--producer", "web", "--worker", "jobs")).stdout
    assert printed.startswith("BEGIN;\n")
    assert 'GRANT SELECT, UPDATE ON "durable".schedules TO "jobs";\n' in printed
    assert (await cli("roles", "--worker", "jobs", "--json")).json == {"statements": grants({"worker": "jobs"})}


async def test_what_cannot_be_is_refused(database_url: URL) -> None:
    cli = CommandLine(database_url)
    assert (await cli("roles")).code == 2
    missing = await cli("roles", "--worker", "nobody at all", "--apply")
    assert (missing.code, 'role "nobody at all" does not exist' in missing.stderr) == (1, True)
    with pytest.raises(InvalidConfiguration, match="no kind 'admin'"):
        grants({"admin": "me"})


def test_every_table_is_thought_of() -> None:
    tables = {table.name for table in metadata.tables.values()}
    assert set(OPERATOR) == tables
    assert set(PRODUCER) | set(WORKER) <= tables
