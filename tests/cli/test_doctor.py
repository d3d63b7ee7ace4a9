"""`durable doctor`: finds each thing that should not be, and nothing where all is well."""

import json
import re
import uuid
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, text, update
from sqlalchemy.ext.asyncio import create_async_engine

from durable_sa import Durable, TaskContext
from durable_sa.models import Checkpoint, Event, Queue, Run, Schedule, Task, Wait, WorkerRow
from durable_sa.testing.database import TestServer
from tests.cli.support import CommandLine
from tests.support import eventually

AGO = text("now() - interval '1 hour'")


async def execute(durable: Durable, *statements: Any) -> None:
    async with durable.engine.begin() as connection:
        for statement in statements:
            await connection.execute(statement)


async def spawn(durable: Durable, **values: Any) -> uuid.UUID:
    """A task that is due in an hour, with columns as they are given."""
    task_id = (await durable.spawn_by_name("a", unchecked=True, delay=3600)).task_id
    if values:
        await execute(durable, update(Task).where(Task.task_id == task_id).values(**values))
    return task_id


async def findings(cli: CommandLine) -> dict[str, list[str]]:
    """What is found, by subject; the same for people as for programs."""
    result = await cli("doctor", "--grace", "1s")
    as_json = await cli("doctor", "--grace", "1s", "--json")
    assert "Traceback" not in result.stderr + as_json.stderr
    report = json.loads(as_json.stdout)
    assert result.code == as_json.code == (0 if report["ok"] else 1)
    found = {finding["subject"]: finding["problems"] for finding in report["findings"]}
    assert report["ok"] == (not found)
    for subject, problems in found.items():
        lines = [problem.replace("\n", "\\n") for problem in problems]
        assert all(ageless(f"FAIL\t{subject}\t{problem}\n") in ageless(result.stdout) for problem in lines)
    assert ("FAIL" in result.stdout) == bool(found)
    return found


def ageless(text: str) -> str:
    return re.sub(r"[\d.]+ s\b", "some s", text)


async def wait_row(task_id: uuid.UUID, **values: Any) -> Any:
    base = {"key": uuid.uuid4(), "kind": "event", "name": "e", "queue_name": "default", "created_at": AGO}
    return insert(Wait).values(task_id=task_id, **base, **values)


