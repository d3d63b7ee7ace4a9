"""Registering tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from ..app import App
from ..decorators import (
    AsyncFunction,
    AsyncFunctionWithoutParams,
    SyncFunction,
    SyncFunctionWithoutParams,
    TaskDecorator,
)
from ..decorators import task as make_task
from ..options import Replay
from ..policies import CancellationPolicy, RetryStrategy
from ..steps import transaction
from ..tasks import FollowUp, LimitKey, Task
from ..validation import Duration

T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


class Registry(App):
    """The part of a client that registers tasks."""

    transaction = staticmethod(transaction)
    """The decorator :func:`durable_sa.transaction`; nothing is registered."""

    @overload
    def task(self, name: AsyncFunction[ParamsT, T], /) -> Task[ParamsT, T]: ...
    @overload
    def task(self, name: AsyncFunctionWithoutParams[T], /) -> Task[None, T]: ...
    @overload
    def task(self, name: SyncFunction[ParamsT, T], /) -> Task[ParamsT, T]: ...
    @overload
    def task(self, name: SyncFunctionWithoutParams[T], /) -> Task[None, T]: ...
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
    def task(self, name: str | Callable[..., Any] | None = None, **options: Any) -> Any:
        """Make a task as :func:`durable_sa.task` does, and register it."""
        if callable(name):
            return self.register(make_task(name))
        decorate = make_task(name, **options)

        def registering(function: Callable[..., Any]) -> Task[Any, Any]:
            return self.register(decorate(function))

        return registering
