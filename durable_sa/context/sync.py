"""`def` tasks: user code in a thread, its durable calls on the event loop.

The thread of a run and the run's root task take turns: while user code runs, the root waits for its next request;
while the root carries out a request, the thread waits for the answer. So a `def` task suspends, is cancelled and is
resumed by the same means as any other. A signal that ends the run reaches the thread as the answer to the call that
it is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import itertools
import queue
import threading
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from sqlalchemy.orm import Session
from typing_extensions import Unpack

from ..concurrency.branches import Branch, current_branch, entered
from ..current import running
from ..errors import InvalidState, TaskTimeout
from ..execution.run import RAISED_BEFORE_PARKING
from ..policies import Duration
from ..results import TaskHandle
from ..serialization.annotations import is_coroutine_function
from ..signals import ControlFlow, Suspended
from ..steps import PLAIN, Step, StepOptions

if TYPE_CHECKING:
    from ..options import SpawnOptions
    from ..tasks import Task
    from . import StateT, TaskContext
    from .base import Call
else:
    from typing_extensions import TypeVar as _TypeVar

    StateT = _TypeVar("StateT", default=Any)

P = ParamSpec("P")
T = TypeVar("T")
ParamsT = TypeVar("ParamsT")


UNWINDING_GRACE = 6.0
"""Seconds that a thread gets to come to its end once its run has; longer than the branches of a run get."""


class _Thread:
    """The thread of one run. Made in the run's root."""

    def __init__(self, name: str) -> None:
        self.requests: asyncio.Queue[tuple[Callable[[], Coroutine[Any, Any, Any]], queue.SimpleQueue[Any]] | None]
        self.requests = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.name = name
        self.signal: BaseException | None = None
        self.ident: int | None = None
        self.lock = threading.Lock()
        self.ignored = 0
        self.branch = current_branch()
        """The root's branch; while the body of a step runs in the thread, one of its own."""

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """From the thread: have a coroutine run on the loop, and wait for what comes of it."""
        if threading.get_ident() != self.ident:
            raise InvalidState(
                "The context of a `def` task",
                "used outside of the task's own thread",
                "Call it from there, or write the task as `async def` and use asyncio.gather.",
            )
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        with self.lock:
            if self.signal is None:
                request = functools.partial(_perform, self.branch, make)
                self.loop.call_soon_threadsafe(self.requests.put_nowait, (request, answers))
            else:
                self.ignored += 1
                if self.ignored <= RAISED_BEFORE_PARKING:
                    raise self.signal
        # Code that swallows the signal and calls again would spin: it waits here until the process ends.
        succeeded, value = answers.get()
        if succeeded:
            return cast(T, value)
        raise value

    @contextlib.contextmanager
    def step(self, call: Call) -> Generator[None]:
        """From the thread: while the body of a step runs, what it calls is part of that step."""
        outer = self.branch
        self.branch = outer.within_step(str(call.key))
        try:
            yield
        finally:
            self.branch = outer


