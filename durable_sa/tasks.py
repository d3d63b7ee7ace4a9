"""Tasks: functions that are run durably, with the types of their params and output."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from pydantic import ValidationError

from .errors import InvalidConfiguration, InvalidTaskParams, SerializationError
from .names import validate_name
from .options import Replay, TaskOptions, check_limit_key
from .policies import CancellationPolicy, RetryStrategy
from .serialization.annotations import names_around, resolve
from .serialization.codec import Codec, codec_for, problems
from .serialization.fidelity import is_mapped
from .serialization.types import UnfaithfulType

# A task that accepts a base type, or None, can be spawned with a subtype.
ParamsT_contra = TypeVar("ParamsT_contra", contravariant=True)
OutputT_co = TypeVar("OutputT_co", covariant=True)

_NULL = "null"


class OfTask(Protocol[OutputT_co]):
    """A type that no value has: with it beside them, type checkers take the type of params from the task alone.

    From the params alone mypy infers another type than from the task, and reports neither. If a union has a second
    member that could hold the params, it infers nothing from them, and reports the argument that does not fit. Each
    object has a method of this name, and none that returns what a task takes.
    """

    def __reduce__(self) -> OutputT_co:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        ...


LimitKey: TypeAlias = str | Callable[[Any], str | None]
"""A limit key, or a function from the params, None for a task without, to the key or None."""


class DeclaredSchedule(NamedTuple):
    """The schedule that a task declares."""

    cron_expression: str
    """A cron expression, or `@every` and a number of seconds."""
    timezone: str


@dataclass(frozen=True, eq=False)
class Task(Generic[ParamsT_contra, OutputT_co]):
    """A function that is run durably. Made by `task` or `Durable.task`; still callable as the plain function.

    `ParamsT` is None for a task without params.
    """

    name: str
    """The name that is stored. A worker runs the task that is registered under the name at that time."""
    function: Callable[..., Any]
    """The plain function."""
    is_async: bool
    """True for an `async def` function. Another one runs in a thread, with a `SyncTaskContext`."""
    params_name: str | None = field(repr=False)
    """The name of the second parameter, or None if the context is the only one."""
    options: TaskOptions = field(repr=False)
    """The options of its spawns."""
    no_retry_on: tuple[type[BaseException], ...] = field(repr=False)
    """Exceptions after which it is not retried."""
    local_types: dict[str, object] = field(repr=False)
    """Types that its annotations name and that are local to the function that defines the task."""
    replay: Replay | None = field(default=None, repr=False)
    """The rule for a recorded step that is met with other arguments; None leaves it to the client."""
    schedule: DeclaredSchedule | None = field(default=None, repr=False)
    """The schedule that workers keep in step with the code."""
    limit_key: LimitKey | None = field(default=None, repr=False)
    """The limit key of its spawns, or the function that makes it of their params."""
    retry_on: tuple[type[BaseException], ...] | None = field(default=None, repr=False)
    """The only exceptions after which it is retried; None if all but those of `no_retry_on` are."""
    timeout: float | None = field(default=None, repr=False)
    """Seconds in memory after which an attempt fails with `TaskTimeout`."""
    hard_timeout: float | None = field(default=None, repr=False)
    """Seconds after which the process that has a run in memory is ended, and the attempt has failed."""

    on_failure: "FollowUp | None" = field(default=None, repr=False)
    """The task that is spawned if it fails; None leaves it to the client."""
    on_cancel: "FollowUp | None" = field(default=None, repr=False)
    """The task that is spawned if it is cancelled; None leaves it to the client."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.function

    @property
    def takes_params(self) -> bool:
        """True if it takes `(ctx, params)` rather than `(ctx)`."""
        return self.params_name is not None

    @property
    def max_attempts(self) -> int | None:
        """The number of times its code may fail; None leaves it to the client."""
        return self.options.max_attempts

    @property
    def retry_strategy(self) -> RetryStrategy | None:
        """The delays between attempts; None leaves them to the client."""
        return self.options.retry_strategy

    @property
    def cancellation(self) -> CancellationPolicy | None:
        """The times after which it is cancelled; None leaves them to the client."""
        return self.options.cancellation

    @property
    def max_lost_workers(self) -> int | None:
        """The number of workers in a row that may be lost while they run it alone; None leaves it to the client."""
        return self.options.max_lost_workers

    @property
    def queue_name(self) -> str | None:
        """The queue it is spawned on; None leaves it to the client."""
        return self.options.queue_name

    # Annotations are resolved on first use, because by then all names in them are defined.

    @functools.cached_property
    def params_codec(self) -> Codec[Any]:
        """The codec of its params."""
        return self._codec(cast(str, self.params_name))

    @functools.cached_property
    def output_codec(self) -> Codec[OutputT_co]:
        """The codec of its output."""
        return self._codec("return")

    def _codec(self, name: str) -> Codec[Any]:
        annotation = resolve(self.function, name, self.local_types)
        return codec_for(annotation, names_around(self.function, self.local_types))

    def check_types(self) -> None:
        """Refuse types that say in advance that some of their values cannot be read back, as far as they are known yet.

        Raises:
            SerializationError: with the type, and the part of it that is at fault.
        """
        for name in ("return",) if self.params_name is None else ("return", self.params_name):
            try:
                self._codec(name)
            except UnfaithfulType:
                raise
            except SerializationError:  # a name in it is not defined yet, or will never be
                continue

    def encode_params(self, params: object) -> str | None:
        """Return params as JSON text, None for a task that takes none.

        Values that pydantic converts to a `ParamsT` are accepted as well, such as a dict for a model.

        Raises:
            InvalidTaskParams: with the places that do not fit, never the values.
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

    def limit_key_of(self, params: object) -> str | None:
        """Return the limit key of a spawn with these params, which fit.

        Raises:
            InvalidConfiguration: the task's function raises, or returns something else than a text or None.
            InvalidName: the key breaks the rules for names.
        """
        key = self.limit_key
        if callable(key):
            value = None if self.params_name is None else self.params_codec.validate(params)
            try:
                key = key(value)
            except Exception as error:
                raise InvalidConfiguration(
                    "limit_key",
                    f"the function of task {self.name!r} has raised {type(error).__name__}",
                    "It gets the params, and returns a str or None.",
                ) from error
        return None if key is None else check_limit_key(key)

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


FollowUp: TypeAlias = Task[Any, Any] | str
"""A task, or the name of one."""


def check_follow_up(value: FollowUp | None, what: str) -> FollowUp | None:
    """Return a follow-up, which `what` names.

    Raises:
        TypeError: it is neither a task nor a name.
        InvalidName: a name that breaks the rules.
    """
    if value is None or isinstance(value, Task):
        return value
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{what} is a task, made by @task, or its name, not {type(value).__name__}")
    return validate_name("task", value)


def _with_remedy(found: list[str], params: object) -> list[str]:
    if params is None:
        return ["none are given, and it needs some", *found]
    if is_mapped(params):
        return [f"an object of type {type(params).__name__} belongs to a session, pass its primary key", *found]
    return found
