"""What type checkers make of `@task`: read by them, never run. The ignored lines must be errors."""
# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, assert_type

from pydantic import BaseModel

from durable_sa import RetryStrategy, Spawn, SyncTaskContext, Task, TaskContext, TaskHandle, TaskPollResult, task


class State:
    pass


class Params(BaseModel):
    query: str


class Special(Params):
    more: int


class Result(BaseModel):
    summary: str


@task
async def bare(ctx: TaskContext[State], params: Params) -> Result:
    return Result(summary=params.query)


@task("named", max_attempts=3, retry_strategy=RetryStrategy.none(), no_retry_on=[KeyError])
async def named(ctx: TaskContext, params: Params) -> Result:
    return Result(summary=params.query)


@task()
async def without_params(ctx: TaskContext[State]) -> int:
    return 1


@task
def blocking(ctx: SyncTaskContext[State], params: list[int]) -> dict[str, int]:
    return {}


@task(queue_name="night")
def blocking_without_params(ctx: SyncTaskContext) -> None: ...


@task
async def optional(ctx: TaskContext, params: Params | None) -> str:
    return ""


@task
async def positional(context: TaskContext, anything: Any, /) -> None: ...


assert_type(bare, Task[Params, Result])
assert_type(named, Task[Params, Result])
assert_type(without_params, Task[None, int])
assert_type(blocking, Task[list[int], dict[str, int]])
assert_type(blocking_without_params, Task[None, None])
assert_type(optional, Task[Params | None, str])
assert_type(positional, Task[Any, None])
assert_type(bare.name, str)
assert_type(bare.max_attempts, int | None)
assert_type(bare.function, Callable[..., Any])

assert_type(Spawn(bare, Params(query="x"), priority=1), Spawn[Result])
assert_type(Spawn(bare, Special(query="x", more=1)), Spawn[Result])
assert_type(Spawn(without_params), Spawn[int])
assert_type(Spawn(optional), Spawn[str])
assert_type(Spawn(optional, Params(query="x")), Spawn[str])

# A task can stand for one that gives something more general, or takes something more special.
wider: Task[Special, BaseModel] = bare
takes_nothing: Task[None, str] = optional
anything: list[Task[Any, Any]] = [bare, named, without_params, blocking]


def output(result: TaskPollResult[Result], handle: TaskHandle[Result]) -> None:
    assert_type(result.output, Result | None)
    takes_general(handle)


def takes_general(handle: TaskHandle[BaseModel]) -> None: ...


narrower: Task[Params, str] = bare  # type: ignore[assignment]
Spawn(bare)  # type: ignore[arg-type]
Spawn(bare, "x")  # type: ignore[arg-type]
Spawn(bare, Params(query="x"), priorty=1)  # type: ignore[call-overload]
Spawn(bare, Params(query="x"), priority="high")  # type: ignore[call-overload]
Spawn(without_params, 5)  # type: ignore[arg-type]
task(max_atempts=3)  # type: ignore[call-overload]
task("x", max_attempts="3")  # type: ignore[call-overload]
bare.name = "other"  # type: ignore[misc]


@task  # type: ignore[arg-type]
async def three(ctx: TaskContext, a: int, b: int) -> None: ...


@task("x")  # type: ignore[arg-type]
async def nothing() -> None: ...


def decorated(function: Callable[[TaskContext[State], Params], Coroutine[Any, Any, Result]]) -> None:
    assert_type(task(function), Task[Params, Result])
    assert_type(task("x")(function), Task[Params, Result])


async def generator(ctx: TaskContext) -> AsyncIterator[int]:
    yield 1
