"""The decorators `step` and `transaction`: functions whose calls by a task are recorded, and plain ones elsewhere."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from .concurrency.threads import in_event_loop
from .current import context_or_none
from .errors import InvalidState, SerializationError
from .names import validate_name
from .options import MAX_ATTEMPTS
from .policies import RetryStrategy
from .serialization.annotations import local_types, names_around, plain_function, resolve
from .serialization.codec import Codec, codec_for
from .serialization.types import UnfaithfulType
from .validation import Duration, instance, integer, seconds

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
AsyncSessionT = TypeVar("AsyncSessionT", bound=AsyncSession)
SessionT = TypeVar("SessionT", bound=Session)


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The options of a step.

    Raises:
        InvalidConfiguration: for a value that cannot work.
    """

    max_attempts: int = 1
    """The number of tries before the step's error reaches the task. Retries of a step spend no attempt of the task."""
    retry_strategy: RetryStrategy | None = None
    """The delays between tries. The client's default if None."""
    timeout: float | None = None
    """Seconds after which a try is cancelled and fails with `TaskTimeout`."""

    def __post_init__(self) -> None:
        integer(self.max_attempts, "max_attempts", minimum=1, maximum=MAX_ATTEMPTS)
        if self.retry_strategy is not None:
            instance(self.retry_strategy, RetryStrategy, "retry_strategy")
        if self.timeout is not None:
            object.__setattr__(self, "timeout", seconds(self.timeout, "timeout"))


PLAIN: Final = StepOptions()
"""The options of a plain function."""


