"""Annotations that are types, and text in parts of them. `test_tasks` and `test_steps` have those that are all text."""

import functools
from dataclasses import dataclass
from typing import Any, ForwardRef, Optional

import pytest
from pydantic import BaseModel

from durable_sa.decorators import task
from durable_sa.errors import SerializationError
from durable_sa.serialization.annotations import is_coroutine_function, plain_function


@dataclass
class Total:
    value: int


class Outer(BaseModel):
    inner: "Inner"


@task
def early(ctx: Any) -> Outer:
    raise NotImplementedError


# Its schema cannot be built before the model is there.
with pytest.raises(SerializationError, match="The type Outer has no JSON form: name 'Inner' is not defined"):
    _ = early.output_codec


class Inner(BaseModel):
    x: int


def test_text_inside_of_types() -> None:
    @task
    def total(ctx: Any, values: tuple[int, "int"]) -> list["Total"]:
        return [Total(sum(values))]

    assert total.decode_params("[1,2]") == (1, 2)
    assert total.output_codec.round_trip([Total(3)], "it")[1] == [Total(3)]


def test_local_types_inside_of_types() -> None:
    class Local(BaseModel):
        x: int

    @task
    def total(ctx: Any, values: Optional["Local"]) -> dict[str, list["Local"]]:
        return {"a": [values]} if values else {}

    assert total.decode_params('{"x":1}') == Local(x=1)
    assert total.output_codec.decode('{"a":[{"x":1}]}', "it") == {"a": [Local(x=1)]}
    assert list(total.local_types) == ["Local"]


def test_a_forward_reference_made_by_hand() -> None:
    def function(ctx: Any) -> None: ...

    function.__annotations__["return"] = list[ForwardRef("Total")]  # type: ignore[misc]
    assert task(function).output_codec.decode('[{"value":1}]', "it") == [Total(1)]


def test_a_model_that_is_completed_later_is_tried_again() -> None:
    assert early.output_codec.decode('{"inner":{"x":1}}', "it") == Outer(inner=Inner(x=1))


def test_text_that_is_no_annotation() -> None:
    @task
    def made(ctx: Any) -> "1 +": ...  # type: ignore[valid-type]  # noqa: F722

    with pytest.raises(SerializationError, match=r"The return annotation of .*made cannot be evaluated"):
        _ = made.output_codec


async def plain(ctx: Any) -> int:
    return 1


@functools.wraps(plain)
def wrapper(*args: Any) -> Any:
    return plain(*args)


class Callable:
    async def __call__(self, ctx: Any) -> int:
        return 1


def test_what_lies_below() -> None:
    for function in (
        plain,
        wrapper,
        functools.partial(wrapper),
        functools.partial(functools.partial(plain)),
        task(plain),
    ):
        assert plain_function(function) is plain
        assert is_coroutine_function(function)
    assert plain_function(Callable()) is Callable.__call__
    assert is_coroutine_function(Callable())
    assert is_coroutine_function(Callable().__call__)
    assert plain_function(len) is len
    assert plain_function(Total) is Total
    assert not is_coroutine_function(len)
