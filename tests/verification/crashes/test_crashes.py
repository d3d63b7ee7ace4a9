"""A worker killed anywhere: the task comes to the same end, its transactions happened once, its steps hardly more."""

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, SpawnResult, Task
from tests.context.support import Rows

from . import crashing

ROOT = Path(__file__).parents[3]
LAST_POINT = 200
STRIDE = 4


class Crasher:
    """The process that makes workers and has them killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def __call__(self, durable: Durable, runs: list[tuple[str, SpawnResult[Any], int]]) -> list[int]:
        """How each of these workers, all side by side, has ended: -9 if it was killed, 0 if it came to the end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = [(queue_name, str(spawned.task_id), point) for queue_name, spawned, point in runs]
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        await self.process.stdin.drain()
        statuses: list[int] = json.loads(await self.process.stdout.readline())
        # Nobody has to wait for the leases of processes that are known to be dead.
        async with durable.engine.begin() as connection:
            await connection.execute(text("UPDATE durable.workers SET expires_at = now() - interval '1 s'"))
        return statuses


@pytest.fixture
async def crasher(database_url: URL, engine: AsyncEngine, tmp_path: Path) -> AsyncGenerator[Crasher]:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE ledger (id serial, task_id uuid, what text)"))
    url = database_url.render_as_string(hide_password=False)
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.verification.crashes.crashing", url, str(tmp_path / "steps")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )
    yield Crasher(process)
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("task", [crashing.work, crashing.plain_work], ids=["asynchronous", "plain"])
async def test_killed_at_every_point_where_it_talks_to_the_database(
    durable: Durable, crasher: Crasher, tmp_path: Path, task: Task[int, Any]
):
    for each in crashing.TASKS:
        durable.register(each)
    # Another part of the points each time, so that all of them are tried, sooner or later.
    seed = int(os.environ.get("SOAK_SEED") or random.randrange(STRIDE))
    sys.stdout.write(f"SOAK_SEED={seed}\n")
    runs = []
    for point in range(1 + seed % STRIDE, LAST_POINT + 1, STRIDE):
        queue_name = f"point-{point}"
        await durable.create_queue(queue_name)
        runs.append((queue_name, await durable.spawn(task, point, queue_name=queue_name), point))

    statuses = await crasher(durable, runs)
    killed = [run for run, status in zip(runs, statuses, strict=True) if status == -9]
    assert set(statuses) <= {-9, 0}
    # The points reach from the first statement to the end of the task.
    assert len(killed) > 20
    again = [(queue_name, spawned, (7 * point) % 17 + 1) for queue_name, spawned, point in killed[::3]]
    assert set(await crasher(durable, again)) <= {-9, 0}

    crashing.Process.ledger = tmp_path / "steps"
    async with durable.worker(queue_names=[queue_name for queue_name, _, _ in runs], concurrency=100):
        results = [await durable.wait_for_result(spawned, timeout=40) for _, spawned, _ in runs]

    async with durable.engine.connect() as connection:
        written = (await connection.execute(text("SELECT task_id, what, id FROM ledger"))).all()
    steps = Counter(line for line in (tmp_path / "steps").read_text().splitlines())
    for (_, spawned, point), result in zip(runs, results, strict=True):
        rows = Rows(durable, spawned)
        assert result.error is None
        row = await rows.task()
        assert row.failures == 0
        children = await rows.children()
        assert len(children) == 1
        assert await rows.waits() == []

        own = {what: number for task_id, what, number in written if task_id == spawned.task_id}
        of_child = [number for task_id, _, number in written if task_id == children[0].task_id]
        # Every transaction once, and what the task saw is what was committed.
        assert Counter(task_id for task_id, _, _ in written)[spawned.task_id] == len(own)
        assert len(of_child) == 1
        if task is crashing.work:
            assert result.output[:-1] == [
                point + 1,
                own["write 1"],
                of_child[0],
                point,
                "timeout",
                point + 1,
                own["write 2"],
            ]
            assert 2 <= steps[f"{spawned.task_id} plain"] <= 2 + 2
        else:
            assert result.output[:-1] == [point + 2, own["write 1"], of_child[0]]
            assert 1 <= steps[f"{spawned.task_id} threaded"] <= 1 + 2

        runs_of_task = await rows.runs()
        assert [entry.attempt for entry in runs_of_task] == list(range(1, row.attempt + 1))
        assert runs_of_task[-1].state == "completed"
        assert all(entry.error["name"] == "LeaseLost" for entry in runs_of_task[:-1])
