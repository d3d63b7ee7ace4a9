"""`durable events`: what tasks wait for."""

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
