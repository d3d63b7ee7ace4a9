"""durable_sa: `Durable`, a worker in the same event loop, sessions of SQLAlchemy."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

import durable_sa
from durable_sa import Durable, SpawnResult, TaskContext, Worker, task

from .base import AT_A_TIME, KEYS, NEVER, QUEUE, Params, Settings, System, noop_step

_KNOWS_LIMITS = hasattr(durable_sa, "Limit")
_ORDER = text("INSERT INTO orders (note) VALUES ('x')")


async def filler(size: int) -> str:
    """Return a string of the given length, as a step's result."""
    return "x" * size


def engine_for(url: str, connections: int | None = None) -> AsyncEngine:
    """Return an engine, with SQLAlchemy's default pool size unless a number of connections is given."""
    options: dict[str, Any] = {} if connections is None else {"pool_size": connections, "max_overflow": 0}
    return create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), **options)


def _is_claim(statement: str) -> bool:
    return "open_lanes" in statement or "WITH opened AS" in statement


class DurableSystem(System):
    """durable_sa. The tasks are closures, so that they reach the probe of their system."""

    distribution = "durable_sa"

    def __init__(self) -> None:
        super().__init__()
        self._tasks = self._make_tasks()
        self._claims: list[float] = []

    def _make_tasks(self) -> dict[str, Any]:
        @task
        async def noop(ctx: TaskContext, params: Params) -> None:
            self.probe.begin()
            self.probe.end()

        # A checkout to compare with may know no limits.
        options: Any = {"limit_key": lambda params: f"key-{params['i'] % KEYS}"} if _KNOWS_LIMITS else {}

        @task(**options)
        async def keyed(ctx: TaskContext, params: Params) -> None:
            self.probe.begin()
            self.probe.end()

        @task
        async def stamp(ctx: TaskContext, params: Params) -> None:
            self.probe.note(params["i"])
            self.probe.end()

        @task
        async def steps(ctx: TaskContext, params: Params) -> None:
            self.probe.begin()
            for number in range(params["steps"]):
                await ctx.step(f"step-{number}", filler, params.get("size", 0))
            self.probe.end()

        @task
        async def wait(ctx: TaskContext, params: Params) -> None:
            self.probe.begin()
            for number in range(params.get("steps", 0)):
                await ctx.step(f"step-{number}", noop_step)
            self.probe.wait()
            await ctx.await_event("go")
            self.probe.end()

        @task
        async def child(ctx: TaskContext, params: Params) -> int:
            return int(params["i"])

        @task
        async def parent(ctx: TaskContext, params: Params) -> int:
            self.probe.begin()
            numbers = range(params["children"])
            handles = await asyncio.gather(*(ctx.spawn(f"child-{i}", child, {"i": i}) for i in numbers))
            results = await asyncio.gather(*(ctx.join(handle) for handle in handles))
            self.probe.end()
            return sum(results)

        @task
        async def hold(ctx: TaskContext, params: Params) -> None:
            self.probe.begin()
            await self.probe.hold()
            self.probe.end()

        @task
        async def nap(ctx: TaskContext, params: Params) -> None:
            self.probe.wait()
            await ctx.sleep_for("nap", 3600)

        @task
        async def collect(ctx: TaskContext, params: Params) -> None:
            self.probe.begin()
            self.probe.wait()
            for _ in range(params["count"]):
                await ctx.receive("note")
            self.probe.end()

        @task
        async def answer(ctx: TaskContext, params: Params) -> None:
            asker = await ctx.receive("question")
            await ctx.send(uuid.UUID(asker), "answer", payload=True)

        @task
        async def ask(ctx: TaskContext, params: Params) -> None:
            await ctx.receive("go")
            self.probe.asks(params["i"])
            await ctx.send(uuid.UUID(params["other"]), "question", str(ctx.task_id))
            await ctx.receive("answer")
            self.probe.answered(params["i"])

        @task
        async def tell(ctx: TaskContext, params: Params) -> None:
            async with ctx.stream("items") as stream:
                for _ in range(params["count"]):
                    await stream.write(time.monotonic())
                    if params["pause"]:
                        await asyncio.sleep(params["pause"])

        tasks = (noop, keyed, stamp, steps, wait, child, parent, hold, nap, collect, answer, ask, tell)
        return {each.name: each for each in tasks}

    async def source(self) -> str:
        """Return the file of the durable_sa that this process has imported."""
        return durable_sa.__file__

    def _client(self, engine: AsyncEngine) -> Durable:
        return Durable(engine, queue_name=QUEUE, tasks=self._tasks.values())

    async def install(self, url: str) -> None:
        engine = engine_for(url)
        async with self._client(engine) as client:
            await client.migrate()
            await client.create_queue()
            await client.create_queue("elsewhere")
        await engine.dispose()

    async def limit(self, url: str | None, kind: str | None) -> None:
        if url is None:
            return  # the limits are in the database of the run
        engine = engine_for(url)
        async with self._client(engine) as client:
            limit = durable_sa.Limit(concurrency=AT_A_TIME if kind == "keys" else NEVER)
            await client.set_limit(QUEUE, limit, per_key=kind == "keys")
        await engine.dispose()

    async def open(self, url: str, connections: int, settings: Settings) -> None:
        self._engine = engine_for(url, connections)
        self._durable = self._client(self._engine)

    async def close(self) -> None:
        await self._durable.close()
        await self._engine.dispose()

    async def work(self, url: str, settings: Settings) -> None:
        settings = dict(settings)
        timed = settings.pop("timed", False)
        self._worker_engine = engine_for(url)
        if timed:
            self._time_claims(self._worker_engine)
        self._worker_client = self._client(self._worker_engine)
        self._worker: Worker = await self._worker_client.start_worker(**settings)

    async def rest(self) -> None:
        await self._worker_client.close()
        await self._worker_engine.dispose()

    def _time_claims(self, engine: AsyncEngine) -> None:
        def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if _is_claim(statement):
                connection.info["claim"] = time.monotonic()

        def after(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if _is_claim(statement):
                self._claims.append(time.monotonic() - connection.info["claim"])

        event.listen(engine.sync_engine, "before_cursor_execute", before)
        event.listen(engine.sync_engine, "after_cursor_execute", after)

    async def claim_times(self) -> list[float]:
        times, self._claims = self._claims, []
        return times

    async def spawn_one(self, slot: int, task: str, params: Params) -> SpawnResult[Any]:
        result: SpawnResult[Any] = await self._durable.spawn(self._tasks[task], params)
        return result

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        async with AsyncSession(self._engine) as session, session.begin():
            await session.execute(_ORDER)
            await self._durable.spawn_with(session, self._tasks[task], params)

    async def spawn_many(self, task: str, params: Sequence[Params]) -> None:
        registered = self._tasks[task]
        await self._durable.spawn_many([(registered, item) for item in params])

    async def result(self, handle: Any) -> None:
        await self._durable.wait_for_result(handle)

    async def emit(self, name: str) -> None:
        await self._durable.emit_event(name)

    async def send(self, handle: Any, topic: str, payload: Any) -> None:
        await self._durable.send(handle, topic, payload)

    async def read(self, handle: Any) -> AsyncGenerator[float]:
        async for item in self._durable.read_stream(handle, "items"):
            yield item.value

    def identify(self, handle: Any) -> str:
        return str(handle.task_id)


SYSTEM = DurableSystem
