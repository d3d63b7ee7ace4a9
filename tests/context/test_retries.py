"""Which failures are retried, how often, and when: by the formula of the policy, wherever it is computed."""

import asyncio
import math
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from durable_sa import Durable, InvalidState, RetryStrategy, TaskContext, UserError, step, task
from durable_sa.validation import MAX_DURATION
from tests.context.support import Rows, Runner, Tally
from tests.support import eventually


async def failing(ctx: TaskContext, params: str) -> None:
    """Raises what the params name."""
    if params == "group of retryable":
        raise ExceptionGroup("both", [ValueError(), ConnectionError()])
    if params == "group with one that is not":
        raise ExceptionGroup("both", [ValueError(), UserError("no")])
    if params == "SerializationError":
        await ctx.step("step", list, object())
    if params == "InvalidName":
        await ctx.emit_event("$mine")
    if params == "InvalidTaskParams":
        await ctx.spawn("child", typed, "no number")
    if params == "PayloadTooLarge":
        await ctx.emit_event("large", "x" * 17_000_000)
    if params == "ChildFailed":
        await ctx.join(await ctx.spawn("child", refusing))
    if params == "TaskTimeout":
        await ctx.await_event("never", timeout=0)
    if params == "step timeout":
        await slow()
    raise {
        "ValueError": ValueError,
        "Exception": Exception,
        "SystemExit": SystemExit,
        "CancelledError": asyncio.CancelledError,
    }.get(params, UserError)("x")


@step(timeout=0.01)
async def slow() -> None:
    await asyncio.sleep(10)


@task
async def typed(ctx: TaskContext, params: int) -> None:
    pass


@task
async def refusing(ctx: TaskContext) -> None:
    raise UserError("no")


@pytest.mark.parametrize(
    ("what", "retried"),
    [
        ("ValueError", True),
        ("Exception", True),
        ("SystemExit", True),
        ("CancelledError", True),
        ("TaskTimeout", True),
        ("step timeout", True),
        ("group of retryable", True),
        ("UserError", False),
        ("group with one that is not", False),
        ("SerializationError", False),
        ("InvalidName", False),
        ("InvalidTaskParams", False),
        ("PayloadTooLarge", False),
        ("ChildFailed", False),
    ],
)
async def test_what_is_retried(run: Runner, what: str, retried: bool):
    run.durable.register(typed)
    run.durable.register(refusing)
    spawned = await run.spawn(task("failing", max_attempts=3)(failing), what)
    assert (await run.wait(spawned)).status == "failed"
    assert len(await Rows(run.durable, spawned).runs()) == (3 if retried else 1)


async def test_exceptions_of_no_retry_on_are_not_retried_nor_are_their_subclasses(run: Runner, tally: Tally):
    class Refused(Exception):
        pass

    class FinallyRefused(Refused):
        pass

    @task(max_attempts=4, no_retry_on=[Refused, SystemExit])
    async def work(ctx: TaskContext, params: int) -> None:
        tally.add(params)
        raise (FinallyRefused(), ValueError(), SystemExit(1))[params]

    for params in range(3):
        await run.failure(work, params)
    assert tally == [0, 1, 1, 1, 1, 2]


async def test_strategy_none_never_retries(run: Runner, tally: Tally):
    @task(max_attempts=5, retry_strategy=RetryStrategy.none())
    async def work(ctx: TaskContext) -> None:
        tally.add(ctx.attempt)
        raise ValueError

    await run.failure(work)
    assert tally == [1]


@pytest.mark.parametrize("attempts", [1, 2, 7])
async def test_max_attempts_counts_the_executions(run: Runner, tally: Tally, attempts: int):
    @task(max_attempts=50)
    async def work(ctx: TaskContext) -> None:
        tally.add(ctx.attempt)
        raise ValueError

    spawned = await run.spawn(work, max_attempts=attempts)
    await run.wait(spawned)
    assert tally == list(range(1, attempts + 1))
    row = await Rows(run.durable, spawned).task()
    assert (row.attempt, row.failures) == (attempts, attempts)


async def test_defaults_are_five_attempts_five_seconds_apart(engine: AsyncEngine):
    async with Durable(engine) as durable, durable.worker():
        run = Runner(durable)

        @task
        async def work(ctx: TaskContext) -> None:
            raise ValueError

        spawned = await run.spawn(work)
        rows = Rows(durable, spawned)
        for attempt in range(1, 6):

            async def ended() -> Any:
                found = await rows.runs()
                return found if len(found) == attempt else None  # noqa: B023

            last = (await eventually(ended))[-1]
            row = await rows.task()
            if attempt < 5:
                assert row.state == "pending"
                assert abs(row.available_at - last.finished_at - timedelta(seconds=5)) < timedelta(milliseconds=100)
                await skip_pause(durable, spawned)
        assert row.state == "failed"


