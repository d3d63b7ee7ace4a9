"""dbos: a `DBOSClient` enqueues workflows, which run after `DBOS.launch()`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig, EnqueueOptions

from .base import AT_A_TIME, KEYS, NEVER, QUEUE, Params, Settings, System, noop_step

VERSION = "bench"
PATIENCE = 3600.0


async def filler(size: int) -> str:
    """Return a string of the given length, as a step's result."""
    return "x" * size


class DbosSystem(System):
    """dbos holds a waiting workflow in the memory of the process that runs it."""

    distribution = "dbos"

    def __init__(self) -> None:
        super().__init__()
        self._kind: str | None = None
        self._register()

    def _register(self) -> None:
        @DBOS.workflow(name="noop")
        async def noop(params: Params) -> None:
            self.probe.begin()
            self.probe.end()

        @DBOS.workflow(name="keyed")
        async def keyed(params: Params) -> None:
            self.probe.begin()
            self.probe.end()

        @DBOS.workflow(name="stamp")
        async def stamp(params: Params) -> None:
            self.probe.note(params["i"])
            self.probe.end()

        @DBOS.workflow(name="steps")
        async def steps(params: Params) -> None:
            self.probe.begin()
            for number in range(params["steps"]):
                await DBOS.run_step_async({"name": f"step-{number}"}, filler, params.get("size", 0))
            self.probe.end()

        @DBOS.workflow(name="wait")
        async def wait(params: Params) -> None:
            self.probe.begin()
            for number in range(params.get("steps", 0)):
                await DBOS.run_step_async({"name": f"step-{number}"}, noop_step)
            self.probe.wait()
            await DBOS.get_event_async("emitter", "go", timeout_seconds=PATIENCE)
            self.probe.end()

        @DBOS.workflow(name="emit")
        async def emit(name: str) -> None:
            await DBOS.set_event_async(name, value=True)

        @DBOS.workflow(name="child")
        async def child(params: Params) -> int:
            return int(params["i"])

        @DBOS.workflow(name="parent")
        async def parent(params: Params) -> int:
            self.probe.begin()
            handles = [await DBOS.enqueue_workflow_async(QUEUE, child, {"i": i}) for i in range(params["children"])]
            results = await asyncio.gather(*(handle.get_result(polling_interval_sec=0.05) for handle in handles))
            self.probe.end()
            return sum(results)

        @DBOS.workflow(name="hold")
        async def hold(params: Params) -> None:
            self.probe.begin()
            await self.probe.hold()
            self.probe.end()

        @DBOS.workflow(name="nap")
        async def nap(params: Params) -> None:
            self.probe.wait()
            await DBOS.sleep_async(PATIENCE)

        @DBOS.workflow(name="collect")
        async def collect(params: Params) -> None:
            self.probe.begin()
            self.probe.wait()
            for _ in range(params["count"]):
                await DBOS.recv_async("note", timeout_seconds=PATIENCE)
            self.probe.end()

        @DBOS.workflow(name="answer")
        async def answer(params: Params) -> None:
            asker = await DBOS.recv_async("question", timeout_seconds=PATIENCE)
            await DBOS.send_async(asker, message=True, topic="answer")

        @DBOS.workflow(name="ask")
        async def ask(params: Params) -> None:
            await DBOS.recv_async("go", timeout_seconds=PATIENCE)
            self.probe.asks(params["i"])
            await DBOS.send_async(params["other"], DBOS.workflow_id, "question")
            await DBOS.recv_async("answer", timeout_seconds=PATIENCE)
            self.probe.answered(params["i"])

        @DBOS.workflow(name="tell")
        async def tell(params: Params) -> None:
            for _ in range(params["count"]):
                await DBOS.write_stream_async("items", time.monotonic())
                if params["pause"]:
                    await asyncio.sleep(params["pause"])
            await DBOS.close_stream_async("items")

    async def install(self, url: str) -> None:
        await asyncio.to_thread(DBOS.migrate, url)

    async def open(self, url: str, connections: int, settings: Settings) -> None:
        self._client = await asyncio.to_thread(
            partial(DBOSClient, system_database_url=url, system_database_pool_size=connections)
        )
        engine_url = sa.make_url(url).set(drivername="postgresql+psycopg")
        self._engine = sa.create_engine(engine_url, pool_size=connections, max_overflow=0)
        self._result_poll: float = settings.get("result_poll", 1.0)

    async def close(self) -> None:
        await asyncio.to_thread(self._client.destroy)
        self._engine.dispose()

    async def work(self, url: str, settings: Settings) -> None:
        config: DBOSConfig = {
            "name": "bench",
            "system_database_url": url,
            "application_version": VERSION,
            "run_migrations": False,
            "log_level": "WARNING",
        }
        if "pool" in settings:
            config["sys_db_pool_size"] = settings["pool"]
        queue = {
            name: settings[key]
            for key, name in (("concurrency", "worker_concurrency"), ("poll_interval", "polling_interval_sec"))
            if key in settings
        }
        if self._kind is not None:
            queue |= {"partition_concurrency": AT_A_TIME} if self._kind == "keys" else {"global_concurrency": NEVER}

        def launch() -> None:
            DBOS(config=config)
            DBOS.launch()
            DBOS.register_queue(QUEUE, **queue)

        await asyncio.to_thread(launch)

    async def rest(self) -> None:
        await asyncio.to_thread(DBOS.destroy)

    async def limit(self, url: str | None, kind: str | None) -> None:
        self._kind = kind

    def _options(self, task: str) -> EnqueueOptions:
        return {"workflow_name": task, "queue_name": QUEUE, "app_version": VERSION}

    async def spawn_one(self, slot: int, task: str, params: Params) -> Any:
        options = self._options(task)
        if self._kind == "keys":
            options["queue_partition_key"] = f"key-{params['i'] % KEYS}"
        return await self._client.enqueue_async(options, params)

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        def enqueue() -> None:
            with self._engine.begin() as connection:
                connection.execute(sa.text("INSERT INTO orders (note) VALUES ('x')"))
                self._client.enqueue_in_transaction(connection, self._options(task), params)

        await asyncio.to_thread(enqueue)

    async def result(self, handle: Any) -> None:
        await handle.get_result(polling_interval_sec=self._result_poll)

    async def emit(self, name: str) -> None:
        await self._client.enqueue_async({**self._options("emit"), "workflow_id": "emitter"}, name)

    async def send(self, handle: Any, topic: str, payload: Any) -> None:
        await self._client.send_async(handle.workflow_id, payload, topic)

    async def read(self, handle: Any) -> AsyncGenerator[float]:
        poll = self._result_poll
        async for item in self._client.read_stream_async(handle.workflow_id, "items", polling_interval_sec=poll):
            yield item

    def identify(self, handle: Any) -> str:
        return str(handle.workflow_id)


SYSTEM = DbosSystem
