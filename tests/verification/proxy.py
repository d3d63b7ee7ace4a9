"""A TCP proxy in front of Postgres that cuts, delays, tears and swallows what passes, at a statement if need be.

It reads as much of the protocol as it takes to know which statement a client has sent, and where the reply to it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from typing import Self

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_TERMINATE = b"X\0\0\0\x04"
_CHUNK = 65536


class Frames:
    """Cuts a stream into the protocol's messages: a byte for the type, four for the length."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The messages that are complete by now."""
        self._buffer += data
        messages: list[tuple[bytes, bytes]] = []
        start = 0
        while len(self._buffer) - start >= 5:
            (length,) = struct.unpack_from("!I", self._buffer, start + 1)
            end = start + 1 + length
            if len(self._buffer) < end:
                break
            messages.append((self._buffer[start : start + 1], self._buffer[start + 5 : end]))
            start = end
        self._buffer = self._buffer[start:]
        return messages


class Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.statement = ""
        """What the client has sent last."""
        self.swallowing: Frames | None = None
        """Set from a statement on whose reply is not to reach the client."""
        self.started = False
        self._names: dict[bytes, str] = {}
        self._frames = Frames()

    @property
    def listens(self) -> bool:
        """Whether the client waits for notifications on it."""
        return self.statement.upper().startswith("LISTEN")

    def executed(self, data: bytes) -> list[str]:
        """The statements whose execution these bytes from the client ask for."""
        if not self.started:
            # Requests for encryption come without a type, as does what opens the session.
            code = struct.unpack_from("!I", data, 4)[0] if len(data) >= 8 else 0
            if code in (_SSL_REQUEST, _GSS_REQUEST):
                return []
            self.started = True
            (length,) = struct.unpack_from("!I", data)
            data = data[length:]
        found: list[str] = []
        for kind, body in self._frames.feed(data):
            if kind == b"P":
                name, text = body.split(b"\0", 2)[:2]
                self._names[name] = text.decode(errors="replace")
            elif kind == b"B":
                found.append(self._names.get(body.split(b"\0", 2)[1], ""))
            elif kind == b"Q":
                found.append(body.rstrip(b"\0").decode(errors="replace"))
        if found:
            self.statement = found[-1]
        return found

    def abort(self, *, reset: bool = True) -> None:
        """End it: with a reset, so that both sides learn of it at once, or as if it had been closed in order."""
        for writer in (self.client, self.server):
            if reset:
                with contextlib.suppress(OSError, AttributeError):
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Listens on a port of its own for the clients of one server."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.links: set[Link] = set()
        self.latency = 0.0
        """Seconds that each piece of data waits, both ways."""
        self.jitter = 0.0
        """Seconds by which that varies, up and down."""
        self.slice = 0
        """Bytes at a time, if not 0."""
        self.refusing = False
        """Whether new connections are reset at once."""
        self.clinging = False
        """Whether the ends of sessions are kept from the server, so that neither it nor the proxy closes anything."""
        self.waiting = 0
        """New connections that nothing passes through yet."""
        self.left = 0
        """Clients that have closed their end in spite of that."""
        self.seen = 0
        """Statements that have passed."""
        self.happened = 0
        """Statements lost with their reply, or before they arrived."""
        self._lose: Callable[[str], str | None] = lambda _: None
        self._open = asyncio.Event()
        self._open.set()
        self._deaf = False
        self._swallowing: str | None = None
        self._chance = random.Random(port)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.heal()
        self.cut_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose(self, choose: Callable[[str], str | None]) -> None:
        """Ask for each statement whether it is to be lost: its "reply", the "request" itself, or nothing."""
        self._lose = choose

    def cut(self, chance: random.Random) -> bool:
        """End one connection, in one way or the other; False if there is none."""
        links = sorted(self.links, key=id)
        if not links:
            return False
        chance.choice(links).abort(reset=chance.random() < 0.5)
        return True

    def cut_all(self) -> int:
        """End all connections; how many there were."""
        links = list(self.links)
        for link in links:
            link.abort()
        return len(links)

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told: the half-open connection of a lost route."""
        self._open.clear()

    def swallow(self, direction: str) -> None:
        """What is sent "up" to the server, or "down" from it, is lost, and nobody is told; the other way all passes."""
        self._swallowing = direction

    def deafen(self) -> None:
        """Notifications do not arrive any more."""
        self._deaf = True

    def heal(self) -> None:
        """Let everything pass again. What was stalled is cut, as a route that comes back does not know it."""
        if not self._open.is_set() or self._swallowing:
            self.cut_all()
        if self._deaf:
            for link in list(self.links):
                if link.listens:
                    link.abort()
        self._open.set()
        self._swallowing = None
        self._deaf = self.refusing = False
        self.latency = self.jitter = 0.0
        self.slice = 0
        self._lose = lambda _: None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            return
        self.waiting += 1
        await self._open.wait()
        self.waiting -= 1
        host, port = self.target
        if host.startswith("/"):
            from_server, to_server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            from_server, to_server = await asyncio.open_connection(host, port)
        link = Link(writer, to_server)
        self.links.add(link)
        try:
            async with asyncio.TaskGroup() as group:
                for pump in (self._upstream(link, reader), self._downstream(link, from_server)):
                    self._tasks.add(task := group.create_task(pump))
                    task.add_done_callback(self._tasks.discard)
        except* (OSError, EOFError, struct.error):
            pass
        finally:
            self.links.discard(link)
            link.abort(reset=False)

    async def _upstream(self, link: Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            for statement in link.executed(data):
                self.seen += 1
                fate = self._lose(statement)
                if fate is None:
                    continue
                self.happened += 1
                if fate == "request":
                    raise ConnectionAbortedError
                link.swallowing = Frames()
            if self.clinging and data.endswith(_TERMINATE):
                while await reader.read(_CHUNK):
                    pass
                self.left += 1
                await asyncio.Event().wait()
            if self._swallowing != "up":
                await self._pass(link.server, data)
        raise EOFError

    async def _downstream(self, link: Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            if self._deaf and link.listens:
                continue
            if link.swallowing is not None:
                if any(kind == b"Z" for kind, _ in link.swallowing.feed(data)):
                    link.abort()
                    return
                continue
            if self._swallowing != "down":
                await self._pass(link.client, data)
        raise EOFError

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.slice or len(data)
        for start in range(0, len(data), size):
            if self.latency:
                await asyncio.sleep(self.latency + self._chance.uniform(-self.jitter, self.jitter))
            await self._open.wait()
            writer.write(data[start : start + size])
            await writer.drain()