async def skip_pause(durable: Durable, spawned: Any) -> None:
    async with durable.engine.begin() as connection:
        statement = "UPDATE durable.tasks SET available_at = now() WHERE task_id = :id"
        await connection.execute(text(statement), {"id": spawned.task_id})
    # Something ready makes the worker look.
    await durable.spawn_by_name("nobody", unchecked=True)
    await durable.emit_event(f"look-{spawned.task_id}-{asyncio.get_running_loop().time()}")


@pytest.mark.slow
async def test_losses_of_the_run_are_no_failures(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        if ctx.attempt < 4:
            await ready.wait()
            await rows.take_over()
            await ctx.heartbeat()
        return ctx.attempt

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    ready.set()
    assert (await run.wait(spawned)).output == 4
    assert (await rows.task()).failures == 0


async def test_failure_that_a_lost_run_reports_does_not_count(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        if ctx.attempt == 1:
            await ready.wait()
            await rows.take_over()
            raise ValueError("nobody's business any more")
        return "done"

    ready = asyncio.Event()
    spawned = await run.spawn(work)
    rows = Rows(run.durable, spawned)
    ready.set()
    assert (await run.wait(spawned)).output == "done"
    assert (await rows.task()).failures == 0


async def test_retried_task_starts_with_fresh_counts_and_keeps_its_steps(run: Runner, tally: Tally):
    async def once() -> str:
        tally.add("step")
        return "kept"

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> str:
        found = await ctx.step("once", once)
        tally.add(ctx.attempt)
        if ctx.attempt < 4:
            raise ValueError
        return found

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).status == "failed"
    await run.durable.retry_task(spawned)
    assert (await run.wait(spawned)).output == "kept"
    assert tally == ["step", 1, 2, 3, 4]
    runs = await Rows(run.durable, spawned).runs()
    assert [row.attempt for row in runs] == [1, 2, 3, 4]
    with pytest.raises(InvalidState):
        await run.durable.retry_task(spawned)


@contextmanager
def _at_one_moment() -> Generator[None]:
    """Within, a statement knows one time, however slow the machine is: the end of a run, and of the next one's delay."""

    def rewrite(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        return statement.replace("pg_catalog.clock_timestamp()", "pg_catalog.now()"), parameters

    event.listen(Engine, "before_cursor_execute", rewrite, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", rewrite)


async def delays(engine: AsyncEngine, cases: list[tuple[RetryStrategy, int]]) -> list[float]:
    """What the database makes of these policies after so many failures."""
    async with Durable(engine) as durable:
        await durable.create_queue("backoff")
        for number, (strategy, failures) in enumerate(cases):
            await durable.spawn_by_name(
                f"case-{number}",
                unchecked=True,
                queue_name="backoff",
                retry_strategy=strategy,
                # One more is left: the failure after it is the last, and sets no time.
                max_attempts=failures + 1,
            )
        for number, (_, failures) in enumerate(cases):
            async with engine.begin() as connection:
                statement = "UPDATE durable.tasks SET failures = :failures WHERE task_name = :name"
                await connection.execute(text(statement), {"failures": failures - 1, "name": f"case-{number}"})

        async def work(ctx: TaskContext) -> None:
            raise ValueError

        for number in range(len(cases)):
            durable.register(task(f"case-{number}")(work))
        found = []
        with _at_one_moment():
            async with durable.worker(queue_names=["backoff"], concurrency=50):

                async def all_ended() -> Any:
                    statement = text(
                        "SELECT t.task_name, EXTRACT(epoch FROM t.available_at - r.finished_at) FROM durable.tasks t"
                        " JOIN durable.runs r USING (task_id) WHERE t.queue_name = 'backoff' AND r.attempt = 1"
                    )
                    async with engine.connect() as connection:
                        rows = (await connection.execute(statement)).all()
                    return rows if len(rows) == len(cases) else None

                rows = dict([tuple(row) for row in await eventually(all_ended)])
                found = [float(rows[f"case-{number}"]) for number in range(len(cases))]
        async with engine.begin() as connection:
            for table in ("runs", "tasks"):
                await connection.execute(text(f"DELETE FROM durable.{table}"))
        return found


BOUNDARIES = [
    (RetryStrategy.fixed(0), 1),
    (RetryStrategy.fixed(5), 1000),
    (RetryStrategy.fixed(0.001), 2),
    (RetryStrategy.fixed(MAX_DURATION), 3),
    (RetryStrategy.exponential(5, 2, 300), 1),
    (RetryStrategy.exponential(5, 2, 300), 6),
    (RetryStrategy.exponential(5, 2, 300), 7),
    (RetryStrategy.exponential(5, 2, 300), 2**31 - 2),
    (RetryStrategy.exponential(0, 2, 300), 1),
    (RetryStrategy.exponential(0, 2, 300), 100),
    (RetryStrategy.exponential(0, 1000, MAX_DURATION), 2**31 - 2),
    (RetryStrategy.exponential(1, 1, 300), 100_000),
    (RetryStrategy.exponential(MAX_DURATION, 1000, MAX_DURATION), 1),
    (RetryStrategy.exponential(MAX_DURATION, 1000, MAX_DURATION), 1_000_000),
    (RetryStrategy("exponential", 10, 2, 1), 1),
    (RetryStrategy("exponential", 10, 2, 0), 5),
    (RetryStrategy.exponential(1e-9, 1000, 300), 5),
    (RetryStrategy.exponential(1e-300, 1000, 300), 104),
    (RetryStrategy.exponential(2.2250738585072014e-308, 703.4463436894061, MAX_DURATION), 110),
    (RetryStrategy.exponential(0.001, 1.0001, 300), 50_000),
    (RetryStrategy.exponential(1e-6, 1000, MAX_DURATION), 6),
]


async def test_next_attempt_is_when_the_formula_says_at_the_boundaries(engine: AsyncEngine):
    found = await delays(engine, BOUNDARIES)
    for (strategy, failures), delay in zip(BOUNDARIES, found, strict=True):
        # The two clock readings of the statement are some microseconds apart.
        assert math.isclose(delay, strategy.delay(failures), rel_tol=1e-9, abs_tol=0.01), (strategy, failures)


strategies = st.one_of(
    st.builds(RetryStrategy.fixed, st.floats(0, MAX_DURATION)),
    st.builds(
        RetryStrategy,
        st.just("exponential"),
        st.floats(0, 10_000),
        st.floats(1, 1000),
        st.floats(0, MAX_DURATION),
        st.just(0),
    ),
)


@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cases=st.lists(st.tuples(strategies, st.integers(1, 200)), min_size=30, max_size=50))
@pytest.mark.slow
def test_next_attempt_is_when_the_formula_says(database_url: Any, cases: list[tuple[RetryStrategy, int]]):
    async def check() -> None:
        engine = create_async_engine(database_url)
        try:
            found = await delays(engine, cases)
        finally:
            await engine.dispose()
        for (strategy, failures), delay in zip(cases, found, strict=True):
            assert math.isclose(delay, strategy.delay(failures), rel_tol=1e-9, abs_tol=0.01), (strategy, failures)

    asyncio.run(check())


@pytest.mark.slow
async def test_jitter_stays_within_its_share_and_differs(engine: AsyncEngine):
    strategy = RetryStrategy.exponential(100, 2, 250, jitter=0.5)
    cases = [(strategy, 1)] * 60 + [(strategy, 5)] * 40
    found = await delays(engine, cases)
    early, late = found[:60], found[60:]
    assert all(50 <= delay <= 150.01 for delay in early)
    assert len({round(delay, 3) for delay in early}) > 50
    assert min(early) < 85
    assert max(early) > 115
    # Jitter included, no delay is longer than max_backoff.
    assert all(125 <= delay <= 250.01 for delay in late)
    assert max(late) >= 249.9


async def test_full_jitter_of_the_longest_and_shortest_delays_can_be_stored(engine: AsyncEngine):
    cases = [
        (RetryStrategy.exponential(MAX_DURATION, 1000, MAX_DURATION, jitter=1), 100),
        (RetryStrategy.fixed(MAX_DURATION, jitter=1), 1),
        (RetryStrategy.exponential(0, 1, 0, jitter=1), 1),
        (RetryStrategy.exponential(5e-324, 1000, MAX_DURATION, jitter=5e-324), 111),
        (RetryStrategy.exponential(5e-324, 1, 300, jitter=0.25), 1),
    ]
    for (strategy, _), delay in zip(cases, await delays(engine, cases), strict=True):
        assert -0.001 <= delay <= max(strategy.max_backoff, 2 * strategy.base_delay) + 0.01


async def test_policy_that_somebody_wrote_into_the_row_still_fails_the_task(run: Runner):
    """Within the checks of the table, whatever stands in the columns must not keep a failure from being stored."""

    @task
    async def work(ctx: TaskContext) -> None:
        raise ValueError

    run.durable.register(work)
    spawned = await run.durable.spawn(work, delay=3600)
    async with run.durable.engine.begin() as connection:
        statement = (
            "UPDATE durable.tasks SET retry_kind = 'exponential', retry_base_delay = 5e-324, retry_factor = 1000,"
            " retry_max_backoff = 5e-324, retry_jitter = 1, failures = 2147483640, max_attempts = 2147483646,"
            " available_at = now()"
        )
        await connection.execute(text(statement))
    await run.spawn(task("look")(failing), "UserError")
    assert (await run.wait(spawned)).status == "failed"


def test_model_in_python_has_the_documented_values():
    assert [RetryStrategy.exponential().delay(n) for n in range(1, 8)] == [5, 10, 20, 40, 80, 160, 300]
    assert RetryStrategy.fixed().delay(17) == 5
    assert RetryStrategy.none().delay(1) == 0
