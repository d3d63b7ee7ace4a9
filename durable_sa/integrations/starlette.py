"""Streams of tasks as server-sent events, for applications on Starlette or FastAPI.

```python
from starlette.requests import Request
from starlette.responses import StreamingResponse

from durable_sa.integrations.starlette import stream_response


async def answer(request: Request) -> StreamingResponse:
    task_id = uuid.UUID(request.path_params["task_id"])
    return stream_response(durable, task_id, "answer", request)
```
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import StreamingResponse

from ..client import Durable
from ..results import AnyTaskId, StreamRestart

END = "end"
"""The event that is sent last, so that a browser can close the connection instead of asking for more."""
RESTART = "restart"
"""The event that tells a reader to drop the items behind the position that is its data."""


def stream_response(
    durable: Durable[Any], task: AnyTaskId, name: str, request: Request, *, after: int = 0
) -> StreamingResponse:
    """Return a response of server-sent events: the items of a task's stream as JSON, then an event `end`.

    The id of each event is its position. A browser that reconnects sends the last one as `Last-Event-ID`, and gets the
    items behind that; without one the stream begins `after`. Items that are superseded are told by an event `restart`,
    whose data is the last position that still counts.
    """
    given = request.headers.get("last-event-id", "")
    position = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else after
    return StreamingResponse(
        server_sent_events(durable, task, name, after=position),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def server_sent_events(
    durable: Durable[Any], task: AnyTaskId, name: str, *, after: int = 0
) -> AsyncGenerator[bytes]:
    """Yield the items of a task's stream behind a position as server-sent events; see :func:`stream_response`."""
    async with aclosing(durable.read_stream(task, name, after=after)) as entries:
        async for entry in entries:
            if isinstance(entry, StreamRestart):
                yield f"id: {entry.position}\nevent: {RESTART}\ndata: {entry.position}\n\n".encode()
            else:
                # JSON has no line breaks, which would end the data.
                yield b"id: %d\ndata: %b\n\n" % (entry.position, to_json(entry.value))
    yield f"event: {END}\ndata:\n\n".encode()