@dataclass(frozen=True, eq=False)
class Step(Generic[P, R_co]):
    """A function that runs once for each call of it in a task. Made by `step`."""

    name: str
    function: Callable[P, R_co]
    """The plain function."""
    options: StepOptions

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function: inside a task as `ctx.step`, elsewhere as it is.

        In an `async def` task the result is awaited. The thread of a `def` step of such a task cannot wait for steps,
        not even in an event loop of its own: in that thread the call is one of the plain function.
        """
        context = context_or_none()
        if context is None or not (context.blocking or (in_event_loop() and not context.in_another_loop)):
            return self.function(*args, **kwargs)
        return cast(R_co, context.step(self.name, self, *args, **kwargs))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    @property
    def __wrapped__(self) -> Callable[P, R_co]:
        return self.function


class StepDecorator(Protocol):
    """The decorator that `step(...)` returns."""

    def __call__(self, function: Callable[P, R], /) -> Step[P, R]: ...


@overload
def step(name: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    name: str | None = None,
    *,
    max_attempts: int = 1,
    retry_strategy: RetryStrategy | None = None,
    timeout: Duration | None = None,
) -> StepDecorator: ...
def step(
    name: str | Callable[..., Any] | None = None,
    *,
    max_attempts: int = 1,
    retry_strategy: RetryStrategy | None = None,
    timeout: Duration | None = None,
) -> Any:
    """Decorate a function that tasks call, so that each call runs once.

    Inside a task `await charge(order_id)` is then `await ctx.step("charge", charge, order_id)` with these options.
    Outside a task it is the plain function.

    The name is the function's own if none is given. `max_attempts`, 1 if not given, counts the tries of the step;
    between them it waits as `retry_strategy` says, the client's default if None. A try that takes longer than
    `timeout` is cancelled and fails with `TaskTimeout`.

    Raises:
        InvalidName, InvalidConfiguration: for a name or an option that cannot work.
        SerializationError: values of the result could not be read back as they were, by their type.
    """
    if callable(name):
        return _make(name, None, StepOptions())
    if name is not None:
        validate_name("step", name)
    limit = None if timeout is None else seconds(timeout, "timeout")
    options = StepOptions(max_attempts, retry_strategy, limit)
    return functools.partial(_make, name=name, options=options)


AnySession: TypeAlias = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
_SESSIONS: Final = (Session, AsyncSession, scoped_session, async_scoped_session)


@dataclass(frozen=True, eq=False)
class Transaction(Generic[P, R_co]):
    """A function whose call by a task is one transaction with its checkpoint. Made by `transaction`."""

    name: str
    function: Callable[..., R_co]
    """The plain function, which takes a session first."""

    @overload
    def __call__(self, session: AnySession, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]  # mypy: P may hold anything
        """Call the function: inside a task as `ctx.transaction`, which passes a session; with a session as it is.

        In an `async def` task the result is awaited.

        Raises:
            InvalidState: it is called without a session where no task runs.
        """
        if args and isinstance(args[0], _SESSIONS):
            return self.function(*args, **kwargs)
        context = context_or_none()
        if context is None or not (context.blocking or (in_event_loop() and not context.in_another_loop)):
            raise InvalidState(
                f"Transaction {self.name!r}",
                "called without a session, outside of a task's own code",
                "Call it from a task (in a test inside `with task_context() as ctx:`), or pass a session first.",
            )
        return context.transaction(self.name, self.function, *args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., R_co]:
        return self.function


class TransactionDecorator(Protocol):
    """The decorator that `transaction(...)` returns."""

    @overload
    def __call__(self, function: Callable[Concatenate[AsyncSession, P], R], /) -> Transaction[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Session, P], R], /) -> Transaction[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[AsyncSessionT, P], R], /) -> Transaction[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[SessionT, P], R], /) -> Transaction[P, R]: ...


@overload
def transaction(name: Callable[Concatenate[AsyncSession, P], R], /) -> Transaction[P, R]: ...
@overload
def transaction(name: Callable[Concatenate[Session, P], R], /) -> Transaction[P, R]: ...
@overload
def transaction(name: Callable[Concatenate[AsyncSessionT, P], R], /) -> Transaction[P, R]: ...
@overload
def transaction(name: Callable[Concatenate[SessionT, P], R], /) -> Transaction[P, R]: ...
@overload
def transaction(name: str | None = None) -> TransactionDecorator: ...
def transaction(name: str | Callable[..., Any] | None = None) -> Any:
    """Decorate a function that takes a session first, so that its call by a task is one transaction.

    Inside a task `await transfer(1, 2)` is then `await ctx.transaction("transfer", transfer, 1, 2)`. With a session as
    its first argument it is the plain function, also inside a task: it then belongs to the transaction of that session.

    The name is the function's own if none is given.

    Raises:
        InvalidName: for a name that breaks the rules for steps.
        TypeError: for a method, a class, or a function without parameters.
    """
    if callable(name):
        return _make_transaction(name, None)
    if name is not None:
        validate_name("step", name)
    return functools.partial(_make_transaction, name=name)


def _make_transaction(function: Any, name: str | None) -> Transaction[..., Any]:
    if not callable(function) or isinstance(function, Step | Transaction | type):
        raise TypeError(f"@transaction decorates a function, not {function!r}")
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None or first.name in ("self", "cls") or first.kind is inspect.Parameter.KEYWORD_ONLY:
        raise TypeError(f"@transaction decorates a function whose first parameter is the session, not {function!r}")
    step = _make(function, name, PLAIN)
    return Transaction(step.name, function)


def plain_step(fn: Callable[..., Any]) -> tuple[Callable[..., Any], StepOptions]:
    """Return the function of a step, and the options of its decorator if it has one."""
    return (fn.function, fn.options) if isinstance(fn, Step) else (fn, PLAIN)


def result_codec(function: Callable[..., Any]) -> Codec[Any]:
    """Return the codec of the result of `function`, by its return annotation; plain JSON without one.

    Raises:
        SerializationError: if the annotation cannot be evaluated or has no JSON form.
    """
    function = plain_function(function)
    if not isinstance(function, FunctionType):
        return codec_for(resolve(function, "return", {}))
    codec = _result_codecs.get(function)
    if codec is None:
        names = _local_types.get(function, {})
        codec = codec_for(resolve(function, "return", names), names_around(function, names))
        _result_codecs[function] = codec
    return codec


_result_codecs: Final[WeakKeyDictionary[Callable[..., Any], Codec[Any]]] = WeakKeyDictionary()
_local_types: Final[WeakKeyDictionary[Callable[..., Any], dict[str, object]]] = WeakKeyDictionary()


def _make(function: Any, name: str | None, options: StepOptions) -> Step[..., Any]:
    if not callable(function) or isinstance(function, Step | type):
        raise TypeError(f"@step decorates a function, not {function!r}")
    if name is None and (name := getattr(function, "__name__", None)) is None:
        raise TypeError(f"{function!r} has no name of its own, give it one: step('name')(...)")
    if found := local_types(function):
        _local_types[plain_function(function)] = found
    try:
        result_codec(function)
    except UnfaithfulType:
        raise
    except SerializationError:  # a name in the annotation is not defined yet
        pass
    return Step(validate_name("step", name), function, options)
