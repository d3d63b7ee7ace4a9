"""A step runs once: replays are given what it gave, to the call that asked for it."""

import functools
import logging
import threading
import time
from typing import Any, Never, NoReturn

import pytest

from durable_sa import Durable, SyncTaskContext, TaskContext, task
from tests.context.support import Crash, Rows, Runner, Tally, warnings


async def test_recorded_step_does_not_run_again(run: Runner, tally: Tally):
    async def double(value: int) -> int:
        tally.add(value)
        return value * 2

    @task
    async def work(ctx: TaskContext) -> list[int]:
        first = await ctx.step("double", double, 1)
        if ctx.attempt == 1:
            raise Crash
        return [first, await ctx.step("double", double, 2)]

    assert await run(work) == [2, 4]
    assert tally == [1, 2]


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
async def test_empty_result_is_recorded_like_any_other(run: Runner, tally: Tally, value: object):
    async def step():
        tally.add("step")
        return value

    @task
    async def work(ctx: TaskContext):
        found = await ctx.step("empty", step)
        if ctx.attempt == 1:
            raise Crash
        return [found, type(found).__name__]

    assert await run(work) == [value, type(value).__name__]
    assert tally == ["step"]


async def test_failed_step_records_nothing_and_runs_again_in_the_next_attempt(run: Runner, tally: Tally):
    async def flaky() -> str:
        tally.add("flaky")
        if len(tally) < 3:
            raise ConnectionError("try again")
        return "done"

    @task(max_attempts=3)
    async def work(ctx: TaskContext) -> str:
        return await ctx.step("flaky", flaky)

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).output == "done"
    assert tally == ["flaky"] * 3
    assert [row.state for row in await Rows(run.durable, spawned).runs()] == ["failed", "failed", "completed"]


async def test_error_of_a_step_reaches_the_task_with_its_class(run: Runner):
    class OutOfStock(Exception):
        pass

    async def reserve():
        raise OutOfStock("no more of these")

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> str:
        try:
            await ctx.step("reserve", reserve)
        except OutOfStock as error:
            return f"caught {error}"
        return "not raised"

    assert await run(work) == "caught no more of these"


async def test_arguments_are_part_of_a_steps_identity(run: Runner, tally: Tally):
    async def fetch(page: int, *, size: int = 10, order: str = "asc") -> str:
        tally.add((page, size, order))
        return f"{page} {size} {order}"

    @task
    async def work(ctx: TaskContext) -> list[str]:
        if ctx.attempt == 1:
            await ctx.step("fetch", fetch, 1)
            await ctx.step("fetch", fetch, 2, size=5, order="desc")
            raise Crash
        # In another order than before, and the keywords as well.
        second = await ctx.step("fetch", fetch, 2, order="desc", size=5)
        first = await ctx.step("fetch", fetch, 1)
        return [first, second]

    assert await run(work) == ["1 10 asc", "2 5 desc"]
    assert tally == [(1, 10, "asc"), (2, 5, "desc")]


async def test_same_name_and_arguments_again_is_the_next_occurrence(run: Runner, tally: Tally):
    async def draw() -> int:
        tally.add("draw")
        return len(tally)

    @task
    async def work(ctx: TaskContext) -> list[int]:
        drawn = [await ctx.step("draw", draw) for _ in range(2 if ctx.attempt == 1 else 4)]
        if ctx.attempt == 1:
            raise Crash
        return drawn

    assert await run(work) == [1, 2, 3, 4]
    assert len(tally) == 4


async def test_name_that_looks_like_a_numbered_one_is_a_step_of_its_own(run: Runner, tally: Tally):
    async def give(value: str) -> str:
        tally.add(value)
        return value

    def giver(value: str) -> Any:
        return functools.partial(give, value)

    @task
    async def work(ctx: TaskContext) -> list[str]:
        names = ["a", "a", "a#2", "a#1", "a:1", "1", "a\\", "a'", 'a"', "('a',)"]
        found = [await ctx.step(name, giver(f"{name} {position}")) for position, name in enumerate(names)]
        if ctx.attempt == 1:
            raise Crash
        assert found == [f"{name} {position}" for position, name in enumerate(names)]
        return found

    assert len(set(await run(work))) == 10
    assert len(tally) == 10


