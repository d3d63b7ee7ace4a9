"""What tasks are named, fail with and store is shown as text, and payloads only to those who may see them."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

from sqlalchemy import insert, text

from durable_sa import Durable, TaskContext, TaskFilter, UserError, task
from durable_sa.dashboard import Access
from durable_sa.models import RunRow
from durable_sa.testing import run_until_idle
from tests.dashboard.support import EVERYTHING, serving

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe",
    "</pre></textarea></script><svg onload=alert(1)>",
    "&lt;b&gt;",
    "..",
    "a/b?c#d%2e",
]
SECRET = "4111-1111-1111-1111"


class Markup(HTMLParser):
    """The elements of a page, each of which must be one of its own."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc")]
        for name in ("href", "src", "action", "formaction", "hx-get", "data-href"):
            assert (attributes.get(name) or "/").startswith(("/", "#")), attributes
        assert tag not in ("style", "iframe", "object", "base")
        assert tag not in ("script", "img") or (attributes.get("src") or "").startswith("/assets/")


def assert_intact(page: str) -> None:
    """The page has no markup but its own."""
    assert page.rstrip().endswith("</html>")
    parser = Markup()
    parser.feed(page)
    parser.close()
    assert "\u202e" not in page
    assert "\x00" not in page


async def test_names_are_text(durable: Durable) -> None:
    ids = {}
    for name in HOSTILE:
        await durable.create_queue(name)
        spawned = await durable.spawn_by_name(name, unchecked=True, queue_name=name, idempotency_key=name)
        await durable.emit_event(name, {"x": name}, queue_name=name)
        ids[name] = spawned.task_id
        traceback = f'  File "{name}", line 1, in {name}\n'
        # NUL in an escape of JSON, as a driver in another language may have written it.
        error = json.dumps({"name": name, "message": f"{name} \x00", "traceback": traceback, "step": name})
        async with durable.engine.begin() as connection:
            row = {"task_id": spawned.task_id, "attempt": 1, "run_id": spawned.run_id, "state": "failed"}
            await connection.execute(insert(RunRow).values(row))
            await connection.execute(
                text(
                    "UPDATE durable.tasks SET state = 'failed', outcome = 'failed', finished_at = now(), attempt = 1, "
                    "started_at = now(), error = CAST(:error AS json) WHERE task_id = :task_id"
                ),
                {"error": error, "task_id": spawned.task_id},
            )
            await connection.execute(
                text("UPDATE durable.runs SET error = CAST(:error AS json) WHERE task_id = :task_id"),
                {"error": error, "task_id": spawned.task_id},
            )
    access = Access(HOSTILE[0], actions={"retry", "cancel", "delete", "emit", "pause", "trigger"}, payloads=True)
    async with serving(durable, access) as (browser, _):
        for path in ("/", "/tasks", "/queues", "/events", "/failures"):
            assert_intact(await browser.page(path))
            data = json.dumps(await browser.data(path))
            assert [name for name in HOSTILE if json.dumps(name)[1:-1] not in data] == [], path
        for name, task_id in ids.items():
            assert_intact(await browser.page(f"/tasks/{task_id}"))
            assert (await browser.data(f"/tasks/{task_id}"))["task"]["key"] == name
        # Links lead to where they say, whatever is in the names. No browser would send those of a queue "..".
        for path in ("/queues", "/failures", "/events"):
            for link in set(re.findall(r'href="([^"#]*)"', await browser.page(path))):
                if not link.endswith("/.."):
                    assert (await browser.get(unescape(link))).status_code == 200, link
        answer = await browser.act("/queues/pause", headers={"accept": "text/html"}, queue_name=HOSTILE[1])
        assert answer.status_code == 303
        assert_intact(await browser.page("/queues"))


async def test_values_that_no_page_could_show_leave_it_intact(durable: Durable) -> None:
    long, deep = "<b>" * 700_000, "[" * 400 + "]" * 400
    spawned = await durable.spawn_by_name("big", {"long": long, "many": list(range(20_000))}, unchecked=True)
    async with durable.engine.begin() as connection:
        for number, value in enumerate((r'"\ud800 \u0000 \u202e"', deep, '"<script>alert(1)</script>"', "1e400")):
            await connection.execute(
                text(
                    "INSERT INTO durable.checkpoints (task_id, key, kind, name, value, arguments) "
                    "VALUES (:task_id, gen_random_uuid(), 'step', :name, CAST(:value AS json), :arguments)"
                ),
                {
                    "task_id": spawned.task_id,
                    "name": f"step-{number}",
                    "value": value,
                    "arguments": f"[[{value}],{{}}]",
                },
            )
    async with serving(durable) as (browser, _):
        page = await browser.page(f"/tasks/{spawned.task_id}")
        assert_intact(page)
        assert len(page) < 600_000
        assert "2100000 characters" in page
        assert "more)" in page
        data = await browser.data(f"/tasks/{spawned.task_id}")
        assert len(data["values"]["params"]["long"]) < 21_000


