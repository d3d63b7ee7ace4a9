"""Wake-up hints: NOTIFY after the commit, coalesced.

A hint says that something is worth a look, never what to do: one that is lost costs a poll interval and nothing else.
It is sent after the commit and outside of it, because a NOTIFY inside a transaction makes committers queue up behind
each other; and what becomes known while one is on its way travels together in the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, event
from sqlalchemy.engine import Connection, Engine, RootTransaction, TwoPhaseTransaction
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from ..concurrency.branches import detached
from ..models import SCHEMA
from ..statements.notifying import NOTIFY
from .connections import Database, is_autocommit

logger = logging.getLogger("durable_sa")

MAX_PAYLOAD = 7000
"""Bytes; Postgres allows 8,000."""

SPACING = 0.005
"""Seconds after a hint in which others gather: of tasks spawned in a row, a hint each would take as long as a spawn."""
BOARDING = 0.003
"""Seconds after a hint from which on a spawn takes along what has gathered: before it would be sent by itself."""
DEADLINE = 5.0
"""Seconds after which a hint is taken to be on a connection that never answers; the next goes on another."""

_SHORTEST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.01
"""Seconds between looks whether a transaction is over."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def channel_name(schema: str) -> str:
    """The channel of a schema's hints, within the 63 bytes of an identifier."""
    if schema == SCHEMA:
        return "durable"
    return f"durable_{hashlib.blake2b(schema.encode(), digest_size=10).hexdigest()}"


@dataclass(slots=True)
class Hint:
    """What may be worth a look: lanes with the earliest time in each, events, ended runs, limits on time."""

    lanes: dict[tuple[str, int], datetime] = field(default_factory=dict[tuple[str, int], datetime])
    events: bool = False
    taken: bool = False
    limits: bool = False
    tasks: int = 0
    """How many tasks it is about, where it was made; that does not travel."""

    def __bool__(self) -> bool:
        return bool(self.lanes) or self.events or self.taken or self.limits

    def add(self, queue_name: str, priority: int, available_at: datetime | None, *, tasks: int = 1) -> None:
        """Tasks of a lane that are, or will be, claimable, the first of them at that time."""
        if available_at is None:
            return
        self.tasks += tasks
        known = self.lanes.get((queue_name, priority))
        if known is None or available_at < known:
            self.lanes[queue_name, priority] = available_at

    def add_rows(self, rows: Iterable[Row[Any]]) -> Hint:
        """Tasks as a statement returned them: queue_name, priority, available_at."""
        for row in rows:
            self.add(row.queue_name, row.priority, row.available_at)
        return self

    def merge(self, other: Hint) -> None:
        """Take in another hint."""
        tasks = self.tasks + other.tasks
        for (queue_name, priority), available_at in other.lanes.items():
            self.add(queue_name, priority, available_at)
        self.tasks = tasks
        self.events |= other.events
        self.taken |= other.taken
        self.limits |= other.limits

    def encode(self) -> str:
        """The hint as a NOTIFY payload. If there are too many lanes to name, none is: everybody looks everywhere."""
        lanes = [
            [queue_name, priority, int((available_at - _EPOCH).total_seconds() * 1_000_000)]
            for (queue_name, priority), available_at in self.lanes.items()
        ]
        text = json.dumps([lanes, int(self.events), int(self.taken), int(self.limits)], separators=(",", ":"))
        if len(text) > MAX_PAYLOAD:
            text = json.dumps([None, int(self.events), int(self.taken), int(self.limits)], separators=(",", ":"))
        return text

    @classmethod
    def decode(cls, payload: str) -> Hint | None:
        """The hint in a payload; None if all lanes are worth a look, or the payload is nobody's that we know."""
        try:
            lanes, events, taken, limits = json.loads(payload)
            if lanes is None:
                return None
            hint = cls(events=bool(events), taken=bool(taken), limits=bool(limits))
            for queue_name, priority, micros in lanes:
                hint.add(str(queue_name), int(priority), datetime.fromtimestamp(int(micros) / 1_000_000, UTC))
            return hint
        except (ValueError, TypeError, OverflowError, OSError):
            return None