async def test_kinds_of_calls_do_not_share_names(run: Runner):
    async def step() -> str:
        return "step"

    async def transaction(session: Any) -> str:
        return "transaction"

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        await ctx.emit_event("same", "event")
        found = [
            await ctx.step("same", step),
            await ctx.transaction("same", transaction),
            await ctx.await_event("same"),
        ]
        await ctx.sleep_for("same", 0.01)
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == ["step", "transaction", "event"]


async def test_other_arguments_on_replay_run_the_step_anew_and_warn(
    run: Runner, tally: Tally, caplog: pytest.LogCaptureFixture
):
    async def fetch(page: str) -> str:
        tally.add(page)
        return page

    @task
    async def work(ctx: TaskContext) -> str:
        found = await ctx.step("fetch", fetch, f"secret-{ctx.attempt}")
        if ctx.attempt == 1:
            raise Crash
        return found

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        spawned = await run.spawn(work)
        assert (await run.wait(spawned)).output == "secret-2"
    assert tally == ["secret-1", "secret-2"]
    told = [line for line in warnings(caplog) if "other arguments" in line]
    assert len(told) == 1
    assert "'fetch'" in told[0]
    assert str(spawned.task_id) in told[0]
    assert "secret" not in caplog.text.replace("secret-2 ", "")


async def test_replay_with_the_same_arguments_warns_of_nothing(run: Runner, caplog: pytest.LogCaptureFixture):
    async def fetch(page: int) -> int:
        return page

    @task
    async def work(ctx: TaskContext) -> int:
        for page in range(4):
            await ctx.step("fetch", fetch, page)
            if ctx.attempt == page + 1:
                raise Crash
        await ctx.sleep_for("pause", 0.01)
        await ctx.await_event("never", timeout=0.01) if ctx.attempt == 0 else None
        return await ctx.step("fetch", fetch, 9)

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        assert await run(work) == 9
    assert warnings(caplog) == []


async def test_completing_without_using_what_is_recorded_warns_with_the_names(
    run: Runner, caplog: pytest.LogCaptureFixture
):
    async def give() -> str:
        return "private"

    @task
    async def work(ctx: TaskContext) -> str:
        if ctx.attempt == 1:
            await ctx.step("removed-step", give)
            await ctx.step("kept-step", give)
            raise Crash
        return await ctx.step("kept-step", give)

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        assert await run(work) == "private"
    [warning] = warnings(caplog)
    assert "removed-step" in warning
    assert "kept-step" not in warning
    assert "private" not in warning


async def test_plain_function_runs_in_a_thread_and_sees_the_context_variables(run: Runner):
    def where() -> list[bool]:
        from durable_sa import current_context

        return [threading.get_ident() == loop_thread, current_context().task_name == "work"]

    @task
    async def work(ctx: TaskContext) -> list[bool]:
        return await ctx.step("where", where)

    loop_thread = threading.get_ident()
    assert await run(work) == [False, True]


async def test_plain_functions_do_not_hold_up_the_event_loop_nor_each_other(run: Runner):
    import asyncio

    def block() -> None:
        time.sleep(0.2)

    @task
    async def work(ctx: TaskContext) -> float:
        started = time.monotonic()
        await asyncio.gather(*(ctx.step("block", block) for _ in range(4)))
        return time.monotonic() - started

    assert await run(work) < 0.6


class Shop:
    def __init__(self, name: str) -> None:
        self.name = name

    async def open(self, day: str) -> str:
        return f"{self.name} on {day}"

    def close(self, day: str) -> str:
        return f"not {self.name} on {day}"

    async def __call__(self, day: str) -> str:
        return f"called {self.name} on {day}"


