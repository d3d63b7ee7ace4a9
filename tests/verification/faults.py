"""What can happen: each fault is something that is done to a field of processes, again and again while a round lasts."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from .server import promote, standby, start_as_standby

if TYPE_CHECKING:
    from .field import Field

Inject = Callable[["Field", random.Random], Awaitable[int]]


@dataclass(frozen=True)
class Fault:
    """One way in which things go wrong."""

    name: str
    pause: float
    """Mean seconds from one injection to the next."""
    inject: Inject
    """Do it, undo it if it lasts, and say how often it has hit something."""
    needs: frozenset[str] = frozenset()
    """What the field has to have for it."""
    excuses: frozenset[str] = frozenset()
    """Texts of errors that it gives to statements of the application, which are the application's to handle."""
    harmless: bool = False
    """Whether it keeps no worker from claiming."""


FAULTS: dict[str, Fault] = {}


def fault(
    name: str,
    pause: float,
    *,
    needs: tuple[str, ...] = (),
    excuses: tuple[str, ...] = (),
    harmless: bool = False,
) -> Callable[[Inject], Inject]:
    def register(inject: Inject) -> Inject:
        FAULTS[name] = Fault(name, pause, inject, frozenset(needs), frozenset(excuses), harmless)
        return inject

    return register


@fault("worker killed", 0.6)
async def kill_worker(field: Field, chance: random.Random) -> int:
    return field.pick("worker", chance).send(signal.SIGKILL)


@fault("producer killed", 1.0, harmless=True)
async def kill_producer(field: Field, chance: random.Random) -> int:
    return field.pick("producer", chance).send(signal.SIGKILL)


@fault("worker stopped and continued", 0.4)
async def pause_worker(field: Field, chance: random.Random) -> int:
    """Shorter than its lease or longer; then it is a zombie, whose runs others have."""
    child = field.pick("worker", chance)
    if child.stopped or not child.send(signal.SIGSTOP):
        return 0
    try:
        await asyncio.sleep(field.claim_timeout * chance.choice([0.5, 0.9, 1.3, 1.7]))
    finally:
        child.send(signal.SIGCONT)
    return 1


@fault("worker told to stop", 0.8)
async def terminate_worker(field: Field, chance: random.Random) -> int:
    """As in a deploy: once, twice, or by the keyboard."""
    child = field.pick("worker", chance)
    hit = child.send(chance.choice([signal.SIGTERM, signal.SIGINT]))
    if chance.random() < 0.4:
        await asyncio.sleep(chance.uniform(0, 0.3))
        hit += child.send(signal.SIGTERM)
    return int(hit)


@fault("worker replaced by another version", 0.2, needs=("versions",), harmless=True)
async def deploy(field: Field, chance: random.Random) -> int:
    """One after the other, all of them to the second version of the code, and then back to the first."""
    async with field.deploying:
        slots = [slot for slot in field.slots if slot.role == "worker"]
        slot = min(slots, key=lambda slot: slot.starts)
        return int(await field.replace(slot, version=3 - slot.settings["version"]))


@fault("poisoned code", 1.0, needs=("poison",))
async def poison(field: Field, chance: random.Random) -> int:
    """The producers ask for it; it is counted from the ledger."""
    return 0


@fault("server stopped at once", 1.5)
async def crash_server(field: Field, chance: random.Random) -> int:
    async with field.server_changing:
        await field.server.stop("immediate")
        await asyncio.sleep(chance.choice([0, 0, 0.3, 1.0]))
        await field.server.start()
    return 1


@fault("server restarted", 1.5)
async def restart_server(field: Field, chance: random.Random) -> int:
    async with field.server_changing:
        await field.server.stop("fast")
        await field.server.start()
    return 1


@fault("server killed", 2.0)
async def kill_server(field: Field, chance: random.Random) -> int:
    async with field.server_changing:
        await field.server.kill()
        await field.server.start()
    return 1


