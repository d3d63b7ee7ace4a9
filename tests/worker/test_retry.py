"""What is retried, and when: `Retry`, and the lists of a task."""

from datetime import timedelta
from typing import Any

import pytest

from durable_sa import Durable, InvalidConfiguration, Retry, RetryStrategy, TaskContext, step, task

from ..support import eventually
from .conftest import Rows

LATER = RetryStrategy.fixed(3600)


@pytest.mark.parametrize("strategy", [RetryStrategy.none(), LATER], ids=["none", "later"])
@pytest.mark.parametrize("place", ["body", "step", "group"])
async def test_retry_has_its_own_delay_whatever_the_lists_and_the_strategy(
    durable: Durable, sql: Rows, strategy: RetryStrategy, place: str
) -> None:
    calls: list[int] = []

    @step(max_attempts=5, retry_strategy=RetryStrategy.fixed(0))
    async def ask() -> None:
        calls.append(1)
        raise Retry(after=timedelta(milliseconds=10))

    @durable.task(max_attempts=3, retry_strategy=strategy, no_retry_on=[Exception], retry_on=[])
    async def asking(ctx: TaskContext) -> str:
        if ctx.attempt == 3:
            return "done"
        if place == "step":
            await ask()
        if place == "group":
            raise ExceptionGroup("several", [Retry(0), Retry(0.01)])
        raise Retry(after=0.01)

    spawned = await durable.spawn(asking)
    async with durable.worker():
        assert (await durable.wait_for_result(spawned, timeout=10)).output == "done"
    # A step that asks for the task's retry is not tried once more by itself.
    assert len(calls) == (2 if place == "step" else 0)
    assert await sql("SELECT failures, attempt FROM durable.tasks") == [(2, 3)]


@pytest.mark.slow
async def test_retry_counts_as_a_failure_and_waits_as_long_as_it_says(durable: Durable, sql: Rows) -> None:
    @durable.task(max_attempts=2)
    async def asking(ctx: TaskContext) -> None:
        raise Retry(after=1000 if ctx.attempt == 1 else 0)

    spawned = await durable.spawn(asking)
    async with durable.worker():

        async def delays() -> list[Any]:
            return await sql(
                "SELECT extract(epoch FROM available_at - clock_timestamp())::float FROM durable.tasks"
                " WHERE failures = 1"
            )

        ((delay,),) = await eventually(delays)
        assert 900 < delay <= 1000
        await sql("UPDATE durable.tasks SET available_at = now()")
        result = await durable.wait_for_result(spawned, timeout=10)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.name, result.error.message) == ("Retry", "The task asked to be retried after 0 s")


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ConnectionError(), 2),
        (ConnectionResetError(), 2),
        (ValueError(), 1),
        (PermissionError(), 1),
        (ExceptionGroup("several", [ConnectionError(), ConnectionError()]), 2),
        (ExceptionGroup("several", [ConnectionError(), ValueError()]), 1),
    ],
    ids=repr,
)
async def test_only_what_retry_on_lists_is_retried_and_no_retry_on_wins(
    durable: Durable, sql: Rows, error: Exception, attempts: int
) -> None:
    @durable.task(
        max_attempts=2, retry_strategy=RetryStrategy.fixed(0), retry_on=(OSError,), no_retry_on=[PermissionError]
    )
    async def failing(ctx: TaskContext) -> None:
        raise error

    spawned = await durable.spawn(failing)
    async with durable.worker():
        await durable.wait_for_result(spawned, timeout=10)
    assert await sql("SELECT state, attempt FROM durable.tasks") == [("failed", attempts)]


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), "30", None, True, timedelta(days=40000)])
def test_a_delay_that_cannot_work_is_refused(after: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="after"):
        Retry(after=after)


@pytest.mark.parametrize("listed", [["ValueError"], [ValueError()], [int]])
def test_a_list_of_something_else_is_refused(listed: Any) -> None:
    with pytest.raises(TypeError, match="retry_on lists exception classes"):
        task(retry_on=listed)
