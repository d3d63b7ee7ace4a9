"""The pages in a real browser: what is clicked and typed, what refreshes itself, and what no policy lets pass."""

import re
import uuid

import pytest

from durable_sa.dashboard.pages import doctor
from tests.dashboard.chromium import Site, fill

pytestmark = pytest.mark.slow

PAGES = (
    "/",
    "/tasks",
    "/failures",
    "/queues",
    "/queues/default",
    "/limits",
    "/workers",
    "/schedules",
    "/events",
    "/doctor",
)


async def test_every_page_fits_and_breaks_no_policy(site: Site) -> None:
    waiting = await fill(site.durable)
    failed = next(one for one in (await site.durable.list_tasks()).items if one.status == "failed")
    await site.durable.create_schedule(
        "business-hours",
        task="break_down",
        cron_expression="0,10,20,30,40,50 8-12,14-18 1-15,20-28 * mon-fri",
        timezone="America/Argentina/Buenos_Aires",
    )
    for width, theme in ((360, "light"), (800, "dark"), (1200, "light"), (1600, "light")):
        page = await site.open("/", width, color_scheme=theme)
        for path in (*PAGES, f"/tasks/{waiting}", f"/tasks/{failed.task_id}", "/tasks/all?action=retry"):
            await page.goto(site.address + path)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
            assert await page.locator("h1").count() == 1
            # Times are those of the reader, with UTC beside.
            if await page.locator("time").count():
                title = await page.locator("time").first.get_attribute("title")
                assert (title or "").endswith("Z")
            await site.check(page)
        await page.context.close()


async def test_limits_and_messages_are_clicked(site: Site) -> None:
    waiting = await fill(site.durable)
    page = await site.open("/queues/default")
    await page.get_by_text("Set a limit…").click()
    await page.locator("select[name=scope]").select_option("key")
    await page.get_by_label("Key, for one key").fill("acme")
    await page.get_by_label("Tasks at once").fill("2")
    await page.get_by_role("button", name="Set", exact=True).click()
    await page.get_by_text("Set the limit of key 'acme' of queue 'default'.").wait_for()
    row = page.locator("tr", has=page.get_by_text("acme", exact=True))
    await row.get_by_text("Close…").click()
    await row.get_by_label("For").fill("1h")
    await row.get_by_role("button", name="Close", exact=True).click()
    await page.get_by_text("Closed key 'acme' of queue 'default'.").wait_for()
    await site.check(page)
    await page.goto(f"{site.address}/limits")
    await page.get_by_role("cell", name="key acme: 2 at once").wait_for()
    await page.goto(f"{site.address}/queues/default?limit_state=closed")
    await page.get_by_role("button", name="Open", exact=True).click()
    await page.get_by_text("Opened key 'acme' of queue 'default'.").wait_for()
    await page.get_by_role("link", name="Overview").click()
    await page.get_by_role("link", name="limited").wait_for()
    await page.goto(f"{site.address}/tasks/{waiting}")
    await page.get_by_label("Topic").fill("note")
    await page.get_by_label("Message, JSON").fill('{"text": "<b>hello</b>"}')
    await page.get_by_role("button", name="Send", exact=True).click()
    await page.get_by_text("Sent a message of topic 'note'.").wait_for()
    await page.get_by_role("heading", name="Waiting messages").wait_for()
    await page.get_by_text("<b>hello</b>").wait_for()
    # What comes while the page is open appears by itself.
    await site.durable.send(uuid.UUID(waiting), "later", None)
    await page.get_by_role("cell", name="later").wait_for()
    await site.check(page)


