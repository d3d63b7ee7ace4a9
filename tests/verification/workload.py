"""The tasks that faults happen to, and the worker process that runs them.

What each comes to can be computed from its params, or is in the database; what it does and sees is in the ledger.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from durable_sa import (
    Durable,
    RetryStrategy,
    SyncTaskContext,
    TaskContext,
    TaskTimeout,
    UserError,
    current_context,
    task,
)
from durable_sa.context.base import Call, ContextBase

from .ledger import Ledger

QUICKLY = RetryStrategy.fixed(0.1)

Poison = Literal["exit", "kill", "segfault", "block", "recurse", "memory", "swallow", "system exit"]
_CLONE_NEWNET = 0x40000000

POISONS: tuple[Poison, ...] = ("exit", "kill", "segfault", "block", "recurse", "memory", "swallow", "system exit")


class Op(BaseModel):
    """What a producer asks for. `secret` is what must not turn up in any log."""

    op: str
    secret: str
    number: int = 0
    seconds: float = 0.0
    source: int = 0
    target: int = 0
    poison: Poison | None = None


class Planned(Exception):
    """A failure that the task is meant to have."""


class Here:
    """This process."""

    ledger: Ledger
    claim_timeout = 2.0


def _note(what: str, step: str, **details: Any) -> None:
    context = current_context()
    Here.ledger.write(what, task=str(context.task_id), attempt=context.attempt, step=step, **details)


def note_calls() -> None:
    """Have each durable call noted when it is made, replayed or not: what one execution asks for, in its order."""
    draw = ContextBase._call

    def call(self: ContextBase, kind: str, name: str, arguments: str = "") -> Call:
        made = draw(self, kind, name, arguments)
        if made.key.int:
            run = self._run
            about = {"task": str(run.claimed.task_id), "fence": run.claimed.fence, "branch": str(run.branch().path)}
            Here.ledger.write("called", **about, key=str(made.key), call=f"{kind} {name}")
        return made

    ContextBase._call = call


async def compute(op: Op, step: str, number: int) -> int:
    """A step: what it returns is known beforehand, and that it is executed is noted."""
    _note("step", step)
    await asyncio.sleep(op.seconds)
    return number * 2 + 1


def compute_in_thread(op: Op, step: str, number: int) -> int:
    _note("step", step)
    return number * 2 + 1


async def book(session: AsyncSession, step: str) -> int:
    """A transaction: gives back what only the commit that counts can have written."""
    _note("transaction", step)
    statement = text("INSERT INTO effects (task_id, what) VALUES (:task_id, :what) RETURNING id")
    result = await session.execute(statement, {"task_id": current_context().task_id, "what": step})
    return int(result.scalar_one())


async def move(session: AsyncSession, op: Op) -> int:
    """A transfer between two accounts, in the order of their numbers."""
    _note("transaction", "move")
    change = text("UPDATE accounts SET balance = balance + :by WHERE account = :account")
    for account in sorted({op.source, op.target}):
        by = (account == op.target) * op.number - (account == op.source) * op.number
        await session.execute(change, {"account": account, "by": by})
    await session.execute(
        text("INSERT INTO transfers VALUES (:task_id, :source, :target, :amount)"),
        {"task_id": current_context().task_id, "source": op.source, "target": op.target, "amount": op.number},
    )
    return op.number


def _seen(call: str, value: Any) -> Any:
    """What a task sees of a call has to be the same in each of its runs."""
    _note("seen", call, value=value)
    return value


@task(max_attempts=1)
async def leaf(ctx: TaskContext, op: Op) -> int:
    await ctx.transaction("leaf", book, "leaf")
    return await ctx.step("leaf", compute, op, "leaf", op.number)


@task(max_attempts=1)
async def tour(ctx: TaskContext, op: Op) -> list[Any]:
    """Ten calls, one of each kind. No fault is a failure of it."""
    found: list[Any] = [_seen("first", await ctx.step("first", compute, op, "first", 1))]
    found.append(_seen("book", await ctx.transaction("book", book, "book")))
    _seen("now", (await ctx.now()).isoformat())
    await ctx.sleep_for("nap", 0.05)
    child = await ctx.spawn("leaf", leaf, op.model_copy(update={"op": f"{op.op}/leaf"}))
    found.append(_seen("threaded", await ctx.step("threaded", compute_in_thread, op, "threaded", 2)))
    await ctx.emit_event(f"toured-{op.op}", op.number)
    found.append(_seen("event", await ctx.await_event(f"toured-{op.op}")))
    found.append(_seen("join", await ctx.join(child)))
    try:
        await ctx.await_event(f"never-{op.op}", timeout=0.05)
    except TaskTimeout:
        found.append(_seen("timeout", "timeout"))
    branches = await asyncio.gather(
        ctx.step("left", compute, op, "left", 3), ctx.transaction("right", book, "right"), ctx.rand()
    )
    return [*found, *_seen("gather", branches)]


@task(max_attempts=1)
def plain(ctx: SyncTaskContext, op: Op) -> list[int]:
    """The same in a thread."""
    found = [_seen("one", ctx.step("one", compute_in_thread, op, "one", op.number))]
    ctx.sleep_for("nap", 0.05)
    child = ctx.spawn("leaf", leaf, op.model_copy(update={"op": f"{op.op}/leaf"}))
    found.append(_seen("join", ctx.join(child)))
    return [*found, _seen("two", ctx.step("two", compute_in_thread, op, "two", op.number + 1))]


@task(max_attempts=1)
async def transfer(ctx: TaskContext, op: Op) -> int:
    quoted = await ctx.step("quote", compute, op, "quote", op.number)
    moved = await ctx.transaction("move", move, op)
    await ctx.step("thank", compute, op, "thank", quoted)
    return moved


@task(max_attempts=1)
async def family(ctx: TaskContext, op: Op) -> int:
    """As many children as its number says, side by side."""
    children = [
        await ctx.spawn("leaf", leaf, op.model_copy(update={"op": f"{op.op}/{number}", "number": number}))
        for number in range(op.number)
    ]
    return sum(await asyncio.gather(*(ctx.join(child) for child in children)))


@task(max_attempts=1)
async def waiter(ctx: TaskContext, op: Op) -> int | None:
    """The payload of an event that somebody may emit, or None; it goes on with the same even if that comes later."""
    try:
        got = _seen("signal", await ctx.await_event(f"signal-{op.op}", timeout=op.seconds, type=int))
    except TaskTimeout:
        got = _seen("signal", None)
    await ctx.sleep_for("nap", 0.02)
    await ctx.step("after", compute, op.model_copy(update={"seconds": 0.0}), "after", 1)
    return got


@task(max_attempts=4, retry_strategy=QUICKLY)
async def flaky(ctx: TaskContext, op: Op) -> int:
    """Fails in its first attempts, as many as its number says."""
    done = await ctx.step("before", compute, op, "before", op.number)
    if ctx.attempt <= op.number:
        _note("raised", "flaky")
        raise Planned(str(ctx.attempt))
    return done


@task(max_attempts=3, retry_strategy=QUICKLY)
async def doomed(ctx: TaskContext, op: Op) -> None:
    """Fails for good, with a child that is far from its end."""
    child = await ctx.spawn("nap", nap, op.model_copy(update={"op": f"{op.op}/nap", "seconds": 60.0}))
    await ctx.step("before", compute, op.model_copy(update={"seconds": 0.0}), "before", op.number)
    _note("raised", "doomed")
    raise UserError({"message": f"planned, with {child.task_id}"})


@task(max_attempts=1)
async def nap(ctx: TaskContext, op: Op) -> int:
    """Sleeps, or works, until it is cancelled or done."""
    await ctx.sleep_for("nap", op.seconds)
    return await ctx.step("awake", compute, op.model_copy(update={"seconds": 0.05}), "awake", op.number)


@task(max_attempts=2, retry_strategy=QUICKLY)
async def poisoned(ctx: TaskContext, op: Op) -> int:
    """Harms the process it runs in, once."""
    done = await ctx.step("before", compute, op, "before", op.number)
    if ctx.attempt == 1:
        await ctx.step("poison", take, op.poison)
    return done


async def take(poison: Poison) -> None:
    _note("poison", poison)
    match poison:
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "block":
            time.sleep(1.5 * Here.claim_timeout)  # noqa: ASYNC251 - that is the poison
        case "recurse":
            sys.setrecursionlimit(sys.getrecursionlimit())
            _recurse()
        case "memory":
            raise MemoryError
        case "system exit":
            raise SystemExit(5)
        case "swallow":
            try:
                await asyncio.sleep(0.2)
            except BaseException:  # noqa: BLE001 - that is the poison
                await asyncio.sleep(0.2)


def _recurse() -> None:
    _recurse()


@task(max_attempts=1000, retry_strategy=QUICKLY)
async def spool(ctx: TaskContext, op: Op) -> int:
    """Needs room in the directory that its worker was started in."""
    return await ctx.step("spool", keep, op)


async def keep(op: Op) -> int:
    _note("step", "spool")
    try:
        return Path(op.op).write_bytes(bytes(op.number))  # noqa: ASYNC240
    except OSError:
        _note("raised", "spool")
        raise


@task(max_attempts=1)
async def tick(ctx: TaskContext) -> None:
    """What the schedule spawns."""


TASKS = (leaf, tour, plain, transfer, family, waiter, flaky, doomed, nap, poisoned, spool, tick)

QUEUES = ("main", "side")


def engine_of(settings: dict[str, Any]) -> AsyncEngine:
    """An engine whose connections bear the process's name."""
    arguments: dict[str, Any] = {"server_settings": {"application_name": settings["name"]}, "timeout": 5}
    if settings.get("pooled"):
        # PgBouncer of Debian 12 knows no prepared statements.
        arguments |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0, "command_timeout": 20}
    return create_async_engine(settings["url"], connect_args=arguments, hide_parameters=True)


