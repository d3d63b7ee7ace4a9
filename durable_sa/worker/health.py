"""HTTP probes of a worker: they show if its event loop turns, and if it can work.

A thread with an event loop of its own answers them, because the worker's event loop may be the one that is stuck.
`GET /live` fails if only a restart helps. `GET /ready` also fails while the database is away, the lease is lost or the
worker is being shut down. Both say why, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import text

from ..concurrency.threads import LoopThread
from ..database.channel import DedicatedConnection
from ..database.closing import dispose
from ..database.connections import Database
from ..errors import InvalidConfiguration

logger = logging.getLogger("durable_sa")

STUCK_AFTER: Final = 5.0
"""Seconds without a turn of the event loop after which it is stuck; the worker's `claim_timeout` if that is less."""
_SELECT_ONE: Final = text("SELECT 1")
_TIMEOUT: Final = 2.0
"""Seconds within which a request must arrive, and the database must answer."""
_MAX_REQUEST_BYTES: Final = 8 * 1024


Answer: TypeAlias = tuple[bool, dict[str, Any]]
"""The state that a probe asks for, and the details."""


class VitalSigns(NamedTuple):
    """The state of a worker, as another thread can read it."""

    turned: float
    """Seconds since the last turn of its event loop."""
    stuck_after: float
    beaten: float | None
    """Seconds since the last committed heartbeat was sent; None without a lease."""
    stopping: bool


class HealthServer:
    """Answers probes on a port of an address, or of all interfaces, until it is stopped."""

    def __init__(
        self, database: Database, port: int, vital_signs: Callable[[], VitalSigns], host: str | None = None
    ) -> None:
        self._database = database
        self._host = host
        self._port = port
        self._vital_signs = vital_signs
        self._started: Future[int] = Future()
        self._thread = LoopThread("durable-health", self._serve, self._failed)

    async def start(self) -> int:
        """Start the thread, and return the port.

        Raises:
            InvalidConfiguration: the port is taken, or not allowed.
        """
        self._thread.start()
        try:
            return await asyncio.wrap_future(self._started)
        except OSError as error:
            raise InvalidConfiguration("health_port", f"{self._port} cannot be had: {error.strerror}") from error

    async def stop(self) -> None:
        """Stop the thread, and wait up to 2 seconds for its end."""
        await self._thread.stop(_TIMEOUT)

    def _failed(self, error: Exception) -> None:
        if not self._started.done():
            self._started.set_exception(error)
        else:
            logger.error("the thread of the health probes has ended", exc_info=error)

    async def _serve(self, stop: asyncio.Event) -> None:
        engine = self._database.private()
        connection = DedicatedConnection(Database(engine, self._database.schema))

        try:
            server = await start_probes(
                self._host, self._port, live=self._live, ready=functools.partial(self._ready, connection)
            )
            async with server:
                # With port 0, the sockets of IPv4 and IPv6 have different ports.
                sockets = sorted(server.sockets, key=lambda bound: bound.family != socket.AF_INET)
                self._started.set_result(sockets[0].getsockname()[1])
                await stop.wait()
        finally:
            await connection.close()
            await dispose(engine)

    async def _live(self) -> Answer:
        signs = self._vital_signs()
        body = {"seconds_since_loop_turned": round(signs.turned, 3)}
        if signs.turned > signs.stuck_after:
            return False, {**body, "problem": "the event loop is stuck: a task blocks it"}
        return True, body

    async def _ready(self, connection: DedicatedConnection) -> Answer:
        live, body = await self._live()
        signs = self._vital_signs()
        body["seconds_since_heartbeat"] = None if signs.beaten is None else round(signs.beaten, 3)
        if not live:
            return False, body
        if signs.stopping:
            return False, {**body, "problem": "the worker is being shut down"}
        if signs.beaten is None:
            return False, {**body, "problem": "the worker has no lease"}
        try:
            async with asyncio.timeout(_TIMEOUT):
                await connection.execute(_SELECT_ONE)
        except Exception as error:  # noqa: BLE001 - any error means that the database does not answer
            return False, {**body, "problem": f"the database does not answer: {type(error).__name__}"}
        return True, body


async def start_probes(
    host: str | None,
    port: int,
    *,
    live: Callable[[], Awaitable[Answer]],
    ready: Callable[[], Awaitable[Answer]],
) -> asyncio.Server:
    """Answer `GET /live` and `GET /ready` on a port of an address, or of all interfaces.

    Raises:
        OSError: the port is taken, or not allowed.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, ValueError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(_TIMEOUT):
                    request = await reader.readuntil(b"\r\n\r\n")
                writer.write(await _answer(request, {b"/live": live, b"/ready": ready}))
                writer.close()
                async with asyncio.timeout(_TIMEOUT):
                    await writer.wait_closed()
        finally:
            # The worker may have ended before the answer was sent, and then closes the event loop at once.
            writer.transport.abort()

    return await asyncio.start_server(answer, host, port, limit=_MAX_REQUEST_BYTES, reuse_address=True)


async def _answer(request: bytes, probes: Mapping[bytes, Callable[[], Awaitable[Answer]]]) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.split(maxsplit=1)[0].partition(b"?")[0] if rest.split() else b""
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", {"error": "GET /live or GET /ready"})
    if path not in probes:
        return _response("404 Not Found", {"error": "GET /live or GET /ready"})
    well, body = await probes[path]()
    response = _response("200 OK" if well else "503 Service Unavailable", {"ok": well, **body})
    return response.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else response


def _response(status: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode() + b"\n"
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content