@pytest.mark.slow
async def test_all_is_well_with_a_worker_that_works(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def child(ctx: TaskContext) -> None:
        await ctx.await_event("go")

    @durable.task
    async def parent(ctx: TaskContext) -> None:
        await ctx.join(await ctx.spawn("child", child))

    async with durable.worker(worker_id="the-worker"):
        spawned = await durable.spawn(parent)

        async def all_wait() -> bool:
            row = (await cli("queues", "--json")).json[0]
            return bool(row["scheduled"] == 2)

        await eventually(all_wait)
        assert await findings(cli) == {}
        result = await cli("doctor")
        assert (result.code, result.stderr) == (0, "")
        assert "the-worker" in result.stdout
        await durable.emit_event("go")
        await durable.wait_for_result(spawned, timeout=10)
    assert await findings(cli) == {}


@pytest.mark.slow
async def test_work_that_nobody_claims(cli: CommandLine, durable: Durable) -> None:
    await spawn(durable, available_at=AGO)
    (problem,) = (await findings(cli))["due tasks"]
    assert problem.startswith("1 of 'a' in queue 'default' are due and unclaimed, the oldest for 1 h")
    assert problem.endswith("no worker serves the queue")
    async with durable.worker():
        assert (await findings(cli))["due tasks"][0].endswith("workers serve the queue")
    await execute(durable, update(Queue).values(paused_at=AGO))
    assert await findings(cli) == {}


async def test_waits_that_are_over(cli: CommandLine, durable: Durable) -> None:
    emitted = await spawn(durable, state="sleeping", available_at=None)
    timed_out = await spawn(durable, state="sleeping")
    ended = await spawn(durable, state="sleeping", available_at=None)
    missing = await spawn(durable, state="sleeping", available_at=None)
    waiting = await spawn(durable, state="sleeping", available_at=None)
    child = await spawn(durable, state="completed", outcome="completed", finished_at=AGO)
    await execute(
        durable,
        insert(Event).values(queue_name="default", name="came", emitted_at=AGO, delivered_at=AGO),
        await wait_row(emitted, event_name="came"),
        await wait_row(timed_out, event_name="late", due_at=AGO),
        (await wait_row(ended, child_task_id=child)).values(kind="join"),
        (await wait_row(missing, child_task_id=uuid.uuid4())).values(kind="join"),
        await wait_row(waiting, event_name="not yet"),
    )
    problems = (await findings(cli))["waits"]
    reasons = {
        emitted: "the event was emitted",
        timed_out: "its timeout is over",
        ended: "the child has ended",
        missing: "there is no such child",
    }
    assert len(problems) == len(reasons)
    for task_id, reason in reasons.items():
        (problem,) = [problem for problem in problems if str(task_id) in problem]
        assert problem.endswith(reason)


async def test_a_task_that_sleeps_for_ever(cli: CommandLine, durable: Durable) -> None:
    task_id = await spawn(durable, state="sleeping", available_at=None)
    assert await findings(cli) == {"sleepers": [f"task {task_id} (a) sleeps and waits for nothing"]}


async def test_an_event_that_is_not_delivered(cli: CommandLine, durable: Durable) -> None:
    await execute(durable, insert(Event).values(queue_name="default", name="e", emitted_at=AGO))
    assert await findings(cli) == {"events": ["event 'e' in queue 'default' has not been delivered for 1 h"]}


async def test_a_task_past_its_limit(cli: CommandLine, durable: Durable) -> None:
    task_id = await spawn(durable, cancel_at=AGO)
    assert await findings(cli) == {"time limits": [f"task {task_id} (a) is past its limit by 1 h"]}


async def test_runs_of_workers_that_are_gone(cli: CommandLine, durable: Durable) -> None:
    silent, unknown = uuid.uuid4(), uuid.uuid4()
    for worker_id in (silent, unknown):
        await spawn(durable, state="running", claimed_by=worker_id)
    await execute(
        durable,
        insert(WorkerRow).values(
            worker_id=silent, name="w1", queue_names=["default"], claim_timeout=text("'2 min'"), expires_at=AGO
        ),
    )
    problems = (await findings(cli))["leases"]
    assert sorted(problems) == [
        f"1 runs are held by worker {unknown}, which is unknown",
        "1 runs are held by worker w1, whose lease ended 1 h ago",
    ]


@pytest.mark.slow
async def test_columns_that_contradict_each_other(cli: CommandLine, durable: Durable) -> None:
    running = await spawn(durable, state="running")
    assert await findings(cli) == {"states": [f"task {running} (a) is running, which contradicts its lease"]}


@pytest.mark.slow
async def test_a_schedule_that_is_overdue(cli: CommandLine, durable: Durable) -> None:
    values = {"queue_name": "default", "task_name": "a", "cron_expression": "* * * * *", "next_tick_at": AGO}
    await execute(
        durable,
        insert(Schedule).values(name="due", **values),
        insert(Schedule).values(name="paused", paused_at=AGO, **values),
    )
    assert await findings(cli) == {"schedules": ["schedule 'due' of queue 'default' has been due for 1 h"]}


@pytest.mark.slow
async def test_rows_that_belong_to_nothing(cli: CommandLine, durable: Durable) -> None:
    await durable.create_queue("gone")
    in_no_queue = await spawn(durable, queue_name="gone")
    await execute(durable, delete(Queue).where(Queue.queue_name == "gone"))
    no_parent = await spawn(durable, parent_task_id=uuid.uuid4())
    failed = await spawn(durable, state="failed", outcome="failed", finished_at=AGO)
    left_behind = await spawn(durable, parent_task_id=failed, created_at=AGO)
    nobody = [uuid.uuid4() for _ in range(3)]
    await execute(
        durable,
        await wait_row(nobody[0], event_name="e"),
        insert(Checkpoint).values(task_id=nobody[1], key=uuid.uuid4(), kind="step", name="s"),
        insert(Run).values(task_id=nobody[2], attempt=1, run_id=uuid.uuid4(), state="failed"),
        insert(Event).values(queue_name="gone", name="e", delivered_at=AGO),
    )
    assert set((await findings(cli))["orphans"]) == {
        f"task in a queue that does not exist: {in_no_queue}",
        f"task whose parent does not exist: {no_parent}",
        f"task whose parent has failed or was cancelled: {left_behind}",
        f"wait of a task that has ended or does not exist: {nobody[0]}",
        f"checkpoint of a task that does not exist: {nobody[1]}",
        f"run of a task that does not exist: {nobody[2]}",
        "event of a queue that does not exist: e",
    }


@pytest.mark.slow
async def test_who_holds_the_oldest_snapshot(
    cli: CommandLine, durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_async_engine(
        durable.engine.url, connect_args={"server_settings": {"application_name": "the-holder"}}
    )
    async with engine.connect() as connection:
        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()
        assert await findings(cli) == {}
        snapshot = (await cli("doctor", "--json")).json["oldest_snapshot"]
        assert (snapshot["pid"], snapshot["application_name"]) == (pid, "the-holder")
        monkeypatch.setattr("durable_sa.cli.doctor._SNAPSHOT_SECONDS", 0.0)
        (problem,) = (await findings(cli))["snapshots"]
        assert f"process {pid}, application 'the-holder'" in problem
    await engine.dispose()


@pytest.mark.slow
async def test_many_problems_are_cut_short(cli: CommandLine, durable: Durable) -> None:
    for _ in range(25):
        await spawn(durable, state="sleeping", available_at=None)
    problems = (await findings(cli))["sleepers"]
    assert len(problems) == 21
    assert problems[-1] == "possibly more"


async def test_a_database_without_tables(durable_server: TestServer) -> None:
    url = durable_server.create_database()
    try:
        found = await findings(CommandLine(url))
        assert "durable's tables are not installed" in found["schema"][0]
    finally:
        durable_server.drop_database(url)


@pytest.mark.slow
async def test_a_check_that_takes_too_long_is_said_to(
    cli: CommandLine, durable: Durable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_sa.cli.doctor._CHECK_SECONDS", 0.5)
    async with durable.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE durable.schedules IN ACCESS EXCLUSIVE MODE"))
        assert "could not be checked within 0.5 s" in (await findings(cli))["schedules"]


HOSTILE_TIMES = ("0044-03-15 BC", "infinity")


@pytest.mark.slow
async def test_times_that_no_driver_can_read_are_shown_as_the_nearest(cli: CommandLine, durable: Durable) -> None:
    """Written by hand, in one row each of all tables, they keep nobody from the rows beside them."""

    @durable.task
    async def waiter(ctx: TaskContext) -> int:
        return await ctx.await_event("signal", type=int)

    spawned = await durable.spawn(waiter, delay=3600)
    other = await durable.spawn(waiter)
    await durable.create_schedule("nightly", task=waiter, cron_expression="0 0 1 1 *")
    await durable.emit_event("signal", 7)
    await execute(
        durable,
        insert(Run).values(task_id=spawned.task_id, attempt=1, run_id=uuid.uuid4(), state="failed"),
        insert(Checkpoint).values(task_id=spawned.task_id, key=uuid.uuid4(), kind="step", name="s"),
        await wait_row(spawned.task_id, event_name="e"),
        insert(WorkerRow).values(
            worker_id=uuid.uuid4(),
            name="w",
            queue_names=["default"],
            claim_timeout=timedelta(hours=1),
            expires_at=text("now() + interval '1 hour'"),
        ),
        text("UPDATE durable.queues SET paused_at = now()"),
        text("INSERT INTO durable.queues (queue_name) VALUES ('open')"),
    )
    columns = {
        "queues": ("created_at", "paused_at"),
        "tasks": ("created_at", "first_started_at", "started_at"),
        "runs": ("started_at", "finished_at"),
        "checkpoints": ("created_at",),
        "events": ("emitted_at", "delivered_at"),
        "waits": ("created_at",),
        "schedules": ("created_at", "updated_at", "last_tick_at"),
        "workers": ("started_at", "heartbeat_at"),
    }
    for moment in HOSTILE_TIMES:
        for table, names in columns.items():
            sets = ", ".join(f"{name} = '{moment}'" for name in names)
            where = "WHERE paused_at IS NOT NULL" if table == "queues" else ""
            await execute(durable, text(f"UPDATE durable.{table} SET {sets} {where}"))
        for command in ("tasks list", f"tasks show {spawned.task_id}", "queues list", "schedules list"):
            for output in ((), ("--json",)):
                result = await cli(*command.split(), *output)
                assert result.code == 0, (moment, command, result.stderr)
        report = await cli("doctor", "--json")
        assert [worker["name"] for worker in json.loads(report.stdout)["workers"]] == ["w"], (moment, report.stderr)
        async with Durable(cli.url) as client:
            assert len(await client.queue_statistics()) == 2
            assert [schedule.name for schedule in await client.list_schedules()] == ["nightly"]
            await client.pause_schedule("nightly")
            await client.resume_schedule("nightly")
            assert await client.emit_event("signal", 8) is False
    await durable.resume_queue()
    async with durable.worker():
        assert (await durable.wait_for_result(other, timeout=10)).output == 7
