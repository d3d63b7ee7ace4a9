"""Nothing is served without access, and nothing is changed without a form of this user in this browser."""

import asyncio
import logging
import re
import uuid
from typing import Any

import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Mount

from durable_sa import Durable, TaskFilter, TaskRow
from durable_sa.dashboard import Access, dashboard
from durable_sa.dashboard.access import ACTIONS as NAMES
from durable_sa.dashboard.actions import ACTIONS
from durable_sa.dashboard.application import located
from durable_sa.dashboard.pages import PAGES
from durable_sa.errors import InvalidConfiguration, InvalidName
from tests.dashboard.support import EVERYTHING, ORIGIN, browsing, serving

UNKNOWN = uuid.UUID(int=7)


def example(path: str) -> str:
    """A path that a route's pattern matches."""
    parts = {"{task_id:uuid}": str(UNKNOWN), "{queue_name:path}": "default", "{name}": "dashboard.css"}
    return re.sub(r"\{[^}]*\}", lambda found: parts[found[0]], path)


ROUTES = [(method, example(route.path)) for route in dashboard(Durable(), auth=lambda _: None).routes
          for method in sorted(route.methods or ())]  # fmt: skip
"""Every route that there is, so that a new one cannot be forgotten."""


def test_the_table_has_every_route() -> None:
    assert {path for _, path in ROUTES} == {example(part.path) for part in (*PAGES, *ACTIONS)} | {
        "/assets/dashboard.css"
    }
    assert all(action.needs in NAMES for action in ACTIONS)
    assert {method for method, _ in ROUTES} == {"GET", "HEAD", "POST"}


async def test_every_route_refuses_who_has_no_access() -> None:
    # No database is needed for it.
    async with serving(Durable("postgresql://127.0.0.1:1/none"), None) as (browser, _):
        for method, path in [*ROUTES, ("GET", "/nothing"), ("OPTIONS", "/"), ("PUT", "/tasks")]:
            for accept in ("text/html", "application/json"):
                headers = {"accept": accept, "origin": ORIGIN, "sec-fetch-site": "same-origin"}
                answer = await browser.request(
                    method, path, headers=headers, data={"token": "x"} if method == "POST" else None
                )
                assert answer.status_code == 403, (method, path)
                assert "durable_dashboard" not in answer.headers.get("set-cookie", "")
                if method == "GET" and accept == "application/json":
                    assert answer.json() == {"error": "You may not see this.", "status": 403}


@pytest.mark.parametrize("accept", ["text/html", "application/json"])
async def test_every_action_refuses_who_may_not_do_it(durable: Durable, accept: str) -> None:
    for action in ACTIONS:
        access = Access("eve", actions=NAMES - {action.needs})
        async with serving(durable, access) as (browser, _):
            answer = await browser.act(action.path, headers={"accept": accept}, task_id=str(UNKNOWN), name="x")
            assert answer.status_code == 403, action.path
            assert action.needs in answer.text


async def test_without_auth_there_is_no_dashboard() -> None:
    with pytest.raises(TypeError):
        dashboard(Durable())  # type: ignore[call-arg]
    for nothing in (None, Access("ada"), "ada"):
        with pytest.raises(InvalidConfiguration, match="auth: it must be a function"):
            dashboard(Durable(), auth=nothing)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="redact"):
        dashboard(Durable(), auth=lambda _: None, redact="x")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfiguration, match="origins"):
        dashboard(Durable(), auth=lambda _: None, origins="https://x")


async def test_auth_may_be_async_raise_and_redirect(caplog: pytest.LogCaptureFixture) -> None:
    async def later(request: Request) -> Access | None:
        assert request.headers["host"] == "ops.example.com"
        return EVERYTHING

    def login(_: Request) -> Access | None:
        raise HTTPException(303, headers={"Location": "/login"})

    durable = Durable("postgresql://127.0.0.1:1/none")
    async with serving(durable, later) as (browser, _):
        assert (await browser.get("/assets/dashboard.css")).status_code == 200
    async with serving(durable, login) as (browser, _):
        answer = await browser.get("/tasks")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    # An answer that is no Access is a mistake, which opens nothing.
    for wrong in (True, "ada", {"user": "ada"}):
        async with serving(durable, lambda _, wrong=wrong: wrong) as (browser, _):
            assert (await browser.get("/assets/dashboard.css")).status_code == 500
    assert "auth must return an Access or None, not bool" in caplog.text


async def test_errors_of_auth_tell_nothing_and_any_status_is_sent() -> None:
    def failing(_: Request) -> Access | None:
        raise InvalidName("queue", "internal-name", "x")

    def closed(_: Request) -> Access | None:
        raise HTTPException(499, "why")

    durable = Durable("postgresql://127.0.0.1:1/none")
    for auth, status in ((failing, 500), (closed, 499)):
        async with serving(durable, auth) as (browser, _):
            for accept in ("text/html", "application/json"):
                answer = await browser.get("/tasks", headers={"accept": accept})
                assert answer.status_code == status
                assert "internal-name" not in answer.text


