"""Registering tasks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, overload

from ..app import App
from ..context import TaskContext
from ..policies import CancellationPolicy, RetryStrategy
from ..tasks import Task, TaskDecorator
from ..tasks import task as make_task

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


class Registry(App):
    """The part of a client that registers tasks."""

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
        """Make a task as :func:`durable_sa.task` does, and register it."""
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
