"""`durable limits`, and what `durable doctor` says of keys."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, Limit, TaskContext, task
from tests.cli.support import CommandLine
from tests.support import eventually


@task("work")
async def work(ctx: TaskContext) -> None: ...


@task("parent")
async def parent(ctx: TaskContext) -> None:
    await ctx.join(await ctx.spawn("part", work))


async def test_limits_are_set_and_keys_listed_closed_and_opened(cli: CommandLine, durable: Durable) -> None:
    durable.register(work)
    result = await cli("limits", "set", "default", "--per-key", "--concurrency", "2", "--rate", "60/1m", "--burst", "9")
    assert (result.code, "each key of queue 'default' set" in result.stdout) == (0, True)
    await durable.spawn(work, limit_key="acme")
    assert "acme\topen\t0\t1" in (await cli("limits", "list", "default")).stdout
    assert (await cli("limits", "close", "default", "acme", "--for", "1h")).code == 0
    (row,) = (await cli("limits", "list", "default", "--state", "closed", "--json")).json
    assert (row["key"], row["state"], row["waiting"]) == ("acme", "closed", 1)
    await durable.spawn(work, limit_key="b 2")
    first = await cli("limits", "list", "default", "--limit", "1")
    assert ("b 2" in first.stdout, "--after acme" in first.stderr) == (False, True)
    second = await cli("limits", "list", "default", "--limit", "1", "--after", "acme")
    assert ("b 2" in second.stdout, "--after 'b 2'" in second.stderr) == (True, True)
    assert "No keys." in (await cli("limits", "list", "default", "--after", "b 2")).stdout
    assert (await cli("limits", "open", "default", "acme")).code == 0
    assert "No keys." in (await cli("limits", "list", "default", "--state", "closed")).stdout
    assert (await cli("limits", "set", "default", "--key", "acme", "--weight", "3")).code == 0
    assert (await cli("limits", "set", "default", "--per-key", "--none")).code == 0


async def test_queues_are_listed_with_the_states_of_their_keys(cli: CommandLine, durable: Durable) -> None:
    await durable.create_queue("llm", limit_per_key=Limit(concurrency=1))
    await durable.close_limit_key("llm", "acme", datetime.now(UTC) + timedelta(hours=1))
    assert [row["limit_keys"] for row in (await cli("queues", "--json")).json] == [{}, {"closed": 1}]
    assert "1 closed" in (await cli("queues")).stdout


async def test_a_unique_key_names_the_unfinished_task_or_the_newest(cli: CommandLine, durable: Durable) -> None:
    durable.register(work)
    old = await durable.spawn(work, unique="report")
    await durable.cancel_task(old)
    assert f"task\t{old.task_id}" in (await cli("tasks", "show", "report")).stdout
    new = await durable.spawn(work, unique="report")
    assert f"task\t{new.task_id}" in (await cli("tasks", "show", "report")).stdout
    refused = await cli("tasks", "retry", str(old.task_id))
    assert (refused.code, "without its unique key" in refused.stderr) == (1, True)
    assert (await cli("tasks", "retry", "--all", "--state", "cancelled", "--json")).json["passed_over"] == 1


async def test_limits_that_make_no_sense_are_refused(cli: CommandLine, durable: Durable) -> None:
    for arguments in (
        ("set", "default"),
        ("set", "default", "--none", "--concurrency", "2"),
        ("set", "default", "--concurrency", "2", "--burst", "3"),
        ("set", "default", "--rate", "often"),
        ("set", "default", "--rate", "60/"),
        ("close", "default", "acme"),
        ("close", "default", "acme", "--for", "99999999w"),
    ):
        assert (await cli("limits", *arguments)).code == 2, arguments
    assert (await cli("limits", "set", "nowhere", "--concurrency", "1")).code == 1


async def test_numbers_of_queues_that_make_no_sense_are_refused(cli: CommandLine) -> None:
    for value in ("llm", "llm=", "=3", "llm=many"):
        result = await cli("worker", "app:durable", "--queue-concurrency", value)
        assert (result.code, "for example, llm=10" in result.stderr) == (2, True), value


async def test_the_doctor_finds_and_repairs_wrong_counts(
    cli: CommandLine, durable: Durable, engine: AsyncEngine
) -> None:
    await durable.create_queue("default", limit_per_key=Limit(concurrency=1))
    async with engine.begin() as connection:
        await connection.execute(
            text("INSERT INTO durable.limit_keys (queue_name, limit_key, running) VALUES ('default', 'a', 1)")
        )
    result = await cli("doctor")
    assert result.code == 1
    assert "key 'a' of queue 'default' counts 1 slots, and its tasks hold 0" in result.stdout
    result = await cli("doctor", "--repair")
    assert (result.code, "Limit keys counted anew: 1." in result.stdout) == (0, True)


async def test_the_doctor_names_a_task_that_waits_for_its_own_slot(
    cli: CommandLine, durable: Durable, engine: AsyncEngine
) -> None:
    durable.register(work)
    durable.register(parent)
    await durable.create_queue("default", limit=Limit(concurrency=1, hold="task"))
    spawned = await durable.spawn(parent)
    async with durable.worker(concurrency=5):
        waits = text("SELECT 1 FROM durable.tasks WHERE state = 'sleeping'")

        async def sleeping() -> bool:
            async with engine.connect() as connection:
                return bool((await connection.execute(waits)).all())

        await eventually(sleeping)
        result = await cli("doctor", "--grace", "0s")
    assert result.code == 1
    assert f"task {spawned.task_id} (parent) keeps a slot of the part without keys" in result.stdout


async def test_tasks_are_spawned_and_found_by_their_limit_key(cli: CommandLine) -> None:
    spawned = (await cli("tasks", "spawn", "ship", "--limit-key", "acme", "--unique", "order-7", "--json")).json
    assert spawned["created"]
    assert not (await cli("tasks", "spawn", "ship", "--limit-key", "acme", "--unique", "order-7", "--json")).json[
        "created"
    ]
    await cli("tasks", "spawn", "ship", "--limit-key", "other")
    (found,) = (await cli("tasks", "list", "--limit-key", "acme", "--json")).json
    assert found["task_id"] == spawned["task_id"]
    trial = await cli("tasks", "cancel", "--all", "--limit-key", "acme", "--dry-run")
    assert trial.stdout.splitlines()[0] == spawned["task_id"]
