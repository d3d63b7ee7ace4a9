"""The asyncio tasks of one run of user code: which branch each one is, and how all of them come to an end.

A run begins as one asyncio task, its root; `gather`, `TaskGroup` and the like make more. Each is a branch, with a path
that depends on nothing but the order in which its parent created it: what a branch does can be told apart in the same
way when the code is replayed, whatever finished first. (`asyncio.as_completed` creates the tasks of coroutines in no
order; of tasks that exist already it makes none.)
"""

import asyncio
import contextvars
import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Coroutine, Hashable
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from typing import Any, Final, Generic, TypeVar

from ..errors import InvalidState
from . import blocking
from .blocking import AnyFuture, AnyTask
from .suspension import TURNS, Quiescence

T = TypeVar("T")
TaskT = TypeVar("TaskT", bound=AnyTask)
BranchT = TypeVar("BranchT", bound="Branch | None")

CANCEL_AGAIN: Final = 0.1
"""Seconds the tasks of a run have to unwind before they are cancelled once more."""

_current: ContextVar["Branch | None"] = ContextVar("durable_sa_branch", default=None)
_branch_of: dict[AnyTask, "Branch | None"] = {}
"""The live asyncio tasks of all runs. The context variable alone would not do: tasks may share a context."""


class _Counters:
    """What a branch has created and asked for so far."""

    __slots__ = ("callbacks", "children", "occurrences")

    def __init__(self) -> None:
        self.children = itertools.count()
        self.callbacks = itertools.count()
        self.occurrences: dict[Hashable, int] = {}


class Branch:
    """One asyncio task of a run, or the body of one step in it."""

    __slots__ = ("_counters", "bound", "branches", "depth", "path")

    def __init__(self, branches: "Branches", path: tuple[int | str, ...], *, bound: bool = False) -> None:
        self.branches = branches
        self.path = path
        """`()` for the root; for others the parent's path and the number of the task, or the label of the step."""
        self.depth = len(path)
        """How far below the root."""
        self.bound = bound
        """Whether its asyncio task is known. While an eager task takes its first step it is not yet."""
        self._counters: _Counters | None = None

    @property
    def _count(self) -> "_Counters":
        """Made when it is needed: most branches create no other and repeat nothing."""
        if self._counters is None:
            self._counters = _Counters()
        return self._counters

    def occurrence(self, identity: Hashable) -> int:
        """How often this branch was asked for `identity` before: 0, then 1, and so on."""
        occurrences = self._count.occurrences
        count = occurrences.get(identity, 0)
        occurrences[identity] = count + 1
        return count

    def begin_anew(self) -> None:
        """Counts from the beginning again, for a body that is run once more: what it asks for is the same."""
        self._counters = None

    def fork(self) -> "Branch":
        """The branch of the next task that this one creates."""
        return Branch(self.branches, (*self.path, next(self._count.children)))

    def fork_in_callback(self) -> "Branch":
        """The same for its callbacks: they come in any order, so they must not shift the numbers of the others."""
        return Branch(self.branches, (*self.path, f"callback-{next(self._count.callbacks)}"))

    def fork_in_wait_for(self) -> "Branch":
        """This branch once more, for a task that `asyncio.wait_for` creates: from Python 3.12 on it makes do without.

        Both go by the same path and counters, so that what is replayed by another Python finds the same.
        """
        _ = self._count
        branch = copy.copy(self)
        branch.depth += 1
        branch.bound = False
        return branch

    def start(self, create: Callable[[], TaskT], context: contextvars.Context | None) -> TaskT:
        """The asyncio task of this branch, which `create` makes in `context`, None being a copy of the current one."""
        if context is None:
            token = _current.set(self)
            try:
                task = create()
            finally:
                _current.reset(token)
        else:
            with suppress(RuntimeError):  # the running task is in this very context
                context.run(_current.set, self)
            task = create()
        if not self.bound:
            self.branches.adopt(task, self)
        return task