async def test_whatever_can_be_called_can_be_a_step(run: Runner):
    shop = Shop("Bakery")

    async def deliver(shop: str, day: str) -> str:
        return f"{shop} delivers on {day}"

    async def awaitable(day: str) -> str:
        return f"awaited on {day}"

    @functools.wraps(deliver)
    def wrapped(shop: str, day: str) -> Any:
        return deliver(shop.upper(), day)

    @task
    async def work(ctx: TaskContext) -> list[Any]:
        found: list[Any] = [
            await ctx.step("method", shop.open, "Monday"),
            await ctx.step("plain method", shop.close, "Monday"),
            await ctx.step("object", shop, "Monday"),
            await ctx.step("partial", functools.partial(deliver, day="Monday"), "Bakery"),
            await ctx.step("lambda", lambda day: awaitable(day), "Monday"),
            await ctx.step("wrapped", wrapped, "Bakery", "Monday"),
            await ctx.step("builtin", len, [1, 2, 3]),
            await ctx.step("class", str, 7),
        ]
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == [
        "Bakery on Monday",
        "not Bakery on Monday",
        "called Bakery on Monday",
        "Bakery delivers on Monday",
        "awaited on Monday",
        "BAKERY delivers on Monday",
        3,
        "7",
    ]


@pytest.mark.parametrize("name", ["", "$mine", "a\nb", "a\x00b", "\ud800", "é" * 101, "x" * 201, 5, None, b"x"])
async def test_name_that_breaks_the_rules_fails_the_task_at_once(run: Runner, tally: Tally, name: Any):
    async def step() -> None:
        tally.add("ran")

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.step(name, step)

    spawned = await run.spawn(work)
    result = await run.wait(spawned)
    assert result.error.name == "InvalidName"
    assert len(await Rows(run.durable, spawned).runs()) == 1
    assert tally == []


@pytest.mark.parametrize("name", ["x" * 200, "é" * 100, "find sources", "%s :x '; --", "durable::x", "🙂"])
async def test_every_other_name_works(run: Runner, name: str):
    async def step() -> int:
        return 1

    @task
    async def work(ctx: TaskContext) -> int:
        found = await ctx.step(name, step)
        if ctx.attempt == 1:
            raise Crash
        return found

    assert await run(work) == 1


async def test_argument_that_cannot_be_encoded_fails_the_task_at_once_and_is_named(run: Runner, tally: Tally):
    async def step(count: int, *, handle: object) -> None:
        tally.add("ran")

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.step("open", step, 1, handle=object())

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "SerializationError"
    assert "'open'" in error.message
    assert "'handle'" in error.message
    assert len(await Rows(run.durable, spawned).runs()) == 1
    assert tally == []


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), float("-inf"), "\ud800", {"nested": [float("inf")]}],
    ids=["object", "nan", "infinity", "surrogate", "nested"],
)
async def test_result_that_cannot_be_encoded_is_not_repeated(run: Runner, tally: Tally, value: object):
    async def step():
        tally.add("effect")
        return value

    @task(max_attempts=4)
    async def work(ctx: TaskContext) -> None:
        await ctx.step("give", step)

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "SerializationError"
    assert "'give'" in error.message
    assert tally == ["effect"]
    assert await Rows(run.durable, spawned).checkpoints() == []


async def test_result_over_the_limit_is_refused_with_its_size_and_not_repeated(engine: Any, tally: Tally):
    async with Durable(engine, max_payload_bytes=1000) as durable, durable.worker():
        run = Runner(durable)

        async def step(size: int) -> str:
            tally.add(size)
            return "x" * (size - 2)

        @task
        async def work(ctx: TaskContext) -> int:
            await ctx.step("largest", step, 1000)
            await ctx.step("too large", step, 1001)
            return 0

        spawned = await run.spawn(work)
        error = (await run.wait(spawned)).error
        assert error.name == "PayloadTooLarge"
        assert "'too large'" in error.message
        assert "1001" in error.message
        assert "1000" in error.message
        assert tally == [1000, 1001]
        assert [row.name for row in await Rows(durable, spawned).checkpoints()] == ["largest"]


async def test_what_a_step_gave_is_not_changed_by_changing_the_object(run: Runner):
    async def collect() -> list[int]:
        return [1]

    @task
    async def work(ctx: TaskContext) -> list[int]:
        found = await ctx.step("collect", collect)
        if ctx.attempt == 1:
            found.append(2)
            raise Crash
        return found

    assert await run(work) == [1]