class _Outbox:
    """Hints with the transactions that they wait for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[RootTransaction | None, Hint]] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, hint: Hint, after: RootTransaction | None) -> None:
        with self._lock:
            self._waiting.append((after, hint))

    def take(self) -> Hint:
        """All that need not wait any longer, as one."""
        ready = Hint()
        with self._lock:
            waiting, self._waiting = self._waiting, []
            for after, hint in waiting:
                if after is not None and after.is_active:
                    self._waiting.append((after, hint))
                else:
                    ready.merge(hint)
        return ready

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()


class HintSender:
    """Sends hints for one async engine on one event loop, one NOTIFY at a time."""

    def __init__(self, engine: AsyncEngine, channel: str) -> None:
        self.channel = channel
        self.loop = asyncio.get_running_loop()
        self.pool = engine.sync_engine.pool
        self._database = Database(engine)
        self._outbox = _Outbox()
        self._task: asyncio.Task[None] | None = None
        self._sent_at = -math.inf

    @property
    def quiet_for(self) -> float:
        """Seconds since a hint went."""
        return time.monotonic() - self._sent_at

    def take(self) -> Hint:
        """What waits, for a statement that takes it along."""
        self._sent_at = time.monotonic()
        return self._outbox.take()

    def send(self, hint: Hint, after: RootTransaction | None = None) -> None:
        """Send, soon, and not before the end of a transaction. Call it on the event loop."""
        if not hint:
            return
        self._outbox.put(hint, after)
        if self._task is None:
            _sending.add(self)
            with detached():
                self._task = self.loop.create_task(self._drain(), name="durable:hints")

    async def flush(self) -> None:
        """Wait until nothing is on its way."""
        while (task := self._task) is not None:
            await asyncio.wait([task])

    async def _drain(self) -> None:
        pause = _SHORTEST_PAUSE
        try:
            while (early := SPACING - self.quiet_for) > 0 or self._outbox:
                if early > 0:
                    await asyncio.sleep(early)
                    continue
                if not (hint := self._outbox.take()):
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                    continue
                async with asyncio.timeout(DEADLINE):
                    await self._database.execute_unshielded(NOTIFY, {"channel": self.channel, "payload": hint.encode()})
                self._sent_at = time.monotonic()
        except Exception as error:  # noqa: BLE001 - a hint that is lost costs a poll interval
            self._outbox.clear()
            logger.debug("a wake-up hint could not be sent: %s", type(error).__name__)
        finally:
            self._task = None
            _sending.discard(self)


class _ThreadSender:
    """Sends hints for one sync engine from a daemon thread that ends when there is nothing to do."""

    def __init__(self, engine: Engine, channel: str) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._pool = engine.pool
        self._channel = channel
        self._outbox = _Outbox()
        self._lock = threading.Lock()
        self._running = False

    def send(self, hint: Hint, after: RootTransaction | None) -> None:
        with self._lock:
            self._outbox.put(hint, after)
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._drain, name="durable-hints", daemon=True).start()

    def _drain(self) -> None:
        pause = _SHORTEST_PAUSE
        while True:
            with self._lock:
                if not self._outbox:
                    self._running = False
                    return
            if not (hint := self._outbox.take()):
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            try:
                with self._engine.connect() as connection:
                    connection.execute(NOTIFY, {"channel": self._channel, "payload": hint.encode()})
                    if self._engine.pool is not self._pool:
                        # The application has disposed of it: nobody would ever close what is given back.
                        connection.detach()
            except Exception as error:  # noqa: BLE001 - a hint that is lost costs a poll interval
                logger.debug("a wake-up hint could not be sent: %s", type(error).__name__)
            time.sleep(SPACING)


# By pool, which all variants of an engine share that `execution_options()` makes: applications make one each request.
_senders: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, weakref.WeakValueDictionary[tuple[Pool, str], HintSender]
] = weakref.WeakKeyDictionary()
_thread_senders: weakref.WeakValueDictionary[tuple[Pool, str], _ThreadSender] = weakref.WeakValueDictionary()
if hasattr(os, "register_at_fork"):
    # Their threads are not in the child.
    os.register_at_fork(after_in_child=_thread_senders.clear)
_sending: set[HintSender] = set()
_pending: weakref.WeakKeyDictionary[RootTransaction, dict[str, Hint]] = weakref.WeakKeyDictionary()
"""What is to be sent after a transaction, by channel; those of one that is rolled back go with it."""
_listening: weakref.WeakKeyDictionary[Connection, set[str]] = weakref.WeakKeyDictionary()
"""To which events of a connection we listen: no more than need be, as that alone takes a tenth of a spawn's time."""


def sender(engine: AsyncEngine, channel: str) -> HintSender:
    """The sender of an engine on the running event loop. It is kept for as long as somebody has it or it sends."""
    senders = _senders.setdefault(asyncio.get_running_loop(), weakref.WeakValueDictionary())
    key = (engine.sync_engine.pool, channel)
    found = senders.get(key)
    if found is None:
        found = senders[key] = HintSender(engine, channel)
    return found


async def flush(channel: str, *, seconds: float = 5.0) -> None:
    """Wait, not for long, until nothing is on its way to a channel from the running event loop, over any engine."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for busy in [busy for busy in _sending if busy.loop is loop and busy.channel == channel]:
                await busy.flush()


def send_after_commit(connection: Connection, channel: str, hint: Hint) -> None:
    """Send a hint once the transaction that `connection` is in has been committed, however that comes about.

    The event of the connection is the one that fires exactly once for every real COMMIT: of sessions, of connections,
    with savepoints, in two phases, of sessions that joined an outer transaction; and never for a rollback. It fires
    just before the COMMIT is sent.
    """
    transaction = connection.get_transaction()
    if transaction is None or is_autocommit(connection):
        _send(connection, channel, hint, None)
        return
    _pending.setdefault(transaction, {}).setdefault(channel, Hint()).merge(hint)
    name = "commit_twophase" if isinstance(transaction, TwoPhaseTransaction) else "commit"
    listening = _listening.setdefault(connection, set())
    if name not in listening:
        listening.add(name)
        event.listen(connection, name, _committing)


def _committing(connection: Connection, *_: Any) -> None:
    transaction = connection.get_transaction()
    if transaction is not None:
        for channel, hint in _pending.pop(transaction, {}).items():
            _send(connection, channel, hint, transaction)


def _send(connection: Connection, channel: str, hint: Hint, after: RootTransaction | None) -> None:
    engine = connection.engine
    if connection.dialect.is_async:
        sender(AsyncEngine(engine), channel).send(hint, after)
        return
    key = (engine.pool, channel)
    found = _thread_senders.get(key)
    if found is None:
        found = _thread_senders[key] = _ThreadSender(engine, channel)
    found.send(hint, after)
