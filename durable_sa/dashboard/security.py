"""The checks of requests that change something, and the headers of every response."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection
from typing import Final
from urllib.parse import quote, urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With `no-referrer` browsers would send `Origin: null` with a form.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
COOKIE: Final = "durable_dashboard"
TOKEN: Final = "token"  # noqa: S105 - the name of a field
_NONCE_BYTES: Final = 32
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


def nonce_of(request: Request) -> str | None:
    """Return the random text in the cookie of a browser, if there is one of ours."""
    nonce = request.cookies.get(COOKIE, "")
    return nonce if len(nonce) == 2 * _NONCE_BYTES and all(digit in "0123456789abcdef" for digit in nonce) else None


def new_nonce() -> str:
    """Draw the random text of a browser."""
    return secrets.token_hex(_NONCE_BYTES)


def token_for(nonce: str, user: str) -> str:
    """Return the token that a form of this user in this browser carries.

    It needs no secret that several processes would have to share: another site can neither read the cookie nor set it.
    """
    return hmac.new(nonce.encode(), user.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()


def set_nonce(response: Response, request: Request, nonce: str) -> None:
    """Have the browser keep its random text for the pages of the dashboard alone."""
    path = quote(request.scope.get("root_path", ""), safe="/") or "/"
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, nonce, path=path, httponly=True, samesite="strict", secure=secure)


def check_origin(request: Request, origins: Collection[str]) -> None:
    """Refuse a request that a page of another origin has sent.

    Raises:
        HTTPException: 403.
    """
    site = request.headers.get("sec-fetch-site")
    # Browsers send it to hosts with TLS and to loopback only.
    if site not in (None, "same-origin"):
        raise HTTPException(403, "The request comes from another site.")
    origin = request.headers.get("origin")
    if origin is None:
        raise HTTPException(403, "The request has no Origin header.")
    if origin in origins:
        return
    sent, host = urlsplit(origin), request.headers.get("host", "")
    if sent.scheme not in _DEFAULT_PORTS or _place(sent.netloc, sent.scheme) != _place(host, sent.scheme):
        raise HTTPException(
            403,
            f"The request comes from {origin!r}, and this is {host!r}. Behind a proxy that replaces the Host header, "
            "name the origin that browsers see: dashboard(..., origins=[...]).",
        )


def _place(netloc: str, scheme: str) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit(f"//{netloc}")
        return parts.hostname, parts.port or _DEFAULT_PORTS[scheme]
    except ValueError:
        return None, None


def check_token(request: Request, user: str, token: str) -> None:
    """Refuse a form that was not made for this user in this browser.

    Raises:
        HTTPException: 403.
    """
    nonce = nonce_of(request)
    if nonce is None or not hmac.compare_digest(token_for(nonce, user).encode(), token.encode(errors="replace")):
        raise HTTPException(403, "The form is not from this session. Load the page anew, and send it once more.")