async def test_actions_are_clicked(site: Site) -> None:
    waiting = await fill(site.durable)
    page = await site.open(f"/tasks/{waiting}")
    # Emit what it waits for.
    await page.get_by_text("Emit it…").click()
    await page.get_by_label("Payload, JSON").fill('"gone"')
    await page.get_by_role("button", name="Emit", exact=True).click()
    await page.get_by_text("Emitted event 'go'.").wait_for()
    async with site.durable.worker():
        assert (await site.durable.wait_for_result(uuid.UUID(waiting), timeout=20)).output == "gone"
    # Retry all that failed, after a look at how many there are.
    await page.goto(f"{site.address}/failures")
    await page.get_by_role("link", name="Retry all…").click()
    await page.get_by_text("3 tasks would be retried").wait_for()
    await page.get_by_role("button", name="Retry them").click()
    await page.get_by_text("Retried 3 tasks.").wait_for()
    # Select two, and cancel them.
    await page.goto(f"{site.address}/tasks?state=pending")
    boxes = page.locator("td.check input")
    await boxes.nth(0).check()
    await boxes.nth(1).check()
    assert await page.locator("#selected").inner_text() == "2"
    await page.locator("#selection").get_by_role("button", name="Cancel").click()
    await page.get_by_text("Cancelled 2 tasks.").wait_for()
    assert site.problems == ["Cancel 2 tasks?"]
    site.problems.clear()
    # Pause a queue, in two clicks, and trigger a schedule, in one.
    await page.goto(f"{site.address}/queues/default")
    await page.locator("summary", has_text="Pause").first.click()
    await page.get_by_role("button", name="Pause", exact=True).first.click()
    await page.get_by_text("Paused queue 'default'.").wait_for()
    assert (await site.durable.queue_statistics("default"))[0].paused
    await page.goto(f"{site.address}/schedules")
    await page.get_by_role("button", name="Trigger").click()
    await page.get_by_text("Triggered schedule 'nightly'.").wait_for()
    assert re.search(r"/tasks/[0-9a-f-]{36}$", page.url)
    await page.get_by_text("queue 'default' is paused", exact=False).first.wait_for()
    await site.check(page)


async def test_keys_move_select_and_open(site: Site) -> None:
    await fill(site.durable)
    page = await site.open("/tasks")
    await page.keyboard.press("/")
    assert await page.evaluate("document.activeElement.name") == "find"
    await page.keyboard.press("Escape")
    await page.keyboard.press("j")
    await page.keyboard.press("j")
    await page.keyboard.press("k")
    await page.keyboard.press("j")
    current = page.locator("tr.current")
    assert await current.count() == 1
    await page.keyboard.press("x")
    assert await current.locator("input").is_checked()
    await page.keyboard.press("?")
    await page.locator("#keys").wait_for()
    await page.keyboard.press("Escape")
    # Until it is closed, its button has the focus, and gets the next key.
    await page.locator("#keys").wait_for(state="hidden")
    target = await current.get_attribute("data-href")
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"**{target}")
    # A key or an id that is typed leads to the task.
    await page.keyboard.press("/")
    assert target is not None
    await page.keyboard.type(target.rpartition("/")[2])
    async with page.expect_navigation():
        await page.keyboard.press("Enter")
    assert page.url.endswith(target)
    await site.check(page)


async def test_a_page_refreshes_what_has_changed_and_no_more(site: Site) -> None:
    waiting = await fill(site.durable)
    page = await site.open(f"/tasks/{waiting}")
    await page.get_by_text("Emit it…").click()
    await page.get_by_label("Payload, JSON").fill("[1")
    await page.evaluate("document.querySelector('main').marked = true")
    async with site.durable.worker():
        await site.durable.emit_event("go", "gone")
        await site.durable.wait_for_result(uuid.UUID(waiting), timeout=20)
    await page.locator("h1 .state.completed").wait_for()
    # The same document: nothing was loaded anew.
    assert await page.evaluate("document.querySelector('main').marked") is True
    await site.check(page)


async def test_what_is_typed_and_opened_stays(site: Site) -> None:
    waiting = await fill(site.durable)
    page = await site.open(f"/tasks/{waiting}")
    await page.get_by_text("Emit it…").click()
    area = page.get_by_label("Payload, JSON")
    await area.fill("[1")
    async with page.expect_response(lambda answer: answer.request.headers.get("hx-request") == "true"):
        pass
    await page.wait_for_timeout(100)
    assert await area.is_visible()
    assert await area.input_value() == "[1"
    assert await page.evaluate("document.activeElement.name") == "payload"
    await site.check(page)


