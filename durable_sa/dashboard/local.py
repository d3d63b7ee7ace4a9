"""The dashboard for one user on this machine: access needs the token of the URL that `durable dashboard` prints."""

from __future__ import annotations

import getpass
import hashlib
import hmac
import secrets
from collections.abc import Collection
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import Receive, Scope, Send

from .access import ACTIONS, Access
from .application import Dashboard, dashboard

QUERY: Final = "token"


class LocalDashboard:
    """An ASGI application: the dashboard behind a token, which moves from the URL into a cookie."""

    def __init__(self, durable: Any, *, write: bool = False, payloads: bool = False, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(24)
        # The cookies of all ports of a host are in one place.
        self._cookie = f"durable_token_{hashlib.sha256(self.token.encode()).hexdigest()[:12]}"
        actions: Collection[str] = ACTIONS if write else ()
        self._access = Access(_user(), actions=actions, payloads=payloads)
        self.dashboard: Dashboard = dashboard(durable, auth=self._authorized)

    def _authorized(self, request: Request) -> Access | None:
        return self._access if self._is_known(request.cookies.get(self._cookie, "")) else None

    def _is_known(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(errors="replace"), self.token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and scope["method"] == "GET":
            fields = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            given = next((value for name, value in fields if name == QUERY), None)
            if given is not None and self._is_known(given):
                # The address that stays in the browser's history does not contain the token.
                path = scope.get("raw_path", b"").decode("latin-1").partition("?")[0] or quote(scope["path"])
                rest = urlencode([(name, value) for name, value in fields if name != QUERY])
                # Two slashes would begin the name of a host.
                response = RedirectResponse(f"/{path.lstrip('/')}{'?' if rest else ''}{rest}", 303)
                response.set_cookie(self._cookie, self.token, httponly=True, samesite="strict")
                await response(scope, receive, send)
                return
        await self.dashboard(scope, receive, send)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # The process runs under a number without a name.
        return "local"
