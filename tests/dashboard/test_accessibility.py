"""axe-core finds nothing serious on any page, light and dark, narrow and wide.

It is `tests/dashboard/axe`, as it comes from the package axe-core of npm. No page loads it: it is evaluated over the
protocol of the browser, so that the policy of the pages stays as it is and is tried, too.
"""

import logging
import uuid
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.routing import compile_path

from durable_sa import Durable, Limit, Rate, TaskContext, TaskFilter
from durable_sa.dashboard.pages import PAGES
from tests.dashboard.chromium import Site, break_down, fill, serving_in_chromium, wait_for_it
from tests.support import eventually

pytestmark = pytest.mark.slow

(AXE,) = (Path(__file__).parent / "axe").glob("axe-*.min.js")
RUN = """
async (selector) => {
    const context = selector ? { include: [...document.querySelectorAll(selector)] } : document;
    if (selector && !context.include.length) return [];
    const found = await axe.run(context, { resultTypes: ["violations"] });
    return found.violations.filter((one) => ["serious", "critical"].includes(one.impact)).map((one) => [
        one.id, one.help, ...one.nodes.slice(0, 3).map((node) => `${node.target}: ${node.html.slice(0, 200)}`)]);
}
"""
OPEN_ALL = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"


async def fill_everything(durable: Durable) -> list[str]:
    """Something for each table, badge and button; the paths on which they are shown."""

    @durable.task("talk")
    async def talk(ctx: TaskContext) -> Any:
        ctx.logger.info("a line")
        await ctx.publish("progress", {"done": 1})
        async with ctx.stream("out", dict) as stream:
            await stream.write({"item": 1})
        return await ctx.join(await ctx.spawn("child", wait_for_it))

    waiting = await fill(durable)
    talking = await durable.spawn(talk)
    await durable.send(talking, "other", {"text": "hello"})
    async with durable.worker():

        async def waits() -> bool:
            return (await durable.get_task(talking)).status == "sleeping"

        await eventually(waits)
    await durable.create_queue("limited", limit=Limit(concurrency=9), limit_per_key=Limit(rate=Rate(60, 60)))
    await durable.close_limit_key("limited", "acme", datetime.now(UTC) + timedelta(days=1))
    await durable.create_queue("paused")
    await durable.pause_queue("paused")
    await durable.pause_schedule("nightly")
    await durable.create_schedule("hourly", task=break_down, cron_expression="0 * * * *")
    due = [await durable.spawn(break_down, queue_name=name) for name in ("default", "limited", "paused")]
    await durable.cancel_task(due[2])
    await durable.emit_event("gone", {"by": "ada"})
    failed = (await durable.list_tasks(TaskFilter(state="failed"))).items[0]
    return [
        "/",
        "/tasks",
        "/tasks?state=failed&key=none&spawned_after=24h",
        "/tasks/all?action=delete",
        *(f"/tasks/{task_id}" for task_id in (waiting, talking.task_id, failed.task_id, due[2].task_id)),
        "/failures",
        "/queues",
        "/queues/default",
        "/queues/limited",
        "/queues/paused",
        "/limits",
        "/workers",
        "/schedules",
        "/events",
        "/events?name=go&queue_name=default",
        "/doctor",
        f"/tasks/{uuid.UUID(int=7)}",
    ]


@pytest.fixture
async def client(engine: AsyncEngine) -> AsyncGenerator[Durable]:
    async with Durable(engine, keep_logs=logging.INFO) as durable:
        await durable.create_queue()
        yield durable


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_axe_finds_nothing_serious(client: Durable, theme: str) -> None:
    paths = await fill_everything(client)
    for page in PAGES:
        pattern, *_ = compile_path(page.path)
        assert any(pattern.match(path.partition("?")[0]) for path in paths), f"add a path of {page.path}"
    axe, found = AXE.read_text(), dict[str, Any]()
    async with serving_in_chromium(client) as site, client.worker(queue_names=["paused"]):
        for width in (360, 1600):
            page = await site.open("/", width, color_scheme=theme)
            for path in paths:
                await page.goto(site.address + path)
                await page.evaluate(axe)
                found[f"{path} {width}"] = await page.evaluate(RUN, "")
                # What is closed is not seen, and what is open covers the rest.
                await page.evaluate(OPEN_ALL)
                found[f"{path} {width}, opened"] = await page.evaluate(RUN, "details")
                if path == "/tasks":
                    await page.keyboard.press("j")
                    found["the row of the keys"] = await page.evaluate(RUN, "tr.current")
                    await page.keyboard.press("?")
                    found["the keys"] = await page.evaluate(RUN, "#keys")
                    await page.keyboard.press("Escape")
            # The page of a task that does not exist is an error to the console, too.
            site.problems[:] = [problem for problem in site.problems if "404" not in problem]
            await site.check(page)
            await page.context.close()
    assert {where: violations for where, violations in found.items() if violations} == {}
    assert len(found) > 2 * len(paths)


async def test_axe_would_find_something(site: Site) -> None:
    page = await site.open("/tasks")
    await page.evaluate(AXE.read_text())
    await page.evaluate(
        "document.querySelector('[name=task_name]').parentElement.replaceWith(document.createElement('input'))"
    )
    await page.evaluate("document.querySelector('h1').style.color = '#eee'")
    assert {rule for rule, *_ in await page.evaluate(RUN, "")} == {"color-contrast", "label"}
