"""The dashboard in Chromium: served over HTTP, filled, and opened in pages whose problems are noted."""

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from durable_sa import Durable, TaskContext, task
from durable_sa.dashboard import Access, dashboard
from durable_sa.dashboard.access import ACTIONS
from tests.support import eventually

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@task("wait_for_it")
async def wait_for_it(ctx: TaskContext) -> str:
    await ctx.step("look", asyncio.sleep, 0)
    return await ctx.await_event("go")


@task("break_down", max_attempts=1)
async def break_down(ctx: TaskContext) -> None:
    raise ValueError("</pre><script>alert(1)</script>")


@dataclass
class Site:
    """The dashboard as a browser sees it."""

    durable: Durable
    address: str
    browser: Any
    problems: list[str] = field(default_factory=list)

    async def open(self, path: str, width: int = 1200, **options: Any) -> Any:
        context = await self.browser.new_context(viewport={"width": width, "height": 800}, **options)
        context.set_default_timeout(20_000)
        page = await context.new_page()
        await page.add_init_script(WATCH)
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(self.address) else self.problems.append(request.url),
        )

        async def accept(dialog: Any) -> None:
            self.problems.append(dialog.message)
            await dialog.accept()

        page.on("dialog", accept)
        await page.goto(self.address + path)
        return page

    async def check(self, page: Any) -> None:
        assert await page.evaluate("window.violations") == []
        assert self.problems == []


@asynccontextmanager
async def serving_in_chromium(durable: Durable) -> AsyncGenerator[Site]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt install chromium")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `dashboard` is not installed")
    playwright_api = pytest.importorskip("playwright.async_api", reason="Playwright is not installed")
    app = dashboard(durable, auth=lambda _: Access("ada", actions=ACTIONS, payloads=True))
    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    serving = asyncio.create_task(server._serve([socket]))
    try:
        await eventually(lambda: server.started)
        async with playwright_api.async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            try:
                yield Site(durable, f"http://127.0.0.1:{socket.getsockname()[1]}", browser)
            finally:
                await browser.close()
    finally:
        server.should_exit = True
        await serving
        await app.close()


async def fill(durable: Durable) -> str:
    durable.register(wait_for_it)
    durable.register(break_down)
    await durable.create_schedule("nightly", task=break_down, cron_expression="0 3 * * *")
    await durable.spawn_many([(break_down, None)] * 3)
    waiting = await durable.spawn(wait_for_it)
    async with durable.worker(concurrency=4):
        await eventually(lambda: durable.get_task(waiting), within=20)

        async def settled() -> bool:
            statuses = [one.status for one in (await durable.list_tasks()).items]
            return sorted(statuses) == ["failed", "failed", "failed", "sleeping"]

        await eventually(settled)
    return str(waiting.task_id)