def start_logging(level: int = logging.DEBUG) -> None:
    """Everything that the library says, as the log of this process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("durable_sa").setLevel(level)


def enter(network: str) -> None:
    """Go to another network namespace, with all threads and connections to come."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", network).open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


async def work(settings: dict[str, Any]) -> None:
    """A worker process, until SIGTERM."""
    from .versions import VERSIONS

    start_logging()
    if network := settings.get("network"):
        enter(network)
    if start := settings.get("cwd"):
        os.chdir(start)
    Here.ledger = Ledger(Path(settings["directory"]), settings["name"])
    Here.claim_timeout = settings["claim_timeout"]
    note_calls()
    tasks = VERSIONS[settings.get("version", 1)]
    Here.ledger.write("knows", name=settings["name"], tasks=[known.name for known in tasks])
    engine = engine_of(settings)
    while True:
        try:
            async with Durable(engine, tasks=tasks, queue_name="main") as durable:
                await durable.run_worker(
                    queue_names=settings["queue_names"],
                    concurrency=settings["concurrency"],
                    claim_timeout=settings["claim_timeout"],
                    worker_id=settings["name"],
                    shutdown_timeout=10,
                    fatal_on_lease_timeout=settings.get("fatal", False),
                )
            break
        except Exception as error:  # noqa: BLE001 - a supervisor would start it anew, whatever it was
            logging.getLogger("worker").info("start failed: %s", type(error).__name__)
            await asyncio.sleep(0.1)
    await engine.dispose()