@pytest.mark.parametrize("nothing", [NoReturn, Never])
async def test_step_that_only_ever_raises_may_say_so(run: Runner, tally: Tally, nothing: Any):
    async def give_up() -> None:
        tally.add("ran")
        raise ConnectionError

    give_up.__annotations__["return"] = nothing

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> NoReturn:
        await ctx.step("give up", give_up)
        raise AssertionError

    assert (await run.failure(work)).name == "ConnectionError"
    assert tally == ["ran"] * 2


async def test_step_that_raises_stop_iteration_fails_instead_of_hanging(run: Runner):
    def exhausted() -> int:
        return next(iter(()))

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        return await ctx.step("exhausted", exhausted)

    error = await run.failure(work)
    assert "StopIteration" in error.name + error.message


async def test_steps_inside_a_step_are_replayed_with_it(run: Runner, tally: Tally, caplog: pytest.LogCaptureFixture):
    async def inner(value: str) -> str:
        tally.add(f"inner {value}")
        return value

    @task
    async def work(ctx: TaskContext) -> list[str]:
        async def outer() -> str:
            tally.add("outer")
            return await ctx.step("inner", inner, "x") + await ctx.step("inner", inner, "x")

        # The occurrences inside do not shift those outside, which are counted when the step is not run again as well.
        found = [await ctx.step("outer", outer), await ctx.step("inner", inner, "x")]
        if ctx.attempt == 1:
            raise Crash
        return [*found, await ctx.step("inner", inner, "x")]

    with caplog.at_level(logging.WARNING, logger="durable_sa"):
        assert await run(work) == ["xx", "x", "x"]
    assert tally == ["outer", "inner x", "inner x", "inner x", "inner x"]
    assert warnings(caplog) == []


async def test_steps_inside_a_step_that_failed_are_not_repeated(run: Runner, tally: Tally):
    async def inner() -> str:
        tally.add("inner")
        return "kept"

    @task
    async def work(ctx: TaskContext) -> str:
        async def outer() -> str:
            tally.add("outer")
            value = await ctx.step("inner", inner)
            if ctx.attempt == 1:
                raise Crash
            return value

        return await ctx.step("outer", outer)

    assert await run(work) == "kept"
    assert tally == ["outer", "inner", "outer"]


async def test_what_is_no_function_is_refused(run: Runner, tally: Tally):
    async def charge(cents: int) -> int:
        tally.add(cents)
        return cents

    @task(max_attempts=1)
    async def called(ctx: TaskContext) -> int:
        return await ctx.step("charge", charge(5))  # type: ignore[call-overload]

    @task(max_attempts=1)
    def called_in_a_thread(ctx: SyncTaskContext) -> int:
        return ctx.step("charge", charge(5))  # type: ignore[call-overload]

    @task(max_attempts=1)
    async def in_a_transaction(ctx: TaskContext) -> int:
        return await ctx.transaction("charge", charge(5))  # type: ignore[call-overload]

    @task(max_attempts=1)
    async def no_function(ctx: TaskContext) -> int:
        return await ctx.step("charge", 5)  # type: ignore[call-overload]

    for work, message in (
        (called, "step 'charge' takes a function and then its arguments, not the result of a call (a coroutine)"),
        (
            called_in_a_thread,
            "step 'charge' takes a function and then its arguments, not the result of a call (a coroutine)",
        ),
        (
            in_a_transaction,
            "transaction 'charge' takes a function and then its arguments, not the result of a call (a coroutine)",
        ),
        (no_function, "step 'charge' takes a function and then its arguments, not int"),
    ):
        error = await run.failure(work)
        assert (error.name, error.message) == ("TypeError", message)
    assert tally == []


async def test_a_function_in_the_place_of_the_name_is_refused(run: Runner):
    @task
    async def child(ctx: TaskContext) -> None: ...

    @task
    async def nameless_step(ctx: TaskContext) -> None:
        await ctx.step(len, "text")  # type: ignore[call-overload]

    @task
    async def nameless_child(ctx: TaskContext) -> None:
        await ctx.spawn(child)  # type: ignore[call-overload]

    error = await run.failure(nameless_step)
    assert (error.name, "it must be a str, not builtin_function_or_method" in error.message) == ("InvalidName", True)
    error = await run.failure(nameless_child)
    assert error.name == "TypeError"
