"""The interface of a system under test, and the measurements that are the same for all systems.

This module and the drivers run in the environments of the systems, so they import only the standard library and their
system. Times are those of the monotonic clock, which on Linux is the same for all processes.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, ClassVar, TypeAlias

Params: TypeAlias = dict[str, Any]
Settings: TypeAlias = dict[str, Any]

QUEUE = "bench"
KEYS = 100
"""The number of limit keys."""
AT_A_TIME = 4
"""Tasks of a limit key that may run at a time."""
NEVER = 10_000
"""Tasks of a queue that may run at a time, which are more than ever do."""
CHUNK = 1000
"""Tasks per call of `spawn_many`."""


class Probe:
    """The starts and ends that the tasks report, from the threads that the system runs them in."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.exchanges: dict[int, float] = {}
        """Seconds from question to answer, by the number of the task `ask`."""
        self._asked: dict[int, float] = {}
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

    def asks(self, number: int) -> None:
        """Record the question of a task `ask`, the first time it comes to that."""
        self._asked.setdefault(number, time.monotonic())

    def answered(self, number: int) -> None:
        """Record the answer to a question."""
        self.exchanges.setdefault(number, time.monotonic() - self._asked[number])

    def note(self, number: int) -> None:
        """Record the start of a task by its number."""
        self.numbered[number] = time.monotonic()

    def wait(self) -> None:
        """Count a task that is about to wait."""
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
    """Do nothing, as a step."""


class System(ABC):
    """A system under test, in one process: as its client, as its worker, or as both.

    Every driver registers these tasks, as far as its system can run them:

    `noop` does nothing; `keyed` does nothing, and has one of 100 limit keys; `stamp` notes when it started; `steps`
    takes `steps` steps that return `size` characters each; `wait` takes `steps` steps and then waits for the event
    ``go``; `parent` spawns `children` tasks `child` and waits for them all; `hold` runs until `release`; `nap` sleeps
    for an hour; `collect` receives `count` messages; `ask` waits for a message, sends one to the task `other`, which is
    an `answer`, and waits for its reply; `tell` writes `count` items to a stream, with `pause` seconds between them.
    Each item is the time at which it is written.
    """

    distribution: ClassVar[str]
    """The name on PyPI."""

    def __init__(self) -> None:
        self.probe = Probe()

    @abstractmethod
    async def install(self, url: str) -> None:
        """Create the system's tables and its queue in an empty database."""

    @abstractmethod
    async def open(self, url: str, connections: int, settings: Settings) -> None:
        """Connect as a client with the given number of connections."""

    @abstractmethod
    async def close(self) -> None:
        """Disconnect the client."""

    @abstractmethod
    async def work(self, url: str, settings: Settings) -> None:
        """Start a worker in the background and wait until it is connected."""

    @abstractmethod
    async def rest(self) -> None:
        """Stop the worker."""

    @abstractmethod
    async def spawn_one(self, slot: int, task: str, params: Params) -> Any:
        """Enqueue a task and commit; return the handle that `result` takes.

        `slot` is the number of the concurrent caller.
        """

    async def limit(self, url: str | None, kind: str | None) -> None:
        """Set the limit of each key for the kind `keys`, of the queue for `queue`; None is for the next run."""
        raise NotImplementedError

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

    async def send(self, handle: Any, topic: str, payload: Any) -> None:
        """Send a message to a task."""
        raise NotImplementedError

    def read(self, handle: Any) -> AsyncIterator[float]:
        """Read the items of the stream of a task `tell`, until it ends."""
        raise NotImplementedError

    def identify(self, handle: Any) -> str:
        """Return the id of a task, which another task can send to."""
        raise NotImplementedError

    # The methods below are called by the workloads, and are the same for all systems.

    async def load(self, task: str, count: int, params: Params) -> None:
        """Enqueue tasks by the fastest way that the system has."""
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
        """Enqueue `count` no-op tasks from concurrent callers; return the seconds it took."""
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

    async def begin_collecting(self, tasks: int, each: int) -> None:
        """Enqueue tasks `collect`, which receive `each` messages."""
        self._collectors = [
            await self.spawn_one(number % 8, "collect", {"count": each, "i": number}) for number in range(tasks)
        ]

    async def flood(self, each: int) -> None:
        """Send `each` messages to every task `collect`, from 20 concurrent callers."""
        todo = iter([handle for _ in range(each) for handle in self._collectors])

        async def sender() -> None:
            for handle in todo:
                await self.send(handle, "note", 1)

        await asyncio.gather(*(sender() for _ in range(20)))

    async def round_trips(self, count: int, pause: float) -> None:
        """Have pairs of waiting tasks exchange a message each, one pair after the other."""
        for number in range(count):
            answer = await self.spawn_one(0, "answer", {"i": number})
            ask = await self.spawn_one(0, "ask", {"i": number, "other": self.identify(answer)})
            await asyncio.sleep(pause)
            await self.send(ask, "go", True)
            await self.result(ask)

    async def listen(self, count: int, pause: float) -> dict[str, Any]:
        """Read the stream of a task `tell`; return the number of items, their delays, and the seconds of the whole."""
        gc.collect()
        handle = await self.spawn_one(0, "tell", {"count": count, "pause": pause})
        written: list[float] = []
        delays: list[float] = []
        async for moment in self.read(handle):
            written.append(moment)
            delays.append(time.monotonic() - moment)
        seconds = written[-1] + delays[-1] - written[0]
        await self.result(handle)
        return {"count": len(written), "delays": delays, "seconds": seconds}

    async def exchanged(self) -> list[float]:
        """Return the seconds between the question of each task `ask` and its answer."""
        return list(self.probe.exchanges.values())

    async def ping(self, count: int, pause: float, seconds: float) -> dict[str, list[float]]:
        """Run one task at a time, until `count` tasks have ended or the seconds have passed.

        The pauses between tasks are random, up to `pause` seconds, so that they do not fall into step with the system's
        polls.
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
        """Spawn at a fixed rate (tasks per second); return the times of the spawns.

        The tasks are numbered from `first`.
        """
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
        """Return the numbers of tasks that have started, ended and waited here, and the time of the first start."""
        starts = self.probe.starts
        return {
            "started": len(starts),
            "ended": len(self.probe.ends),
            "waiting": self.probe.waiting,
            "first": starts[0] if starts else None,
        }

    async def until(self, ended: int, seconds: float) -> dict[str, Any]:
        """Return the progress once `ended` tasks have ended in this process, or after the given seconds."""
        deadline = time.monotonic() + seconds
        while len(self.probe.ends) < ended and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        return await self.progress()

    async def tenths(self) -> list[float]:
        """Return the times at which 0, 10, 20 ... 100 % of the tasks had ended."""
        ends = sorted(self.probe.ends)
        return [ends[min(len(ends) - 1, len(ends) * tenth // 10)] for tenth in range(11)]

    async def numbered(self) -> dict[int, float]:
        """Return the start of each task `stamp` by its number, for the starts since the last call."""
        noted, self.probe.numbered = self.probe.numbered, {}
        return noted

    async def release(self) -> None:
        """End the tasks `hold`."""
        self.probe.release()

    async def forget(self) -> None:
        """Reset the counters."""
        self.probe = Probe()
        gc.collect()

    async def claim_times(self) -> list[float]:
        """Return the seconds that each claim of the worker took since the last call, if the driver measures it."""
        return []
