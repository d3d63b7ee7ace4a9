"""The decorator `task`, which makes a task of a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast, get_origin, overload

from .errors import InvalidConfiguration, InvalidCron, SerializationError
from .names import validate_name
from .options import Replay, TaskOptions, check_limit_key, check_replay
from .policies import CancellationPolicy, RetryStrategy
from .schedules import cron
from .serialization.annotations import is_coroutine_function, local_types, plain_function, resolve
from .tasks import DeclaredSchedule, FollowUp, LimitKey, Task, check_follow_up
from .validation import Duration, seconds

if TYPE_CHECKING:
    from .context import TaskContext
    from .context.sync import SyncTaskContext

ParamsT = TypeVar("ParamsT")
OutputT = TypeVar("OutputT")

AsyncFunction: TypeAlias = "Callable[[TaskContext[Any], ParamsT], Coroutine[Any, Any, OutputT]]"
AsyncFunctionWithoutParams: TypeAlias = "Callable[[TaskContext[Any]], Coroutine[Any, Any, OutputT]]"
SyncFunction: TypeAlias = "Callable[[SyncTaskContext[Any], ParamsT], OutputT]"
SyncFunctionWithoutParams: TypeAlias = "Callable[[SyncTaskContext[Any]], OutputT]"

_CONTEXTS = f"{__package__}.context"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class TaskDecorator(Protocol):
    """The decorator that `task(...)` returns."""

    @overload
    def __call__(self, function: AsyncFunction[ParamsT, OutputT], /) -> Task[ParamsT, OutputT]: ...
    @overload
    def __call__(self, function: AsyncFunctionWithoutParams[OutputT], /) -> Task[None, OutputT]: ...
    @overload
    def __call__(self, function: SyncFunction[ParamsT, OutputT], /) -> Task[ParamsT, OutputT]: ...
    @overload
    def __call__(self, function: SyncFunctionWithoutParams[OutputT], /) -> Task[None, OutputT]: ...


@overload
def task(name: AsyncFunction[ParamsT, OutputT], /) -> Task[ParamsT, OutputT]: ...
@overload
def task(name: AsyncFunctionWithoutParams[OutputT], /) -> Task[None, OutputT]: ...
@overload
def task(name: SyncFunction[ParamsT, OutputT], /) -> Task[ParamsT, OutputT]: ...
@overload
def task(name: SyncFunctionWithoutParams[OutputT], /) -> Task[None, OutputT]: ...
@overload
def task(
    name: str | None = None,
    *,
    max_attempts: int | None = None,
    retry_strategy: RetryStrategy | None = None,
    cancellation: CancellationPolicy | None = None,
    queue_name: str | None = None,
    no_retry_on: Iterable[type[BaseException]] = (),
    replay: Replay | None = None,
    schedule: str | None = None,
    timezone: str = "UTC",
    every: Duration | None = None,
    limit_key: LimitKey | None = None,
    max_lost_workers: int | None = None,
    retry_on: Iterable[type[BaseException]] | None = None,
    timeout: Duration | None = None,
    hard_timeout: Duration | None = None,
    on_failure: FollowUp | None = None,
    on_cancel: FollowUp | None = None,
) -> TaskDecorator: ...
def task(
    name: str | Callable[..., Any] | None = None,
    *,
    max_attempts: int | None = None,
    retry_strategy: RetryStrategy | None = None,
    cancellation: CancellationPolicy | None = None,
    queue_name: str | None = None,
    no_retry_on: Iterable[type[BaseException]] = (),
    replay: Replay | None = None,
    schedule: str | None = None,
    timezone: str = "UTC",
    every: Duration | None = None,
    limit_key: LimitKey | None = None,
    max_lost_workers: int | None = None,
    retry_on: Iterable[type[BaseException]] | None = None,
    timeout: Duration | None = None,
    hard_timeout: Duration | None = None,
    on_failure: FollowUp | None = None,
    on_cancel: FollowUp | None = None,
) -> Any:
    """Make a task of a function that takes `(ctx)` or `(ctx, params)`: `@task` or `@task("name", max_attempts=3)`.

    `async def` functions get a `TaskContext`; `def` functions run in a thread with a `SyncTaskContext`. Params and
    output are stored by their annotations, as plain JSON where there are none. The name is the function's own if none
    is given. Options that are not set are the client's. After an exception of `no_retry_on` the task is not retried;
    with `retry_on` it is retried after those only, and `no_retry_on` wins. An attempt that has been in memory for
    `timeout` seconds, waits that suspend it not counted, fails with `TaskTimeout`, which its code may catch. The task
    fails once `max_lost_workers` workers in a row were lost while they ran nothing else. With `replay="strict"` it
    fails with `ReplayMismatch` before a recorded step, met with other arguments, would run anew.

    `schedule`, a cron expression in `timezone`, or `every`, seconds or a `timedelta`, declares a schedule that spawns
    the task without params. Workers that have the task create it, under the task's name in the task's queue, and
    change it with the code; ten minutes after the last worker with the task has ended, the others remove it.

    `limit_key`, a function from the params to a text or None, or a text, makes the limit key of each spawn that gives
    none.

    `hard_timeout`, seconds or a `timedelta`, ends the process that has the task in memory for so long without a
    suspension, after its other runs have been given back, so it ends also code that nothing else ends. The attempt
    fails with `TaskTimeout`. That takes `durable worker --processes`; other workers take it as the `timeout`, and warn
    once.

    `on_failure` and `on_cancel` are tasks, or names of tasks, that the statement which fails or cancels this one spawns
    with a :class:`durable_sa.TaskEnded` as params. They are fixed when this task is spawned.

    Raises:
        TypeError: if the function takes something else, or the context of the other kind of function, or is a
            generator or a class.
        InvalidName, InvalidConfiguration: for a name or an option that cannot work.
        InvalidCron: for a `schedule` that cannot be read, or never fires.
    """
    if callable(name):
        return _make(name, name=None, options=TaskOptions(), no_retry_on=())
    if name is not None:
        validate_name("task", name)
    options = TaskOptions(max_attempts, retry_strategy, cancellation, queue_name, max_lost_workers)
    if replay is not None:
        check_replay(replay)
    if limit_key is not None and not callable(limit_key):
        check_limit_key(limit_key)
    declared = _declared(schedule, timezone, every)
    return functools.partial(
        _make,
        name=name,
        options=options,
        no_retry_on=_exceptions("no_retry_on", no_retry_on),
        replay=replay,
        schedule=declared,
        retry_on=None if retry_on is None else _exceptions("retry_on", retry_on),
        timeout=None if timeout is None else seconds(timeout, "timeout", minimum=0.001),
        hard_timeout=None if hard_timeout is None else seconds(hard_timeout, "hard_timeout", minimum=0.001),
        limit_key=limit_key,
        on_failure=check_follow_up(on_failure, "on_failure"),
        on_cancel=check_follow_up(on_cancel, "on_cancel"),
    )


def _declared(schedule: str | None, timezone: str, every: Duration | None) -> DeclaredSchedule | None:
    if schedule is None and every is None:
        return None
    if schedule is not None and every is not None:
        raise InvalidConfiguration("schedule and every", "both are given", "Give one of them.")
    expression = schedule if every is None else f"{cron.EVERY}{seconds(every, 'every', minimum=1):.15g}"
    if cron.next_tick(cast(str, expression), timezone, datetime.now(UTC)) is None:
        raise InvalidCron(expression, "it never comes true")
    return DeclaredSchedule(cast(str, expression), timezone)


def _make(
    function: Any,
    name: str | None,
    options: TaskOptions,
    no_retry_on: tuple[type[BaseException], ...],
    **further: Any,
) -> Task[Any, Any]:
    if not callable(function) or isinstance(function, Task | type):
        raise TypeError(f"@task decorates a function, not {function!r}")
    plain = plain_function(function)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(f"Task {_label(plain)} is a generator; a task returns its output once")
    if name is None and (name := getattr(function, "__name__", None)) is None:
        raise TypeError(f"{function!r} has no name of its own, give it one: task('name')(...)")
    is_async, params_name, names = is_coroutine_function(function), _params_name(function), local_types(function)
    _check_context(function, is_async, names)
    return Task(
        name=validate_name("task", name),
        function=function,
        is_async=is_async,
        params_name=params_name,
        options=options,
        no_retry_on=no_retry_on,
        local_types=names,
        **further,
    )


def _params_name(function: Callable[..., Any]) -> str | None:
    """Return the name of the second parameter, None if the context is the only one."""
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


def _check_context(function: Callable[..., Any], is_async: bool, local_names: dict[str, object]) -> None:
    """Refuse an `async def` that takes a `SyncTaskContext`, and a `def` that takes a `TaskContext`."""
    right, wrong = ("TaskContext", "SyncTaskContext") if is_async else ("SyncTaskContext", "TaskContext")
    try:
        declared = resolve(function, next(iter(inspect.signature(function).parameters)), local_names)
    except SerializationError:  # it is imported for type checkers only
        return
    context = get_origin(declared) or declared
    if not isinstance(context, type) or context.__name__ != wrong or not context.__module__.startswith(_CONTEXTS):
        return
    given, other = ("an `async def`", "a `def`") if is_async else ("a `def`", "an `async def`")
    raise TypeError(
        f"Task {_label(function)} is {given} and takes a {wrong}, which only {other} gets. Take a {right}, or make it "
        f"{other}."
    )


def _exceptions(option: str, classes: Iterable[type[BaseException]]) -> tuple[type[BaseException], ...]:
    found = (classes,) if isinstance(classes, type) else tuple(classes)
    for entry in cast(tuple[object, ...], found):
        if not (isinstance(entry, type) and issubclass(entry, BaseException)):
            raise TypeError(f"{option} lists exception classes, not {entry!r}")
    return cast(tuple[type[BaseException], ...], found)


def _label(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
