"""A process that asks for things, and writes down what it was told: ok, failed, or unknown where no reply came."""

from __future__ import annotations

import asyncio
import random
import signal
import uuid
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from durable_sa import Durable, DurableError

from . import workload
from .ledger import Ledger
from .versions import VERSIONS
from .workload import POISONS, QUEUES, Op

SECRET = "canary-7c1d"
"""In all params: to be found in the tables and nowhere else."""

DEADLINE = 8.0
"""Seconds after which an operation counts as unknown."""


class Producer:
    """Operations one after the other, each with a name that its task carries."""

    def __init__(self, settings: dict[str, Any], engine: AsyncEngine, durable: Durable, ledger: Ledger) -> None:
        self.name: str = settings["name"]
        self.poison: bool = settings.get("poison", False)
        self.operations: int = settings.get("operations", 0)
        self.versions: bool = settings.get("versions", False)
        self.retention: bool = settings.get("retention", False)
        self.chance = random.Random(settings["seed"])
        self.pause = 1.0 / settings["rate"]
        self.engine = engine
        self.durable = durable
        self.ledger = ledger
        self.spawned: list[uuid.UUID] = []
        self.waiting: list[tuple[float, str, int]] = []
        self.count = 0
        self.watching: set[asyncio.Task[None]] = set()

    async def attempt(self, kind: str, op: str, awaitable: Awaitable[Any], **details: Any) -> Any:
        """Do it, and note before that it is asked for, and after how it went. None unless it went well."""
        self.ledger.write("invoke", kind=kind, op=op, **details)
        try:
            async with asyncio.timeout(DEADLINE):
                result = await awaitable
        except DurableError as error:
            self.ledger.write("fail", kind=kind, op=op, error=type(error).__name__)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            self.ledger.write("unknown", kind=kind, op=op, error=type(error).__name__)
        else:
            self.ledger.write("ok", kind=kind, op=op, result=_plain(result))
            return result
        return None

    async def run(self, stop: asyncio.Event) -> None:
        """Ask for this and that until told to stop."""
        kinds = {
            "tour": 4,
            "plain": 2,
            "transfer": 3,
            "family": 1,
            "waiter": 3,
            "flaky": 2,
            "doomed": 1,
            "nap": 2,
            "order": 2,
            "keyed": 2,
            "many": 1,
            "cancel": 2,
            "retry": 1,
        }
        if self.poison:
            kinds["poisoned"] = 4
        if self.versions:
            kinds |= {"grown": 4, "former": 2, "latter": 3}
        if self.retention:
            kinds["forget"] = 4
        while not stop.is_set() and (not self.operations or self.count < self.operations):
            kind = self.chance.choices(list(kinds), list(kinds.values()))[0]
            self.count += 1
            await self.perform(kind, f"{self.name}-{self.count}")
            await self.emit_due()
            try:
                async with asyncio.timeout(self.pause * self.chance.uniform(0.2, 1.8)):
                    await stop.wait()
            except TimeoutError:
                pass
        for _, op, number in self.waiting:
            await self.emit(op, number)
        if self.watching:
            await asyncio.wait(self.watching)

    def op(self, name: str, **values: Any) -> Op:
        return Op(op=name, secret=SECRET, **values)

    async def perform(self, kind: str, name: str) -> None:
        chance = self.chance
        number = chance.randrange(1, 4)
        match kind:
            case "tour" | "plain" | "family":
                await self.spawn(kind, self.op(name, number=number, seconds=chance.choice([0.0, 0.01, 0.1])))
            case "transfer":
                source, target = chance.sample(range(1, 11), 2)
                await self.spawn(kind, self.op(name, number=number, source=source, target=target))
            case "grown" | "former" | "latter":
                await self.spawn(kind, self.op(name, number=number, seconds=chance.choice([0.0, 0.1])))
            case "waiter":
                op = self.op(name, number=number, seconds=chance.uniform(0.2, 2.0))
                await self.spawn(kind, op)
                if chance.random() < 0.8:
                    self.waiting.append((asyncio.get_running_loop().time() + chance.uniform(0, 2.0), name, number))
            case "flaky":
                await self.spawn(kind, self.op(name, number=chance.randrange(6)))
            case "doomed":
                await self.spawn(kind, self.op(name, number=number))
            case "nap":
                await self.spawn(kind, self.op(name, number=number, seconds=chance.uniform(0.0, 2.0)))
            case "poisoned":
                await self.spawn(kind, self.op(name, number=number, poison=chance.choice(POISONS)))
            case "order":
                await self.order(self.op(name, number=number))
            case "keyed":
                await self.keyed(self.op(name, number=number))
            case "many":
                items = [(workload.leaf, self.op(f"{name}.{index}", number=index)) for index in range(5)]
                await self.attempt("spawn_many", name, self.durable.spawn_many(items), count=5)
            case "cancel" | "retry":
                await self.interfere(kind, name)
            case _:
                await self.attempt("forget", name, self.durable.cleanup_tasks(0.3, limit=50))
                await self.attempt("forget", name, self.durable.cleanup_events(5, limit=50))

    async def spawn(self, kind: str, op: Op) -> None:
        queue_name = self.chance.choice(QUEUES)
        priority = self.chance.choice([-1, 0, 0])
        # Producers have the code of the first version.
        spawning = self.durable.spawn_by_name(kind, op, unchecked=True, queue_name=queue_name, priority=priority)
        spawned = await self.attempt("spawn", op.op, spawning)
        if spawned is None:
            return
        self.spawned.append(spawned.task_id)
        if self.chance.random() < 0.3:
            watch = asyncio.create_task(self.watch(spawned.task_id, op.op))
            self.watching.add(watch)
            watch.add_done_callback(self.watching.discard)

    async def watch(self, task_id: uuid.UUID, op: str) -> None:
        """What a caller is told of the outcome."""
        self.ledger.write("invoke", kind="wait", op=op)
        try:
            result = await self.durable.wait_for_result(task_id, timeout=DEADLINE)
            error = None if result.error is None else result.error.name
            self.ledger.write(
                "outcome", op=op, task=str(task_id), status=str(result.status), output=result.output, error=error
            )
        except (DurableError, SQLAlchemyError, OSError, TimeoutError) as error:
            self.ledger.write("unknown", kind="wait", op=op, error=type(error).__name__)

    async def order(self, op: Op) -> None:
        """A row of the application and its task, in one transaction."""

        async def place() -> Any:
            async with AsyncSession(self.engine) as session, session.begin():
                spawned = await self.durable.spawn_with(session, workload.leaf, op)
                await session.execute(
                    text("INSERT INTO orders VALUES (:op, :task_id)"), {"op": op.op, "task_id": spawned.task_id}
                )
                if self.chance.random() < 0.2:
                    await session.rollback()
                    raise workload.Planned
                return spawned

        try:
            await self.attempt("order", op.op, place())
        except workload.Planned:
            self.ledger.write("fail", kind="order", op=op.op, error="Planned")

    async def keyed(self, op: Op) -> None:
        """Spawned with a key, again until a reply comes, and once more after that."""
        ids: set[uuid.UUID] = set()
        for _ in range(self.chance.randrange(2, 5)):
            spawned = await self.attempt(
                "keyed", op.op, self.durable.spawn(workload.leaf, op, idempotency_key=f"key-{op.op}", queue_name="main")
            )
            if spawned is not None:
                ids.add(spawned.task_id)
        if len(ids) > 1:
            self.ledger.write("violation", text=f"{op.op}: one key gave the tasks {sorted(map(str, ids))}")

    async def interfere(self, kind: str, name: str) -> None:
        if not self.spawned:
            return
        task_id = self.chance.choice(self.spawned[-30:])
        change = self.durable.cancel_task(task_id) if kind == "cancel" else self.durable.retry_task(task_id)
        await self.attempt(kind, name, change, task=str(task_id))

    async def emit_due(self) -> None:
        now = asyncio.get_running_loop().time()
        due = [entry for entry in self.waiting if entry[0] <= now]
        self.waiting = [entry for entry in self.waiting if entry[0] > now]
        for _, op, number in due:
            await self.emit(op, number)

    async def emit(self, op: str, number: int) -> None:
        """Into both queues, as nobody has noted which one the waiter is in."""
        for queue_name in QUEUES:
            await self.attempt(
                "emit", op, self.durable.emit_event(f"signal-{op}", number, queue_name=queue_name), queue=queue_name
            )


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(each) for each in result]
    task_id = getattr(result, "task_id", None)
    return str(task_id) if task_id is not None else result


async def produce(settings: dict[str, Any]) -> None:
    """A producer process, until SIGTERM."""
    workload.start_logging()
    engine = workload.engine_of(settings)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    ledger = Ledger(Path(settings["directory"]), settings["name"])
    async with Durable(engine, tasks=VERSIONS[1], queue_name="main") as durable:
        await Producer(settings, engine, durable, ledger).run(stop)
    await engine.dispose()
