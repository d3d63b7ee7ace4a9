"""Lines in the log say which task they are about."""

import logging

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, RetryStrategy, SyncTaskContext, TaskContext, task
from durable_sa.logs import FIELDS, TaskFields
from durable_sa.testing import run_until_idle

SECRET = "correct-horse-battery-staple"
own = logging.getLogger("tests.telemetry")


def log(line: str) -> None:
    own.info(line)


@task
async def asynchronous(ctx: TaskContext) -> None:
    log("body")
    await ctx.step("step", log, "step")


@task
def synchronous(ctx: SyncTaskContext) -> None:
    log("thread")


@task(max_attempts=2)
async def fails(ctx: TaskContext) -> None:
    raise ValueError(SECRET)


def fields(record: logging.LogRecord) -> tuple[object, ...]:
    return tuple(getattr(record, field) for field in FIELDS)


async def test_lines_of_a_task_have_its_fields(engine: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tests.telemetry")
    chosen = TaskFields()
    caplog.handler.addFilter(chosen)
    async with Durable(engine, tasks=[asynchronous, synchronous]) as durable:
        one, another = await durable.spawn(asynchronous), await durable.spawn(synchronous)
        await run_until_idle(durable)
    log("outside")
    caplog.handler.removeFilter(chosen)
    found = {record.getMessage(): fields(record) for record in caplog.records if record.name == "tests.telemetry"}
    mine = (str(one.task_id), "asynchronous", str(one.run_id), 1, "default")
    assert found == {
        "body": mine,
        "step": mine,
        "thread": (str(another.task_id), "synchronous", str(another.run_id), 1, "default"),
        "outside": (None,) * 5,
    }


async def test_lines_about_a_task_have_its_fields(engine: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "durable_sa")
    async with Durable(engine, tasks=[fails], default_retry_strategy=RetryStrategy.fixed(0)) as durable:
        spawned = await durable.spawn(fails, headers={"secret": SECRET})
        await run_until_idle(durable)
    lines = [(record.getMessage(), fields(record)) for record in caplog.records if hasattr(record, "task_id")]
    assert [(line, values[0], values[3]) for line, values in lines] == [
        (
            f"task {spawned.task_id} (fails) failed in attempt 1 and is retried: ValueError: ...",
            str(spawned.task_id),
            1,
        ),
        (f"task {spawned.task_id} (fails) failed: ValueError: ...", str(spawned.task_id), 2),
    ]
    assert SECRET not in caplog.text
