"""The ASGI application: everything in it is behind `auth`."""

from __future__ import annotations

import inspect
import logging
import mimetypes
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import cache, partial
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import (
    DurableError,
    InvalidConfiguration,
    InvalidState,
    QueueNotFound,
    ScheduleNotFound,
    TaskNotFound,
)
from . import security
from .access import Access
from .actions import ACTIONS, Action, Interrupted, Outcome, done_before, may_go_on, report
from .forms import Fields, form_of, query_of
from .pages import PAGES, Page
from .reader import Reader, TooBusy
from .rendering import Urls, as_json, render
from .values import Redact
from .view import Redirect, View

if TYPE_CHECKING:
    from ..client import Durable

Auth = Callable[[Request], Access | Awaitable[Access | None] | None]

logger = logging.getLogger("durable_sa")

NOTE: Final = "durable_dashboard_note"
"""The cookie that carries the sentence about an action to the next page."""
_ACCESS: Final = "durable.access"
_LONGEST_NOTE: Final = 1000


def dashboard(
    durable: Durable[Any], *, auth: Auth, redact: Redact | None = None, origins: Collection[str] = ()
) -> Dashboard:
    """Make the dashboard of a client, to be mounted in an application on Starlette, or on another ASGI framework.

    `auth` is a function, `async` or not, of Starlette's request: it returns an :class:`Access`, or None to refuse the
    request. Nothing is served without it, stylesheets included. It may raise Starlette's `HTTPException`, also one with
    a `Location`. `redact` is a function of a task's name, a path of keys and indexes, and a value: it returns what is
    shown in its place. The path begins with `params`, `headers`, `output` or `error`, with `step`,
    `message`, `value` or `stream` and its name, with `log`, or with `event` and its name (the task's name is then
    empty). `origins` are those that browsers see, such as
    `https://ops.example.com`, if a proxy replaces the `Host` header.

    Raises:
        InvalidConfiguration: `auth` or `redact` is not a function, or `origins` is a text.
    """
    return Dashboard(durable, auth=auth, redact=redact, origins=origins)


