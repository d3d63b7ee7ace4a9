"""`def` tasks: user code in a thread, its durable calls on the event loop.

The thread of a run and the run's root task take turns: while the thread executes user code, the root waits for its next
request; while the root carries out a request, the thread waits for the answer. A request may need user code in turn,
the body of a step: then the thread executes that, and the root carries out the requests it makes, before the request
goes on. So a `def` task suspends, is cancelled and is resumed by the same means as any other, and its steps are those
of any other. A signal that ends the run reaches the thread as the answer to its pending call.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import queue
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from datetime import datetime
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeAlias, TypeVar, cast, overload

from sqlalchemy.orm import Session
from typing_extensions import Unpack

from ..concurrency.branches import Branch, current_branch, entered
from ..current import running
from ..errors import InvalidState, TaskTimeout
from ..execution.run import RAISED_BEFORE_PARKING
from ..options import SpawnOptions
from ..results import TaskHandle
from ..serialization.annotations import is_coroutine_function
from ..signals import ControlFlow, Suspended
from ..steps import plain_step
from ..tasks import Task
from ..validation import Duration
from . import TaskContext
from .data import StateT, TaskData

P = ParamSpec("P")
T = TypeVar("T")
ParamsT = TypeVar("ParamsT")

UNWINDING_GRACE = 6.0
"""Seconds that the thread of a run that has ended gets to unwind; longer than the branches of a run get."""

_Answers: TypeAlias = queue.SimpleQueue[tuple[bool | None, Any]]
"""The way back to a pending call: True with its result, False with its error, None with code for the thread."""
_Make: TypeAlias = Callable[[], Coroutine[Any, Any, Any]]


class _Thread:
    """The thread of one run, and the exchange of requests and answers between it and the run's root task."""

    def __init__(self, context: TaskContext[Any]) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._requests: asyncio.Queue[tuple[_Make, _Answers] | None] = asyncio.Queue()
        self._pending: _Answers | None = None
        """The last call that the root has begun to carry out."""
        self._branch = current_branch()
        """The branch of the code in the thread: the root's, or that of the step whose body it executes."""
        self._lock = threading.Lock()
        self._signal: BaseException | None = None
        self._signals_raised = 0
        self._escaped: BaseException | None = None
        """The exception that code in the thread has raised: an answer, even if it looks like the end of the run."""
        self._deadline: float | None = None
        self.ident: int | None = None

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """In the thread: have the root await the coroutine that `make` returns, and wait for its result."""
        if threading.get_ident() != self.ident:
            raise InvalidState(
                "The context of a `def` task",
                "used outside of the task's own thread",
                "Call it from there, or write the task as `async def` and use asyncio.gather.",
            )
        answers: _Answers = queue.SimpleQueue()
        with self._lock:
            if self._signal is None:
                request = functools.partial(_perform, self._branch, make)
                self._loop.call_soon_threadsafe(self._requests.put_nowait, (request, answers))
            else:
                self._signals_raised += 1
                if self._signals_raised <= RAISED_BEFORE_PARKING:
                    raise self._signal
        # Code that swallows the signal and calls again would spin: it waits here until the process ends.
        while True:
            succeeded, value = answers.get()
            if succeeded is None:
                value()
            elif succeeded:
                return cast(T, value)
            else:
                raise value

    async def execute(self, body: Callable[[], Any]) -> Any:
        """In the root: execute `body` in the thread, and carry out its requests until it has ended."""
        outcome: asyncio.Future[tuple[bool, Any]] = self._loop.create_future()

        def finish(succeeded: bool, value: Any) -> None:
            if not outcome.done():
                outcome.set_result((succeeded, value))
            self._requests.put_nowait(None)

        def run() -> None:
            try:
                ended = True, body()
            except BaseException as error:  # noqa: BLE001 - raised in the root
                ended = False, error
            with contextlib.suppress(RuntimeError):  # the event loop is closed, and with it the run has ended
                self._loop.call_soon_threadsafe(finish, *ended)

        outer = self._branch, self._pending
        self._branch = current_branch()
        if self._pending is None:
            self._start(run)
        else:
            self._pending.put((None, run))
        try:
            await self._serve()
        except (asyncio.CancelledError, ControlFlow) as error:
            await self._unwind(error, outcome)
            raise
        finally:
            self._branch, self._pending = outer
        succeeded, value = outcome.result()
        if succeeded:
            return value
        self._escaped = value
        raise value

    def _start(self, run: Callable[[], None]) -> None:
        context = contextvars.copy_context()

        def target() -> None:
            self.ident = threading.get_ident()
            context.run(run)

        threading.Thread(target=target, name=f"durable:{self._context.task_name}", daemon=True).start()

    async def _serve(self) -> None:
        while (request := await self._requests.get()) is not None:
            make, self._pending = request
            try:
                answer = True, await make()
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError | ControlFlow) and error is not self._escaped:
                    raise
                answer = False, error
            self._pending.put(answer)
            self._escaped = None

    async def _unwind(self, error: BaseException, outcome: asyncio.Future[tuple[bool, Any]]) -> None:
        """Raise the signal that ends the run in the thread, and wait until the code there has ended."""
        signal = error if isinstance(error, ControlFlow) else (self._context.signal or Suspended())
        with self._lock:
            self._signal = signal
        if self._pending is not None:
            self._pending.put((False, signal))
        while not self._requests.empty():
            if (late := self._requests.get_nowait()) is not None:
                late[1].put((False, signal))
        # The run is not over before its code in the thread is: that must not run here and elsewhere at once.
        if self._deadline is None:
            self._deadline = self._loop.time() + UNWINDING_GRACE
        while not outcome.done() and (remaining := self._deadline - self._loop.time()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([outcome], timeout=remaining)


class SyncTaskContext(TaskData[StateT]):
    """The running `def` task; the methods of :class:`durable_sa.TaskContext`, blocking its thread instead of awaited.

    It belongs to the task's own thread. `def` steps run in that thread, too.
    """

    __slots__ = ("_claimed", "_state", "context", "thread")

    blocking: ClassVar = True
    """True: the methods block. False for a `TaskContext`."""

    def __init__(self, context: TaskContext[StateT]) -> None:
        self.context = context
        self.thread: _Thread | None = None
        self._claimed = context._claimed
        self._state = context._state

    @property
    def _own_thread(self) -> _Thread:
        if self.thread is None:
            raise InvalidState("The task", "not running")
        return self.thread

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
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
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        around: contextlib.AbstractContextManager[object],
    ) -> Awaitable[Any]:
        def body() -> Any:
            with around:
                if timeout is None:
                    result = function(*args, **kwargs)
                else:
                    result = _in_another_thread(name, functools.partial(function, *args, **kwargs), timeout)
                if inspect.isawaitable(result):
                    # A function such as `lambda: fetch(url)` is only known to return one once it has.
                    return self._call(lambda: self._await(lambda: result))
                return result

        return self._execute(body)

    async def _await(self, make: Callable[[], Awaitable[T]]) -> T:
        with running(self.context):
            return await make()

    def transaction(
        self, name: str, fn: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As :meth:`durable_sa.TaskContext.transaction`; `fn` is called with a `Session`, on the event loop."""
        return self._call(lambda: cast(Coroutine[Any, Any, T], self.context.transaction(name, fn, *args, **kwargs)))

    @overload
    def spawn(
        self, name: str, task: Task[None, T], params: None = None, /, **options: Unpack[SpawnOptions]
    ) -> TaskHandle[T]: ...
    @overload
    def spawn(
        self, name: str, task: Task[ParamsT, T], params: ParamsT, /, **options: Unpack[SpawnOptions]
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
    def await_event(self, name: str, *, timeout: Duration | None = None, type: None = None) -> Any: ...
    def await_event(self, name: str, *, timeout: Duration | None = None, type: Any = None) -> Any:  # noqa: A002
        """As :meth:`durable_sa.TaskContext.await_event`."""
        return self._call(lambda: self.context.await_event(name, timeout=timeout, type=type))

    def emit_event(self, name: str, payload: Any = None) -> bool:
        """As :meth:`durable_sa.TaskContext.emit_event`."""
        return self._call(lambda: self.context.emit_event(name, payload))

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


async def run_in_thread(context: SyncTaskContext[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Execute a `def` task in a thread of its own. The root of the task's run awaits this coroutine."""
    context.thread = _Thread(context.context)
    return await context.thread.execute(functools.partial(function, context, *arguments))


async def _perform(branch: Branch, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with entered(branch):
        return await make()


def _in_another_thread(name: str, function: Callable[[], T], timeout: float) -> T:
    """Call a step's function in a thread of its own, which is abandoned after `timeout` seconds.

    Raises:
        TaskTimeout: the function has not returned by then.
    """
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(function))
        except BaseException as error:  # noqa: BLE001 - raised in the thread of the task
            outcome.set_exception(error)

    threading.Thread(target=run, name=f"durable-step:{name}", daemon=True).start()
    done, _ = wait([outcome], timeout)
    if not done:
        raise TaskTimeout(f"step {name!r}", timeout)
    return outcome.result()
