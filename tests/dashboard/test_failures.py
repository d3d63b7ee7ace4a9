"""The page of failures: the largest groups, and how many are in the others."""

import asyncio
import json

from sqlalchemy import text

from durable_sa import Durable, TaskContext, task
from tests.dashboard.support import serving

ERROR = '{"name": "OSError", "message": "no", "traceback": "", "raw": null, "step": null}'


async def test_the_largest_groups_are_shown_and_the_rest_is_counted(durable: Durable) -> None:
    names = [f"task-{number}" for number in range(103)] + ["task-0", "task-0"]
    await asyncio.gather(*(durable.spawn_by_name(name, unchecked=True) for name in names))
    async with durable.engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE durable.tasks SET state = 'failed', outcome = 'failed', finished_at = now(), "
                "error = CAST(:error AS json)"
            ),
            {"error": ERROR},
        )
    async with serving(durable) as (browser, _):
        data = await browser.data("/failures")
        assert len(data["groups"]) == 100
        assert (data["groups"][0]["task_name"], data["groups"][0]["count"]) == ("task-0", 3)
        assert data["others"] == {"groups": 3, "failures": 3}
        assert "And 3 failures in 3 smaller groups" in await browser.page("/failures")
        assert "smaller groups" not in await browser.page("/failures?task_name=task-0")


async def test_a_long_error_has_its_name_and_is_found(durable: Durable) -> None:
    for number, name in enumerate(("long", "nul")):
        await durable.spawn_by_name(name, unchecked=True)
        error = {"name": "UserError", "message": "x", "raw": {"blob": "y" * 200_000 + "\0" * number}}
        async with durable.engine.begin() as connection:
            await connection.execute(
                text(
                    "UPDATE durable.tasks SET state = 'failed', outcome = 'failed', finished_at = now(), "
                    "error = CAST(:error AS json) WHERE task_name = :name"
                ),
                {"error": json.dumps(error), "name": name},
            )
    async with serving(durable) as (browser, _):
        groups = {group["task_name"]: group for group in (await browser.data("/failures"))["groups"]}
        assert groups["long"]["error_name"] == "UserError"
        assert len((await browser.data(f"/tasks?{groups['long']['query']}"))["tasks"]) == 1
        # The server cannot take this one apart, so that no filter finds it.
        assert (groups["nul"]["error_name"], groups["nul"]["query"]) == ("?", None)
        assert (await browser.page("/failures")).count("Retry all…") == 1


async def test_a_message_may_be_redacted_to_anything(durable: Durable) -> None:
    @task("fails", max_attempts=1)
    async def fails(ctx: TaskContext) -> None:
        raise ValueError("secret")

    durable.register(fails)
    spawned = await durable.spawn(fails)
    async with durable.worker():
        await durable.wait_for_result(spawned, timeout=20)
    async with serving(durable, redact=lambda task, path, value: {"length": 6}) as (browser, _):
        for path in ("/failures", f"/tasks/{spawned.task_id}"):
            assert "length" in await browser.page(path)
