"""Take the screenshots of the dashboard: `python docs/images/dashboard.py` writes dashboard-*.png.

With names of pages, as in `python docs/images/dashboard.py limits talk`, only theirs.

It needs the `embedded` and `dashboard` extras, Playwright, and a Chromium that is installed (`CHROMIUM` names another
than /usr/bin/chromium). `python docs/images/dashboard.py --serve` shows the same pages at http://127.0.0.1:8765/.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import uvicorn
from playwright.async_api import Browser, async_playwright
from sqlalchemy import text

from durable_sa import (
    Durable,
    Limit,
    Rate,
    RetryStrategy,
    TaskContext,
    TaskFilter,
)
from durable_sa.dashboard import Access, dashboard
from durable_sa.embedded import temporary_server

HERE = Path(__file__).parent
PORT = 8765
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ACTIONS = {
    "cancel",
    "retry",
    "send",
    "emit",
    "pause",
    "trigger",
    "limit",
    "delete",
}

tasks = Durable()


async def charge(order: int) -> str:
    await asyncio.sleep(0.12)
    return f"ch_{order}"


async def reserve(order: int) -> list[str]:
    await asyncio.sleep(0.07)
    return ["A-17", "B-03"]


async def write_letter(order: int) -> None:
    await asyncio.sleep(0.05)


async def ask_bank(account: str) -> None:
    await asyncio.sleep(0.03)
    raise ConnectionError("the bank's gateway answered 503")


def parse(line: str) -> float:
    return float(line)


@tasks.task
async def fulfil_order(ctx: TaskContext, order: int) -> str:
    await ctx.step("charge-card", charge, order)
    await ctx.step("reserve-stock", reserve, order)
    await ctx.sleep_for("grace-period", 0.2)
    await ctx.await_event(f"picked:{order}")
    label = await ctx.join(await ctx.spawn("print-label", print_label, order))
    await ctx.step("write-letter", write_letter, order)
    return label


@tasks.task
async def print_label(ctx: TaskContext, order: int) -> str:
    await ctx.step("render", reserve, order)
    return f"label-{order}.pdf"


@tasks.task(
    max_attempts=3, retry_strategy=RetryStrategy.fixed(0.1), queue_name="bank"
)
async def settle_account(ctx: TaskContext, account: str) -> None:
    await ctx.step("load-balance", reserve, 1)
    await ctx.step("ask-bank", ask_bank, account)


@tasks.task(max_attempts=1, queue_name="imports")
async def import_prices(ctx: TaskContext, file: str) -> int:
    await ctx.step("download", charge, 4)
    await ctx.step("parse", parse, "12,50 EUR")
    return 1


@tasks.task(queue_name="mail")
async def send_newsletter(ctx: TaskContext, count: int) -> int:
    for number in range(count):
        await ctx.step(f"batch-{number}", write_letter, number)
    return count


@tasks.task(queue_name="mail")
async def watch_inbox(ctx: TaskContext) -> None:
    await ctx.step("listen", asyncio.sleep, 3600)


@tasks.task(queue_name="llm")
async def answer_question(ctx: TaskContext, question: str) -> str:
    ctx.logger.info("searching the handbook")
    await ctx.step("search", write_letter, 1)
    await ctx.publish("progress", {"step": "drafting", "of": 3, "done": 1})
    async with ctx.stream("draft") as stream:
        for word in f"An answer to: {question}".split():
            await stream.write(word)
    ctx.logger.info("a draft of %d characters", len(question) + 14)
    await ctx.receive("review")
    return question


async def ask(durable: Durable[Any]) -> None:
    """Ask questions of tenants, whose limits differ."""
    each = Limit(concurrency=2, hold="task")
    await durable.create_queue(
        "llm", limit=Limit(concurrency=200), limit_per_key=each
    )
    own = Limit(concurrency=8, hold="task")
    await durable.set_limit("llm", own, key="initech", weight=3)
    slow = Limit(4, Rate(2, per=3600, burst=2), hold="task")
    await durable.set_limit("llm", slow, key="umbrella")
    for tenant, number in (
        ("acme", 6),
        ("globex", 3),
        ("initech", 5),
        ("umbrella", 4),
        ("wayne", 1),
    ):
        for about in range(number):
            await durable.spawn(
                answer_question,
                f"How do I cancel order {1200 + about}?",
                limit_key=tenant,
            )


async def fill(durable: Durable[Any]) -> None:
    """Run tasks of all kinds, and let them seem to have begun at different times."""
    await durable.migrate()
    for name in ("default", "bank", "imports", "mail", "archive"):
        await durable.create_queue(name)
    every = {"timezone": "Europe/Berlin"}
    await durable.create_schedule(
        "nightly-report",
        task=send_newsletter,
        cron_expression="0 7 * * 1-5",
        params=3,
        **every,
    )
    await durable.create_schedule(
        "settle-accounts",
        task=settle_account,
        cron_expression="*/15 * * * *",
        params="all",
    )
    await durable.create_schedule(
        "import-prices",
        task=import_prices,
        cron_expression="30 2 1 * *",
        params="june.csv",
    )
    await durable.pause_schedule("import-prices", queue_name="imports")
    orders = [
        (
            await durable.spawn(
                fulfil_order,
                1000 + number,
                idempotency_key=f"order-{1000 + number}",
            )
        ).task_id
        for number in range(14)
    ]
    for account in ("DE-77", "FR-12", "NL-03", "IT-51"):
        await durable.spawn(settle_account, account)
    for month in ("april", "may", "june"):
        await durable.spawn(import_prices, f"{month}.csv")
    for count in (4, 6, 12):
        await durable.spawn(send_newsletter, count)
    await durable.spawn(watch_inbox)
    await ask(durable)
    until = datetime.now(UTC) + timedelta(minutes=40)
    await durable.close_limit_key("llm", "globex", until)
    queues = ["default", "bank", "imports", "mail", "llm"]
    await durable.start_worker(
        queue_names=queues, concurrency=16, worker_id="web-1:4121"
    )
    await durable.start_worker(
        queue_names=queues[:1], concurrency=8, worker_id="web-2:4388"
    )
    for number in range(9):
        await durable.emit_event(f"picked:{1000 + number}")
    await asyncio.sleep(3)
    asking = TaskFilter(queue_name="llm", state="sleeping")
    for question in (await durable.list_tasks(asking)).items:
        await durable.send(
            question.task_id, "note", {"from": "ada", "text": "be brief"}
        )
    await durable.spawn(
        fulfil_order, 1100, delay=7200, idempotency_key="order-1100"
    )
    for number in range(3):
        await durable.spawn(print_label, 2000 + number, queue_name="archive")
    await durable.cancel_task(orders[-1])
    await durable.pause_queue("archive")
    async with durable.engine.begin() as connection:
        for number, task_id in enumerate(orders):
            await connection.execute(
                text(EARLIER),
                {"task": task_id, "by": 11 * number + 11, "wait": 9 * number},
            )
        await connection.execute(text(OVERDUE))

    async with durable.engine.begin() as connection:
        await connection.execute(text(MINUTES))


# What workers of a busier time would have counted, with a quarter of an hour in which the bank did not answer.
MINUTES = """
INSERT INTO durable.task_minutes
    (queue_name, minute, task_name, worker_id, completed, failed, cancelled, milliseconds, slowest)
