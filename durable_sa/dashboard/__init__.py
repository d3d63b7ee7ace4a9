"""Pages about tasks, queues and workers, as an ASGI application to be mounted in your own. Needs the extra `dashboard`.

```python
from durable_sa.dashboard import Access, dashboard
from fastapi import FastAPI, Request

app = FastAPI()


async def who(request: Request) -> Access | None:
    user = request.session.get("user")
    return Access(user, actions={"cancel", "retry"}) if user else None


app.mount("/durable", dashboard(durable, auth=who))
```
"""

try:
    import jinja2 as _jinja2
    import starlette as _starlette
except ModuleNotFoundError as error:
    if error.name not in ("jinja2", "starlette"):
        raise
    raise ModuleNotFoundError(
        "The dashboard is not installed. Install it with: pip install 'durable_sa[dashboard]'", name=error.name
    ) from None

from .access import Access
from .application import Dashboard, dashboard

__all__ = ["Access", "Dashboard", "dashboard"]

del _jinja2, _starlette
