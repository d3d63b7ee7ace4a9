# The annotations of this module are text, as in modules of many apps.
from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import pytest
from pydantic import AfterValidator, BaseModel, Field, field_validator
from typing_extensions import TypedDict

from durable_sa import context
from durable_sa.context.sync import SyncTaskContext
from durable_sa.decorators import task
from durable_sa.errors import InvalidConfiguration, InvalidName, InvalidTaskParams, SerializationError
from durable_sa.options import TaskOptions
from durable_sa.policies import CancellationPolicy, RetryStrategy
from durable_sa.steps import result_codec, step
from durable_sa.tasks import Task

if TYPE_CHECKING:
    from decimal import Decimal

    from durable_sa.context import TaskContext


class Query(BaseModel):
    text: str = Field(alias="q")
    limit: int = 10

    @field_validator("limit")
    @classmethod
    def positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("ask for one or more")
        return value


class Answer(BaseModel):
    texts: list[str]


@task
async def ask(ctx: TaskContext[Any], query: Query) -> Answer:
    """Answers."""
    return Answer(texts=[query.text])


@task("nightly", max_attempts=3, queue_name="night")
def clean(ctx: Any) -> int:
    return 5


async def test_a_task_is_the_plain_function() -> None:
    assert await ask(None, Query(q="x")) == Answer(texts=["x"])
    assert clean(None) == 5
    assert ask.function.__doc__ == "Answers."


def test_what_a_signature_says() -> None:
    assert (ask.name, ask.is_async, ask.takes_params) == ("ask", True, True)
    assert (clean.name, clean.is_async, clean.takes_params) == ("nightly", False, False)
    assert (clean.max_attempts, clean.retry_strategy, clean.cancellation, clean.queue_name) == (3, None, None, "night")
    assert clean.options == TaskOptions(max_attempts=3, queue_name="night")
    assert ask.options == TaskOptions()


def test_a_task_is_frozen_and_hashable_and_short_to_show() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ask.name = "other"  # type: ignore[misc]
    assert {ask: 1}[ask] == 1
    assert repr(clean).startswith("Task(name='nightly', function=<function clean")


def test_options_are_checked_at_once() -> None:
    strategy, policy = RetryStrategy.none(), CancellationPolicy(1)
    made = task("x", retry_strategy=strategy, cancellation=policy, no_retry_on=[KeyError, OSError])(clean.function)
    assert (made.retry_strategy, made.cancellation, made.no_retry_on) == (strategy, policy, (KeyError, OSError))
    assert task(no_retry_on=KeyError)(clean.function).no_retry_on == (KeyError,)  # type: ignore[call-overload]
    with pytest.raises(InvalidName, match="task name"):
        task("")
    with pytest.raises(InvalidName, match="task name"):
        task(name=b"x")  # type: ignore[call-overload]
    with pytest.raises(InvalidConfiguration, match="max_attempts"):
        task(max_attempts=0)
    with pytest.raises(TypeError, match="no_retry_on lists exception classes, not 'KeyError'"):
        task(no_retry_on=["KeyError"])  # type: ignore[list-item]


# -- params and output


def test_params_are_validated_and_come_back() -> None:
    text = ask.encode_params(Query(q="x", limit=3))
    assert text == '{"text":"x","limit":3}'
    assert ask.decode_params(text) == Query(q="x", limit=3)
    assert ask.encode_params({"q": "x"}) == ask.encode_params({"text": "x"}) == '{"text":"x"}'
    assert ask.decode_params('{"q":"x"}') == Query(q="x")


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (None, "none are given, and it needs some; Input should be a valid dictionary or instance of Query"),
        ("hunter2", "Input should be a valid dictionary or instance of Query"),
        ({"text": 5}, "at text: Input should be a valid string"),
        ({"limit": "hunter2"}, "at q: Field required; at limit: Input should be a valid integer"),
        ({"q": "x", "limit": 0}, "at limit: ask for one or more"),
        (Answer(texts=[]), "Input should be a valid dictionary or instance of Query"),
    ],
)
def test_params_that_do_not_fit_are_refused_without_their_values(params: object, problem: str) -> None:
    with pytest.raises(InvalidTaskParams) as caught:
        ask.encode_params(params)
    assert str(caught.value).startswith(f"The params do not fit task 'ask': {problem}")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_stored_params_that_do_not_fit_are_refused() -> None:
    for text in (None, "5", '{"q":1}', "{"):
        with pytest.raises(InvalidTaskParams, match="The params do not fit task 'ask': cannot be read back as Query"):
            ask.decode_params(text)
    with pytest.raises(InvalidTaskParams, match="at limit: ask for one or more"):
        ask.decode_params('{"q":"x","limit":0}')