async def test_auth_may_read_the_body(durable: Durable) -> None:
    async def reading(request: Request) -> Access | None:
        await request.body()
        return EVERYTHING

    spawned = await durable.spawn_by_name("anything", unchecked=True)
    async with serving(durable, reading) as (browser, _), asyncio.timeout(20):
        answer = await browser.act("/tasks/cancel", task_id=str(spawned.task_id))
        assert answer.json()["done"] == 1


async def test_cookies_are_for_a_place_with_any_name(durable: Durable) -> None:
    app = dashboard(durable, auth=lambda _: EVERYTHING)
    async with browsing(Starlette(routes=[Mount("/é x", app)])) as browser:
        answer = await browser.get("/é x/events")
        assert answer.status_code == 200
        assert "path=/%c3%a9%20x;" in answer.headers["set-cookie"].lower()
    await app.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": ""}, "user: it is empty"),
        ({"user": None}, "user: it must be a str"),
        ({"user": "a", "actions": {"drop"}}, "actions: 'drop' is none"),
        ({"user": "a", "actions": "cancel"}, "actions: 'cancel' is a text"),
        ({"user": "a", "queues": "mail"}, "queues: 'mail' is a text"),
    ],
)
def test_an_access_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        Access(**options)


def test_an_access_names_queues_and_tasks() -> None:
    with pytest.raises(InvalidName):
        Access("a", queues={""})
    with pytest.raises(TypeError, match="TaskFilter or a select"):
        Access("a", where="x")  # type: ignore[arg-type]
    assert Access("a", where=select(TaskRow.task_id)).only_tasks
    assert not Access("a", where=TaskFilter()).actions


async def test_a_form_of_another_origin_is_refused(durable: Durable) -> None:
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    async with serving(durable) as (browser, _):
        for headers in (
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
            {"sec-fetch-site": "none"},
            {"origin": "https://evil.example"},
            {"origin": "https://ops.example.com.evil.example"},
            {"origin": "https://ops.example.com:8443"},
            {"origin": "null"},
            {"origin": ""},
            {"origin": "file://ops.example.com"},
            {"origin": "https://ops.example.com:x"},
        ):
            answer = await browser.act("/tasks/cancel", headers=headers, task_id=str(spawned.task_id))
            assert answer.status_code == 403, headers
        token = await browser.token()
        answer = await browser.post("/tasks/cancel", data={"token": token, "task_id": str(spawned.task_id)})
        assert answer.status_code == 403
        assert "no Origin" in answer.text
        assert (await durable.get_task(spawned)).status == "pending"
        # The port may be written out.
        answer = await browser.act("/tasks/cancel", headers={"origin": f"{ORIGIN}:443"}, task_id=str(spawned.task_id))
        assert answer.status_code == 200, answer.text


async def test_a_proxy_that_replaces_the_host_needs_the_origin_by_name(durable: Durable) -> None:
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    headers = {"origin": "https://public.example"}
    async with serving(durable) as (browser, _):
        answer = await browser.act("/tasks/cancel", headers=headers, task_id=str(spawned.task_id))
        assert answer.status_code == 403
        assert "origins=" in answer.text
    async with serving(durable, origins=["https://public.example"]) as (browser, _):
        assert (await browser.act("/tasks/cancel", headers=headers, task_id=str(spawned.task_id))).status_code == 200


async def test_a_form_needs_the_token_of_its_user_in_its_browser(durable: Durable) -> None:
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    users = {"user": "ada"}
    app = dashboard(durable, auth=lambda _: Access(users["user"], actions=NAMES))
    fields = {"task_id": str(spawned.task_id)}
    async with browsing(app) as browser, browsing(app) as other:
        token, foreign = await browser.token(), await other.token()
        assert token != foreign
        for wrong in ("", "x", "0" * 64, foreign, "\ud800"[:0], "é" * 64, token.upper()):
            answer = await browser.act("/tasks/cancel", **{**fields, "token": wrong})
            assert answer.status_code == 403, wrong
        # The same browser with another user.
        users["user"] = "eve"
        assert (await browser.act("/tasks/cancel", **{**fields, "token": token})).status_code == 403
        users["user"] = "ada"
        # Without the cookie, and with one that somebody else has chosen.
        browser.cookies.clear()
        headers = {"cookie": "durable_dashboard=abc"}
        assert (await browser.act("/tasks/cancel", headers=headers, **{**fields, "token": token})).status_code == 403
        assert (await durable.get_task(spawned)).status == "pending"
        assert (await browser.act("/tasks/cancel", **fields)).status_code == 200
    await app.close()


