"""Runs operations that race in every order there is, within a bound, on real connections.

An operation is cut at every statement, and between a statement and its commit; and within a statement that locks rows,
between the snapshot that it sees and the first of its locks. Where one waits for a lock of another, that is found by
asking the server, and the others go on. An order is a sequence of choices of who goes on next; all those are tried in
which somebody who could have gone on is interrupted at most so many times. That is deterministic: the same operations
are tried in the same orders each time, and an order that went wrong can be repeated by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sqlalchemy import Executable, Row, TextClause, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from durable_sa.database_errors import is_conflict
from durable_sa.errors import DurableError

from .engine_steps import HELD, Steps

_TRIES = 5
_BLOCKED = text(
    "SELECT EXISTS (SELECT FROM unnest(pg_blocking_pids(:pid)) AS other WHERE other <> pg_backend_pid()) AS blocked,"
    " EXISTS (SELECT FROM pg_locks WHERE pid = :pid AND locktype = 'advisory' AND NOT granted) AS stopped"
)
_STOP = text("SELECT pg_advisory_lock(:key)")
_RELEASE = text("SELECT pg_advisory_unlock(:key)")
_LOCKING = re.compile(r"\bFOR (NO KEY )?UPDATE\b")
_CLAUSE = re.compile(r"\b(WHERE|ORDER BY|LIMIT|FOR (NO KEY )?UPDATE)\b")


def stopped_before_its_locks(statement: str, key: int) -> str:
    """The statement, waiting for an advisory lock when it has its snapshot and before it locks a row.

    Those that set a limit on the wait for locks stay as they are.
    """
    locking = _LOCKING.search(statement)
    if locking is None or "lock_timeout" in statement:
        return statement
    # The query that locks begins at the parenthesis that is open there.
    start, depth = locking.start(), 0
    while start > 0 and depth >= 0:
        start -= 1
        depth += {")": 1, "(": -1}.get(statement[start], 0)
    depth, position = 0, start + (depth < 0)
    while not (depth == 0 and (clause := _CLAUSE.match(statement, position))):
        depth += {"(": 1, ")": -1}.get(statement[position], 0)
        position += 1
    wait = f"(SELECT true FROM pg_catalog.pg_advisory_xact_lock_shared({key}))"
    if clause[1] == "WHERE":
        return f"{statement[: clause.end()]} {wait} AND {statement[clause.end() :]}"
    return f"{statement[:position]} WHERE {wait} {statement[position:]}"


class Monitor:
    """A connection that knows who waits for whom, and holds the locks that statements are stopped with."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()
        self._last_key = 0

    async def ask(self, statement: TextClause, **parameters: Any) -> Row[Any]:
        async with self._lock:
            return (await self._connection.execute(statement, parameters)).one()

    async def new_key(self) -> int:
        """An advisory lock that nobody gets until it is released."""
        self._last_key += 1
        await self.ask(_STOP, key=self._last_key)
        return self._last_key


@dataclass(frozen=True)
class Operation:
    """What one side does. In a transaction of its own, or each statement in one, as the engine does it."""

    name: str
    steps: Callable[[], Steps[Any]]
    transaction: bool = False
    then: Callable[[], Steps[Any]] | None = None
    """What follows after the commit, statement by statement."""


