"""absurd: `Absurd`, the worker of its documentation, in a thread; `AsyncAbsurd` with the faster settings.

`absurdctl init` contains and creates the tables, and needs `psql` on the path.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from absurd_sdk import Absurd, AsyncAbsurd, AsyncTaskContext, TaskContext

from .base import QUEUE, Params, Settings, System, noop_step

CHILDREN = "children"
"""The queue of child tasks, because a task cannot wait for a task in its own queue."""


class AbsurdSystem(System):
    """absurd. A client has one connection, so every concurrent caller has a client."""

    distribution = "absurd-sdk"

    async def install(self, url: str) -> None:
        program = Path(sys.executable).with_name("absurdctl")
        subprocess.run([program, "init", "-d", url], check=True, stdout=subprocess.DEVNULL)  # noqa: ASYNC221
        client = AsyncAbsurd(url)
        await client.create_queue(QUEUE)
        await client.create_queue(CHILDREN)
        await client.close()

    async def open(self, url: str, connections: int, settings: Settings) -> None:
        self._clients: list[AsyncAbsurd] = []
        self._connections: list[psycopg.AsyncConnection[Any]] = []
        for _ in range(connections):
            connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
            self._connections.append(connection)
            self._clients.append(AsyncAbsurd(connection, queue_name=QUEUE))
        self._result_poll: float | None = settings.get("result_poll")

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()

    async def work(self, url: str, settings: Settings) -> None:
        options = {key: settings[key] for key in ("concurrency", "batch_size", "poll_interval") if key in settings}
        self._workers: list[Absurd | AsyncAbsurd] = []
        self._running: list[asyncio.Future[None]] = []
        if settings.get("sync"):
            worker = Absurd(url, queue_name=QUEUE)
            self._register_sync(worker)
            self._workers.append(worker)
            self._running.append(asyncio.ensure_future(asyncio.to_thread(worker.start_worker, **options)))
            return
        # A concurrency below the number of workers reduces the number of workers.
        count = min(settings.get("workers", 1), options.get("concurrency", 1))
        options["concurrency"] = options.get("concurrency", 1) // count
        for _ in range(count):
            self._start_async(url, QUEUE, options)
        if settings.get("children"):
            self._start_async(url, CHILDREN, options)

    def _start_async(self, url: str, queue: str, options: Settings) -> None:
        worker = AsyncAbsurd(url, queue_name=queue)
        self._register_async(worker)
        self._workers.append(worker)
        self._running.append(asyncio.ensure_future(worker.start_worker(**options)))

    async def rest(self) -> None:
        for worker in self._workers:
            worker.stop_worker()
        await asyncio.wait(self._running, timeout=10)
        for worker in self._workers:
            closing = worker.close()
            if closing is not None:
                await closing

    def _register_sync(self, client: Absurd) -> None:
        @client.register_task("noop", QUEUE)
        def noop(params: Params, ctx: TaskContext) -> None:
            self.probe.begin()
            self.probe.end()

        @client.register_task("stamp", QUEUE)
        def stamp(params: Params, ctx: TaskContext) -> None:
            self.probe.note(params["i"])
            self.probe.end()

        @client.register_task("steps", QUEUE)
        def steps(params: Params, ctx: TaskContext) -> None:
            self.probe.begin()
            for number in range(params["steps"]):
                ctx.step(f"step-{number}", lambda: "x" * params.get("size", 0))
            self.probe.end()

    def _register_async(self, client: AsyncAbsurd) -> None:
        def task(queue: str) -> Callable[..., None]:
            return lambda function: client.register_task(function.__name__, queue)(function)  # type: ignore[func-returns-value]

        @task(QUEUE)
        async def noop(params: Params, ctx: AsyncTaskContext) -> None:
            self.probe.begin()
            self.probe.end()

        @task(QUEUE)
        async def stamp(params: Params, ctx: AsyncTaskContext) -> None:
            self.probe.note(params["i"])
            self.probe.end()

        @task(QUEUE)
        async def steps(params: Params, ctx: AsyncTaskContext) -> None:
            async def filler() -> str:
                return "x" * int(params.get("size", 0))

            self.probe.begin()
            for number in range(params["steps"]):
                await ctx.step(f"step-{number}", filler)
            self.probe.end()

        @task(QUEUE)
        async def wait(params: Params, ctx: AsyncTaskContext) -> None:
            self.probe.begin()
            for number in range(params.get("steps", 0)):
                await ctx.step(f"step-{number}", noop_step)
            self.probe.wait()
            await ctx.await_event("go")
            self.probe.end()

        @task(QUEUE)
        async def parent(params: Params, ctx: AsyncTaskContext) -> int:
            async def spawn(number: int) -> str:
                return str((await client.spawn("child", {"i": number}, queue=CHILDREN))["task_id"])

            self.probe.begin()
            numbers = range(params["children"])
            ids = [await ctx.step(f"spawn-{number}", lambda number=number: spawn(number)) for number in numbers]
            results = await asyncio.gather(*(ctx.await_task_result(task_id, CHILDREN) for task_id in ids))
            self.probe.end()
            return len(results)

        @task(CHILDREN)
        async def child(params: Params, ctx: AsyncTaskContext) -> int:
            return int(params["i"])

        @task(QUEUE)
        async def hold(params: Params, ctx: AsyncTaskContext) -> None:
            self.probe.begin()
            await self.probe.hold()
            self.probe.end()

        @task(QUEUE)
        async def nap(params: Params, ctx: AsyncTaskContext) -> None:
            self.probe.wait()
            await ctx.sleep_for("nap", 3600)

    async def spawn_one(self, slot: int, task: str, params: Params) -> Any:
        return (await self._clients[slot % len(self._clients)].spawn(task, params, queue=QUEUE))["task_id"]

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        async with self._connections[slot].transaction():
            await self._connections[slot].execute("INSERT INTO orders (note) VALUES ('x')")
            await self._clients[slot].spawn(task, params, queue=QUEUE)

    async def result(self, handle: Any) -> None:
        client = self._clients[0]
        if self._result_poll is None:
            await client.await_task_result(handle)
            return
        while (found := await client.fetch_task_result(handle)) is None or found.state in ("pending", "running"):
            await asyncio.sleep(self._result_poll)

    async def emit(self, name: str) -> None:
        await self._clients[0].emit_event(name)


SYSTEM = AbsurdSystem