@fault("server away for longer than a lease", 2.0)
async def long_outage(field: Field, chance: random.Random) -> int:
    async with field.server_changing:
        await field.server.stop("fast")
        await asyncio.sleep(1.6 * field.claim_timeout)
        await field.server.start()
    return 1


@fault("process of the server killed", 1.0)
async def kill_backend(field: Field, chance: random.Random) -> int:
    async with field.server_changing:
        return await field.server.kill_backend(field.database, chance)


@fault("connection terminated by the server", 0.05)
async def terminate_backend(field: Field, chance: random.Random) -> int:
    return await field.server.strike("pg_terminate_backend", field.database, chance)


@fault("all connections terminated by the server", 0.7)
async def terminate_all(field: Field, chance: random.Random) -> int:
    return await field.server.strike("pg_terminate_backend", field.database, chance, 1.0)


@fault("statement cancelled", 0.05, excuses=("due to user request",))
async def cancel_statement(field: Field, chance: random.Random) -> int:
    rows = await field.server.sql(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND state = 'active'"
        " AND application_name <> 'control' LIMIT 2",
        field.database,
    )
    return len(rows)


@fault("connection cut", 0.05)
async def cut_connection(field: Field, chance: random.Random) -> int:
    return field.any_proxy(chance).cut(chance)


@fault("reply or request lost", 1.0)
async def lose_replies(field: Field, chance: random.Random) -> int:
    """For a second, of statements of all kinds, of commits more often; first the reply, or the request."""

    def choose(statement: str) -> str | None:
        share = 0.2 if statement.upper().startswith("COMMIT") else 0.03
        if chance.random() >= share:
            return None
        return "reply" if chance.random() < 0.8 else "request"

    before = field.lost()
    for proxy in field.proxies:
        proxy.lose(choose)
    try:
        await asyncio.sleep(1.0)
    finally:
        for proxy in field.proxies:
            proxy.lose(lambda _: None)
    return field.lost() - before


@fault("route lost", 0.7)
async def stall_route(field: Field, chance: random.Random) -> int:
    """Half-open connections: nothing arrives, nobody is told. A partition of one process."""
    proxy = field.any_proxy(chance)
    hit = len(proxy.links)
    proxy.stall()
    try:
        await asyncio.sleep(field.claim_timeout * chance.choice([0.3, 0.8, 1.4]))
    finally:
        proxy.heal()
    return hit


@fault("route lost one way", 0.7)
async def lose_direction(field: Field, chance: random.Random) -> int:
    """Of a worker: what it asks for does not arrive, or is done and nobody hears of it."""
    proxy = chance.choice([slot.proxy for slot in field.slots if slot.role == "worker"])
    hit = len(proxy.links)
    proxy.swallow(chance.choice(["up", "down"]))
    try:
        await asyncio.sleep(field.claim_timeout * chance.choice([0.3, 0.8, 1.4, 2.0]))
    finally:
        proxy.heal()
    return hit


@fault("slow and torn network", 1.5)
async def slow_down(field: Field, chance: random.Random) -> int:
    proxies = [proxy for proxy in field.proxies if chance.random() < 0.6]
    for proxy in proxies:
        proxy.latency = chance.choice([0.0, 0.005, 0.05, 0.5])
        proxy.jitter = proxy.latency * chance.choice([0.0, 0.4])
        proxy.slice = chance.choice([0, 3, 16, 200])
    try:
        await asyncio.sleep(chance.uniform(0.5, 1.5))
    finally:
        for proxy in proxies:
            proxy.latency = proxy.jitter = 0.0
            proxy.slice = 0
    return sum(len(proxy.links) for proxy in proxies)


@fault("notifications lost", 0.7)
async def lose_notifications(field: Field, chance: random.Random) -> int:
    proxies = [proxy for proxy in field.proxies if any(link.listens for link in proxy.links)]
    for proxy in proxies:
        proxy.deafen()
    try:
        await asyncio.sleep(1.0)
    finally:
        for proxy in proxies:
            proxy.heal()
    return len(proxies)


