"""`durable schedules`: list, pause, resume, trigger."""

import uuid

import pytest
from sqlalchemy import text

from durable_sa import Durable, TaskContext
from tests.cli.support import CommandLine


async def schedule(durable: Durable, name: str = "nightly") -> None:
    @durable.task("report")
    async def report(ctx: TaskContext, day: str) -> str:
        return f"the report of {day}"

    await durable.create_schedule(name, task=report, cron_expression="0 3 1 1 *", params="Monday")


async def test_schedules_are_listed_with_their_ticks(cli: CommandLine, durable: Durable) -> None:
    assert (await cli("schedules", "list")).stdout == "No schedules.\n"
    await schedule(durable)
    (row,) = (await cli("schedules", "list", "--json")).json
    assert row.pop("next_tick_at").endswith("-01-01T03:00:00Z")
    assert row == {
        "name": "nightly",
        "task_name": "report",
        "queue_name": "default",
        "cron_expression": "0 3 1 1 *",
        "timezone": "UTC",
        "backend": "worker",
        "paused_at": None,
        "last_tick_at": None,
        "last_task_id": None,
    }
    assert "nightly\treport\tdefault\t0 3 1 1 *\tUTC\topen\t\t" in (await cli("schedules", "list")).stdout


async def test_the_next_tick_of_an_extension_is_reckoned(cli: CommandLine, durable: Durable) -> None:
    await schedule(durable)
    async with durable.engine.begin() as connection:
        await connection.execute(text("UPDATE durable.schedules SET backend = 'pg_cron', next_tick_at = NULL"))
    (row,) = (await cli("schedules", "list", "--json")).json
    assert row["next_tick_at"].endswith("-01-01T03:00:00Z")


async def test_a_schedule_is_paused_and_resumed(cli: CommandLine, durable: Durable) -> None:
    await schedule(durable)
    assert (await cli("schedules", "pause", "nightly", "--json")).json == {"name": "nightly", "paused": True}
    assert (await cli("schedules", "list", "--json")).json[0]["paused_at"] is not None
    assert "paused" in (await cli("schedules", "list")).stdout
    assert (await cli("schedules", "resume", "nightly")).stdout == "Schedule 'nightly' resumed.\n"
    assert (await cli("schedules", "list", "--json")).json[0]["paused_at"] is None


async def test_a_schedule_is_triggered(cli: CommandLine, durable: Durable) -> None:
    await schedule(durable)
    task_id = uuid.UUID((await cli("schedules", "trigger", "nightly", "--json")).json["task_id"])
    async with durable.worker():
        assert (await durable.wait_for_result(task_id, timeout=10)).output == "the report of Monday"


async def test_an_unknown_schedule_is_said_to_be_unknown(cli: CommandLine) -> None:
    for command in ("pause", "resume", "trigger", "delete"):
        result = await cli("schedules", command, "nope")
        assert (result.code, result.stdout) == (1, "")
        assert result.stderr == "error: There is no schedule named 'nope'. List them: durable schedules list\n"


@pytest.mark.slow
async def test_a_name_in_several_queues_needs_the_queue(cli: CommandLine, durable: Durable) -> None:
    await schedule(durable)
    await durable.create_queue("west")
    await durable.create_schedule("weekly", task="report", cron_expression="0 3 1 1 *", params="", queue_name="west")
    # There is one of that name: its queue need not be said.
    assert (await cli("schedules", "pause", "weekly")).code == 0
    await durable.create_schedule("nightly", task="report", cron_expression="0 3 1 1 *", params="", queue_name="west")
    refused = await cli("schedules", "pause", "nightly")
    assert (refused.code, refused.stdout) == (2, "")
    assert "Name one with --queue: default, west." in refused.stderr
    assert (await cli("schedules", "pause", "nightly", "--queue", "west")).code == 0
    rows = (await cli("schedules", "list", "--json")).json
    assert [(row["queue_name"], row["paused_at"] is None) for row in rows] == [
        ("default", True),
        ("west", False),
        ("west", False),
    ]
    elsewhere = await cli("schedules", "delete", "weekly", "--queue", "default", "--yes")
    assert (elsewhere.code, elsewhere.stdout) == (1, "")
    assert "named 'weekly' in queue 'default'. Queues that have one: west. List them:" in elsewhere.stderr
    assert (await cli("schedules", "delete", "nightly", "--yes")).code == 2
    assert (await cli("schedules", "delete", "nightly", "-q", "west", "--yes")).code == 0
    assert (await cli("schedules", "delete", "nightly", "--yes")).code == 0
    assert [row["name"] for row in (await cli("schedules", "list", "--json")).json] == ["weekly"]


async def test_a_schedule_is_deleted_after_a_question(cli: CommandLine, durable: Durable) -> None:
    await schedule(durable)
    assert (await cli("schedules", "delete", "nightly", stdin="n\n")).code == 1
    assert len(await durable.list_schedules()) == 1
    assert (await cli("schedules", "delete", "nightly", "--yes", "--json")).json == {"name": "nightly"}
    assert await durable.list_schedules() == []


async def test_schedules_of_one_queue(cli: CommandLine, durable: Durable) -> None:
    await schedule(durable)
    await durable.create_queue("other")
    assert len((await cli("schedules", "list", "-q", "default", "--json")).json) == 1
    assert (await cli("schedules", "list", "-q", "other", "--json")).json == []
    assert (await cli("schedules", "list", "-q", "nope")).code == 1
    assert (await cli("schedules", "pause", "nightly", "-q", "other")).code == 1
    assert (await cli("schedules", "pause", "nightly", "-q", "default")).code == 0