class Branches:
    """All asyncio tasks of one run, from `start` to `unwind`, on one event loop with the task factory installed.

    `on_quiescent` is called at most once, by the event loop itself and in the context in which this object was made:
    when nothing is `busy`, at least one `wait` is pending, and all tasks are blocked on such waits or on each other. If
    some are blocked on anything else, a timer or a socket, that is another `grace` seconds later and with a warning.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_context",
        "_grace",
        "_heard",
        "_loop",
        "_on_quiescent",
        "_quiescence",
        "_root",
        "_stopped",
        "_tasks",
        "_thread",
        "_unheard",
    )

    def __init__(
        self,
        *,
        on_quiescent: Callable[[], object],
        grace: float = 10.0,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._root: AnyTask | None = None
        """None once it has ended: it would still refer to its context, and so to this object."""
        self._tasks: dict[AnyTask, Branch] = {}
        # What follows is made when it is needed: most tasks end without a branch, a failure or a wait.
        self._unheard: weakref.WeakSet[AnyTask] | None = None
        """Tasks whose exception nobody has retrieved yet."""
        self._heard = False
        """Whether nobody is going to retrieve them any more."""
        self._closed = False
        self._on_quiescent: Callable[[], object] = on_quiescent
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
        self._on_quiescent = _nothing
        if self._quiescence is not None:
            self._quiescence.stop()

    @property
    def tasks(self) -> set[AnyTask]:
        """The live asyncio tasks, the root included."""
        return {task for task in self._tasks if not task.done()}

    def start(
        self, coro: Coroutine[Any, Any, T], *, context: contextvars.Context | None = None, name: str | None = None
    ) -> asyncio.Task[T]:
        """Starts the root, in `context` or a copy of the current one.

        Raises: `InvalidState` if the event loop has lost the task factory.
        """
        context = contextvars.copy_context() if context is None else context
        branch = Branch(self, ())
        context.run(_current.set, branch)
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
            raise InvalidState("The event loop's task factory", "not the one that runs need", _SET_FACTORY_BEFORE)
        return task

    def busy(self) -> AbstractContextManager[None]:
        """While a step, a transaction or a call of the engine runs, the run is not quiescent."""
        return self._watch()

    def wait(self, future: asyncio.Future[T]) -> Coroutine[Any, Any, T]:
        """Awaits `future`, which a durable wait resolves.

        Raises: `InvalidState` under `asyncio.wait_for` with a timeout.
        """
        return self._watch().wait(future)

    def scope(self, label: str) -> AbstractContextManager[Branch]:
        """While the body of a step runs: a branch of its own.

        The body does not run when its step is replayed, so the tasks it creates must not shift the numbers of others.
        """
        return entered(Branch(self, (*current_branch().path, label), bound=True))

    async def unwind(self, *, grace: float = 5.0) -> list[AnyTask]:
        """Ends the run: cancels its tasks, again and again until they have ended, but gives up after `grace` seconds.

        Returns the tasks that are alive even then; nothing here refers to them any more. What unwinding raises is
        ignored. To be called from outside of the run; without live tasks it returns at once.
        """
        self._stop_watching()
        if self._root is not None:
            # Who would have looked at these failures is being taken away.
            for task in self._unheard or ():
                _hear(task)
        self._unheard, self._heard = None, True
        self._silence()
        deadline = self._loop.time() + grace
        for depth in sorted({branch.depth for branch in self._tasks.values()}):
            # Parents first: a task group cancels its tasks itself, and twice would interrupt how they clean up.
            for task, branch in list(self._tasks.items()):
                if branch.depth == depth and not task.cancelling():
                    task.cancel()
            await self._settle()
        while (live := self.tasks) and (remaining := deadline - self._loop.time()) > 0:
            await asyncio.wait(live, timeout=min(CANCEL_AGAIN, remaining))
            self._silence()
            for task in self.tasks:
                task.cancel()
        self._closed = True
        self._root = None
        for task in live:
            del self._tasks[task], _branch_of[task]
            # The garbage collector may come across it, then, and the end of the event loop does not wait for it.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            asyncio._unregister_task(task)
        return list(live)

    def takes(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a task that the calling thread creates on `loop` can be one of this run."""
        return loop is self._loop and not self._closed and self.is_in_thread()

    def is_in_thread(self) -> bool:
        """Whether the calling thread is the one of the run's event loop."""
        return threading.get_ident() == self._thread

    def adopt(self, task: AnyTask, branch: Branch) -> None:
        branch.bound = True
        _branch_of[task] = branch
        self._tasks[task] = branch
        task.add_done_callback(self._ended)

    def _silence(self) -> None:
        """Keeps what `gather` and `shield` make of the tasks from being logged if nobody comes to await it."""
        for outcome in blocking.outcomes(self._tasks):
            outcome.add_done_callback(_hear)

    async def _settle(self) -> None:
        """Lets the event loop turn as often as it takes for a cancellation to get through to the tasks below."""
        for _ in range(TURNS):
            if not self._tasks:
                return
            await asyncio.sleep(0)

    def _ended(self, task: AnyTask) -> None:
        self._tasks.pop(task, None)
        _branch_of.pop(task, None)
        if task is self._root:
            self._root = None
            self._stop_watching()
        self._closed = self._root is None and not self._tasks
        if self._heard:
            _hear(task)
        elif getattr(task, "_log_traceback", False):
            if self._unheard is None:
                self._unheard = weakref.WeakSet()
            self._unheard.add(task)
        if self._quiescence is not None:
            self._quiescence.look()


