"""The context of a `def` task, whose methods block the thread of the task."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Self, TypeVar, cast, overload

from sqlalchemy.orm import Session
from typing_extensions import Unpack

from ..current import running
from ..errors import InvalidState
from ..options import SpawnOptions
from ..results import AnyTaskId, Race, TaskHandle
from ..serialization.annotations import is_coroutine_function
from ..signals import ControlFlow
from ..steps import plain_step
from ..tasks import OfTask, Task
from ..validation import Duration
from . import TaskContext
from .data import StateT, TaskData
from .logger import TaskLogger
from .steps import Body
from .streams import TaskStream
from .thread import TaskThread, call_in_another_thread

P = ParamSpec("P")
T = TypeVar("T")
SessionT = TypeVar("SessionT", bound=Session)
ParamsT = TypeVar("ParamsT")


class SyncTaskContext(TaskData[StateT]):
    """The running `def` task; the methods of :class:`durable_sa.TaskContext`, blocking its thread instead of awaited.

    It belongs to the task's own thread. `def` steps run in that thread, too.
    """

    __slots__ = ("_calls", "_claimed", "_state", "context", "thread")

    blocking: ClassVar = True
    """True: the methods block. False for a `TaskContext`."""

    def __init__(self, context: TaskContext[StateT]) -> None:
        self.context = context
        self.thread: TaskThread | None = None
        self._calls: list[Callable[[], Coroutine[Any, Any, Any]]] | None = None
        """Takes the calls that are not to be carried out."""
        self._claimed = context._claimed
        self._state = context._state

    @property
    def _own_thread(self) -> TaskThread:
        if self.thread is None:
            raise InvalidState("The task", "not running")
        return self.thread

    @property
    def logger(self) -> TaskLogger:
        """As :attr:`durable_sa.TaskContext.logger`."""
        branch = None if self.thread is None else self.thread.branch
        return TaskLogger(
            self._claimed, lambda record: self.context.log_line(record, branch), self.context.logger.lowest
        )

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._calls is not None:
            self._calls.append(make)
            return cast(T, None)
        return self._perform(make)

    def _perform(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._own_thread.call(make)

    async def _execute(self, body: Callable[[], Any]) -> Any:
        return await self._own_thread.execute(body)

    @overload
    def step(self, name: str, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    def step(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`durable_sa.TaskContext.step`; `def` functions run in this thread."""
        if is_coroutine_function(plain_step(fn)[0]):
            return self._call(lambda: self._await(lambda: self.context.step(name, fn, *args, **kwargs)))
        return self._call(lambda: self.context.step_by(self._attempt, name, fn, args, kwargs))

    def _attempt(
        self, name: str, body: Body, timeout: float | None, around: contextlib.AbstractContextManager[object]
    ) -> Awaitable[Any]:
        def execute() -> Any:
            with around:
                result = body() if timeout is None else call_in_another_thread(name, body, timeout)
                if inspect.isawaitable(result):
                    # A function such as `lambda: fetch(url)` is only known to return one once it has.
                    return self._call(lambda: self._await(lambda: result))
                return result

        return self._execute(execute)

    async def _await(self, make: Callable[[], Awaitable[T]]) -> T:
        with running(self.context):
            return await make()

    @overload
    def transaction(
        self, name: str, fn: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @overload
    def transaction(
        self, name: str, fn: Callable[Concatenate[SessionT, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    def transaction(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`durable_sa.TaskContext.transaction`; `fn` is called with a `Session`, in this thread."""
        return self._call(lambda: self.context.transaction_by(self._execute, name, fn, args, kwargs))

    @overload
    def spawn(
        self, name: str, task: Task[None, T], params: None = None, /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...
    @overload
    def spawn(
        self, name: str, task: Task[ParamsT, T], params: ParamsT | OfTask[ParamsT], /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...
    def spawn(self, name: str, task: Any, params: Any = None, /, **options: Unpack[SpawnOptions]) -> TaskHandle[Any]:
        """As :meth:`durable_sa.TaskContext.spawn`."""
        return self._call(lambda: self.context.spawn(name, task, params, **options))

    def spawn_by_name(
        self, name: str, task_name: str, params: Any = None, /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[Any]:
        """As :meth:`durable_sa.TaskContext.spawn_by_name`."""
        return self._call(lambda: self.context.spawn_by_name(name, task_name, params, **options))

    def join(self, handle: TaskHandle[T], *, timeout: Duration | None = None) -> T:
        """As :meth:`durable_sa.TaskContext.join`."""
        return self._call(lambda: self.context.join(handle, timeout=timeout))

    def sleep_for(self, name: str, duration: Duration) -> None:
        """As :meth:`durable_sa.TaskContext.sleep_for`."""
        self._call(lambda: self.context.sleep_for(name, duration))

    def sleep_until(self, name: str, when: datetime) -> None:
        """As :meth:`durable_sa.TaskContext.sleep_until`."""
        self._call(lambda: self.context.sleep_until(name, when))

    @overload
    def await_event(self, name: str, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    @overload
    def await_event(self, name: str, *, timeout: Duration | None = None, type: Any = None) -> Any: ...
    def await_event(self, name: str, *, timeout: Duration | None = None, type: Any = None) -> Any:  # noqa: A002
        """As :meth:`durable_sa.TaskContext.await_event`."""
        return self._call(lambda: self.context.await_event(name, timeout=timeout, type=type))

    def emit_event(self, name: str, payload: Any = None) -> bool:
        """As :meth:`durable_sa.TaskContext.emit_event`."""
        return self._call(lambda: self.context.emit_event(name, payload))

    def send(self, task: AnyTaskId, topic: str, payload: Any = None, *, idempotency_key: str | None = None) -> None:
        """As :meth:`durable_sa.TaskContext.send`."""
        self._call(lambda: self.context.send(task, topic, payload, idempotency_key=idempotency_key))

    @overload
    def receive(self, topic: str, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    @overload
    def receive(self, topic: str, *, timeout: Duration | None = None, type: Any = None) -> Any: ...
    def receive(self, topic: str, *, timeout: Duration | None = None, type: Any = None) -> Any:  # noqa: A002
        """As :meth:`durable_sa.TaskContext.receive`."""
        return self._call(lambda: self.context.receive(topic, timeout=timeout, type=type))

    def race(self, name: str, /, **waits: Callable[[], Any]) -> Race[Any]:
        """As :meth:`durable_sa.TaskContext.race`; each wait is a function: `paid=lambda: ctx.receive("paid")`."""
        makes = {key: self._captured(key, wait) for key, wait in waits.items()}
        return self._call(lambda: self.context.race(name, **makes))

    def _captured(self, key: str, wait: Callable[[], Any]) -> Callable[[], Coroutine[Any, Any, Any]]:
        """Return the call that a function makes on this context, which is not carried out."""
        if not callable(wait):
            raise TypeError(
                f"{key}= of a race is a function without parameters in a `def` task: `lambda: ctx.receive(...)`"
            )
        captured = self._calls = []
        try:
            wait()
        finally:
            self._calls = None
        if len(captured) != 1:
            raise TypeError(f"{key}= of a race makes {len(captured)} calls of the context, and it takes one wait")
        return captured[0]

    def publish(self, name: str, value: Any) -> None:
        """As :meth:`durable_sa.TaskContext.publish`."""
        self._call(lambda: self.context.publish(name, value))

    def stream(self, name: str, type: Any = None, *, keep_open: bool = False) -> SyncTaskStream[Any]:  # noqa: A002
        """As :meth:`durable_sa.TaskContext.stream`, for a `with` block."""
        return SyncTaskStream(self._call, self.context.stream(name, type, keep_open=keep_open))

    def heartbeat(self, duration: Duration | None = None) -> None:
        """As :meth:`durable_sa.TaskContext.heartbeat`."""
        if threading.get_ident() == self._own_thread.ident:
            self._call(lambda: self.context.heartbeat(duration))
        elif self.context.signal is not None:
            # In the thread of a step with a timeout, which cannot make requests.
            raise self.context.signal

    def rand(self) -> float:
        """As :meth:`durable_sa.TaskContext.rand`."""
        return self._call(self.context.rand)

    def now(self) -> datetime:
        """As :meth:`durable_sa.TaskContext.now`."""
        return self._call(self.context.now)

    def uuid7(self) -> uuid.UUID:
        """As :meth:`durable_sa.TaskContext.uuid7`."""
        return self._call(self.context.uuid7)


class SyncTaskStream(Generic[T]):
    """A block in which a `def` task writes a stream, made by `ctx.stream`."""

    def __init__(self, call: Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any], stream: TaskStream[T]) -> None:
        self._call = call
        self._stream = stream

    def __enter__(self) -> Self:
        self._call(self._stream.__aenter__)
        return self

    def write(self, item: T) -> None:
        """As `write` of the block of an `async def` task."""
        self._call(lambda: self._stream.write(item))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ControlFlow | asyncio.CancelledError):
            return  # the run has ended, and its blocks with it
        self._call(lambda: self._stream.__aexit__(kind, error, traceback))


async def run_in_thread(context: SyncTaskContext[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Execute a `def` task in a thread of its own. The root of the task's run awaits this coroutine."""
    context.thread = thread = TaskThread(context.context)
    if (limit := context.context._run.limit) is not None:  # pyright: ignore[reportPrivateUsage]
        limit.hand_over = thread.time_out
    return await thread.execute(functools.partial(function, context, *arguments))