class Dashboard:
    """The dashboard of a client: an ASGI application."""

    def __init__(
        self, durable: Durable[Any], *, auth: Auth, redact: Redact | None = None, origins: Collection[str] = ()
    ) -> None:
        if not callable(auth):  # pyright: ignore[reportUnnecessaryComparison]
            remedy = "Give a function of the request that returns an Access, or None to refuse it."
            raise InvalidConfiguration("auth", f"it must be a function, not {auth!r}", remedy)
        if redact is not None and not callable(redact):  # pyright: ignore[reportUnnecessaryComparison]
            raise InvalidConfiguration("redact", f"it must be a function, not {redact!r}")
        if isinstance(origins, str):
            raise InvalidConfiguration("origins", "it is a text", "Give a list: origins=['https://ops.example.com'].")
        self.durable = durable
        self.reader = Reader(durable)
        self._auth = auth
        self._redact = redact
        self._origins = frozenset(origins)
        # Actions come first, because a page could have the same path, and is then no answer to a POST.
        self.routes = [
            *(Route(action.path, partial(self._act, action), methods=["POST"]) for action in ACTIONS),
            Route("/assets/{name}", self._asset, methods=["GET"]),
            *(Route(page.path, partial(self._page, page), methods=["GET"]) for page in PAGES),
        ]
        self.router = Router(self.routes, redirect_slashes=False, lifespan=self._lifespan)
        handlers: dict[Any, Any] = {
            HTTPException: self._refused,
            Redirect: self._elsewhere,
            TooBusy: self._not_now,
            DurableError: self._failed,
            Exception: self._broken,
        }
        self._app: ASGIApp = ExceptionMiddleware(self._guarded, handlers)
        durable.closers.append(self.close)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            await self.router(scope, receive, send)
        elif scope["type"] == "http":
            await self._app(located(scope), receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def close(self) -> None:
        """Close the connections of the running event loop. The client's `close` does it, too."""
        await self.reader.close()

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncGenerator[None]:
        yield
        await self.close()

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request if `auth` allows it."""
        received: list[Message] = []

        async def recording() -> Message:
            message = await receive()
            received.append(message)
            return message

        async def replaying() -> Message:
            return received.pop(0) if received else await receive()

        request = Request(scope, recording)
        try:
            answer: Any = self._auth(request)
            access = await answer if inspect.isawaitable(answer) else answer
        except DurableError as error:
            # Its text is not for someone who has no access yet.
            raise RuntimeError("auth failed") from error
        if access is None:
            raise HTTPException(403, "You may not see this.")
        if not isinstance(access, Access):
            raise TypeError(f"auth must return an Access or None, not {type(access).__name__}")
        scope[_ACCESS] = access
        # With it the router raises errors, for which there are pages, instead of sending texts.
        scope.setdefault("app", self)
        # A body that `auth` has read is there for the form, too.
        await self.router(scope, replaying, send)

    async def _page(self, page: Page, request: Request) -> Response:
        access = _access(request)
        if not may_see(access, page):
            raise HTTPException(403, "This page is about more than the tasks that you may see.")
        refreshing = page.live and request.headers.get("hx-request") == "true"
        async with self.reader.sections(refreshing=refreshing) as sections:
            view = View(self.durable, access, query_of(request), request.path_params, sections, self._redact)
            data = await page.load(view)
        data["late"] = sections.late
        if _wants_json(request):
            return _json(data)
        return self._html(request, page.template, {"title": page.title, "live": page.live, **data})

    async def _act(self, action: Action, request: Request) -> Response:
        access = _access(request)
        if not access.may(action.needs):
            raise HTTPException(403, f"You may not {action.needs}.")
        if access.only_tasks and not action.about_tasks:
            raise HTTPException(403, "This is about more than the tasks that you may see.")
        security.check_origin(request, self._origins)
        form = await form_of(request)
        security.check_token(request, access.user, form.text(security.TOKEN) or "")
        async with self.reader.sections() as sections:
            view = View(self.durable, access, query_of(request), request.path_params, sections, self._redact)
            try:
                outcome = await action.perform(view, form)
            except Interrupted as interrupted:
                # What was done before the error is reported like the rest.
                report(view, action, interrupted.outcome, form)
                raise (interrupted.__cause__ or interrupted) from None
        report(view, action, outcome, form)
        if _wants_json(request):
            return _json(
                {
                    "message": outcome.message,
                    "done": outcome.number,
                    "skipped": outcome.skipped,
                    "complete": outcome.complete,
                    "task_ids": outcome.task_ids,
                }
            )
        if not outcome.complete:
            more = may_go_on(outcome, form)
            return self._html(request, "going_on.html", {"title": "Working", "action": action, "live": False, **more})
        return self._back(request, outcome, form)

    def _back(self, request: Request, outcome: Outcome, form: Fields) -> Response:
        """Return to the page of a form, with a sentence about what was done."""
        urls = _urls(request)
        message = outcome.message
        if done := done_before(form):
            message = f"{message} {done:,} before that."
        response = RedirectResponse(urls(outcome.back), 303)
        note = quote(message[:_LONGEST_NOTE], errors="replace")
        response.set_cookie(NOTE, note, max_age=30, path=urls.base or "/", httponly=True, samesite="strict")
        return response

    async def _asset(self, request: Request) -> Response:
        found = _assets().get(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "There is no such file.")
        content, kind = found
        return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    def _html(self, request: Request, template: str, context: dict[str, Any], status: int = 200) -> Response:
        access, urls = request.scope.get(_ACCESS), _urls(request)
        nonce = security.nonce_of(request)
        fresh = None if nonce is not None or access is None else security.new_nonce()
        token = "" if access is None else security.token_for(nonce or fresh or "", access.user)
        menu = [] if access is None else [page for page in PAGES if page.in_menu and may_see(access, page)]
        path = request.scope.get("path", "/")
        note = request.cookies.get(NOTE)
        every = {
            "urls": urls,
            "access": access,
            "token": token,
            "menu": menu,
            "here": path.removeprefix(urls.base) or "/",
            "address": urls(path.removeprefix(urls.base) or "/") + _query(request),
            "note": None if note is None else unquote(note)[:_LONGEST_NOTE],
            "version": _version(),
            "late": [],
        }
        response = Response(render(template, every | context), status, media_type="text/html")
        if fresh is not None:
            security.set_nonce(response, request, fresh)
        if note is not None:
            response.delete_cookie(NOTE, path=urls.base or "/")
        return response

    def _error(self, request: Request, status: int, message: str, headers: Any = None) -> Response:
        if _wants_json(request):
            response = _json({"error": message, "status": status}, status)
        else:
            phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else f"Status {status}"
            response = self._html(
                request, "error.html", {"title": phrase, "status": status, "message": message, "live": False}, status
            )
        response.headers.update(headers or {})
        return response

    def _refused(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        return self._error(request, error.status_code, error.detail, error.headers)

    def _elsewhere(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, Redirect):
            raise error
        return RedirectResponse(_urls(request)(error.path), 303)

    def _not_now(self, request: Request, error: Exception) -> Response:
        return Response(status_code=204)

    def _failed(self, request: Request, error: Exception) -> Response:
        match error:
            case TaskNotFound() | QueueNotFound() | ScheduleNotFound():
                status = 404
            case InvalidState():
                status = 409
            case _:
                status = 400
        return self._error(request, status, str(error))

    def _broken(self, request: Request, error: Exception) -> Response:
        logger.error("the dashboard failed at %s", request.url.path, exc_info=error)
        return self._error(request, 500, "The dashboard failed. The log of the application says why.")


def located(scope: Scope) -> Scope:
    """Return a request's scope with the place of the dashboard as `root_path`, and a path without a slash at its end.

    Litestar tells that place only by the difference between the path and the one that was sent, and adds a slash.
    """
    root, path = scope.get("root_path", ""), scope["path"]
    sent: bytes = scope.get("raw_path") or quote(path).encode()
    inner = path[len(root) :] if root and path.startswith(root) else path
    if not sent.lower().endswith(b"%2f"):
        inner = inner.rstrip("/")
    if not root:
        whole = unquote(sent.partition(b"?")[0].decode("latin-1")).rstrip("/")
        root = whole[: len(whole) - len(inner)] if whole.endswith(inner) else ""
        # Two slashes would begin the name of a host.
        root = f"/{root.lstrip('/')}" if root else ""
    return {**scope, "root_path": root, "path": f"{root}{inner or '/'}"}


def may_see(access: Access, page: Page) -> bool:
    """Return whether a page is not about more than a user may see."""
    if access.only_tasks and not page.about_tasks:
        return False
    return access.queues is None or not page.all_queues


def _access(request: Request) -> Access:
    access: Access = request.scope[_ACCESS]
    return access


def _urls(request: Request) -> Urls:
    return Urls(quote(request.scope.get("root_path", ""), safe="/"))


def _query(request: Request) -> str:
    text = request.scope.get("query_string", b"").decode("latin-1")
    return f"?{text}" if text else ""


def _wants_json(request: Request) -> bool:
    accepted = request.headers.get("accept", "")
    return "application/json" in accepted and "text/html" not in accepted


def _json(data: dict[str, Any], status: int = 200) -> Response:
    return Response(as_json(data), status, media_type="application/json")


def _with_headers(send: Send) -> Send:
    """Add the headers of every response to those that are sent."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in security.HEADERS.items():
                headers.setdefault(name, value)
            headers.add_vary_header("Accept, Cookie")
        await send(message)

    return with_headers


@cache
def _assets() -> dict[str, tuple[bytes, str]]:
    """Return the files that may be asked for, read once: no path of a request reaches the file system."""
    found: dict[str, tuple[bytes, str]] = {}
    for file in files("durable_sa.dashboard").joinpath("assets").iterdir():
        if file.is_file():
            found[file.name] = (file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")
    return found


@cache
def _version() -> str:
    from .. import __version__

    return __version__
