"""The tasks that a client knows."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, overload

from ..context import TaskContext
from ..errors import TaskAlreadyRegistered, TaskNotRegistered
from ..policies import CancellationPolicy, RetryStrategy
from ..tasks import Task, TaskDecorator
from ..tasks import task as make_task

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


class Registry:
    """Tasks by name."""

    def __init__(self) -> None:
        self.tasks: dict[str, Task[Any, Any]] = {}
        """The registered tasks by name."""

    @overload
    def task(self, name: Callable[[TaskContext[Any], ParamsT], Coroutine[Any, Any, T]], /) -> Task[ParamsT, T]: ...
    @overload
    def task(self, name: Callable[[TaskContext[Any]], Coroutine[Any, Any, T]], /) -> Task[None, T]: ...
    @overload
    def task(self, name: Callable[[Any, ParamsT], T], /) -> Task[ParamsT, T]: ...
    @overload
    def task(self, name: Callable[[Any], T], /) -> Task[None, T]: ...
    @overload
    def task(
        self,
        name: str | None = None,
        *,
        max_attempts: int | None = None,
        retry_strategy: RetryStrategy | None = None,
        cancellation: CancellationPolicy | None = None,
        queue_name: str | None = None,
        no_retry_on: Iterable[type[BaseException]] = (),
    ) -> TaskDecorator: ...
    def task(
        self,
        name: str | Callable[..., Any] | None = None,
        *,
        max_attempts: int | None = None,
        retry_strategy: RetryStrategy | None = None,
        cancellation: CancellationPolicy | None = None,
        queue_name: str | None = None,
        no_retry_on: Iterable[type[BaseException]] = (),
    ) -> Any:
        """As :func:`durable_sa.task`, and registers what it makes."""
        if callable(name):
            return self.register(make_task(name))
        decorate = make_task(
            name,
            max_attempts=max_attempts,
            retry_strategy=retry_strategy,
            cancellation=cancellation,
            queue_name=queue_name,
            no_retry_on=no_retry_on,
        )

        def registering(function: Callable[..., Any]) -> Task[Any, Any]:
            return self.register(decorate(function))

        return registering

    def register(self, task: Task[ParamsT, T]) -> Task[ParamsT, T]:
        """Make a task known: its workers claim it from now on, and it may be spawned by name. Returns the task.

        Raises:
            TaskAlreadyRegistered: another task has that name.
        """
        if not isinstance(task, Task):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"register() takes a task, made by @task, not {type(task).__name__}")
        if self.tasks.setdefault(task.name, task) is not task:
            raise TaskAlreadyRegistered(task.name)
        return task

    def registered(self, name: str) -> Task[Any, Any]:
        """The task of that name.

        Raises:
            TaskNotRegistered: there is none.
        """
        try:
            return self.tasks[name]
        except KeyError:
            raise TaskNotRegistered(name, self.tasks) from None
