"""The page of failures: the largest groups, and how many are in the others."""

import asyncio

from sqlalchemy import text

from durable_sa import Durable
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
