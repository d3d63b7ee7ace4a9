"""`durable events`: what tasks wait for."""

import pytest

from durable_sa import Durable, TaskContext
from tests.cli.support import CommandLine


async def test_an_event_wakes_who_waits_for_it_and_the_first_wins(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def waiter(ctx: TaskContext) -> object:
        return await ctx.await_event("paid")

    async with durable.worker():
        spawned = await durable.spawn(waiter)
        first = await cli("events", "emit", "paid", '{"amount": 12}', "--json")
        assert first.json == {"name": "paid", "queue_name": "default", "emitted": True}
        again = await cli("events", "emit", "paid", "13")
        assert (again.code, again.stdout) == (0, "Event 'paid' was already emitted; nothing changed.\n")
        assert (await durable.wait_for_result(spawned, timeout=10)).output == {"amount": 12}


async def test_an_event_may_be_without_payload_and_for_another_queue(cli: CommandLine, durable: Durable) -> None:
    await durable.create_queue("other")
    assert (await cli("events", "emit", "e")).stdout == "Event 'e' emitted.\n"
    assert (await cli("events", "emit", "e", "--queue", "other", "--json")).json["emitted"] is True


async def test_a_bad_name_is_a_usage_error_and_a_missing_queue_is_not(cli: CommandLine) -> None:
    bad = await cli("events", "emit", "$e")
    assert bad.code == 2
    assert bad.stderr.startswith("error: The event name '$e' is not valid:")
    assert (await cli("events", "emit", "e", "--queue", "nope")).code == 1


@pytest.mark.slow
async def test_events_are_listed_and_shown(cli: CommandLine, durable: Durable) -> None:
    @durable.task
    async def waiter(ctx: TaskContext, name: str) -> object:
        return await ctx.await_event(name, timeout=3600)

    await durable.create_queue("other")
    assert (await cli("events", "list")).stdout == "No events.\n"
    for name, queue in (("order-1", "default"), ("order-2", "other"), ("order%", "default")):
        await durable.emit_event(name, "hunter2", queue_name=queue)
    names = [row["name"] for row in (await cli("events", "list", "--json")).json]
    assert names == ["order%", "order-2", "order-1"]
    assert [row["name"] for row in (await cli("events", "list", "-q", "other", "--json")).json] == ["order-2"]
    assert [row["name"] for row in (await cli("events", "list", "--prefix", "order%", "--json")).json] == ["order%"]
    limited = await cli("events", "list", "--limit", 1)
    assert "order%" in limited.stdout
    assert "order-1" not in limited.stdout
    assert limited.stderr.startswith("There are more events")
    assert (await cli("events", "list", "-q", "nope")).code == 1
    async with durable.worker():
        task_id = (await durable.spawn(waiter, "late")).task_id
        awaited: list[dict[str, object]] = []
        while not awaited:
            awaited = (await cli("events", "list", "--awaited", "--json")).json
    assert [(row["name"], row["waiting"], row["emitted_at"]) for row in awaited] == [("late", 1, None)]
    shown = await cli("events", "show", "late")
    assert "emitted\tnever\n" in shown.stdout
    assert str(task_id) in shown.stdout
    assert (await cli("events", "show", "late", "--json")).json["waiting"][0]["task_id"] == str(task_id)


async def test_a_payload_is_shown_only_when_asked_for(cli: CommandLine, durable: Durable) -> None:
    await durable.emit_event("paid", {"card": "hunter2"})
    for options in ([], ["--json"]):
        assert "hunter2" not in (await cli("events", "show", "paid", *options)).stdout
    assert "hunter2" in (await cli("events", "show", "paid", "--payloads")).stdout
    assert (await cli("events", "show", "paid", "--payloads", "--json")).json["payload"] == {"card": "hunter2"}
    missing = await cli("events", "show", "nope")
    assert (missing.code, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: No event named 'nope' was emitted in queue 'default'")
    assert (await cli("events", "show", "paid", "-q", "nope")).code == 1


async def test_a_payload_is_replaced(cli: CommandLine, durable: Durable) -> None:
    await durable.emit_event("paid", 12)
    replaced = await cli("events", "replace", "paid", "13", "--json")
    assert replaced.json == {"name": "paid", "queue_name": "default"}
    assert (await cli("events", "show", "paid", "--payloads", "--json")).json["payload"] == 13
    refused = await cli("events", "replace", "unpaid", "1")
    assert (refused.code, refused.stdout) == (1, "")
    assert refused.stderr == (
        "error: No event named 'unpaid' was emitted in queue 'default'. Emit it: durable events emit unpaid\n"
    )
