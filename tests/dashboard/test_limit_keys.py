"""The keys of a queue with limits: all of them page by page, and one that is named."""

import re
from datetime import UTC, datetime, timedelta
from html import unescape
from uuid import UUID

import pytest
from sqlalchemy import text

from durable_sa import Durable, Limit, Rate, TaskContext, TaskFilter, task
from durable_sa.dashboard import Access
from tests.dashboard.support import Browser, serving
from tests.support import eventually

KEYS = """
INSERT INTO durable.limit_keys (queue_name, limit_key, running)
    SELECT 'default', 'key-' || number, number % 2 FROM generate_series(1, 205) AS number
"""
NEXT = re.compile(r'<a rel="next" href="([^"]+)">Next keys</a>')
NAMES = re.compile(r'<tr id="a-[0-9a-f]{16}">\s*<td data-label="Key" class="lead"><bdi class="name">([^<]*)</bdi>')


@task("hold")
async def hold(ctx: TaskContext) -> None:
    await ctx.await_event("never")


async def fill(durable: Durable) -> None:
    await durable.set_limit("default", Limit(concurrency=1), per_key=True)
    async with durable.engine.begin() as connection:
        await connection.execute(text(KEYS))


async def pages(browser: Browser, query: str) -> list[list[str]]:
    found = []
    after = ""
    while after is not None:
        data = await browser.data(f"/queues/default?{query}&limit_after={after}")
        found.append([row["limit_key"] for row in data["limit_keys"]])
        after = data["limit_next"]
    return found


async def test_pages_have_each_key_once(durable: Durable, browser: Browser) -> None:
    await fill(durable)
    listed = [info.key for info in await durable.list_limit_keys("default", limit=1000)]
    found = await pages(browser, "")
    assert [len(page) for page in found] == [100, 100, 5]
    assert [key for page in found for key in page] == listed
    full = await pages(browser, "limit_state=full")
    assert [len(page) for page in full] == [100, 3]
    assert [key for page in full for key in page] == [key for key in listed if int(str(key)[4:]) % 2]


async def test_links_lead_through_the_pages(durable: Durable, browser: Browser) -> None:
    await fill(durable)
    path, names, visited = "/queues/default?limit_state=full", [], 0
    while path:
        page = await browser.page(path)
        names += NAMES.findall(page)
        assert ("First keys" in page) == (visited > 0)
        visited += 1
        link = NEXT.search(page)
        path = "" if link is None else unescape(link[1])
    assert (visited, len(names), len(set(names))) == (2, 103, 103)
    assert "No further key is full." in await browser.page("/queues/default?limit_state=full&limit_after=z")
    assert "There is no further key." in await browser.page("/queues/default?limit_after=z")


async def test_a_key_is_found_by_its_name(durable: Durable, browser: Browser) -> None:
    await fill(durable)
    # Other fields of the form do not hide it.
    data = await browser.data("/queues/default?limit_key=key-77&limit_state=closed&limit_after=z")
    assert [(row["limit_key"], row["running"], row["concurrency"]) for row in data["limit_keys"]] == [("key-77", 1, 1)]
    assert data["limit_next"] is None
    page = await browser.page("/queues/default?limit_key=key-77")
    assert NAMES.findall(page) == ["key-77"]
    assert "All keys" in page
    assert '<span class="state full"><i aria-hidden="true">■</i>full</span>' in page
    # A part of a name is none.
    assert (await browser.data("/queues/default?limit_key=key-"))["limit_keys"] == []
    page = await browser.page("/queues/default?limit_key=unused")
    assert 'Nothing has used key <bdi class="name">unused</bdi>' in page
    # It can be closed all the same, by those who may.
    assert 'name="key" value="unused"' in page
    async with serving(durable, Access("eve")) as (other, _):
        page = await other.page("/queues/default?limit_key=unused")
        assert 'Nothing has used key <bdi class="name">unused</bdi>' in page
        assert 'name="key"' not in page


async def test_blanks_around_a_key_are_part_of_it(durable: Durable, browser: Browser) -> None:
    await durable.set_limit("default", Limit(concurrency=1), per_key=True)
    until = datetime.now(UTC) + timedelta(hours=1)
    for key in (" acme", "acme", "acme "):
        await durable.close_limit_key("default", key, until)
    assert (await browser.act("/limits/open", queue_name="default", key="acme ")).json()["message"] == (
        "Opened key 'acme ' of queue 'default'."
    )
    assert (await browser.act("/limits/close", queue_name="default", key=" acme", **{"for": "2h"})).status_code == 200
    closed = await durable.list_limit_keys("default", state="closed")
    assert {info.key for info in closed} == {" acme", "acme"}
    listed = [info.key for info in await durable.list_limit_keys("default")]
    data = await browser.data(f"/queues/default?limit_after={listed[0]}")
    assert [row["limit_key"] for row in data["limit_keys"]] == listed[1:]


async def start(durable: Durable, number: int, key: str | None = None) -> None:
    """Let a worker begin so many tasks, which then wait."""
    for _ in range(number):
        await durable.spawn(hold, limit_key=key)

    async def asleep() -> bool:
        return len((await durable.list_tasks(TaskFilter(state="sleeping"))).items) == number

    await eventually(asleep)


async def reason(browser: Browser, task_id: UUID) -> tuple[str, bool]:
    (found,) = (await browser.data(f"/tasks/{task_id}"))["reasons"]
    return found["text"], found["until"] is not None


async def test_a_task_says_which_limit_it_waits_for(durable: Durable, browser: Browser) -> None:
    durable.register(hold)
    await durable.set_limit("default", Limit(concurrency=2, hold="task"), per_key=True)
    async with durable.worker():
        await start(durable, 2, "acme")
        task_id = (await durable.spawn(hold, limit_key="acme")).task_id
        assert await reason(browser, task_id) == ("due, waits for a slot of key 'acme': 2 of 2 are taken", False)
        # How many slots other tasks hold is not for those who may see only some.
        async with serving(durable, Access("eve", where=TaskFilter(task_name="hold"))) as (other, _):
            assert await reason(other, task_id) == ("due, waits for a slot of key 'acme'", False)
        await durable.close_limit_key("default", "acme", datetime.now(UTC) + timedelta(hours=1))
        assert await reason(browser, task_id) == ("due, but key 'acme' is closed", True)
        assert "Due, but key &#39;acme&#39; is closed" in await browser.page(f"/tasks/{task_id}")
        await durable.set_limit("default", Limit(concurrency=2))
        await durable.set_limit("default", Limit(concurrency=9, hold="task"), per_key=True)
        await durable.close_limit_key("default", "acme", None)
        assert await reason(browser, task_id) == ("due, waits for a slot of queue 'default': 2 of 2 are taken", False)


@pytest.mark.parametrize("of_key", [True, False])
async def test_a_task_says_which_rate_it_waits_for(durable: Durable, browser: Browser, of_key: bool) -> None:
    durable.register(hold)
    await durable.set_limit("default", Limit(rate=Rate(1, per=3600)), per_key=of_key)
    key = "acme" if of_key else None
    async with durable.worker():
        await start(durable, 1, key)
        task_id = (await durable.spawn(hold, limit_key=key)).task_id
        name = "key 'acme'" if of_key else "queue 'default'"
        assert await reason(browser, task_id) == (f"due, waits for the rate of {name}", True)