@dataclass
class Order:
    """One order that was tried: who could have gone on at each point, who did, and what came of it."""

    enabled: list[tuple[int, ...]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    overlapping: bool = False
    """Whether somebody went on while another's transaction was open."""
    conflicts: int = 0
    outcome: Any = None

    def interruptions(self) -> int:
        """How often somebody who could have gone on was interrupted."""
        return sum(
            after != before and before in self.enabled[position + 1]
            for position, (before, after) in enumerate(pairwise(self.chosen))
        )


class Actor:
    """One operation on a connection of its own, which stops before each step until it is told to go on."""

    def __init__(
        self, operation: Operation, connection: AsyncConnection, pid: int, order: Order, monitor: Monitor, *, cut: bool
    ) -> None:
        self.operation = operation
        self.pid = pid
        self.blocked = False
        self.held = False
        self.open = False
        self._connection = connection
        self._order = order
        self._monitor = monitor
        self._cut = cut
        self._next = ""
        self._arrived = asyncio.Event()
        self._go = asyncio.Event()
        self.task = asyncio.create_task(self._act())

    @property
    def finished(self) -> bool:
        return self.task.done()

    async def arrive(self) -> None:
        """Wait until it stops before its next step, or ends, or waits for a lock."""
        waiting = asyncio.ensure_future(self._arrived.wait())
        pause = 0.01
        while not self._arrived.is_set() and not self.task.done():
            await asyncio.wait([waiting, self.task], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if self._arrived.is_set() or self.task.done():
                break
            self.blocked = (await self._monitor.ask(_BLOCKED, pid=self.pid)).blocked
            if self.blocked:
                waiting.cancel()
                return
            pause = 0.002
        waiting.cancel()
        self.blocked = False

    def go_on(self) -> None:
        self._order.told.append(f"{self.operation.name}: {self._next}")
        self.held = False
        self._arrived.clear()
        self._go.set()

    async def _turn(self, what: str) -> None:
        self._next = what
        self._arrived.set()
        await self._go.wait()
        self._go.clear()

    async def _act(self) -> Any:
        operation = self.operation
        result = await self._attempt()
        if operation.then is not None:
            await self._drive(operation.then(), transaction=False)
        return result

    async def _attempt(self) -> Any:
        for attempt in range(_TRIES):
            try:
                return await self._drive(self.operation.steps(), transaction=self.operation.transaction)
            except DurableError as error:
                await self._end(self._connection.rollback)
                return type(error).__name__
            except DBAPIError as error:
                await self._end(self._connection.rollback)
                if not is_conflict(error) or attempt + 1 == _TRIES:
                    raise
                self._order.conflicts += 1
        raise AssertionError("unreachable")

    async def _drive(self, script: Steps[Any], *, transaction: bool) -> Any:
        step = next(script, None)
        try:
            while step is not None:
                if step is HELD:
                    self.held = True
                    await self._turn("tries again")
                    step = script.send(())
                    continue
                await self._turn("statement")
                statement, parameters = step  # type: ignore[misc]
                self.open = True
                try:
                    rows = await self._execute(statement, parameters)
                except DBAPIError as error:
                    if transaction:
                        raise
                    await self._end(self._connection.rollback)
                    step = script.throw(error)
                    continue
                if not transaction:
                    await self._turn("commit")
                    await self._end(self._connection.commit)
                step = script.send(rows)
        except StopIteration as end:
            if transaction:
                await self._turn("commit")
                await self._end(self._connection.commit)
            return end.value

    async def _execute(self, statement: Executable, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
        if not self._cut:
            result = await self._connection.execute(statement, parameters)
            return result.all() if result.returns_rows else ()
        connection = self._connection.sync_connection
        key = await self._monitor.new_key()
        stopping = False

        def stop(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
            nonlocal stopping
            stopped = stopped_before_its_locks(statement, key)
            stopping = stopped != statement
            return stopped, parameters

        event.listen(connection, "before_cursor_execute", stop, retval=True)
        execution = asyncio.ensure_future(self._connection.execute(statement, parameters))
        try:
            await asyncio.wait([execution], timeout=0.002)
            while stopping and not execution.done():
                if (await self._monitor.ask(_BLOCKED, pid=self.pid)).stopped:
                    await self._turn("locks")
                    break
                await asyncio.wait([execution], timeout=0.002)
        finally:
            event.remove(connection, "before_cursor_execute", stop)
            await self._monitor.ask(_RELEASE, key=key)
        result = await execution
        return result.all() if result.returns_rows else ()

    async def _end(self, how: Callable[[], Awaitable[None]]) -> None:
        await how()
        self.open = False


class Explorer:
    """Tries the orders of some operations, each from the same beginning."""

    def __init__(self, connections: Sequence[AsyncConnection], monitor: AsyncConnection) -> None:
        self._connections = connections
        self._monitor = Monitor(monitor)

    async def orders(
        self,
        begin: Callable[[], Awaitable[Sequence[Operation]]],
        observe: Callable[[list[Any]], Awaitable[Any]],
        *,
        interruptions: int,
        cut: bool,
    ) -> list[Order]:
        """All orders with at most so many interruptions, statements being `cut` before their locks, or not.

        `observe` is given the results and says what came of it.
        """
        tried: list[Order] = []
        prefixes: list[list[int]] = [[]]
        while prefixes:
            prefix = prefixes.pop()
            order, results = await self._try(await begin(), prefix, cut)
            order.outcome = await observe(results)
            tried.append(order)
            for position in range(len(prefix), len(order.chosen)):
                for other in order.enabled[position]:
                    if other != order.chosen[position]:
                        branch = Order(order.enabled[: position + 1], [*order.chosen[:position], other])
                        if branch.interruptions() <= interruptions:
                            prefixes.append(branch.chosen)
        return tried

    async def _try(self, operations: Sequence[Operation], prefix: list[int], cut: bool) -> tuple[Order, list[Any]]:
        """Follow the prefix, and from there on interrupt nobody."""
        order = Order()
        actors: list[Actor] = []
        for operation, connection in zip(operations, self._connections, strict=False):
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            actors.append(Actor(operation, connection, driver.get_server_pid(), order, self._monitor, cut=cut))
        try:
            while not all(actor.finished for actor in actors):
                for actor in actors:
                    await actor.arrive()
                able = [number for number, actor in enumerate(actors) if not actor.finished and not actor.blocked]
                if not able:
                    # Nobody can go on, or all have just ended: the server ends a deadlock by itself.
                    await asyncio.sleep(0.002)
                    continue
                # Who found a row locked tries again when somebody else has done something.
                able = [number for number in able if not actors[number].held] or able
                position = len(order.chosen)
                last = order.chosen[-1] if order.chosen else -1
                choice = last if last in able else able[0]
                if position < len(prefix):
                    choice = prefix[position]
                    assert choice in able, f"the order cannot be repeated: {order.told}"
                assert position < 200, f"they hold each other up: {order.told}"
                order.enabled.append(tuple(able))
                order.chosen.append(choice)
                actors[choice].go_on()
                for number, actor in enumerate(actors):
                    if number != choice:
                        actor.held = False
                        order.overlapping |= actor.open
            return order, [actor.task.result() for actor in actors]
        finally:
            for actor in actors:
                actor.task.cancel()
            await asyncio.gather(*(actor.task for actor in actors), return_exceptions=True)
            for connection in self._connections:
                await connection.rollback()