@fault("flood of notifications", 0.5, harmless=True)
async def flood(field: Field, chance: random.Random) -> int:
    """Strange ones and plausible ones."""
    payloads = [
        "",
        "{",
        "[null,1,1,1]",
        '[[["main",0,0]],1,0,1]',
        '[[["nowhere",99999,1e300]],0,0,0]',
        "\\x00",
        "é" * 900,
    ]
    async with field.connection() as connection:
        await connection.execute(
            "SELECT pg_notify('durable', payload || CASE WHEN payload = '' THEN n::text ELSE '' END)"
            " FROM unnest($1::text[]) payload, generate_series(1, 200) n",
            payloads,
        )
    return 1


@fault("no connections left", 1.5)
async def exhaust(field: Field, chance: random.Random) -> int:
    taken = []
    try:
        with contextlib.suppress(Exception):
            while True:
                taken.append(await field.connect_once())
        await asyncio.sleep(chance.uniform(0.3, 1.0))
    finally:
        for connection in taken:
            connection.terminate()
    return 1


@fault("conflicts between transactions", 1.0)
async def conflicts(field: Field, chance: random.Random) -> int:
    """Serialization failures and deadlocks, by a trigger, out of nothing."""
    triggers = [
        f"TRIGGER failing BEFORE INSERT OR UPDATE ON durable.{table} FOR EACH ROW EXECUTE FUNCTION audit.fail()"
        for table in ("tasks", "checkpoints", "waits", "events")
    ]
    count = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS n FROM audit.raised"
    async with field.connection() as connection:
        before = (await connection.fetch(count))[0]["n"]
        for trigger in triggers:
            await connection.execute(f"CREATE OR REPLACE {trigger}")
        try:
            await asyncio.sleep(1.0)
        finally:
            for table in ("tasks", "checkpoints", "waits", "events"):
                await connection.execute(f"DROP TRIGGER IF EXISTS failing ON durable.{table}")
        return int((await connection.fetch(count))[0]["n"] - before)


@fault("rows locked", 0.3)
async def lock_rows(field: Field, chance: random.Random) -> int:
    """By a person with a client and a telephone call."""
    async with field.connection() as connection, connection.transaction():
        rows = await connection.fetch(
            "SELECT task_id FROM durable.tasks WHERE finished_at IS NULL LIMIT 5 FOR UPDATE SKIP LOCKED"
        )
        await asyncio.sleep(chance.uniform(0.1, 1.0))
        return len(rows)


