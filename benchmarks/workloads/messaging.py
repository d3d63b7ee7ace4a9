"""Messages: many to tasks that wait for them, one each way between two tasks; and streams of tasks to a reader."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from ..bench import Bench
from ..catalogue import System
from ..profiles import Profile
from ..results import percentile
from .common import Case, Outcome, RunError, client, share, until, until_ended, working


async def flood(bench: Bench, system: System, *, tasks: int, each: int) -> Outcome:
    """Measure the time from the first send until all tasks have received their messages and have ended."""
    count = share(tasks, system)
    settings = system.worker("best")
    loop = settings["loop"]
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, connections=8) as sender,
    ):
        worker = await bench.driver(system, loop, 1)
        await worker.call("forget")
        async with working(worker, database, settings):
            await sender.call("begin_collecting", tasks=count, each=each)
            await until(worker, "waiting", count)
            began = time.monotonic()
            await sender.call("flood", each=each)
            await until_ended([worker], database, count)
            seconds = time.monotonic() - began
    return Outcome({"throughput": count * each / seconds}, count)


async def exchange(bench: Bench, system: System, *, pairs: int) -> Outcome:
    """Measure the time from the question of one waiting task to another until it has the answer."""
    settings = dict(system.quick)
    loop = settings["loop"]
    waits = {key: settings.pop(key) for key in ("result_poll",) if key in settings}
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, **waits) as driver,
    ):
        worker = await bench.driver(system, loop, 1)
        await worker.call("forget")
        async with working(worker, database, settings):
            await driver.call("round_trips", count=pairs, pause=0.1)
            await asyncio.sleep(0.1)
            times = await worker.call("exchanged")
    return Outcome({f"round trip p{part}": 1000 * percentile(times, part / 100) for part in (50, 99)}, pairs)


async def stream(bench: Bench, system: System, *, items: int, pause: float) -> Outcome:
    """Measure a stream to one reader in another process: with pauses the delays, without them the speed."""
    count = items if pause else share(items, system)
    settings = dict(system.quick)
    loop = settings["loop"]
    waits = {key: settings.pop(key) for key in ("result_poll",) if key in settings}
    async with (
        bench.server.database(system) as database,
        client(bench, system, database, loop=loop, **waits) as reader,
    ):
        worker = await bench.driver(system, loop, 1)
        async with working(worker, database, settings):
            read = await reader.call("listen", count=count, pause=pause)
    if read["count"] != count:
        raise RunError(f"{read['count']} items of {count} were read")
    delays = {f"delay p{part}": 1000 * percentile(read["delays"], part / 100) for part in (50, 99)}
    return Outcome(delays if pause else {"throughput": count / read["seconds"], **delays}, count)


def cases(profile: Profile) -> list[Case]:
    tasks, each = profile.receivers
    return [
        Case("messages", "messages to waiting tasks", "messages", partial(flood, tasks=tasks, each=each)),
        Case("messages", "between two idle tasks", "messages", partial(exchange, pairs=profile.exchanges)),
        Case("streams", "at full speed", "streams", partial(stream, items=profile.streamed, pause=0)),
        Case("streams", "100 items a second", "streams", partial(stream, items=profile.spoken, pause=0.01)),
    ]
