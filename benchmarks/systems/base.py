"""What a system has to bring to be measured, and what every driver does alike with it.

This module and the drivers run in the systems' own environments: they use nothing but the standard library and the
system itself. Times are of the monotonic clock, which all processes of a machine share on Linux.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeAlias

Params: TypeAlias = dict[str, Any]
Settings: TypeAlias = dict[str, Any]

QUEUE = "bench"
CHUNK = 1000
"""Tasks handed over at once where a system takes many."""


class Probe:
    """What the bodies of the tasks report. Fed from whatever thread the system runs them in."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.numbered: dict[int, float] = {}
        self.waiting = 0
        self._mutex = threading.Lock()
        self._gate: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        self.starts.append(time.monotonic())

    def end(self) -> None:
        self.ends.append(time.monotonic())

    def note(self, number: int) -> None:
        """The task of that number has started."""
        self.numbered[number] = time.monotonic()

    def wait(self) -> None:
        """A task is about to wait."""
        with self._mutex:
            self.waiting += 1

    async def hold(self) -> None:
        """Keep a task running until `release`."""
        if self._gate is None:
            self._gate, self._loop = asyncio.Event(), asyncio.get_running_loop()
        await self._gate.wait()

    def release(self) -> None:
        if self._gate is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._gate.set)


async def noop_step() -> None:
    """A step that does nothing."""


class System(ABC):
    """A system under test, in one process: as its client, as its worker, or as both.

    The tasks that every driver registers, as far as its system can run them:

    `noop` does nothing; `stamp` notes when it started; `steps` takes `steps` steps that return `size` characters each;
    `wait` takes `steps` steps and then waits for the event ``go``; `parent` spawns `children` tasks `child` and waits
    for them all; `hold` runs until it is let go; `nap` sleeps for an hour.
    """

    distribution: ClassVar[str]
    """The name on PyPI."""

    def __init__(self) -> None:
        self.probe = Probe()

    @abstractmethod
    async def install(self, url: str) -> None:
        """Make the system's tables in an empty database, its queue included."""

    @abstractmethod
    async def open(self, url: str, connections: int, settings: Settings) -> None:
        """Connect as a client that may use so many connections."""

    @abstractmethod
    async def close(self) -> None:
        """Disconnect the client."""

    @abstractmethod
    async def work(self, url: str, settings: Settings) -> None:
        """Start a worker in the background; it has a connection when this returns."""

    @abstractmethod
    async def rest(self) -> None:
        """Stop the worker."""

    @abstractmethod
    async def spawn_one(self, slot: int, task: str, params: Params) -> Any:
        """Enqueue a task, committed. `slot` tells concurrent callers apart. Returns what `result` takes."""

    async def spawn_in_transaction(self, slot: int, task: str, params: Params) -> None:
        """Insert a row into ``orders`` and enqueue a task, in one transaction."""
        raise NotImplementedError

    async def spawn_many(self, task: str, params: Sequence[Params]) -> None:
        """Enqueue many tasks in one call."""
        raise NotImplementedError

    async def result(self, handle: Any) -> None:
        """Wait until a task has ended."""
        raise NotImplementedError

    async def emit(self, name: str) -> None:
        """Emit an event."""
        raise NotImplementedError

    # From here on: calls of the conductor, the same for all systems.

    async def load(self, task: str, count: int, params: Params) -> None:
        """Enqueue tasks by the fastest means there is; not measured."""
        items = [{**params, "i": number} for number in range(count)]
        if type(self).spawn_many is not System.spawn_many:
            for start in range(0, count, CHUNK):
                await self.spawn_many(task, items[start : start + CHUNK])
            return
        todo = iter(items)

        async def spawner(slot: int) -> None:
            for item in todo:
                await self.spawn_one(slot, task, item)

        await asyncio.gather(*(spawner(slot) for slot in range(8)))

    async def spawn(self, mode: str, count: int, spawners: int) -> float:
        """Enqueue `count` no-op tasks, with so many callers at once; seconds."""
        calls: dict[str, Callable[[int, str, Params], Awaitable[Any]]] = {
            "single": self.spawn_one,
            "session": self.spawn_in_transaction,
        }

        async def spawner(slot: int) -> None:
            for number in range(slot, count, spawners):
                await calls[mode](slot, "noop", {"i": number})

        gc.collect()
        began = time.monotonic()
        if mode == "bulk":
            for start in range(0, count, CHUNK):
                await self.spawn_many("noop", [{"i": number} for number in range(start, min(start + CHUNK, count))])
        else:
            await asyncio.gather(*(spawner(slot) for slot in range(spawners)))
        return time.monotonic() - began

    async def ping(self, count: int, pause: float, seconds: float) -> dict[str, list[float]]:
        """One task at a time on an idle system, up to `count` and for up to so many seconds.

        The pauses between them are random, up to `pause`, so that no poll of the system falls in step with them.
        """
        spawned: list[float] = []
        ended: list[float] = []
        deadline = time.monotonic() + seconds
        while len(ended) < count and (time.monotonic() < deadline or not ended):
            await asyncio.sleep(random.uniform(0.01, max(0.02, pause)))
            spawned.append(time.monotonic())
            await self.result(await self.spawn_one(0, "stamp", {"i": len(ended)}))
            ended.append(time.monotonic())
        return {"spawned": spawned, "ended": ended}

    async def stream(self, rate: float, seconds: float, first: int) -> dict[str, list[float]]:
        """Spawn at a fixed rate, whatever becomes of the tasks; when each was spawned, by its number from `first`."""
        spawned: list[float] = []
        began = time.monotonic()
        pending: set[asyncio.Task[Any]] = set()
        while (elapsed := time.monotonic() - began) < seconds:
            while len(spawned) < elapsed * rate:
                number = first + len(spawned)
                spawned.append(time.monotonic())
                task = asyncio.ensure_future(self.spawn_one(number % 8, "stamp", {"i": number}))
                pending.add(task)
                task.add_done_callback(pending.discard)
            await asyncio.sleep(0.002)
        await asyncio.gather(*pending)
        return {"spawned": spawned}

    async def progress(self) -> dict[str, Any]:
        """How far the tasks have come in this process."""
        starts = self.probe.starts
        return {
            "started": len(starts),
            "ended": len(self.probe.ends),
            "waiting": self.probe.waiting,
            "first": starts[0] if starts else None,
        }

    async def until(self, ended: int, seconds: float) -> dict[str, Any]:
        """How far the tasks have come once so many have ended in this process, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while len(self.probe.ends) < ended and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        return await self.progress()

    async def tenths(self) -> list[float]:
        """When the task at each tenth of all had ended."""
        ends = sorted(self.probe.ends)
        return [ends[min(len(ends) - 1, len(ends) * tenth // 10)] for tenth in range(11)]

    async def numbered(self) -> dict[int, float]:
        """When each task `stamp` started since the last call."""
        noted, self.probe.numbered = self.probe.numbered, {}
        return noted

    async def release(self) -> None:
        """Let go of the tasks `hold`."""
        self.probe.release()

    async def forget(self) -> None:
        """Begin anew with the numbers."""
        self.probe = Probe()
        gc.collect()

    async def claim_times(self) -> list[float]:
        """How long the worker's claims took since the last call, where the driver can tell."""
        return []
