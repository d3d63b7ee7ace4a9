"""All asyncio tasks of one run: their start, their exceptions, and their end."""

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

from ..errors import InvalidState
from . import blocking
from .blocking import AnyTask, retrieve_exception
from .branches import SET_FACTORY_BEFORE, Branch, branch_of, current, current_branch, entered
from .suspension import TURNS, Quiescence

T = TypeVar("T")

CANCEL_INTERVAL: Final = 0.1
"""Seconds that the tasks of a run have to unwind before they are cancelled once more."""


class BranchTree:
    """The branches of one run, from `start` to `unwind`, on one event loop with the task factory installed.

    `on_quiescent` is called at most once, by the event loop itself and in the context in which this object was made:
    when nothing is `busy`, at least one `wait` is pending, and all tasks are blocked on such waits or on each other. If
    some are blocked on anything else, a timer or a socket, it is called `grace` seconds later, and a warning is logged.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_context",
        "_grace",
        "_loop",
        "_on_done",
        "_on_quiescent",
        "_quiescence",
        "_root",
        "_stopped",
        "_suppress_exceptions",
        "_tasks",
        "_thread",
        "_unretrieved",
    )

    def __init__(self, *, on_quiescent: Callable[[], object], grace: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._root: AnyTask | None = None
        """None once it has ended, because it refers to its context, and that to this object."""
        self._tasks: dict[AnyTask, Branch] = {}
        # The rest is made on first use, because most tasks end without a branch, a failure or a wait.
        self._unretrieved: weakref.WeakSet[AnyTask] | None = None
        """Tasks whose exception has not been retrieved yet."""
        self._suppress_exceptions = False
        """True once the run is being unwound, so that the code to retrieve exceptions is cancelled."""
        self._closed = False
        self._on_quiescent: Callable[[], object] = on_quiescent
        self._on_done: Callable[[asyncio.Task[Any]], object] = _ignore
        self._grace = grace
        self._context = contextvars.copy_context()
        self._quiescence: Quiescence | None = None
        self._stopped = False

    def _watch(self) -> Quiescence:
        if self._quiescence is None:
            self._quiescence = Quiescence(
                self._tasks, self._on_quiescent, grace=self._grace, loop=self._loop, context=self._context
            )
            if self._stopped:
                self._quiescence.stop()
        return self._quiescence

    def _stop_watching(self) -> None:
        self._stopped = True
        self._on_quiescent = _ignore
        if self._quiescence is not None:
            self._quiescence.stop()

    @property
    def tasks(self) -> set[AnyTask]:
        """The live asyncio tasks, the root included."""
        return {task for task in self._tasks if not task.done()}

    def start(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        context: contextvars.Context | None = None,
        name: str | None = None,
        on_done: Callable[[asyncio.Task[T]], object] | None = None,
    ) -> asyncio.Task[T]:
        """Start the root, in `context` or a copy of the current one.

        `on_done` is called with the root when it has ended, unless the run was unwound before. It costs less than a
        callback of the task, which the event loop would schedule separately.

        Raises:
            InvalidState: the event loop has lost the task factory.
        """
        context = contextvars.copy_context() if context is None else context
        branch = Branch(self, ())
        context.run(current.set, branch)
        if on_done is not None:
            self._on_done = on_done
        directly: Any = getattr(self._loop.get_task_factory(), "create_root", None)
        if directly is not None:
            task: asyncio.Task[T] = directly(self._loop, coro, name=name, context=context)
            self._root = task
            if not branch.bound:
                self.adopt(task, branch)
            return task
        # Another factory is on top of ours, which finds the branch in the context.
        self._root = task = self._loop.create_task(coro, name=name, context=context)
        if not branch.bound:
            task.cancel()
            raise InvalidState("The event loop's task factory", "not the one that runs need", SET_FACTORY_BEFORE)
        return task

    def busy(self) -> AbstractContextManager[None]:
        """Return a context manager for a step, a transaction or a call of the engine: meanwhile the run is busy."""
        return self._watch()

    def wait(self, future: asyncio.Future[T]) -> Coroutine[Any, Any, T]:
        """Await `future`, which a durable wait resolves.

        Raises:
            InvalidState: under `asyncio.wait_for` with a timeout.
        """
        return self._watch().wait(future)

    def scope(self, label: str) -> AbstractContextManager[Branch]:
        """Return a context manager for the body of a step, which is a branch of its own."""
        return entered(current_branch().within_step(label))

    def race(self, label: str) -> AbstractContextManager[Branch]:
        """Return a context manager in which the asyncio tasks of a race are created."""
        return entered(current_branch().within_race(label))

    async def unwind(self, *, grace: float = 5.0) -> list[AnyTask]:
        """End the run: cancel its tasks until they have ended, for up to `grace` seconds.

        Exceptions of tasks that unwind are ignored. Call it from outside of the run. It returns the tasks that are
        still alive, and drops all references to them; without live tasks, it returns at once.
        """
        self._stop_watching()
        if self._root is not None:
            for task in self._unretrieved or ():
                retrieve_exception(task)
        self._unretrieved, self._suppress_exceptions = None, True
        self._suppress_outcomes()
        deadline = self._loop.time() + grace
        for depth in sorted({branch.depth for branch in self._tasks.values()}):
            # Parents first: a task group cancels its tasks itself, and a second cancel would interrupt their cleanup.
            for task, branch in list(self._tasks.items()):
                if branch.depth == depth and not task.cancelling():
                    task.cancel()
            await self._let_cancellation_spread()
        while (live := self.tasks) and (remaining := deadline - self._loop.time()) > 0:
            await asyncio.wait(live, timeout=min(CANCEL_INTERVAL, remaining))
            self._suppress_outcomes()
            for task in self.tasks:
                task.cancel()
        self._closed = True
        self._root, self._on_done = None, _ignore
        for task in live:
            del self._tasks[task], branch_of[task]
            # Without these two, asyncio logs the task when it is collected, and awaits it when the event loop ends.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            asyncio._unregister_task(task)
        return list(live)

    def accepts_tasks_on(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether a task that the calling thread creates on `loop` can be one of this run."""
        return loop is self._loop and not self._closed and self.is_in_thread()

    def is_in_thread(self) -> bool:
        """Return whether the calling thread is the one of the run's event loop."""
        return threading.get_ident() == self._thread

    def adopt(self, task: AnyTask, branch: Branch) -> None:
        """Add the asyncio task of a branch."""
        branch.bound = True
        branch_of[task] = branch
        self._tasks[task] = branch
        task.add_done_callback(self._task_done)

    def _suppress_outcomes(self) -> None:
        """Keep asyncio from logging the futures that `gather` and `shield` have made of the tasks."""
        for outcome in blocking.outcomes(self._tasks):
            outcome.add_done_callback(retrieve_exception)

    async def _let_cancellation_spread(self) -> None:
        """Let the event loop turn as often as a cancellation may take to get to the tasks below."""
        for _ in range(TURNS):
            if not self._tasks:
                return
            await asyncio.sleep(0)

    def _task_done(self, task: AnyTask) -> None:
        self._tasks.pop(task, None)
        branch_of.pop(task, None)
        is_root = task is self._root
        if is_root:
            self._root = None
            self._stop_watching()
        self._closed = self._root is None and not self._tasks
        if self._suppress_exceptions:
            retrieve_exception(task)
        elif getattr(task, "_log_traceback", False):
            if self._unretrieved is None:
                self._unretrieved = weakref.WeakSet()
            self._unretrieved.add(task)
        if self._quiescence is not None:
            self._quiescence.look()
        if is_root:
            on_done, self._on_done = self._on_done, _ignore
            on_done(task)


def _ignore(*_: object) -> None:
    """Take the place of a callback, which would keep an ended run alive."""