class SyncTaskContext(Generic[StateT]):
    """The running `def` task; the methods of :class:`durable_sa.TaskContext`, blocking its thread instead of awaited.

    It belongs to the task's own thread. `def` steps run in that thread, too.
    """

    __slots__ = ("context", "thread")

    def __init__(self, context: TaskContext[StateT]) -> None:
        self.context = context
        self.thread: _Thread | None = None

    @property
    def _own_thread(self) -> _Thread:
        if self.thread is None:
            raise InvalidState("The task", "not running")
        return self.thread

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._own_thread.call(make)

    def _inside(self, call: Call) -> contextlib.AbstractContextManager[None]:
        """While a step is executed in this thread."""
        return self._own_thread.step(call)

    @property
    def task_id(self) -> uuid.UUID:
        """The task's id, the same in all attempts."""
        return self.context.task_id

    @property
    def run_id(self) -> uuid.UUID:
        """The id of this attempt; it outlives suspensions."""
        return self.context.run_id

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1."""
        return self.context.attempt

    @property
    def task_name(self) -> str:
        """The name under which the task was spawned."""
        return self.context.task_name

    @property
    def queue_name(self) -> str:
        """The queue the task was spawned into."""
        return self.context.queue_name

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers given at spawn; plain JSON."""
        return self.context.headers

    @property
    def state(self) -> StateT:
        """What the worker's `lifespan` yielded, else the client's `state`."""
        return self.context.state

    @overload
    def step(self, name: str, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    def step(self, name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`durable_sa.TaskContext.step`; `def` functions run in this thread."""
        function: Callable[..., Any] = fn.function if isinstance(fn, Step) else fn
        options = fn.options if isinstance(fn, Step) else PLAIN
        if is_coroutine_function(function):
            return self._call(functools.partial(self._step_on_loop, name, fn, args, kwargs))
        begun = self._call(lambda: self.context.begin_step(name, function, options, args, kwargs))
        if begun.recorded:
            return begun.value
        for tries in itertools.count(begun.tries + 1):
            try:
                with self._inside(begun.call), self.context.around_step(begun.call):
                    result = self._execute(begun.call, function, options, args, kwargs)
                    if inspect.isawaitable(result):
                        # Such as from `lambda: fetch(url)`, which does not tell beforehand.
                        result = self._call(functools.partial(self._await, result))
            except Exception as failure:
                again = functools.partial(self.context.try_again, begun.call, tries, options, failure)
                if not self._call(again):
                    raise
            else:
                return self._call(functools.partial(self.context.end_step, begun.call, begun.codec, result))
        raise AssertionError("unreachable")

    async def _step_on_loop(
        self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with running(self.context):
            return await cast("Coroutine[Any, Any, Any]", self.context.step(name, fn, *args, **kwargs))

    async def _await(self, awaitable: Awaitable[T]) -> T:
        with running(self.context):
            return await awaitable

    def _execute(self, call: Call, function: Callable[..., Any], options: StepOptions, args: Any, kwargs: Any) -> Any:
        if options.timeout is None:
            return function(*args, **kwargs)
        # Nothing can interrupt a thread, so a step with a limit gets one that can be left behind.
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        context = contextvars.copy_context()

        def run() -> None:
            try:
                answers.put((True, context.run(function, *args, **kwargs)))
            except BaseException as error:  # noqa: BLE001 - handed over
                answers.put((False, error))

        threading.Thread(target=run, name=f"durable-step:{call.name}", daemon=True).start()
        try:
            succeeded, value = answers.get(timeout=options.timeout)
        except queue.Empty:
            raise TaskTimeout(f"step {call.name!r}", options.timeout) from None
        if succeeded:
            return value
        raise value

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
            # The thread of a step that has a timeout.
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


async def _perform(branch: Branch, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with entered(branch):
        return await make()


async def run_in_thread(context: SyncTaskContext[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The body of a `def` task, to be awaited as the root of its run: starts the thread and serves its requests."""
    thread = context.thread = _Thread(f"durable:{context.task_name}")
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Any] = loop.create_future()
    inherited = contextvars.copy_context()

    def finish(succeeded: bool, value: Any) -> None:
        if not outcome.done():
            outcome.set_result((succeeded, value))
        thread.requests.put_nowait(None)

    def run() -> None:
        thread.ident = threading.get_ident()
        try:
            value = inherited.run(function, context, *arguments)
        except BaseException as error:  # noqa: BLE001 - handed over
            _tell(loop, finish, False, error)
        else:
            _tell(loop, finish, True, value)

    threading.Thread(target=run, name=thread.name, daemon=True).start()
    answers: queue.SimpleQueue[Any] | None = None
    try:
        while (request := await thread.requests.get()) is not None:
            make, answers = request
            try:
                value = await make()
            except (asyncio.CancelledError, ControlFlow):
                raise
            except BaseException as error:  # noqa: BLE001 - handed over
                answers.put((False, error))
            else:
                answers.put((True, value))
            answers = None
        succeeded, value = outcome.result()
        if succeeded:
            return value
        raise value
    except (asyncio.CancelledError, ControlFlow) as error:
        signal = error if isinstance(error, ControlFlow) else (context.context.signal or Suspended())
        with thread.lock:
            thread.signal = signal
        if answers is not None:
            answers.put((False, signal))
        while not thread.requests.empty():
            if (late := thread.requests.get_nowait()) is not None:
                late[1].put((False, signal))
        # The thread unwinds now. Until it has, the run is not over: its code must not run here and elsewhere at once.
        deadline = loop.time() + UNWINDING_GRACE
        while not outcome.done() and (remaining := deadline - loop.time()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([outcome], timeout=remaining)
        raise


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
        loop.call_soon_threadsafe(function, *arguments)