def test_an_assertion_without_a_text_is_named_by_its_kind() -> None:
    def hold(value: int) -> int:
        assert value != 5, "five is taken"
        if value == 6:
            raise AssertionError
        return value

    @task("assertive")
    async def assertive(ctx: Any, params: Annotated[int, AfterValidator(hold)]) -> None: ...

    with pytest.raises(InvalidTaskParams, match="five is taken"):
        assertive.encode_params(5)
    with pytest.raises(InvalidTaskParams, match="assertion_error"):
        assertive.encode_params(6)


def test_a_task_without_params_takes_none() -> None:
    assert clean.encode_params(None) is None
    assert clean.decode_params(None) is None
    assert clean.decode_params('{"left":"over"}') is None
    with pytest.raises(InvalidTaskParams, match="it takes none, only the context"):
        clean.encode_params({})


def test_null_params_are_not_missing_params() -> None:
    @task
    async def optional(ctx: Any, params: Query | None) -> None: ...

    @task
    async def unannotated(ctx, params): ...

    for made in (optional, unannotated):
        assert made.encode_params(None) == "null"
        assert made.decode_params("null") is None
    assert unannotated.encode_params((1, 2)) == "[1,2]"
    assert unannotated.output_codec.round_trip((1,), "it")[1] == [1]


def test_values_that_fit_and_have_no_json_form_are_serialization_errors() -> None:
    @task
    async def measure(ctx: Any, value: float) -> None: ...

    with pytest.raises(SerializationError, match="The params of task 'measure' cannot be stored: NaN"):
        measure.encode_params(float("nan"))


# -- annotations


def test_types_local_to_the_decorating_function_are_found() -> None:
    class Local(BaseModel):
        x: int

    @task
    async def bare(ctx: NotThere, local: Local) -> list[Local]:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    @task("named")
    async def named(ctx: NotThere, local: dict[str, Local]) -> Local | None:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    assert bare.decode_params('{"x":1}') == Local(x=1)
    assert bare.output_codec.decode('[{"x":1}]', "it") == [Local(x=1)]
    assert named.decode_params('{"a":{"x":1}}') == {"a": Local(x=1)}
    assert named.output_codec.decode("null", "it") is None


def test_fields_of_local_types_may_be_local_types() -> None:
    @dataclasses.dataclass
    class Part:
        number: int

    @dataclasses.dataclass
    class Machine:
        parts: list[Part]

    class Stock(TypedDict):
        machine: Machine

    class Pair(NamedTuple):
        one: Part
        other: Machine

    @task
    async def made(ctx: Any, stock: Stock) -> Pair:
        raise NotImplementedError

    @step
    async def decorated() -> list[Pair]:
        raise NotImplementedError

    async def plain() -> Machine:
        return Machine([Part(1)])

    machine = Machine([Part(1)])
    assert made.decode_params('{"machine":{"parts":[{"number":1}]}}') == {"machine": machine}
    for codec, value in (
        (made.output_codec, Pair(Part(2), machine)),
        (result_codec(decorated), [Pair(Part(2), machine)]),
        (result_codec(plain), machine),
    ):
        assert codec.round_trip(value, "it")[1] == value


def test_the_frame_is_not_held() -> None:
    class Big:
        pass

    def define() -> tuple[Task[Any, Any], weakref.ref[Big]]:
        class Local(BaseModel):
            x: int

        big = Big()

        @task
        async def made(ctx: Any, local: Local) -> None: ...

        return made, weakref.ref(big)

    made, big = define()
    gc.collect()
    assert big() is None
    assert list(made.local_types) == ["Local"]
    assert made.decode_params('{"x":1}').x == 1


def test_a_local_type_comes_before_one_of_the_module() -> None:
    class Answer(BaseModel):
        local: int

    @task
    async def made(ctx: Any) -> Answer:
        raise NotImplementedError

    assert made.output_codec.decode('{"local":1}', "it") == Answer(local=1)


def test_a_function_of_elsewhere_keeps_to_its_own_module() -> None:
    class Answer(BaseModel):
        local: int

    made: Task[Any, object] = task(ask.function)
    assert not isinstance(made.output_codec.decode('{"texts":[]}', "it"), Answer)


def decorated_elsewhere(function: Any) -> Task[Any, Any]:
    return task("elsewhere")(function)


def test_types_in_a_closure_are_found() -> None:
    class Local(BaseModel):
        x: int

    async def function(ctx: Any, local: Local) -> int:
        return Local(x=local.x).x

    made = decorated_elsewhere(function)
    assert made.local_types == {}
    assert made.decode_params('{"x":1}') == Local(x=1)