async def test_actions_are_no_get(durable: Durable) -> None:
    async with serving(durable) as (browser, _):
        for action in ACTIONS:
            answer = await browser.get(f"{action.path}?task_id={UNKNOWN}&name=x&queue_name=default&until=1h")
            assert answer.status_code in (404, 405), action.path
            assert action.path.startswith("/queues/") or answer.status_code == 405


async def test_no_path_leads_out_of_the_assets(durable: Durable) -> None:
    async with serving(durable) as (browser, _):
        for name in (
            "..%2f__init__.py",
            "%2e%2e/application.py",
            "..%5capplication.py",
            "%2fetc%2fpasswd",
            "dashboard.css%00",
            "templates%2fbase.html",
            "",
        ):
            answer = await browser.get(f"/assets/{name}")
            assert answer.status_code == 404, name
            assert "import" not in answer.text
        found = await browser.get("/assets/htmx-2.0.11.min.js")
        assert found.headers["content-type"].startswith("text/javascript")


async def test_every_response_has_the_headers(durable: Durable) -> None:
    async with serving(durable) as (browser, _):
        for path, status in (("/", 200), ("/assets/dashboard.js", 200), ("/nothing", 404), ("/tasks?order=x", 400)):
            answer = await browser.get(path)
            assert answer.status_code == status
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["x-frame-options"] == "DENY"
            assert answer.headers["referrer-policy"] == "same-origin"
            assert "Cookie" in answer.headers["vary"]
            if not path.startswith("/assets"):
                assert answer.headers["cache-control"] == "no-store"
        answer = await browser.get("/")
        assert "style=" not in answer.text
        assert not re.search(r"\son\w+=|<script(?![^>]* src=)|<style|javascript:", answer.text)
        cookie = (await browser.get("/", headers={"cookie": ""})).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Secure" in cookie


async def test_websockets_are_refused(durable: Durable) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await dashboard(durable, auth=lambda _: EVERYTHING)({"type": "websocket", "path": "/"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_links_and_cookies_know_where_it_is_mounted(durable: Durable) -> None:
    app = dashboard(durable, auth=lambda _: EVERYTHING)
    await durable.spawn_by_name("anything", unchecked=True)
    async with browsing(Starlette(routes=[Mount("/ops/durable", app)])) as browser:
        answer = await browser.get("/ops/durable/tasks")
        assert answer.status_code == 200
        links = set(re.findall(r'(?:href|src|action|formaction|hx-get)="([^"]*)"', answer.text))
        assert all(link.startswith("/ops/durable/") for link in links - {"#live"}), links
        assert "path=/ops/durable" in answer.headers["set-cookie"].lower()
        for link in sorted(links - {"#live"}):
            assert (await browser.get(link.replace("&amp;", "&"))).status_code in (200, 405), link
    await app.close()


def test_a_place_is_known_in_every_framework() -> None:
    for scope, root, path in (
        ({"path": "/tasks", "raw_path": b"/tasks"}, "", "/tasks"),
        ({"path": "/tasks/", "raw_path": b"/tasks/"}, "", "/tasks"),
        ({"path": "/", "raw_path": b"/"}, "", "/"),
        ({"path": "/ops/tasks", "root_path": "/ops", "raw_path": b"/ops/tasks"}, "/ops", "/ops/tasks"),
        ({"path": "/ops/", "root_path": "/ops", "raw_path": b"/ops/"}, "/ops", "/ops/"),
        ({"path": "/ops", "root_path": "/ops"}, "/ops", "/ops/"),
        # Litestar.
        ({"path": "/", "root_path": "", "raw_path": b"/ops"}, "/ops", "/ops/"),
        ({"path": "/tasks/", "root_path": "", "raw_path": b"/ops/tasks"}, "/ops", "/ops/tasks"),
        ({"path": "/queues/a b/", "root_path": "", "raw_path": b"/o/queues/a%20b"}, "/o", "/o/queues/a b"),
        # A queue whose name ends with a slash.
        ({"path": "/queues/a/", "raw_path": b"/queues/a%2F"}, "", "/queues/a/"),
    ):
        found = located(scope)
        assert (found["root_path"], found["path"]) == (root, path), scope


async def test_a_broken_page_says_nothing_of_its_error(caplog: pytest.LogCaptureFixture) -> None:
    # No server answers there; the URL has a password.
    async with serving(Durable("postgresql://ada:secret@127.0.0.1:1/none")) as (browser, _):
        with caplog.at_level(logging.ERROR):
            text = await browser.page("/tasks", 500)
    assert "secret" not in text + caplog.text
    assert "Traceback" not in text
