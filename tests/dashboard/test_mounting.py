"""The dashboard inside of applications of each framework, as the guide shows it."""

import asyncio
import re
from typing import Any

import httpx
import pytest

from durable_sa import Durable
from durable_sa.dashboard import Access, dashboard
from tests.dashboard.support import EVERYTHING, ORIGIN

pytestmark = pytest.mark.slow


async def visit(browser: httpx.AsyncClient, durable: Durable) -> None:
    """Look at pages and press a button, below /ops/durable."""
    spawned = await durable.spawn_by_name("anything", unchecked=True)
    first = await browser.get("/ops/durable/", follow_redirects=True)
    assert first.status_code == 200, first.text
    page = await browser.get("/ops/durable/tasks")
    assert page.status_code == 200
    links = set(re.findall(r'(?:href|src|action|formaction|hx-get)="(/[^"]*)"', page.text))
    assert all(link.startswith("/ops/durable/") for link in links), links
    for link in sorted(links):
        assert (await browser.get(link.replace("&amp;", "&"))).status_code in (200, 405), link
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page.text)
    assert found
    form = {"token": found[1], "task_id": str(spawned.task_id)}
    headers = {"origin": ORIGIN, "sec-fetch-site": "same-origin"}
    answer = await browser.post("/ops/durable/tasks/cancel", data=form, headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ops/durable/tasks/{spawned.task_id}")
    shown = await browser.get(answer.headers["location"])
    assert "Cancelled 1 task." in shown.text
    assert "cancelled" in shown.text


async def test_starlette(durable: Durable) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    inner = dashboard(durable, auth=lambda _: EVERYTHING)
    app = Starlette(routes=[Mount("/ops/durable", inner)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ORIGIN) as browser:
        await visit(browser, durable)
    await inner.close()


async def test_fastapi(durable: Durable) -> None:
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    inner = dashboard(durable, auth=lambda _: EVERYTHING)
    app.mount("/ops/durable", inner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ORIGIN) as browser:
        await visit(browser, durable)
    await inner.close()


async def test_litestar(durable: Durable) -> None:
    litestar = pytest.importorskip("litestar")
    handlers = pytest.importorskip("litestar.handlers")
    inner = dashboard(durable, auth=lambda _: EVERYTHING)
    app = litestar.Litestar([handlers.asgi("/ops/durable", is_mount=True, copy_scope=True)(inner)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ORIGIN) as browser:
        await visit(browser, durable)
    await inner.close()


async def test_flask(durable: Durable) -> None:
    flask = pytest.importorskip("flask")
    a2wsgi = pytest.importorskip("a2wsgi")
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = flask.Flask("shop")
    client = Durable(durable.engine.url)
    inner = dashboard(client, auth=lambda _: EVERYTHING)
    # The event loop of a2wsgi is another one than this test's.
    wsgi: Any = DispatcherMiddleware(app.wsgi_app, {"/ops/durable": a2wsgi.ASGIMiddleware(inner)})

    class Threaded(httpx.AsyncBaseTransport):
        def __init__(self) -> None:
            self.inner = httpx.WSGITransport(wsgi)

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            content = await request.aread()
            sent = httpx.Request(request.method, request.url, headers=request.headers, content=content)

            def call() -> httpx.Response:
                answer = self.inner.handle_request(sent)
                return httpx.Response(answer.status_code, headers=answer.headers, content=answer.read())

            return await asyncio.to_thread(call)

    async with httpx.AsyncClient(transport=Threaded(), base_url=ORIGIN) as browser:
        await visit(browser, durable)


async def test_a_session_decides(durable: Durable) -> None:
    """Access by what the application's own middleware knows."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.routing import Mount

    def who(request: Request) -> Access | None:
        user = request.headers.get("x-user")
        return Access(user) if user else None

    inner = dashboard(durable, auth=who)
    app = Starlette(routes=[Mount("/ops/durable", inner)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ORIGIN) as browser:
        assert (await browser.get("/ops/durable/")).status_code == 403
        assert (await browser.get("/ops/durable/", headers={"x-user": "ada"})).status_code == 200
    await inner.close()
