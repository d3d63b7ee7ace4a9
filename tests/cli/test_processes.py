"""`durable worker --processes`: several processes under one that watches them."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text

from durable_sa import Durable, Limit, RetryStrategy, SpawnResult, TaskStatus
from tests.cli.support import Process, process
from tests.support import eventually
from tests.worker.test_health import ask, free_port

pytestmark = pytest.mark.slow

APP = """
import asyncio, ctypes, os, signal, sys, time
from durable_sa import Durable, SyncTaskContext, TaskContext

durable = Durable()

@durable.task
async def pid(ctx: TaskContext) -> int:
    return os.getpid()

@durable.task
async def say(ctx: TaskContext) -> None:
    print("said to stdout")
    print("said to stderr", file=sys.stderr)
    print('{"said": "as JSON"}', file=sys.stderr)

@durable.task
async def pause(ctx: TaskContext, seconds: float) -> list[int]:
    await asyncio.sleep(seconds)
    return [os.getpid(), ctx.attempt]

@durable.task
def grow(ctx: SyncTaskContext, megabytes: int) -> int:
    kept.append(bytearray(os.urandom(1024)) * (megabytes * 1024))
    return os.getpid()

kept: list[bytearray] = []

@durable.task
def stuck(ctx: SyncTaskContext) -> None:
    time.sleep(600)

@durable.task(hard_timeout=1)
async def hangs(ctx: TaskContext) -> None:
    await asyncio.sleep(600)

@durable.task(hard_timeout=1)
async def blocks(ctx: TaskContext) -> None:
    time.sleep(600)

@durable.task(hard_timeout=1)
def holds_the_lock(ctx: SyncTaskContext) -> None:
    ctypes.PyDLL(None).sleep(600)  # without releasing the interpreter's lock

@durable.task(hard_timeout=1)
def ignores_everything(ctx: SyncTaskContext) -> None:
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

@durable.task(hard_timeout=1)
async def hangs_once(ctx: TaskContext) -> int:
    if ctx.attempt == 1:
        time.sleep(600)
    return ctx.attempt