def test_a_type_that_is_defined_later_is_looked_for_again() -> None:
    @task
    async def made(ctx: Any) -> list[Later]:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    with pytest.raises(SerializationError, match=r"The return annotation of .*made cannot be evaluated: name 'Later'"):
        _ = made.output_codec
    globals()["Later"] = int
    try:
        assert made.output_codec.decode("[1]", "it") == [1]
    finally:
        del globals()["Later"]


def test_an_annotation_for_type_checkers_only_hinders_no_other() -> None:
    @task
    async def made(ctx: TaskContext[Any], amount: Decimal) -> int:
        raise NotImplementedError

    assert made.output_codec.decode("1", "it") == 1
    with pytest.raises(
        SerializationError, match=r"The annotation of 'amount' of .*'Decimal' is not defined; import it at run"
    ):
        made.encode_params(1)


class Opaque:
    pass


def test_a_type_that_cannot_be_stored_is_named() -> None:
    @task
    async def made(ctx: Any) -> Callable[[], int]:
        raise NotImplementedError

    @task
    async def other(ctx: Any) -> Opaque:
        raise NotImplementedError

    with pytest.raises(SerializationError, match="The type Opaque has no JSON form"):
        _ = other.output_codec
    with pytest.raises(SerializationError):
        made.output_codec.encode(len, "it")


# -- what may be decorated


def test_wrapped_and_partial_functions() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    made = task(logged(ask.function))
    assert (made.name, made.is_async, made.takes_params) == ("ask", True, True)
    assert made.decode_params('{"q":"x"}') == Query(q="x")
    assert made.output_codec.decode('{"texts":[]}', "it") == Answer(texts=[])

    async def with_extra(ctx: Any, query: Query, *, extra: int) -> Answer:
        raise NotImplementedError

    made = task("partial")(functools.partial(with_extra, extra=5))
    assert (made.is_async, made.takes_params) == (True, True)
    assert made.decode_params('{"q":"x"}') == Query(q="x")
    with pytest.raises(TypeError, match="has no name of its own, give it one"):
        task(functools.partial(with_extra, extra=5))


class Callables:
    def method(self, ctx: Any, query: Query) -> None: ...

    def __call__(self, ctx: Any, query: Query) -> Awaitable[int]:
        raise NotImplementedError


def test_bound_methods_and_callable_objects() -> None:
    assert task(Callables().method).decode_params('{"q":"x"}') == Query(q="x")
    made: Task[Any, Any] = task("x")(Callables())
    assert made.decode_params('{"q":"x"}') == Query(q="x")
    assert made.output_codec.decode("1", "it") == 1


def no_context() -> None: ...
def three(ctx: Any, a: int, b: int = 1) -> None: ...
def keyword(ctx: Any, *, limit: int) -> None: ...
def star(*args: Any) -> None: ...
def method(self: Any, ctx: Any) -> None: ...
def generator(ctx: Any) -> Iterator[int]:
    yield 1


async def async_generator(ctx: Any) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_context, r"Task no_context takes \(\), and a task takes \(ctx\) or \(ctx, params\)"),
        (three, r"takes \(ctx, a, b=1\).* Make one model of several values"),
        (keyword, r"takes \(ctx, limit\)"),
        (star, r"takes \(\*args\).* use functools.wraps"),
        (method, r"takes \(self, ctx\).* decorate a function rather than a method"),
        (generator, "Task generator is a generator"),
        (async_generator, "Task async_generator is a generator"),
        (Callables, "decorates a function, not <class"),
        (ask, "decorates a function, not Task"),
        (classmethod(method), "decorates a function, not <classmethod"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_task_is_refused_when_it_is_decorated(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        task("name")(function)


def test_the_context_of_the_other_kind_of_function_is_refused() -> None:
    async def awaits(ctx: SyncTaskContext[Any]) -> None: ...

    def blocks(ctx: context.TaskContext, params: int) -> None: ...

    def later(ctx: TaskContext) -> None: ...

    with pytest.raises(TypeError, match=r"awaits is an `async def` and takes a SyncTaskContext, which only a `def`"):
        task("awaits")(awaits)
    with pytest.raises(TypeError, match=r"Take a SyncTaskContext, or make it an `async def`\."):
        task("blocks")(cast(Any, blocks))
    assert task("later")(cast(Any, later)).params_name is None


def test_keywords_with_defaults_are_left_alone() -> None:
    @task
    def made(ctx: Any, query: Query, /, *, client: object = None, **extra: object) -> None: ...

    assert made.takes_params
