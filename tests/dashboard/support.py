"""A browser as far as it needs none: requests to the dashboard over ASGI, with the token of its forms."""

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from durable_sa import Durable
from durable_sa.dashboard import Access, Dashboard, dashboard
from durable_sa.dashboard.access import ACTIONS

HOST = "ops.example.com"
ORIGIN = f"https://{HOST}"
EVERYTHING = Access("ada", actions=ACTIONS, payloads=True)

TOKEN = re.compile(r'name="token" value="([0-9a-f]{64})"')


class Browser(httpx.AsyncClient):
    """A client that sends what a browser sends."""

    async def data(self, path: str, status: int = 200) -> Any:
        answer = await self.get(path, headers={"accept": "application/json"})
        assert answer.status_code == status, answer.text
        return answer.json()

    async def page(self, path: str, status: int = 200) -> str:
        answer = await self.get(path, headers={"accept": "text/html"})
        assert answer.status_code == status, answer.text
        return answer.text

    async def token(self) -> str:
        """The token of this session; some page with a form must be visible."""
        found = TOKEN.search(await self.page("/tasks")) or TOKEN.search(await self.page("/events"))
        return found[1] if found else "0" * 64

    async def act(self, path: str, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        form = {"token": await self.token(), **fields}
        sent = {"origin": ORIGIN, "sec-fetch-site": "same-origin", "accept": "application/json", **(headers or {})}
        return await self.post(path, data=form, headers=sent)


@asynccontextmanager
async def browsing(app: Any) -> AsyncGenerator[Browser]:
    async with Browser(transport=httpx.ASGITransport(app=app), base_url=ORIGIN) as browser:
        yield browser


@asynccontextmanager
async def serving(
    durable: Durable, access: Access | Callable[..., Any] | None = EVERYTHING, **options: Any
) -> AsyncGenerator[tuple[Browser, Dashboard]]:
    auth = access if callable(access) else lambda _: access
    app = dashboard(durable, auth=auth, **options)
    try:
        async with browsing(app) as browser:
            yield browser, app
    finally:
        await app.close()
