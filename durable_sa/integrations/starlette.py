"""Streams of tasks as server-sent events, for applications on Starlette or FastAPI.

```python
from starlette.requests import Request
from starlette.responses import StreamingResponse

from durable_sa.integrations.starlette import stream_response


async def answer(request: Request) -> StreamingResponse:
    task_id = uuid.UUID(request.path_params["task_id"])
    return await stream_response(durable, task_id, "answer", request)
```
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import StreamingResponse

from ..client import Durable
from ..errors import TaskNotFound
from ..results import AnyTaskId, StreamItem, StreamRestart, id_of

END = "end"
"""The event that is sent last, so that a browser can close the connection instead of asking for more."""
RESTART = "restart"
"""The event that tells a reader to drop the items behind the position that is its data."""
PING_INTERVAL = 15.0
"""Seconds without an event after which a comment is sent, by which proxies and the server see who is still there."""


async def stream_response(
    durable: Durable[Any], task: AnyTaskId, name: str, request: Request, *, after: int = 0
) -> StreamingResponse:
    """Return a response of server-sent events: the items of a task's stream as JSON, then an event `end`.

    The id of each event is its position. A browser that reconnects sends the last one as `Last-Event-ID`, and gets the
    items behind that; without one the stream begins `after`. An event `restart` says that the items behind the position
    that is its data are superseded. Whether the caller may read the stream is for the application to check.

    Raises:
        TaskNotFound: there is no such task.
        InvalidName, InvalidConfiguration: a name or position that breaks the rules.
    """
    given = request.headers.get("last-event-id", "")
    position = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else after
    events = server_sent_events(durable, task, name, after=position)
    if await durable.get_task_result(task) is None:
        raise TaskNotFound(id_of(task))
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def server_sent_events(durable: Durable[Any], task: AnyTaskId, name: str, *, after: int = 0) -> AsyncGenerator[bytes]:
    """Return the items of a task's stream behind a position as server-sent events; see :func:`stream_response`."""
    return _events(durable.read_stream(task, name, after=after))


async def _events(reading: AsyncGenerator[StreamItem[Any] | StreamRestart]) -> AsyncGenerator[bytes]:
    async with aclosing(reading) as entries:
        following: asyncio.Future[StreamItem[Any] | StreamRestart | None] | None = None
        try:
            while True:
                if following is None:
                    following = asyncio.ensure_future(_next(entries))
                await asyncio.wait([following], timeout=PING_INTERVAL)
                if not following.done():
                    yield b": ping\n\n"
                    continue
                entry, following = following.result(), None
                if entry is None:
                    break
                yield _event(entry)
        finally:
            if following is not None:
                following.cancel()
                await asyncio.wait([following])
    yield f"event: {END}\ndata:\n\n".encode()


async def _next(entries: AsyncGenerator[StreamItem[Any] | StreamRestart]) -> StreamItem[Any] | StreamRestart | None:
    return await anext(entries, None)


def _event(entry: StreamItem[Any] | StreamRestart) -> bytes:
    if isinstance(entry, StreamRestart):
        return f"id: {entry.position}\nevent: {RESTART}\ndata: {entry.position}\n\n".encode()
    # JSON has no line breaks, which would end the data.
    return b"id: %d\ndata: %b\n\n" % (entry.position, to_json(entry.value))
