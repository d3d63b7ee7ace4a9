"""Tasks: functions that are run durably, with what their signatures say about params and output."""

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, overload

from pydantic import ValidationError

from .errors import InvalidTaskParams, SerializationError
from .names import validate_name
from .options import TaskOptions
from .policies import CancellationPolicy, RetryStrategy
from .serialization.annotations import (
    is_coroutine_function,
    local_types,
    names_around,
    plain_function,
    resolve,
)
from .serialization.codec import Codec, codec_for, problems

if TYPE_CHECKING:
    from .context import TaskContext
    from .context.sync import SyncTaskContext

ParamsT = TypeVar("ParamsT")
OutputT = TypeVar("OutputT")
# A task that accepts a base type, or None, can be spawned with what is more special.
ParamsT_contra = TypeVar("ParamsT_contra", contravariant=True)
OutputT_co = TypeVar("OutputT_co", covariant=True)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NULL = "null"


@dataclass(frozen=True, eq=False)
class Task(Generic[ParamsT_contra, OutputT_co]):
    """A function that is run durably. Made by `task` or `Durable.task`; still callable as the plain function.

    `ParamsT` is None for a task without params.
    """

    name: str
    """By which it is stored: what is spawned under a name is run by the task that has it at that time."""
    function: Callable[..., Any]
    """The plain function."""
    is_async: bool
    """Whether it is awaited. A task that is not runs in a thread, with a `SyncTaskContext`."""
    params_name: str | None = field(repr=False)
    """The name of its second parameter, or None if the context is all it takes."""
    options: TaskOptions = field(repr=False)
    """What it says about its spawns."""
    no_retry_on: tuple[type[BaseException], ...] = field(repr=False)
    """Exceptions after which it is not tried again."""
    local_types: dict[str, object] = field(repr=False)
    """Types that its annotations name and that are local to the function in which it is defined."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.function

    @property
    def takes_params(self) -> bool:
        """Whether it takes `(ctx, params)` rather than `(ctx)`."""
        return self.params_name is not None

    @property
    def max_attempts(self) -> int | None:
        """How often its code may fail; None leaves it to the client."""
        return self.options.max_attempts

    @property
    def retry_strategy(self) -> RetryStrategy | None:
        """How long it waits between attempts; None leaves it to the client."""
        return self.options.retry_strategy

    @property
    def cancellation(self) -> CancellationPolicy | None:
        """When it is given up; None leaves it to the client."""
        return self.options.cancellation

    @property
    def queue_name(self) -> str | None:
        """The queue it is spawned on; None leaves it to the client."""
        return self.options.queue_name

    # The types are looked at when they are first needed: by then all that the annotations name is there.

    @functools.cached_property
    def params_codec(self) -> Codec[Any]:
        """Encodes its params."""
        return self._codec(cast(str, self.params_name))

    @functools.cached_property
    def output_codec(self) -> Codec[OutputT_co]:
        """Encodes its output."""
        return self._codec("return")

    def _codec(self, name: str) -> Codec[Any]:
        annotation = resolve(self.function, name, self.local_types)
        return codec_for(annotation, names_around(self.function, self.local_types))

    def encode_params(self, params: object) -> str | None:
        """Return params as JSON text, None for a task that takes none.

        What pydantic makes a `ParamsT` of is accepted as well, such as a dict for a model.

        Raises:
            InvalidTaskParams: naming the places that do not fit, never the values.
            SerializationError: if they fit and have no JSON form.
        """
        if self.params_name is None:
            if params is not None:
                raise InvalidTaskParams(self.name, ["it takes none, only the context"])
            return None
        try:
            value = self.params_codec.validate(params)
        except ValidationError as error:
            raise InvalidTaskParams(self.name, _with_remedy(problems(error), params)) from None
        return self.params_codec.encode(value, f"the params of task {self.name!r}")

    def decode_params(self, text: str | None) -> Any:
        """Return the params of which `text` is the JSON form; None stands for none.

        Raises:
            InvalidTaskParams: if they do not fit.
        """
        if self.params_name is None:
            return None
        try:
            return self.params_codec.decode(_NULL if text is None else text, f"the params of task {self.name!r}")
        except SerializationError as error:
            raise InvalidTaskParams(self.name, [error.reason]) from None


class TaskDecorator(Protocol):
    """What `task(...)` gives."""

    @overload
    def __call__(
        self, function: "Callable[[TaskContext[Any], ParamsT], Coroutine[Any, Any, OutputT]]", /
    ) -> Task[ParamsT, OutputT]: ...
    @overload
    def __call__(
        self, function: "Callable[[TaskContext[Any]], Coroutine[Any, Any, OutputT]]", /
    ) -> Task[None, OutputT]: ...
    @overload
    def __call__(self, function: "Callable[[SyncTaskContext[Any], ParamsT], OutputT]", /) -> Task[ParamsT, OutputT]: ...
    @overload
    def __call__(self, function: "Callable[[SyncTaskContext[Any]], OutputT]", /) -> Task[None, OutputT]: ...


@overload
def task(name: "Callable[[TaskContext[Any], ParamsT], Coroutine[Any, Any, OutputT]]", /) -> Task[ParamsT, OutputT]: ...
@overload
def task(name: "Callable[[TaskContext[Any]], Coroutine[Any, Any, OutputT]]", /) -> Task[None, OutputT]: ...
@overload
def task(name: "Callable[[SyncTaskContext[Any], ParamsT], OutputT]", /) -> Task[ParamsT, OutputT]: ...
@overload
def task(name: "Callable[[SyncTaskContext[Any]], OutputT]", /) -> Task[None, OutputT]: ...
@overload
def task(
    name: str | None = None,
    *,
    max_attempts: int | None = None,
    retry_strategy: RetryStrategy | None = None,
    cancellation: CancellationPolicy | None = None,
    queue_name: str | None = None,
    no_retry_on: Iterable[type[BaseException]] = (),
) -> TaskDecorator: ...
def task(
    name: str | Callable[..., Any] | None = None,
    *,
    max_attempts: int | None = None,
    retry_strategy: RetryStrategy | None = None,
    cancellation: CancellationPolicy | None = None,
    queue_name: str | None = None,
    no_retry_on: Iterable[type[BaseException]] = (),
) -> Any:
    """Make a task of a function that takes `(ctx)` or `(ctx, params)`: `@task` or `@task("name", max_attempts=3)`.

    `async def` functions get a `TaskContext`; `def` functions run in a thread with a `SyncTaskContext`. Params and
    output are stored by their annotations, as plain JSON where there are none. The name is the function's own if none
    is given. Options that are not given are the client's. After an exception of `no_retry_on` the task is not tried
    again.

    Raises:
        TypeError: if the function takes something else, or is a generator or a class.
        InvalidName, InvalidConfiguration: for a name or an option that cannot work.
    """
    if callable(name):
        return _make(name, None, TaskOptions(), ())
    if name is not None:
        validate_name("task", name)
    options = TaskOptions(max_attempts, retry_strategy, cancellation, queue_name)
    return functools.partial(_make, name=name, options=options, no_retry_on=_exceptions(no_retry_on))


def _make(
    function: Any, name: str | None, options: TaskOptions, no_retry_on: tuple[type[BaseException], ...]
) -> Task[Any, Any]:
    if not callable(function) or isinstance(function, Task | type):
        raise TypeError(f"@task decorates a function, not {function!r}")
    plain = plain_function(function)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(f"Task {_label(plain)} is a generator; a task returns its output once")
    if name is None and (name := getattr(function, "__name__", None)) is None:
        raise TypeError(f"{function!r} has no name of its own, give it one: task('name')(...)")
    return Task(
        name=validate_name("task", name),
        function=function,
        is_async=is_coroutine_function(function),
        params_name=_params_name(function),
        options=options,
        no_retry_on=no_retry_on,
        local_types=local_types(function),
    )


def _params_name(function: Callable[..., Any]) -> str | None:
    """The name of the second parameter, None if there is only the context."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    others = [parameter for parameter in parameters if parameter.kind not in _POSITIONAL]
    unknown = any(
        parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.default is inspect.Parameter.empty
        for parameter in others
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    )
    if unknown or len(positional) not in (1, 2) or positional[0].name in ("self", "cls"):
        taken = ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)
        raise TypeError(
            f"Task {_label(function)} takes ({taken}), and a task takes (ctx) or (ctx, params). Make one model of "
            "several values, decorate a function rather than a method, and use functools.wraps in your own decorators."
        )
    return positional[1].name if len(positional) == 2 else None


def _exceptions(classes: Iterable[type[BaseException]]) -> tuple[type[BaseException], ...]:
    found = (classes,) if isinstance(classes, type) else tuple(classes)
    for entry in cast(tuple[object, ...], found):
        if not (isinstance(entry, type) and issubclass(entry, BaseException)):
            raise TypeError(f"no_retry_on lists exception classes, not {entry!r}")
    return cast(tuple[type[BaseException], ...], found)


def _with_remedy(found: list[str], params: object) -> list[str]:
    return ["none are given, and it needs some", *found] if params is None else found


def _label(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