def current_branch() -> Branch:
    """The branch of the running asyncio task; in a thread or a callback, of the task that started it.

    Raises: `LookupError` outside of runs, `InvalidState` in an asyncio task that has got away from its run.
    """
    task = _current_task()
    branch = _branch_at(task)
    if branch is None:
        raise LookupError("No run is going on here.")
    if _has_escaped(task, branch):
        raise InvalidState("This asyncio task", "not one of its run", f"The run has ended. Or: {_SET_FACTORY_BEFORE}")
    return branch


def next_branch(loop: asyncio.AbstractEventLoop, context: contextvars.Context | None) -> Branch | None:
    """The branch of the asyncio task that is about to be created; None outside of runs.

    `context` is the one it is to run in, None being a copy of the current one.
    """
    # The creating task is asked first: contexts are shared, made anew and passed around.
    creator = asyncio.current_task(loop)
    parent = _branch_at(creator)
    root = context.get(_current) if context is not None else None
    if root is not None and not root.bound and root.branches.takes(loop):
        return root
    if parent is None or not parent.branches.takes(loop) or _has_escaped(creator, parent):
        return None
    if creator is None:
        return parent.fork_in_callback()
    return parent.fork_in_wait_for() if blocking.is_called_by_wait_for() else parent.fork()


def detached() -> AbstractContextManager[None]:
    """Inside, asyncio tasks are created outside of the run: they live on when it is suspended, and take no number."""
    return entered(None)


_SET_FACTORY_BEFORE: Final = "Call loop.set_task_factory() before workers are started, not after."


class entered(Generic[BranchT]):  # noqa: N801 - what it is called in a `with` statement
    """Makes `branch` the one of the running task."""

    # Not a generator: steps enter two of these, and it would take as long as the rest of a short one.
    __slots__ = ("_branch", "_outer", "_task", "_token")

    def __init__(self, branch: BranchT) -> None:
        self._branch = branch

    def __enter__(self) -> BranchT:
        self._task = task = _current_task()
        self._outer = _branch_at(task)
        self._token = _current.set(self._branch)
        if task in _branch_of:
            _branch_of[task] = self._branch
        return self._branch

    def __exit__(self, *_: object) -> None:
        if self._task in _branch_of:
            _branch_of[self._task] = self._outer
        with suppress(ValueError):  # an abandoned coroutine is closed by the garbage collector, in whatever context
            _current.reset(self._token)


def _branch_at(task: AnyTask | None) -> Branch | None:
    """The branch of `task`, the running one; without a task, that of the context."""
    if task in _branch_of:
        return _branch_of[task]
    branch = _current.get()
    if branch is not None and not branch.bound and task is not None and branch.branches.is_in_thread():
        branch.branches.adopt(task, branch)  # it is starting eagerly
    return branch


def _has_escaped(task: AnyTask | None, branch: Branch) -> bool:
    return task is not None and task not in _branch_of and branch.branches.is_in_thread()


def _current_task() -> AnyTask | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without an event loop
        return None


def _nothing() -> None:
    """What there is to do about an ended run: a reference to it would keep it."""


def _hear(future: AnyFuture) -> None:
    """Keeps asyncio from logging that nobody retrieved the exception of `future`, which is done."""
    if not future.cancelled():
        future.exception()
