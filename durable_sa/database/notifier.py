"""Sending of wake-up hints: after the commit, at most every 10 ms; a lone spawn 5 ms after the last one carries all.

A hint that is lost costs a poll interval and nothing else. It is sent after the commit and outside of the transaction,
because transactions with a NOTIFY wait for each other to commit. Of tasks spawned in a row, a hint each would take as
long as a spawn: so the hints of 10 ms after one is sent are merged into the next. A spawn without company that comes
after half of that time sends them and its own in its own statement, which saves the other statement.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
import weakref
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, RootTransaction, TwoPhaseTransaction
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from ..concurrency.branches import detached
from ..concurrency.loops import PerLoop
from ..statements.notifying import NOTIFY
from .connections import Database, HeldConnection, is_autocommit
from .hint import Hint, channel_name

logger = logging.getLogger("durable_sa")

SPACING = 0.005
"""Seconds after a hint before a spawn may carry the next; twice as long before that is sent by itself."""
DEADLINE = 5.0
"""Seconds after which a hint's connection is taken for dead; the next hint gets another."""

_SHORTEST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.01
"""Seconds between looks whether a transaction has ended."""


class _Outbox:
    """Hints with the transactions whose end they wait for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[RootTransaction | None, Hint]] = []
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, hint: Hint, after: RootTransaction | None) -> None:
        with self._lock:
            self._waiting.append((after, hint))

    def take(self) -> Hint:
        """Remove all hints whose transactions have ended, and return them as one."""
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
    """Sends hints over one async engine on one event loop, one NOTIFY at a time."""

    def __init__(self, engine: AsyncEngine, channel: str) -> None:
        self.channel = channel
        self.loop = asyncio.get_running_loop()
        self._database = Database(engine)
        self._outbox = _Outbox()
        self._task: asyncio.Task[None] | None = None
        self._sending = _senders.get().sending
        self._sent_at = -math.inf
        """When the latest hint was sent, on the monotonic clock."""

    def take(self) -> Hint | None:
        """Remove the hints that wait and return them, for a spawn to carry; None if the last was sent just now."""
        now = time.monotonic()
        if now < self._sent_at + SPACING:
            return None
        self._sent_at = now
        return self._outbox.take()

    def send(self, hint: Hint, after: RootTransaction | None = None) -> None:
        """Send a hint soon, and not before the end of a transaction. To be called on the event loop."""
        if not hint:
            return
        self._outbox.put(hint, after)
        if self._task is None:
            self._sending.add(self)
            with detached():
                self._task = self.loop.create_task(self._drain(), name="durable:hints")

    async def flush(self) -> None:
        """Wait until no hint is in flight."""
        while (task := self._task) is not None:
            await asyncio.wait([task])

    async def _drain(self) -> None:
        pause = _SHORTEST_PAUSE
        try:
            # The sender lives as long as this task, and the next hint of its engine must know when this one was sent.
            while (early := self._sent_at + 2 * SPACING - time.monotonic()) > 0 or self._outbox:
                if early > 0:
                    await asyncio.sleep(early)
                    continue
                if not (hint := self._outbox.take()):
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
                    continue
                async with asyncio.timeout(DEADLINE), HeldConnection(self._database) as held:
                    await held.execute(NOTIFY, {"channel": self.channel, "payload": hint.encode()})
                self._sent_at = time.monotonic()
        except Exception as error:  # noqa: BLE001 - a hint that is lost costs a poll interval
            self._outbox.clear()
            logger.debug("a wake-up hint could not be sent: %s", type(error).__name__)
        finally:
            self._task = None
            self._sending.discard(self)


class _ThreadSender:
    """Sends hints over one sync engine from a daemon thread, which ends when there are none."""

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
                        # The application has disposed of this pool, which would keep the connection for ever.
                        connection.detach()
            except Exception as error:  # noqa: BLE001 - a hint that is lost costs a poll interval
                logger.debug("a wake-up hint could not be sent: %s", type(error).__name__)
            time.sleep(SPACING)


class _Senders:
    """The senders on one event loop."""

    def __init__(self) -> None:
        # By pool, as all variants of an engine that `execution_options()` makes share it: applications make one each
        # request.
        self.known: weakref.WeakValueDictionary[tuple[Pool, str], HintSender] = weakref.WeakValueDictionary()
        self.sending: set[HintSender] = set()


_senders = PerLoop(_Senders)
_thread_senders: weakref.WeakValueDictionary[tuple[Pool, str], _ThreadSender] = weakref.WeakValueDictionary()
if hasattr(os, "register_at_fork"):
    # Their threads do not exist in the child.
    os.register_at_fork(after_in_child=_thread_senders.clear)
_pending: weakref.WeakKeyDictionary[RootTransaction, dict[str, Hint]] = weakref.WeakKeyDictionary()
"""Hints to be sent after a transaction, by channel; those of one that is rolled back are dropped with it."""
_listening: weakref.WeakKeyDictionary[Connection, set[str]] = weakref.WeakKeyDictionary()
"""Events of a connection that have our listener: as few as possible, as adding one takes a tenth of a spawn's time."""


def sender(database: Database) -> HintSender:
    """Return the sender of a database on the running event loop."""
    return _sender_of(database.engine, channel_name(database.schema))


def _sender_of(engine: AsyncEngine, channel: str) -> HintSender:
    senders = _senders.get().known
    key = (engine.sync_engine.pool, channel)
    found = senders.get(key)
    if found is None:
        found = senders[key] = HintSender(engine, channel)
    return found


async def flush(channel: str, *, seconds: float = 5.0) -> None:
    """Wait, up to `seconds`, until no hint for a channel is in flight on the running event loop, over any engine."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for busy in [busy for busy in _senders.get().sending if busy.channel == channel]:
                await busy.flush()


def send_after_commit(connection: Connection, channel: str, hint: Hint) -> None:
    """Send a hint once the transaction that `connection` is in has been committed, in whatever way.

    The connection's event fires exactly once for every real COMMIT: of sessions, of connections, with savepoints, in
    two phases, of sessions that joined an outer transaction; and never for a rollback. It fires just before the COMMIT
    is sent.
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
        _sender_of(AsyncEngine(engine), channel).send(hint, after)
        return
    key = (engine.pool, channel)
    found = _thread_senders.get(key)
    if found is None:
        found = _thread_senders[key] = _ThreadSender(engine, channel)
    found.send(hint, after)
