"""Schedules that tasks declare: kept in step with the code by the workers that have it."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from durable_sa import Durable, InvalidConfiguration, InvalidCron, ScheduleFilter, TaskContext, TaskRow, task
from durable_sa.schedules.cron import ticks
from durable_sa.testing import time_travel
from tests.support import eventually


def declaring(name: str = "nightly", **options: Any) -> Any:
    @task(name, **options)
    async def function(ctx: TaskContext) -> None: ...

    return function


async def schedules(durable: Durable) -> dict[str, tuple[str, str, str]]:
    listed = await durable.list_schedules(ScheduleFilter())
    return {each.name: (each.queue_name, each.cron_expression, each.timezone) for each in listed}


async def until(durable: Durable, wanted: dict[str, tuple[str, str, str]]) -> None:
    async def reached() -> bool:
        return await schedules(durable) == wanted

    await eventually(reached)


@pytest.mark.slow
async def test_a_worker_creates_and_changes_them_and_they_fire(durable: Durable, engine: AsyncEngine) -> None:
    await durable.create_queue("mail")
    first = Durable(
        engine,
        tasks=[
            declaring(schedule="0 7 * * mon-fri", timezone="Europe/Paris"),
            declaring("send mail", every=timedelta(hours=1), queue_name="mail"),
            declaring("none"),
        ],
    )
    async with time_travel(first) as clock:
        async with first.worker(queue_names=["default", "mail"]):
            (mail,) = [name async for name in _names(first, 2) if name != "nightly"]
            assert mail.startswith("send-mail-")
            await until(
                first,
                {
                    "nightly": ("default", "0 7 * * mon-fri", "Europe/Paris"),
                    mail: ("mail", "@every 3600", "UTC"),
                },
            )
            await clock.advance(timedelta(hours=1))

            async def fired() -> Any:
                async with engine.connect() as connection:
                    return await connection.scalar(
                        sa.select(TaskRow.task_id).where(TaskRow.task_name == "send mail", TaskRow.queue_name == "mail")
                    )

            await eventually(fired)
        second = Durable(engine, tasks=[declaring(schedule="0 8 * * *")])
        async with second.worker():
            await until(second, {"nightly": ("default", "0 8 * * *", "UTC"), mail: ("mail", "@every 3600", "UTC")})


async def _names(durable: Durable, count: int) -> Any:
    async def enough() -> Any:
        found = await schedules(durable)
        return found if len(found) >= count else None

    for name in await eventually(enough):
        yield name


@pytest.mark.slow
async def test_one_that_no_task_declares_any_more_is_removed_and_others_stay(durable: Durable) -> None:
    nightly = declaring(schedule="0 7 * * *")
    await durable.create_schedule("mine", task=declaring("other"), cron_expression="0 9 * * *")
    async with Durable(durable.engine, tasks=[nightly]) as before, before.worker():
        await until(before, {"mine": ("default", "0 9 * * *", "UTC"), "nightly": ("default", "0 7 * * *", "UTC")})
    async with Durable(durable.engine, tasks=[declaring("unrelated")]) as after, time_travel(after) as clock:
        await clock.advance(timedelta(days=1))  # no worker has confirmed it meanwhile
        async with after.worker():
            await clock.advance(timedelta(minutes=9))
            assert "nightly" in await schedules(after)
            async with Durable(durable.engine, tasks=[nightly]) as another, another.worker():
                (worker,) = after.workers
                await clock.advance(timedelta(minutes=9))
                assert "nightly" in await schedules(after)
            for _ in range(4):
                await clock.advance(timedelta(minutes=3))
                worker.maintenance.look_at_everything()
            await until(after, {"mine": ("default", "0 9 * * *", "UTC")})


async def test_a_schedule_of_that_name_that_was_created_otherwise_is_left_alone(
    durable: Durable, caplog: pytest.LogCaptureFixture
) -> None:
    nightly = declaring(schedule="0 7 * * *")
    durable.register(nightly)
    await durable.create_schedule("nightly", task=nightly, cron_expression="0 9 * * *")
    caplog.set_level(logging.ERROR, "durable_sa")
    async with durable.worker():
        await eventually(lambda: "the schedule of task nightly is not kept: a schedule of that name" in caplog.text)
    assert await schedules(durable) == {"nightly": ("default", "0 9 * * *", "UTC")}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": "nonsense"}, InvalidCron, "nonsense"),
        ({"schedule": "0 0 30 2 *"}, InvalidCron, "0 0 30 2"),
        ({"schedule": "0 7 * * *", "timezone": "Mars/Base"}, InvalidConfiguration, "Mars/Base"),
        ({"schedule": "0 7 * * *", "every": 5}, InvalidConfiguration, "both are given"),
        ({"every": 0.5}, InvalidConfiguration, "every .seconds.: 0.5 is not between 1 and"),
        ({"schedule": "@every 0.1"}, InvalidCron, "shorter than a second"),
        ({"schedule": "@every now"}, InvalidCron, "a number of seconds"),
    ],
)
def test_what_cannot_fire_is_refused_by_the_decorator(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        declaring(**options)


def test_intervals_are_the_same_for_every_worker() -> None:
    after = datetime(2030, 1, 1, 0, 0, 7, tzinfo=UTC)
    found = ticks("@every 90", "Europe/Paris", after)
    first = next(found)
    assert first.timestamp() % 90 == 0
    assert timedelta(0) < first - after <= timedelta(seconds=90)
    assert next(found) - first == timedelta(seconds=90)