"""

Start = Callable[..., Process]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
async def start(database_url: URL, app: Path) -> AsyncGenerator[Start]:
    """Start a watcher; its processes end with it."""
    with contextlib.ExitStack() as running:

        def start(*options: object) -> Process:
            url = database_url.render_as_string(hide_password=False)
            return running.enter_context(
                process("worker", "app:durable", "--processes", *map(str, options), url=url, cwd=app)
            )

        yield start


async def spawn(durable: Durable, name: str, params: Any = None, *, max_attempts: int = 1) -> SpawnResult:
    return await durable.spawn_by_name(
        name, params, unchecked=True, max_attempts=max_attempts, retry_strategy=RetryStrategy.fixed(0)
    )


async def output(durable: Durable, spawned: SpawnResult) -> Any:
    return (await durable.wait_for_result(spawned, timeout=30)).output


def pids(watcher: Process) -> set[int]:
    """The processes that live."""
    found = {int(entry) for entry in Path(f"/proc/{watcher.pid}/task/{watcher.pid}/children").read_text().split()}
    return found - {watcher.pid}


async def workers(durable: Durable, count: int) -> set[str]:
    """Wait for so many live workers, and return their ids."""

    async def alive() -> tuple[set[str]] | None:
        async with durable.engine.connect() as connection:
            rows = await connection.execute(
                text("SELECT worker_id FROM durable.workers WHERE lost_at IS NULL AND expires_at > now()")
            )
            found = {str(row.worker_id) for row in rows}
        return (found,) if len(found) == count else None

    return (await eventually(alive, within=30))[0]  # type: ignore[index]


async def slots_held(durable: Durable) -> int:
    """Return the slots of limits that runs hold."""
    async with durable.engine.connect() as connection:
        rows = await connection.execute(
            text(
                "SELECT (SELECT sum(running) FROM durable.limit_totals)"
                " + (SELECT coalesce(sum(slots), 0) FROM durable.limit_arrivals)"
            )
        )
        return int(rows.scalar_one())


async def attempts(durable: Durable, spawned: SpawnResult) -> list[tuple[str, str]]:
    """The errors of the attempts that have ended."""
    async with durable.engine.connect() as connection:
        rows = await connection.execute(
            text("SELECT state, error->>'name' AS name FROM durable.runs WHERE task_id = :id ORDER BY attempt"),
            {"id": spawned.task_id},
        )
        return [(row.state, row.name) for row in rows]


async def test_tasks_run_in_all_processes_until_the_watcher_is_told_to_stop(durable: Durable, start: Start) -> None:
    watcher = start(2, "--concurrency", 1)
    await workers(durable, 2)
    spawned = [await spawn(durable, "pause", 0.5) for _ in range(2)]
    ran_in = {(await output(durable, item))[0] for item in spawned}
    assert ran_in == pids(watcher)
    said = await spawn(durable, "say")
    await output(durable, said)
    watcher.signal(signal.SIGTERM)
    assert await asyncio.to_thread(watcher.wait) == 0, watcher.said
    assert await workers(durable, 0) == set()
    lines = watcher.said.splitlines()
    plain = [line for line in lines if not line.startswith("{")]
    assert all(re.match(r"\[(1|2|watcher)\] ", line) for line in plain), watcher.said
    assert {"[1] said to stdout", "[2] said to stdout"} & set(lines)
    assert {"[1] said to stderr", "[2] said to stderr"} & set(lines)
    assert {f'{{"worker_process": "{number}", "said": "as JSON"}}' for number in (1, 2)} & set(lines)


async def test_a_killed_process_is_restarted_and_its_runs_go_on_at_once(durable: Durable, start: Start) -> None:
    watcher = start(2, "--concurrency", 1)
    await workers(durable, 2)
    long = await spawn(durable, "pause", 3)

    async def runs() -> bool:
        return (await durable.get_task_result(long)).status is TaskStatus.RUNNING  # type: ignore[union-attr]

    await eventually(runs)
    before = pids(watcher)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    # The lease of 120 seconds need not run out.
    pid, attempt = await output(durable, long)
    assert pid not in before
    assert attempt == 2
    assert await attempts(durable, long) == [("failed", "LeaseLost"), ("completed", None)]
    assert "was killed by SIGKILL, and is restarted in 0.1 s" in watcher.said


async def test_the_processes_of_a_killed_watcher_give_their_runs_back_and_end(durable: Durable, start: Start) -> None:
    watcher = start(2)
    await workers(durable, 2)
    long = await spawn(durable, "pause", 600)

    async def runs() -> bool:
        return (await durable.get_task_result(long)).status is TaskStatus.RUNNING  # type: ignore[union-attr]

    await eventually(runs)
    children = pids(watcher)
    assert len(children) == 2
    watcher.signal(signal.SIGKILL)
    await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert await workers(durable, 0) == set()
    assert (await durable.get_task_result(long)).status is TaskStatus.PENDING  # type: ignore[union-attr]


async def test_sigquit_gives_all_runs_back_at_once(durable: Durable, start: Start) -> None:
    await durable.set_limit("default", Limit(concurrency=3))
    watcher = start(2)
    await workers(durable, 2)
    long = await spawn(durable, "pause", 600)

    async def runs() -> bool:
        return (await durable.get_task_result(long)).status is TaskStatus.RUNNING  # type: ignore[union-attr]

    await eventually(runs)
    watcher.signal(signal.SIGQUIT)
    assert await asyncio.to_thread(watcher.wait, 15) == 0, watcher.said
    # Perhaps by both: one may claim it just before it is told.
    assert set(await attempts(durable, long)) == {("failed", "Released")}
    assert await slots_held(durable) == 0


async def test_a_process_ends_after_its_number_of_runs(durable: Durable, start: Start) -> None:
    watcher = start(1, "--max-tasks-per-process", 3)
    spawned = [await spawn(durable, "pause", 0.1) for _ in range(9)]
    ran_in = [await output(durable, item) for item in spawned]
    counts = {pid: [other for other, _ in ran_in].count(pid) for pid, _ in ran_in}
    assert list(counts.values()) == [3, 3, 3]
    assert {attempt for _, attempt in ran_in} == {1}
    await eventually(lambda: watcher.said.count("as planned, and is replaced") >= 3)
    assert "is restarted in" not in watcher.said


async def test_a_process_that_has_grown_ends_when_its_runs_have_ended(durable: Durable, start: Start) -> None:
    watcher = start(1, "--max-memory-per-process", "300M")
    beside = await spawn(durable, "pause", 2)
    grown = [await spawn(durable, "grow", 400)]
    first = await output(durable, grown[0])
    pid, attempt = await output(durable, beside)
    assert (pid, attempt) == (first, 1)
    assert await output(durable, await spawn(durable, "pid")) != first
    assert re.search(r"occupies \d+ MiB of memory, and may occupy 300: it ends", watcher.said)
    assert "is restarted in" not in watcher.said


@pytest.mark.parametrize("name", ["hangs", "blocks", "holds_the_lock", "ignores_everything"])
async def test_a_hard_timeout_ends_the_process_and_gives_the_others_back(
    durable: Durable, start: Start, name: str
) -> None:
    await durable.set_limit("default", Limit(concurrency=3))
    watcher = start(1)
    await workers(durable, 1)
    beside = await spawn(durable, "pause", 3)
    poisonous = await spawn(Durable(durable.engine, on_failure="alert"), name)
    result = await durable.wait_for_result(poisonous, timeout=30)
    assert result.status is TaskStatus.FAILED
    assert result.error is not None
    assert (result.error.name, result.error.message) == ("TaskTimeout", f"Task {name!r} took longer than 1 s")
    assert await attempts(durable, poisonous) == [("failed", "TaskTimeout")]
    async with durable.engine.connect() as connection:
        alerts = text("SELECT params ->> 'task_id' FROM durable.tasks WHERE task_name = 'alert'")
        assert (await connection.scalars(alerts)).all() == [str(poisonous.task_id)]
    assert (await output(durable, beside))[1] == 2
    assert await attempts(durable, beside) == [("failed", "Released"), ("completed", None)]
    assert await slots_held(durable) == 0
    assert "is restarted in" not in watcher.said


async def test_a_hard_timeout_is_retried_as_failures_are(durable: Durable, start: Start) -> None:
    start(2)
    spawned = await spawn(durable, "hangs_once", max_attempts=2)
    assert await output(durable, spawned) == 2
    assert await attempts(durable, spawned) == [("failed", "TaskTimeout"), ("completed", None)]


async def test_a_process_that_cannot_start_is_restarted_with_a_pause_that_grows(start: Start, app: Path) -> None:
    (app / "app.py").write_text("raise RuntimeError('no configuration')")
    watcher = start(1)
    await asyncio.to_thread(watcher.until_said, "is restarted in 0.4 s")
    pauses = re.findall(r"is restarted in ([\d.]+) s", watcher.said)
    assert pauses[:3] == ["0.1", "0.2", "0.4"]
    assert "[1] RuntimeError: no configuration" in watcher.said
    watcher.signal(signal.SIGTERM)
    assert await asyncio.to_thread(watcher.wait) == 0


async def test_arguments_that_are_at_fault_end_it(start: Start, app: Path) -> None:
    (app / "app.py").write_text("")
    watcher = start(2)
    assert await asyncio.to_thread(watcher.wait) == 2
    assert "error: MODULE:DURABLE: 'durable' in app is not a Durable." in watcher.said


async def test_limits_of_processes_need_processes(database_url: URL, app: Path) -> None:
    with process("worker", "app:durable", "--max-tasks-per-process", "3", url=str(database_url), cwd=app) as worker:
        assert worker.wait() == 2
        assert "Add --processes 1, or more." in worker.said


async def test_probes_cover_all_processes(durable: Durable, start: Start) -> None:
    port = free_port()
    watcher = start(2, "--health-port", port)
    await workers(durable, 2)

    async def ready() -> bool:
        with contextlib.suppress(OSError):
            return (await ask(port, "/ready"))[0] == 200
        return False

    await eventually(ready)
    status, answer = await ask(port, "/live")
    assert (status, set(answer["processes"])) == (200, {"1", "2"})
    stopped = min(pids(watcher))
    os.kill(stopped, signal.SIGSTOP)
    try:
        status, answer = await ask(port, "/live")
        assert status == 503
        assert "the process does not answer" in answer["problem"]
    finally:
        os.kill(stopped, signal.SIGCONT)
    await eventually(ready)


async def test_a_process_with_abandoned_threads_is_replaced(durable: Durable, start: Start) -> None:
    watcher = start(1, "--concurrency", 1)
    for _ in range(2):
        stuck = await spawn(durable, "stuck")

        async def runs(stuck: SpawnResult = stuck) -> bool:
            return (await durable.get_task_result(stuck)).status is TaskStatus.RUNNING  # type: ignore[union-attr]

        await eventually(runs)
        await durable.cancel_task(stuck)
    await asyncio.to_thread(watcher.until_said, "as planned, and is replaced")
    assert {await output(durable, await spawn(durable, "pid"))} == pids(watcher)
    assert watcher.said.count("its code goes on in thread") == 2
    assert "2 threads execute code of `def` runs that have ended, more than its 1 slots" in watcher.said
    assert "is restarted in" not in watcher.said