SELECT queue_name, date_trunc('minute', now()) - make_interval(mins => ago), task_name, gen_random_uuid(),
    done, failed, 0, (done + failed) * each, each * (3 + ago % 4)
FROM generate_series(0, 10079) AS ago, LATERAL (VALUES
    ('default', 'fulfil_order', (14 + 9 * sin(ago / 9.0) + ago % 5)::int, (ago % 37 = 0)::int, 220 + ago % 70),
    ('default', 'print_label', (8 + 5 * sin(ago / 9.0) + ago % 3)::int, 0, 90 + ago % 20),
    ('bank', 'settle_account', CASE WHEN ago BETWEEN 18 AND 32 THEN 1 ELSE 6 + ago % 4 END,
        CASE WHEN ago BETWEEN 18 AND 32 THEN 7 ELSE 0 END, 400),
    ('mail', 'send_newsletter', CASE WHEN ago % 20 < 6 THEN 12 - ago % 20 ELSE 0 END, 0, 1500)
) AS numbers (queue_name, task_name, done, failed, each)
WHERE done + failed > 0
ON CONFLICT DO NOTHING
"""
# Earlier, and with a longer wait for the event than the tasks of a script can have.
EARLIER = """
WITH shift AS (
    SELECT CAST(:task AS uuid) AS task_id, make_interval(mins => :by) AS by, make_interval(mins => :by + :wait) AS all_
), spawned AS (
    UPDATE durable.tasks SET created_at = created_at - all_, first_started_at = first_started_at - all_,
        started_at = started_at - all_, finished_at = finished_at - by
    FROM shift WHERE tasks.task_id = shift.task_id
), ran AS (
    UPDATE durable.runs SET started_at = started_at - all_, finished_at = finished_at - by
    FROM shift WHERE runs.task_id = shift.task_id
), waited AS (
    UPDATE durable.waits SET created_at = created_at - all_ FROM shift WHERE waits.task_id = shift.task_id
), children AS (
    UPDATE durable.tasks SET created_at = created_at - by, first_started_at = first_started_at - by,
        started_at = started_at - by, finished_at = finished_at - by
    FROM shift WHERE parent_task_id = shift.task_id
), slept AS (
    UPDATE durable.checkpoints SET created_at = created_at - all_,
        value = to_json((value #>> '{}')::timestamptz - all_)
    FROM shift WHERE checkpoints.task_id = shift.task_id AND kind = 'sleep'
), emitted AS (
    UPDATE durable.checkpoints SET created_at = created_at - by, duration = duration + extract(epoch FROM all_ - by)
    FROM shift WHERE checkpoints.task_id = shift.task_id AND kind = 'event'
)
UPDATE durable.checkpoints SET created_at = created_at - CASE
    WHEN name IN ('charge-card', 'reserve-stock') THEN all_ ELSE by END
FROM shift WHERE checkpoints.task_id = shift.task_id AND kind NOT IN ('event', 'sleep')
"""
OVERDUE = """
UPDATE durable.tasks SET created_at = created_at - interval '20 min', available_at = available_at - interval '20 min'
WHERE queue_name = 'archive'
"""

PAGES = {
    "overview": "/",
    "tasks": "/tasks",
    "failures": "/failures",
    "task": "/tasks?task_name=fulfil_order&state=sleeping",
    "task-done": "/tasks?task_name=fulfil_order&state=completed",
    "task-failed": "/tasks?task_name=settle_account&state=failed",
    "talk": "/tasks?task_name=answer_question&state=sleeping",
    "limited": "/tasks?limit_key=acme&state=pending",
    "queue": "/queues/archive",
    "limits": "/queues/llm",
    "charts": "/queues/default",
    "charts-day": "/queues/bank?window=24h",
    "schedules": "/schedules",
    "events": "/events",
    "doctor": "/doctor",
}
SHIPPED = {
    ("overview", 1600, "light"),
    ("charts", 1600, "light"),
    ("task-done", 1600, "light"),
    ("task-failed", 1600, "dark"),
    ("task", 360, "light"),
    ("talk", 1600, "light"),
    ("limits", 1600, "light"),
}
OF_TASKS = {"task", "task-done", "task-failed", "talk", "limited"}


async def take(
    browser: Browser, name: str, path: str, width: int, theme: Any, folder: Path
) -> None:
    context = await browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=theme,
        timezone_id="Europe/Berlin",
        locale="en-GB",
    )
    page = await context.new_page()
    await page.goto(f"http://127.0.0.1:{PORT}{path}")
    if name in OF_TASKS:
        await page.locator("td.lead a").first.click()
        await page.wait_for_url("**/tasks/*-*")
    await page.wait_for_timeout(150)
    await page.screenshot(
        path=folder / f"dashboard-{name}-{width}-{theme}.png", full_page=True
    )
    await context.close()


async def main() -> None:
    every = "--all" in sys.argv
    named = PAGES.keys() & set(sys.argv[1:])
    with temporary_server() as postgres:
        async with Durable(
            postgres.url(), tasks=tasks.tasks, keep_logs=logging.INFO
        ) as durable:
            await fill(durable)
            app = dashboard(
                durable,
                auth=lambda _: Access(
                    "ada@example.com", actions=ACTIONS, payloads=True
                ),
            )
            server = uvicorn.Server(
                uvicorn.Config(app, port=PORT, log_level="warning")
            )
            serving = asyncio.create_task(server.serve())
            try:
                if "--serve" in sys.argv:
                    await serving
                    return
                async with async_playwright() as playwright:
                    browser = await playwright.chromium.launch(
                        executable_path=CHROMIUM
                    )
                    for name, path in PAGES.items():
                        if named and name not in named:
                            continue
                        for width in (360, 800, 1600):
                            for theme in ("light", "dark"):
                                if every or (name, width, theme) in SHIPPED:
                                    folder = (
                                        Path(sys.argv[-1]) if every else HERE
                                    )
                                    await take(
                                        browser,
                                        name,
                                        path,
                                        width,
                                        theme,
                                        folder,
                                    )
                    await browser.close()
            finally:
                server.should_exit = True
                await serving


if __name__ == "__main__":
    asyncio.run(main())
