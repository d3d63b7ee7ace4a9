"""Who may decide on refunds and see the dashboard: one operator, who has a password."""

import base64
import secrets

from starlette.exceptions import HTTPException
from starlette.requests import Request

from durable_sa.dashboard import Access

from .settings import OPERATOR_PASSWORD


async def operator(request: Request) -> Access | None:
    if not OPERATOR_PASSWORD:
        return None
    wanted = base64.b64encode(f"operator:{OPERATOR_PASSWORD}".encode())
    given = request.headers.get("authorization", "").encode()
    if not secrets.compare_digest(given, b"Basic " + wanted):
        raise HTTPException(401, headers={"WWW-Authenticate": 'Basic realm="agent"'})
    return Access("operator", actions={"cancel", "retry", "pause"})


async def colleague(request: Request) -> str:
    """Return the name of the operator, for the routes of the desk."""
    access = await operator(request)
    if access is None:
        raise HTTPException(403)
    return access.user
