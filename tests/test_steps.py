from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from durable_sa.context import TaskContext
from durable_sa.current import running
from durable_sa.errors import InvalidConfiguration, InvalidName, SerializationError
from durable_sa.policies import RetryStrategy
from durable_sa.steps import Step, StepOptions, result_codec, step


class Receipt(BaseModel):
    order: int


@step
async def charge(order: int) -> Receipt:
    """Charges."""
    return Receipt(order=order)


@step("ship-it", max_attempts=3, retry_strategy=RetryStrategy.none(), timeout=timedelta(seconds=2.5))
def ship(order: int, *, fast: bool = False) -> str:
    return f"{order} {fast}"


class RecordingContext(TaskContext[Any]):
    """Notes what steps it is asked for."""

    in_another_loop = False

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def step(self, name: str, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, fn, args, kwargs))
        return asyncio.sleep(0, "stored")


class BlockingContext:
    blocking = True

    def step(self, name: str, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return ("stored", name, fn, args, kwargs)


async def test_outside_a_task_it_is_the_plain_function() -> None:
    assert await charge(1) == Receipt(order=1)
    assert ship(1, fast=True) == "1 True"
    assert charge.function.__doc__ == "Charges."


async def test_inside_a_task_it_is_a_step() -> None:
    context = RecordingContext()
    with running(context):
        stored: Any = await charge(1)
        assert stored == "stored"
        pending: Any = ship(1, fast=True)
        assert await pending == "stored"
    assert context.calls == [("charge", charge, (1,), {}), ("ship-it", ship, (1,), {"fast": True})]


def test_inside_a_def_task_it_is_a_step_of_that_thread() -> None:
    with running(BlockingContext()):
        stored: Any = ship(1)
        assert stored == ("stored", "ship-it", ship, (1,), {})


async def test_in_a_thread_of_an_async_task_it_is_the_plain_function() -> None:
    context = RecordingContext()
    with running(context):
        assert await asyncio.to_thread(ship, 1) == "1 False"
        assert contextvars.copy_context().run(asyncio.get_running_loop) is asyncio.get_running_loop()
    assert context.calls == []


def test_options() -> None:
    assert charge.name == "charge"
    assert charge.options == StepOptions()
    assert ship.name == "ship-it"
    assert ship.options == StepOptions(3, RetryStrategy.none(), 2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_attempts": 0}, "max_attempts"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"retry_strategy": 5}, "retry_strategy: it must be a RetryStrategy, not int"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        step(**options)


def test_what_may_be_decorated() -> None:
    with pytest.raises(InvalidName, match="names that start with '\\$' are reserved"):
        step("$charge")
    with pytest.raises(TypeError, match="has no name of its own"):
        step(functools.partial(charge.function, 1))
    assert step("partial")(functools.partial(ship.function, 1))() == "1 False"
    not_functions: list[Any] = [charge, Receipt]
    for value in not_functions:
        with pytest.raises(TypeError, match="@step decorates a function"):
            step("x")(value)


@dataclass
class Shop:
    name: str

    @step("open")
    async def opened(self, day: int) -> str:
        return f"{self.name} {day}"


async def test_a_method_can_be_a_step() -> None:
    shop = Shop(name="x")
    assert await shop.opened(1) == "x 1"
    assert isinstance(Shop.opened, Step)
    context = RecordingContext()
    with running(context):
        await shop.opened(1)
    assert context.calls == [("open", Shop.opened, (shop, 1), {})]


# -- types of results


def untyped() -> Any:
    raise NotImplementedError


def awaitable() -> Awaitable[Receipt]:
    raise NotImplementedError


def coroutine() -> Coroutine[Any, Any, list[Receipt]]:
    raise NotImplementedError


def unresolved() -> NotThere:  # type: ignore[name-defined]  # noqa: F821
    raise NotImplementedError


class Maker:
    async def __call__(self) -> Receipt:
        return Receipt(order=1)

    def make(self) -> Receipt:
        return Receipt(order=1)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (charge, "Codec(Receipt)"),
        (charge.function, "Codec(Receipt)"),
        (ship, "Codec(str)"),
        (functools.partial(charge.function, 1), "Codec(Receipt)"),
        (functools.partial(functools.partial(ship, 1), fast=True), "Codec(str)"),
        (functools.lru_cache(ship.function), "Codec(str)"),
        (Maker(), "Codec(Receipt)"),
        (Maker().make, "Codec(Receipt)"),
        (Receipt, "Codec(Receipt)"),
        (awaitable, "Codec(Receipt)"),
        (coroutine, "Codec(list[tests.test_steps.Receipt])"),
        (untyped, "Codec(plain JSON)"),
        (lambda: 1, "Codec(plain JSON)"),
        (len, "Codec(plain JSON)"),
        ([].append, "Codec(plain JSON)"),
    ],
)
def test_the_codec_of_a_result(function: Callable[..., Any], expected: str) -> None:
    assert repr(result_codec(function)) == expected
    assert result_codec(function) is result_codec(function)


def test_local_types_of_a_decorated_step_are_found() -> None:
    class Local(BaseModel):
        x: int

    @step
    async def bare() -> Local:
        raise NotImplementedError

    @step("named")
    async def named() -> list[Local]:
        raise NotImplementedError

    assert result_codec(bare.function).decode('{"x":1}', "it") == Local(x=1)
    assert result_codec(named).decode('[{"x":1}]', "it") == [Local(x=1)]


def test_a_result_type_that_is_not_there_is_refused_before_the_step_runs() -> None:
    with pytest.raises(
        SerializationError, match="The return annotation of unresolved cannot be evaluated: name 'NotThere'"
    ):
        result_codec(unresolved)
