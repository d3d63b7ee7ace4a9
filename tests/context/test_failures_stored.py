"""What is stored of a failure, whatever was raised; and that nothing raised ends the worker."""

import asyncio
import json
import sys
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from durable_sa import Durable, SyncTaskContext, TaskContext, TaskError, TaskTimeout, UserError, step, task
from tests.context.support import Rows, Runner


class Refusal(BaseModel):
    message: str
    code: int


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Harmful(Exception):
    def __str__(self) -> str:
        raise SystemExit(9)

    def __repr__(self) -> str:
        raise KeyboardInterrupt


class Unreachable(Exception):
    """Raises from everything that may be asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("no attributes")

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError("no attributes")


class Classless(Exception):
    @property
    def __class__(self) -> Any:
        raise KeyboardInterrupt

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __repr__(self) -> str:
        raise SystemExit

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


class NamelessType(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__qualname__", "__module__"):
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class Nameless(Exception, metaclass=NamelessType):
    pass


class Group(ExceptionGroup):
    @property
    def exceptions(self) -> Any:
        raise RuntimeError("no members")

    @property
    def message(self) -> Any:
        raise RuntimeError("no message")


HOSTILE = [
    Unprintable,
    Harmful,
    Unreachable,
    Classless,
    Nameless,
    lambda: Group("group", [ValueError()]),
    lambda: ExceptionGroup("group", [Classless(), Unreachable()]),
]


async def test_name_message_and_traceback(run: Runner):
    def inner() -> None:
        raise LookupError("no such order: 7")

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        try:
            inner()
        except LookupError as error:
            raise ValueError("cannot ship") from error

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert (error.name, error.message, error.raw) == ("ValueError", "cannot ship", None)
    stored = (await Rows(run.durable, spawned).task()).error
    assert "test_failures_stored.py" in stored["traceback"]
    assert "in inner" in stored["traceback"]
    assert "LookupError: no such order: 7" in stored["traceback"]
    assert "durable_sa/" not in stored["traceback"].replace("tests/context", "")
    [row] = await Rows(run.durable, spawned).runs()
    assert row.error == stored


@pytest.mark.parametrize(
    ("data", "message", "raw"),
    [
        ("just text", "just text", "just text"),
        ({"message": "Not found", "code": 404}, "Not found", {"message": "Not found", "code": 404}),
        (Refusal(message="No", code=3), "No", {"message": "No", "code": 3}),
        ({"code": 404}, '{"code":404}', {"code": 404}),
        (None, "null", None),
        ([1, {"a": None}], '[1,{"a":null}]', [1, {"a": None}]),
    ],
    ids=repr,
)
async def test_user_error_is_not_retried_and_its_data_comes_back(run: Runner, data: Any, message: str, raw: Any):
    @task(max_attempts=5)
    async def work(ctx: TaskContext) -> None:
        raise UserError(data)

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert (error.name, error.message, error.raw) == ("UserError", message, raw)
    assert len(await Rows(run.durable, spawned).runs()) == 1


async def test_user_error_of_a_step_and_of_a_subclass(run: Runner):
    class OutOfStock(UserError):
        pass

    async def reserve() -> None:
        raise OutOfStock({"message": "gone", "sku": "t-1"})

    @task
    async def work(ctx: TaskContext) -> None:
        await ctx.step("reserve", reserve)

    error = await run.failure(work)
    assert (error.name, error.message, error.raw) == ("OutOfStock", "gone", {"message": "gone", "sku": "t-1"})


async def test_user_error_in_a_group_is_not_retried_and_its_data_is_kept(run: Runner):
    async def refuse() -> None:
        raise UserError({"message": "no", "code": 1})

    @task
    async def work(ctx: TaskContext) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.step("refuse", refuse))

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "ExceptionGroup"
    assert error.raw == {"message": "no", "code": 1}
    assert len(await Rows(run.durable, spawned).runs()) == 1


async def test_long_texts_are_capped_and_keep_head_and_tail(run: Runner):
    def deep(depth: int) -> None:
        if depth:
            try:
                deep(depth - 1)
            finally:
                pass
        else:
            raise ValueError("head " + "x" * 1_000_000 + " tail")

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        try:
            deep(50)
        except ValueError as error:
            raise ExceptionGroup("many", [error] * 200) from error

    spawned = await run.spawn(work)
    await run.wait(spawned)
    stored = (await Rows(run.durable, spawned).task()).error
    assert len(json.dumps(stored)) < 150_000

    @task("other", max_attempts=1)
    async def other(ctx: TaskContext) -> None:
        deep(3)

    error = await run.failure(other)
    assert len(error.message.encode()) <= 32 * 1024
    assert error.message.startswith("head ")
    assert error.message.endswith(" tail")


@pytest.mark.parametrize(
    ("raised", "name", "message"),
    [
        (ValueError("NUL \x00 in it"), "ValueError", "NUL \\x00 in it"),
        (ValueError("lone \ud800 surrogate"), "ValueError", "lone \\ud800 surrogate"),
        (ValueError("🙂 %s :x '; --"), "ValueError", "🙂 %s :x '; --"),
        (Unprintable(), "Unprintable", "RuntimeError"),
        (Harmful(), "Harmful", "SystemExit"),
        (type("Näme 🙂", (Exception,), {})("x"), "Näme 🙂", "x"),
        (UserError({"text": "a\x00b\ud800", "n": float("nan")}), "UserError", "a"),
        (TaskError("own"), "TaskError", "own"),
        (TaskTimeout("the bus", 5), "TaskTimeout", "The bus took longer than 5 s"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_hostile_errors_are_stored(run: Runner, raised: Exception, name: str, message: str):
    async def from_a_step() -> None:
        raise raised

    @task("body", max_attempts=1)
    async def body(ctx: TaskContext) -> None:
        raise raised

    @task("step", max_attempts=1)
    async def in_step(ctx: TaskContext) -> None:
        await ctx.step("step", from_a_step)

    for work in (body, in_step):
        error = await run.failure(work)
        assert error.name == name
        assert message in error.message


@pytest.mark.parametrize("where", ["body", "step", "plain step", "gather", "group"])
@pytest.mark.parametrize(
    "raised",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError("full"), RecursionError("deep")],
    ids=lambda value: type(value).__name__,
)
async def test_what_usually_ends_a_process_is_a_failure_of_the_task(run: Runner, where: str, raised: BaseException):
    async def asynchronous() -> None:
        raise raised

    def plain() -> None:
        raise raised

    @task(max_attempts=2)
    async def work(ctx: TaskContext) -> None:
        if where == "body":
            raise raised
        if where == "step":
            await ctx.step("step", asynchronous)
        elif where == "plain step":
            await ctx.step("step", plain)
        elif where == "gather":
            await asyncio.gather(asyncio.sleep(0), ctx.step("step", asynchronous))
        else:
            async with asyncio.TaskGroup() as group:
                group.create_task(ctx.step("step", asynchronous))

    @task
    async def healthy(ctx: TaskContext) -> str:
        return "well"

    spawned = await run.spawn(work)
    result = await run.wait(spawned)
    stored = (await Rows(run.durable, spawned).task()).error
    assert type(raised).__name__ in json.dumps(stored)
    if where != "group":
        assert result.error.name == type(raised).__name__
    assert len(await Rows(run.durable, spawned).runs()) == 2
    assert await run(healthy) == "well"


async def test_endless_recursion_is_a_failure_of_the_task(run: Runner):
    def recurse(depth: int) -> int:
        return recurse(depth + 1) + 1

    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> int:
        return recurse(0)

    assert (await run.failure(work)).name == "RecursionError"
    assert sys.getrecursionlimit() > 0


async def test_output_that_cannot_be_stored_fails_the_task_at_once(run: Runner):
    @task
    async def work(ctx: TaskContext) -> Any:
        return object()

    spawned = await run.spawn(work)
    error = (await run.wait(spawned)).error
    assert error.name == "SerializationError"
    assert "'work'" in error.message
    assert len(await Rows(run.durable, spawned).runs()) == 1


async def test_error_of_the_last_attempt_is_kept_with_those_of_the_others(run: Runner):
    @task(max_attempts=3)
    async def work(ctx: TaskContext) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    spawned = await run.spawn(work)
    assert (await run.wait(spawned)).error.message == "attempt 3"
    runs = await Rows(run.durable, spawned).runs()
    assert [(row.attempt, row.state, row.error["message"]) for row in runs] == [
        (number, "failed", f"attempt {number}") for number in (1, 2, 3)
    ]
    assert len({row.run_id for row in runs}) == 3
    assert all(row.started_at <= row.finished_at for row in runs)


async def test_completed_task_has_no_error_of_its_earlier_attempts(run: Runner):
    @task
    async def work(ctx: TaskContext) -> str:
        if ctx.attempt == 1:
            raise ValueError("once")
        return "done"

    spawned = await run.spawn(work)
    result = await run.wait(spawned)
    assert result.error is None
    assert (await Rows(run.durable, spawned).task()).error is None


async def test_error_is_not_told_while_the_task_may_still_succeed(run: Runner):
    release = asyncio.Event()

    @task
    async def work(ctx: TaskContext) -> None:
        if ctx.attempt == 1:
            raise ValueError
        await release.wait()

    spawned = await run.spawn(work)
    await Rows(run.durable, spawned).until("running")
    while not await Rows(run.durable, spawned).runs():
        await asyncio.sleep(0.01)
    result = await run.durable.get_task_result(spawned)
    assert result is not None
    assert result.error is None
    release.set()
    await run.wait(spawned)


async def test_params_and_results_are_not_logged(run: Runner, caplog: pytest.LogCaptureFixture):
    @step
    async def secretive(value: str) -> str:
        return value + "-result"

    @task(max_attempts=2)
    async def work(ctx: TaskContext, params: str) -> str:
        await secretive(params)
        raise ValueError("public")

    with caplog.at_level(1):
        await run.failure(work, "canary", headers={"x": "canary"})
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("durable_sa")]
    assert ours
    assert "canary" not in "".join(ours)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["async", "def"])
async def test_whatever_is_raised_the_run_ends_and_frees_its_slot(durable: Durable, kind: str):
    names = []

    def declare(number: int, make: Any) -> Any:
        name = f"hostile-{number}"

        def fail() -> None:
            raise make()

        async def body(ctx: TaskContext) -> None:
            if ctx.attempt == 1:
                await ctx.step("fail", fail)
            raise make()

        def plain_body(ctx: SyncTaskContext) -> None:
            if ctx.attempt == 1:
                ctx.step("fail", fail)
            raise make()

        names.append(name)
        return durable.task(name, max_attempts=2)(body if kind == "async" else plain_body)

    tasks = [declare(number, make) for number, make in enumerate(HOSTILE)]
    # One slot: the first run that does not end would keep the others from beginning.
    async with durable.worker(concurrency=1, shutdown_timeout=0.2):
        for make, hostile in zip(HOSTILE, tasks, strict=True):
            spawned = await durable.spawn(hostile)
            result = await durable.wait_for_result(spawned, timeout=30)
            assert result.error is not None
            expected = "Nameless" if make is Nameless else type.__getattribute__(type(make()), "__name__")
            assert result.error.name == expected
            first, second = await Rows(durable, spawned).runs()
            assert first.error["step"] == "fail"
            assert second.error["step"] is None


async def test_the_step_in_which_the_last_failure_arose_is_named(run: Runner):
    async def charge(succeed: bool) -> None:
        if not succeed:
            raise ValueError("no")

    async def save(session: AsyncSession) -> None:
        raise LookupError

    async def outer(ctx: TaskContext) -> None:
        await ctx.step("inner", charge, False)

    @task("work", max_attempts=8)
    async def work(ctx: TaskContext) -> None:
        match ctx.attempt:
            case 1:
                await ctx.step("charge", charge, False)
            case 2:
                raise ValueError("after")
            case 3:
                await ctx.transaction("save", save)
            case 4:
                try:
                    await ctx.step("charge", charge, False)
                except ValueError as error:
                    raise KeyError from error
            case 5:
                try:
                    await ctx.step("charge", charge, False)
                except ValueError:
                    raise KeyError  # noqa: B904 - by chance, in the handler
            case 6:
                async with asyncio.TaskGroup() as group:
                    group.create_task(ctx.step("grouped", charge, False))
            case 7:
                await ctx.step("outer", outer, ctx)
            case _:
                await ctx.step("unencodable", lambda: object())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("durable_sa.context.steps.encode_arguments", lambda *_: "")
        spawned = await run.spawn(work)
        result = await run.wait(spawned)
    assert result.error.step == "unencodable"
    steps = [row.error["step"] for row in await Rows(run.durable, spawned).runs()]
    assert steps == ["charge", None, "save", "charge", None, "grouped", "inner", "unencodable"]


async def test_error_that_was_stored_without_its_step_can_be_read(run: Runner):
    @task(max_attempts=1)
    async def work(ctx: TaskContext) -> None:
        raise ValueError

    spawned = await run.spawn(work)
    await run.wait(spawned)
    async with run.durable.engine.begin() as connection:
        await connection.execute(text("UPDATE durable.tasks SET error = (error::jsonb - 'step')::json"))
    result = await run.durable.get_task_result(spawned)
    assert result is not None
    assert result.error is not None
    assert result.error.step is None
