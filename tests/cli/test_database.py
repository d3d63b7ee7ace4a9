"""`durable migrate` and `durable cleanup`."""

import uuid

import pytest
from sqlalchemy import URL, text, update

from durable_sa import Durable, migrations
from durable_sa.models import Event, Task
from durable_sa.testing.database import TestServer
from tests.cli.support import CommandLine


@pytest.mark.slow
async def test_migrate_makes_the_tables_and_may_be_repeated(durable_server: TestServer) -> None:
    url = durable_server.create_database()
    try:
        cli = CommandLine(url)
        missing = await cli("tasks", "list")
        assert missing.code == 1
        assert missing.stderr.startswith("error: In this database durable's tables are not installed")
        for _ in range(2):
            assert (await cli("migrate", "--json")).json == {"schema": "durable", "revision": migrations.head()}
        assert (await cli("tasks", "list", "--json")).json == []
        assert (await cli("migrate", "--schema", "elsewhere")).code == 0
        assert (await cli("tasks", "spawn", "x", "--schema", "elsewhere")).code == 0
        assert len((await cli("tasks", "list", "--json", "--schema", "elsewhere")).json) == 1
        assert (await cli("tasks", "list", "--json")).json == []
    finally:
        durable_server.drop_database(url)


async def test_the_url_may_be_given_as_an_option(database_url: URL) -> None:
    cli = CommandLine("postgresql://nobody@127.0.0.1:1/nothing")
    assert (await cli("queues", "--json")).code == 1
    url = database_url.render_as_string(hide_password=False)
    assert (await cli("queues", "--json", "--url", url)).code == 0
    assert (await cli("tasks", "list", "--json", "--url", url)).json == []


async def ended_task(durable: Durable, *, days: int) -> uuid.UUID:
    task_id = (await durable.spawn_by_name("a", unchecked=True)).task_id
    await durable.cancel_task(task_id)
    async with durable.engine.begin() as connection:
        await connection.execute(
            update(Task).where(Task.task_id == task_id).values(finished_at=text(f"now() - interval '{days} days'"))
        )
    return task_id


async def test_cleanup_deletes_what_ended_long_ago(cli: CommandLine, durable: Durable) -> None:
    for _ in range(3):
        await ended_task(durable, days=40)
    kept = await ended_task(durable, days=20)
    result = await cli("cleanup", "--older-than", "30d", "--json")
    assert result.json == {"deleted": 3}
    assert [row["task_id"] for row in (await cli("tasks", "list", "--json")).json] == [str(kept)]
    assert (await cli("cleanup", "--older-than", "30d")).stdout == "Tasks deleted: 0.\n"


async def test_cleanup_goes_on_until_nothing_is_left(cli: CommandLine, durable: Durable, monkeypatch) -> None:
    monkeypatch.setattr("durable_sa.cli.database._BATCH", 2)
    for _ in range(5):
        await ended_task(durable, days=40)
    assert (await cli("cleanup", "--older-than", "30d", "--json")).json == {"deleted": 5}


async def test_cleanup_of_events(cli: CommandLine, durable: Durable) -> None:
    await durable.emit_event("old")
    await durable.emit_event("new")
    long_ago = text("now() - interval '40 days'")
    async with durable.engine.begin() as connection:
        await connection.execute(update(Event).values(delivered_at=text("now()")))
        await connection.execute(update(Event).where(Event.name == "old").values(emitted_at=long_ago))
    assert (await cli("cleanup", "--older-than", "30d", "--events", "--json")).json == {"deleted": 1}
    assert not await durable.emit_event("new")
    assert await durable.emit_event("old")


async def test_cleanup_of_an_unknown_queue_is_an_error(cli: CommandLine) -> None:
    assert (await cli("cleanup", "--older-than", "30d", "--queue", "nope")).code == 1
    assert (await cli("cleanup")).code == 2
