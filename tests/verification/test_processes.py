"""`durable worker --processes` while its processes are killed, grow, and are ended by what they run."""

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text

from durable_sa import Durable, RetryStrategy
from tests.cli.support import Process, process
from tests.support import eventually

GOOD, POISON = 1000, 100
MAX_LOST_WORKERS = 1
KILLS = 20

APP = """
import asyncio, os, signal, time
from durable_sa import Durable, SyncTaskContext, TaskContext

durable = Durable()
kept: list[bytes] = []

@durable.task
async def good(ctx: TaskContext, number: int) -> int:
    await ctx.step("first", asyncio.sleep, 0.01)
    return number

@durable.task
def grows(ctx: SyncTaskContext, number: int) -> int:
    kept.append(os.urandom(8 * 2**20))
    return os.getpid()

@durable.task
async def poison(ctx: TaskContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)

@durable.task(hard_timeout=0.5)
def freezes(ctx: SyncTaskContext) -> None:
    import ctypes
    ctypes.PyDLL(None).sleep(600)  # without releasing the interpreter's lock

@durable.task
async def slow(ctx: TaskContext, number: int) -> int:
    for part in range(5):
        await ctx.step(f"part {part}", asyncio.sleep, 0.1)
    return number
"""

Start = Callable[..., Process]


@pytest.fixture
def start(database_url: URL, tmp_path: Path) -> Generator[Start]:
    """Start a watcher in a directory of its own."""
    with contextlib.ExitStack() as running:

        def start(count: int, *options: object) -> Process:
            directory = tmp_path / f"watcher-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            (directory / "app.py").write_text(APP)
            url = database_url.render_as_string(hide_password=False)
            command = ("worker", "app:durable", "--processes", str(count), *map(str, options))
            return running.enter_context(process(*command, url=url, cwd=directory))

        yield start


def children(watcher: Process) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{watcher.pid}/task/{watcher.pid}/children").read_text().split()]
    return []


def resident_memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def spawn(durable: Durable, name: str, count: int, *, numbered: bool = True, **options: Any) -> list[Any]:
    """Spawn tasks of the watcher's application, which fail at their first failure."""
    options = {"max_attempts": 1, "retry_strategy": RetryStrategy.none(), **options}
    return [
        (await durable.spawn_by_name(name, number if numbered else None, unchecked=True, **options)).task_id
        for number in range(count)
    ]


async def counted(durable: Durable, statement: str, **parameters: Any) -> Counter[Any]:
    async with durable.engine.connect() as connection:
        rows = (await connection.execute(text(statement), parameters)).all()
    return Counter({tuple(row)[:-1]: row[-1] for row in rows})


async def states(durable: Durable) -> Counter[Any]:
    """How many tasks of each name are in which state, with which error."""
    return await counted(
        durable, "SELECT task_name, state, error->>'name', count(*) FROM durable.tasks GROUP BY 1, 2, 3"
    )


async def finished(durable: Durable, within: float) -> Counter[Any]:
    async def ended() -> Counter[Any] | None:
        found = await states(durable)
        return found if all(state in ("completed", "failed") for _, state, _ in found) else None

    found = await eventually(ended, within=within)
    assert found is not None
    return found