@task
async def decline(ctx: TaskContext, params: dict[str, Any]) -> None:
    raise UserError({"message": f"declined {SECRET}", "card": SECRET})


@task
async def ask(ctx: TaskContext, params: dict[str, Any]) -> dict[str, Any]:
    await ctx.step("read-card", keep, params["card"])
    child = await ctx.spawn("child", decline, params)
    await ctx.await_event("approved")
    await ctx.join(child)
    return params


async def keep(card: str) -> str:
    return card


async def test_payloads_are_nowhere_without_permission(durable: Durable) -> None:
    durable.register(ask)
    durable.register(decline)
    spawned = await durable.spawn_by_name("ask", {"card": SECRET}, headers={"card": SECRET})
    await durable.emit_event("approved", {"card": SECRET})
    await run_until_idle(durable)
    assert (await durable.get_task(spawned)).status == "failed"
    (child,) = (await durable.list_tasks(TaskFilter(parent=spawned))).items
    paths = [
        "/",
        "/tasks",
        f"/tasks/{spawned.task_id}",
        f"/tasks/{child.task_id}",
        "/failures",
        "/events",
        "/events?name=approved&queue_name=default",
        "/schedules",
        "/workers",
        "/queues",
    ]
    async with serving(durable, Access("eve", actions=EVERYTHING.actions)) as (browser, _):
        for path in paths:
            for accept in ("text/html", "application/json"):
                answer = await browser.get(path, headers={"accept": accept})
                assert answer.status_code == 200
                assert SECRET not in answer.text, path
    async with serving(durable) as (browser, _):
        shown = [path for path in paths if SECRET in await browser.page(path)]
        assert shown == [paths[2], paths[3], paths[4], paths[6]]

    paths_seen: set[tuple[str, tuple[Any, ...]]] = set()

    def redact(task_name: str, path: tuple[str | int, ...], value: Any) -> Any:
        paths_seen.add((task_name, path))
        if path[-1] == "card":
            return "***"
        return value.replace(SECRET, "gone") if isinstance(value, str) else value

    async with serving(durable, redact=redact) as (browser, _):
        for path in (paths[2], paths[6]):
            text_ = await browser.page(path)
            assert SECRET not in text_, path
            assert "***" in text_
    assert {
        ("ask", ("params", "card")),
        ("ask", ("step", "read-card")),
        ("ask", ("step", "read-card", "arguments", "args", 0)),
        ("", ("event", "approved", "card")),
    } <= paths_seen

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    async with serving(durable, redact=broken) as (browser, _):
        text_ = await browser.page(paths[2])
        assert SECRET not in text_
        assert "not shown: redact failed" in text_


async def test_strange_requests_get_answers(durable: Durable) -> None:
    async with serving(durable) as (browser, _):
        for path, status in (
            ("/tasks?state=odd", 400),
            ("/tasks?spawned_after=yesterday", 400),
            ("/tasks?spawned_after=99999999999h", 400),
            ("/tasks?running_longer_than=x", 400),
            ("/tasks?parent=x", 400),
            ("/tasks?version=x", 400),
            ("/tasks?order=odd", 400),
            ("/tasks?after=odd", 400),
            ("/tasks?limit=0", 400),
            ("/tasks?limit=x", 400),
            ("/tasks?task_name=a%00b", 400),
            ("/tasks?task_name=%ff%fe", 200),
            ("/tasks?" + "&".join(["state=failed"] * 1001), 400),
            ("/tasks/00000000-0000-0000-0000-000000000007", 404),
            ("/tasks/x", 404),
            ("/queues/none", 404),
            ("/queues/a%00b", 404),
            ("/tasks/all", 400),
            ("/tasks/all?action=odd", 400),
            ("/events?name=x&queue_name=none", 200),
        ):
            for accept in ("text/html", "application/json"):
                answer = await browser.get(path, headers={"accept": accept})
                assert answer.status_code == status, (path, answer.text)
        assert (await browser.act("/tasks/cancel")).status_code == 400
        assert (await browser.act("/tasks/cancel", task_id="x")).status_code == 400
        assert (await browser.act("/tasks/cancel", task_id="00000000-0000-0000-0000-000000000007")).status_code == 404
        assert (await browser.act("/events/emit", queue_name="default")).status_code == 400
        assert (await browser.act("/events/emit", name="x", queue_name="default", payload="{")).status_code == 400
        assert (await browser.act("/events/emit", name="$x", queue_name="default")).status_code == 400
        assert (await browser.act("/events/emit", name="x", queue_name="none")).status_code == 404
        assert (await browser.act("/queues/pause", queue_name="none")).status_code == 404
        assert (await browser.act("/schedules/trigger", name="none", queue_name="default")).status_code == 404
        assert (await browser.act("/events/emit", name="x" * 2**20, queue_name="default")).status_code == 413
        headers = {"origin": "https://ops.example.com", "content-type": "application/json"}
        assert (await browser.post("/events/emit", content="{}", headers=headers)).status_code == 415
