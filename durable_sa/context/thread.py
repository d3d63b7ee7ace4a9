"""The thread of a `def` task: user code runs in it, its durable calls on the event loop.

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
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeAlias, TypeVar, cast

from ..concurrency.branches import Branch, current_branch, entered
from ..errors import InvalidState, TaskTimeout
from ..execution.run import RAISED_BEFORE_PARKING
from ..execution.timeouts import AttemptTimeout
from ..signals import ControlFlow, Suspended
from . import TaskContext

T = TypeVar("T")

UNWINDING_GRACE = 6.0
"""Seconds that the thread of a run that has ended gets to unwind; longer than the branches of a run get."""

_Answers: TypeAlias = queue.SimpleQueue[tuple[bool | None, Any]]
"""The way back to a pending call: True with its result, False with its error, None with code for the thread."""
_Make: TypeAlias = Callable[[], Coroutine[Any, Any, Any]]


class TaskThread:
    """The thread of one run, and the exchange of requests and answers between it and the run's root task."""

    def __init__(self, context: TaskContext[Any]) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._requests: asyncio.Queue[tuple[_Make, _Answers] | None] = asyncio.Queue()
        self._pending: _Answers | None = None
        """The last call that the root has begun to carry out."""
        self.branch = current_branch()
        """The branch of the code in the thread: the root's, or that of the step whose body it executes."""
        self._lock = threading.Lock()
        self._signal: BaseException | None = None
        self._signals_raised = 0
        self._escaped: BaseException | None = None
        """The exception that code in the thread has raised: an answer, even if it looks like the end of the run."""
        self._deadline: float | None = None
        self._listening = False
        """True while the root waits for a request: code in the thread is running."""
        self._timeout: TaskTimeout | None = None
        """The timeout that the next call raises."""
        self._thread: threading.Thread | None = None
        self._abandoned = False
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
            timeout, self._timeout = self._timeout, None
            if timeout is not None and self._signal is None:
                raise timeout
            if self._signal is None:
                request = functools.partial(_perform, self.branch, make)
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

        outer = self.branch, self._pending
        self.branch = current_branch()
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
            self.branch, self._pending = outer
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

        self._thread = threading.Thread(target=target, name=f"durable:{self._context.task_name}", daemon=True)
        self._thread.start()

    async def _serve(self) -> None:
        while (request := await self._next_request()) is not None:
            make, self._pending = request
            try:
                answer = True, await make()
            except BaseException as error:
                # By its type, because `isinstance` asks `__class__`, which is user code.
                ends = issubclass(type(error), asyncio.CancelledError | ControlFlow) and error is not self._escaped
                if ends and not issubclass(type(error), AttemptTimeout):
                    raise
                answer = False, error
            self._pending.put(answer)
            self._escaped = None

    async def _next_request(self) -> tuple[_Make, _Answers] | None:
        self._listening = True
        request = await self._requests.get()
        self._listening = False
        return request

    def time_out(self, error: TaskTimeout) -> bool:
        """In the root: have the next call of the thread raise an error. Returns False if it waits for one already."""
        if self._listening:
            with self._lock:
                self._timeout = error
        return self._listening

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
        if not outcome.done() and not self._abandoned and self._thread is not None:
            # The body of a step and the task itself are in the same thread, which counts once.
            self._abandoned = True
            run = self._context._run  # pyright: ignore[reportPrivateUsage]
            run.host.thread_abandoned(run.claimed, self._thread)


async def _perform(branch: Branch, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with entered(branch):
        return await make()


def call_in_another_thread(name: str, function: Callable[[], T], timeout: float) -> T:
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