@pytest.mark.timeout(500)
async def test_a_hundred_tasks_that_kill_their_process_among_a_thousand_good_ones(
    durable: Durable, start: Start
) -> None:
    watcher = start(4, "--concurrency", 6)
    poisonous: list[Any] = []
    for _ in range(10):
        await spawn(durable, "good", GOOD // 10)
        poisonous += await spawn(durable, "poison", POISON // 10, numbered=False, max_lost_workers=MAX_LOST_WORKERS)
    assert await finished(durable, within=450) == {
        ("good", "completed", None): GOOD,
        ("poison", "failed", "LeaseLost"): POISON,
    }
    # Two losses beside others make a suspect, and then it is alone.
    lost = await counted(
        durable,
        "SELECT error->>'name', count FROM (SELECT task_id, error, count(*) OVER (PARTITION BY task_id) AS count "
        "FROM durable.runs WHERE task_id = ANY(:ids)) AS lost GROUP BY 1, 2",
        ids=poisonous,
    )
    assert set(lost) == {("LeaseLost",)}
    assert set(lost.values()) == {2 + MAX_LOST_WORKERS}
    assert watcher.running


async def test_tasks_that_freeze_their_process_fail_by_themselves(durable: Durable, start: Start) -> None:
    start(4, "--concurrency", 6)
    for _ in range(4):
        await spawn(durable, "good", 50)
        await spawn(durable, "freezes", 5, numbered=False)
    assert await finished(durable, within=120) == {
        ("good", "completed", None): 200,
        ("freezes", "failed", "TaskTimeout"): 20,
    }
    ends = await counted(
        durable,
        "SELECT task_name, runs.error->>'name', count(*) FROM durable.runs JOIN durable.tasks USING (task_id) "
        "WHERE runs.state = 'failed' GROUP BY 1, 2",
    )
    assert ends["freezes", "TaskTimeout"] == 20
    assert {what for _, what in ends} <= {"TaskTimeout", "Released"}


async def test_processes_that_are_killed_lose_nothing(durable: Durable, start: Start) -> None:
    watcher = start(3, "--concurrency", 10)
    chance = random.Random(15)
    await spawn(durable, "slow", 600)
    for _ in range(KILLS):
        await asyncio.sleep(chance.uniform(0.2, 0.6))
        if pids := children(watcher):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
    assert await finished(durable, within=120) == {("slow", "completed", None): 600}
    await eventually(lambda: len(children(watcher)) == 3)


async def test_watchers_that_are_killed_leave_no_process_and_no_run(durable: Durable, start: Start) -> None:
    await spawn(durable, "slow", 300)
    seen: set[int] = set()
    for _ in range(4):
        watcher = start(3, "--concurrency", 5)

        async def works(watcher: Process = watcher) -> bool:
            found = await counted(durable, "SELECT count(*) FROM durable.tasks WHERE claimed_by IS NOT NULL")
            return len(children(watcher)) == 3 and found[()] > 0

        await eventually(works)
        seen.update(children(watcher))
        watcher.signal(signal.SIGKILL)
    await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in seen))
    assert len(seen) == 12
    await eventually(lambda: _none_running(durable))
    last = start(3)
    assert await finished(durable, within=60) == {("slow", "completed", None): 300}
    # Each was given back: none had to wait for the end of a lease.
    ends = await counted(durable, "SELECT error->>'name', count(*) FROM durable.runs WHERE state = 'failed' GROUP BY 1")
    assert {what for (what,) in ends} <= {"Released"}
    assert last.running


async def _none_running(durable: Durable) -> bool:
    return not (await counted(durable, "SELECT count(*) FROM durable.tasks WHERE claimed_by IS NOT NULL"))[()]


async def test_processes_that_grow_are_replaced_before_they_exceed_their_memory_by_far(
    durable: Durable, start: Start
) -> None:
    most, slots, each = 250 * 2**20, 4, 8 * 2**20
    watcher = start(2, "--concurrency", slots, "--max-memory-per-process", "250M")
    await spawn(durable, "grows", 300)
    largest = 0

    async def over() -> bool:
        nonlocal largest
        for pid in children(watcher):
            with contextlib.suppress(OSError):
                largest = max(largest, resident_memory(pid))
        return set(await states(durable)) == {("grows", "completed", None)}

    await eventually(over, within=120)
    assert most - slots * each < largest < most + 3 * slots * each
    assert watcher.said.count("as planned, and is replaced") >= 5
    assert "is restarted in" not in watcher.said
    attempts = await counted(durable, "SELECT attempt, count(*) FROM durable.tasks GROUP BY 1")
    assert attempts == {(1,): 300}