async def test_a_button_acts_on_the_row_that_is_shown(site: Site) -> None:
    durable = site.durable
    await fill(durable)
    page = await site.open("/schedules")
    await page.get_by_text("nightly").wait_for()
    # The row above pushes the others down while the page is open.
    await durable.create_schedule("archive", task="break_down", cron_expression="0 2 * * *")
    await page.locator("summary", has_text="Delete…").click()
    await page.get_by_text("archive").wait_for()
    opened = page.locator("tr", has=page.locator("details[open]"))
    assert await opened.locator(".lead").all_inner_texts() == ["nightly"]
    await opened.locator("summary").click()
    await page.locator("tr", has_text="archive").locator("summary").click()
    await page.locator("tr", has_text="archive").get_by_role("button", name="Delete", exact=True).click()
    await page.get_by_text("Deleted schedule 'archive'.").wait_for()
    assert [schedule.name for schedule in await durable.list_schedules()] == ["nightly"]
    await site.check(page)


async def test_an_opened_question_is_not_replaced_by_another(site: Site) -> None:
    waiting = await fill(site.durable)
    page = await site.open(f"/tasks/{waiting}")
    await page.get_by_text("Cancel…").click()
    await page.get_by_role("button", name="Cancel", exact=True).wait_for()
    async with site.durable.worker():
        await site.durable.emit_event("go", "gone")
        await site.durable.wait_for_result(uuid.UUID(waiting), timeout=20)
    await page.locator("h1 .state.completed").wait_for()
    await page.get_by_text("Delete…").wait_for()
    assert await page.locator("details.confirm[open]").count() == 0
    await site.check(page)


async def test_what_is_chosen_stays(site: Site) -> None:
    durable = site.durable
    await fill(durable)
    page = await site.open("/queues/default")
    await page.get_by_text("Set a limit…").click()
    await page.locator("select[name=scope]").select_option("key")
    await page.locator("select[name=hold]").select_option("task")
    await page.get_by_label("Key, for one key").fill("acme")
    await page.get_by_label("Tasks at once").fill("1")
    await durable.create_schedule("archive", task="break_down", cron_expression="0 2 * * *")
    await page.get_by_text("archive").wait_for()
    await page.get_by_role("button", name="Set", exact=True).click()
    await page.get_by_text("Set the limit of key 'acme' of queue 'default'.").wait_for()
    await page.get_by_text("key acme: 1 at once, held by the whole task").wait_for()
    await site.check(page)


async def test_slow_checks_come_by_themselves(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ALL_QUICK", -1.0)
    page = await site.open("/doctor")
    await page.get_by_text("No problem was found.").wait_for()
    assert await page.locator(".state.late").count() == 0
    await site.check(page)


async def test_a_hidden_tab_asks_nothing(site: Site) -> None:
    page = await site.open("/")
    await page.add_init_script(
        "window.away = true; Object.defineProperty(document, 'hidden', { get: () => window.away })"
    )
    await page.clock.install()
    # The page has its scripts and icons before requests are counted.
    await page.goto(f"{site.address}/", wait_until="networkidle")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.clock.fast_forward(60_000)
    await page.wait_for_timeout(100)
    assert asked == []
    await page.evaluate("window.away = false")
    async with page.expect_request(lambda request: True):
        await page.clock.fast_forward(6_000)
    await site.check(page)


async def test_the_theme_is_chosen_and_kept(site: Site) -> None:
    page = await site.open("/", color_scheme="light")

    async def ground() -> str:
        return await page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = await ground()
    await page.locator("#theme").click()
    dark = await ground()
    assert dark != light
    await page.goto(f"{site.address}/tasks")
    assert await ground() == dark
    await site.check(page)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "javascript:alert(1)"])
async def test_names_run_nothing(site: Site, name: str) -> None:
    await site.durable.create_queue(name)
    spawned = await site.durable.spawn_by_name(name, {name: name}, unchecked=True, queue_name=name)
    await site.durable.emit_event(name, name, queue_name=name)
    page = await site.open("/")
    for path in (*PAGES[:4], "/events", f"/tasks/{spawned.task_id}"):
        await page.goto(site.address + path)
        if path != "/failures":
            assert name in await page.inner_text("body")
        await site.check(page)