@fault("tables locked", 1.0)
async def lock_tables(field: Field, chance: random.Random) -> int:
    """As a migration does that waits for something itself."""
    table = chance.choice(["tasks", "checkpoints", "waits", "runs", "workers", "events"])
    async with field.connection() as connection, connection.transaction():
        await connection.execute(f"LOCK TABLE durable.{table} IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(chance.uniform(0.1, 0.7))
    return 1


@fault("short timeouts", 1.0, excuses=("due to statement timeout", "due to lock timeout"))
async def short_timeouts(field: Field, chance: random.Random) -> int:
    """Set for the database while it is in use, so that connections have them from their next start on."""
    name = field.database
    await field.server.sql(f"ALTER DATABASE {name} SET lock_timeout = '20ms'")
    await field.server.sql(f"ALTER DATABASE {name} SET statement_timeout = '300ms'")
    try:
        hit = await field.server.strike("pg_terminate_backend", name, chance, 1.0)
        await asyncio.sleep(1.0)
    finally:
        await field.server.sql(f"ALTER DATABASE {name} RESET ALL")
        await field.server.strike("pg_terminate_backend", name, chance, 1.0)
    return hit


@fault("read-only server", 1.0)
async def read_only(field: Field, chance: random.Random) -> int:
    await field.server.configure("default_transaction_read_only", "on")
    try:
        await asyncio.sleep(chance.uniform(0.2, 1.2))
    finally:
        await field.server.configure("default_transaction_read_only", None)
    return 1


@fault("other isolation", 1.0)
async def other_isolation(field: Field, chance: random.Random) -> int:
    """The database's default becomes serializable and goes back, while it is in use."""
    await field.server.configure("default_transaction_isolation", chance.choice(["serializable", "repeatable read"]))
    try:
        await asyncio.sleep(chance.uniform(0.2, 1.0))
        return await field.server.strike("pg_terminate_backend", field.database, chance, 0.5)
    finally:
        await field.server.configure("default_transaction_isolation", None)


@fault("old snapshot", 1.0, harmless=True)
async def hold_snapshot(field: Field, chance: random.Random) -> int:
    """Which keeps vacuum from removing anything."""
    async with field.connection() as connection, connection.transaction(isolation="repeatable_read"):
        await connection.execute("SELECT count(*) FROM durable.tasks")
        await asyncio.sleep(3.0)
    return 1


@fault("failover to the standby", 1.0, needs=("failover",))
async def fail_over(field: Field, chance: random.Random) -> int:
    """The primary is lost, and a synchronous standby takes its place. Later the old one is back, as a standby, and new
    connections lead to it for a moment."""
    async with field.server_changing, contextlib.AsyncExitStack() as stack:
        replica = await stack.enter_async_context(standby(field.server))
        await asyncio.sleep(chance.uniform(0.2, 1.0))
        await field.server.stop(chance.choice(["immediate", "fast"]))
        await asyncio.sleep(chance.choice([0.0, 0.5]))
        await promote(replica)
        former = field.server
        field.serve(replica)
        if chance.random() < 0.5:
            await asyncio.sleep(0.5)
            await start_as_standby(former)
            field.mislead(former)
            await asyncio.sleep(0.7)
            field.serve(replica)
            await former.stop("immediate")
        field.exits.push_async_exit(stack.pop_all())
    return 1


@fault("pooler restarted", 0.8, needs=("pooler",))
async def restart_pooler(field: Field, chance: random.Random) -> int:
    assert field.pooler is not None
    await field.pooler.disturb(chance)
    return 1


@fault("old rows deleted", 1.0, needs=("retention",), harmless=True)
async def retention(field: Field, chance: random.Random) -> int:
    """The producers clean up all the time, and so do the workers, by the policy of the queues."""
    return 0


@fault("clocks of workers wrong", 1.0, needs=("skew",))
async def skew(field: Field, chance: random.Random) -> int:
    """They run an hour ahead or behind from their start; each start of one counts."""
    return field.count_skewed()


@fault("clock of the server moved", 1.0, needs=("server clock",))
async def move_clock(field: Field, chance: random.Random) -> int:
    """Forward by more than a lease, or back."""
    async with field.server_changing:
        field.set_clock(chance.choice([-3, -1, 2, 5, 8]))
        await asyncio.sleep(chance.uniform(1.2, 2.5))
    return 1


@contextlib.asynccontextmanager
async def injecting(field: Field, chosen: Fault, chance: random.Random) -> AsyncGenerator[None]:
    """Have the fault happen again and again, several at once where one lasts."""
    running: set[asyncio.Task[None]] = set()

    async def once() -> None:
        # What breaks the server breaks the connection over which another fault is being injected.
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            field.counts[chosen.name] += await chosen.inject(field, chance)

    async def repeat() -> None:
        while True:
            await asyncio.sleep(chosen.pause * chance.uniform(0.5, 1.5))
            if len(running) < 3:
                running.add(task := asyncio.create_task(once()))
                task.add_done_callback(running.discard)

    repeating = asyncio.create_task(repeat())
    try:
        yield
    finally:
        repeating.cancel()
        await asyncio.wait([repeating])
        await asyncio.gather(*running)
