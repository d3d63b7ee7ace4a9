"""Branches: the place of each asyncio task in its run, which is the same whenever the run's code is replayed.

A *run* is one execution of user code. It begins as one asyncio task, its *root*; `gather`, `TaskGroup` and the like
create more. Each of these tasks is a *branch* of the run. Its *path* is the path of the task that created it and a
number, counted in the order of creation. So a path depends on nothing but the code: in a replay the same branch has the
same path, whatever finishes first. (`asyncio.as_completed` wraps coroutines in tasks in no fixed order, so they have no
fixed paths. It creates no tasks if it is passed tasks.)

The body of a step is a branch, too, although it has no asyncio task of its own: it is skipped in a replay, so the tasks
that it creates must not shift the numbers of others.
"""

import asyncio
import contextvars
import copy
import itertools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from typing import Final, Generic, Protocol, TypeVar

from ..errors import InvalidState
from . import blocking
from .blocking import AnyTask

TaskT = TypeVar("TaskT", bound=AnyTask)
BranchT = TypeVar("BranchT", bound="Branch | None")

SET_FACTORY_BEFORE: Final = "Call loop.set_task_factory() before workers are started, not after."

RACE: Final = "race-"
"""The beginning of the label of a race in the path of a branch."""
CALLBACK: Final = "callback-"
"""The beginning of the label of a task that a callback has created."""

current: ContextVar["Branch | None"] = ContextVar("durable_sa_branch", default=None)
branch_of: dict[AnyTask, "Branch | None"] = {}
"""The live asyncio tasks of all runs. It comes before the context variable, because tasks may share a context."""


class BranchOwner(Protocol):
    """A run, as its branches see it."""

    def adopt(self, task: AnyTask, branch: "Branch") -> None:
        """Add the asyncio task of a branch."""

    def accepts_tasks_on(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether a task that the calling thread creates on `loop` can be one of this run."""
        ...

    def is_in_thread(self) -> bool:
        """Return whether the calling thread is the one of the run's event loop."""
        ...


class _Counters:
    """The numbers that a branch has given out so far."""

    __slots__ = ("callbacks", "children", "occurrences")

    def __init__(self) -> None:
        self.children = itertools.count()
        self.callbacks = itertools.count()
        self.occurrences: dict[Hashable, int] = {}


class Branch:
    """One asyncio task of a run, or the body of one step in it."""

    __slots__ = ("_counters", "bound", "called", "depth", "live", "owner", "path")

    def __init__(
        self, owner: BranchOwner, path: tuple[int | str, ...], *, bound: bool = False, live: bool = False
    ) -> None:
        self.owner = owner
        self.path = path
        """`()` for the root. For others the parent's path, and the task's number, or the label of the step or race."""
        self.depth = len(path)
        """The distance from the root."""
        self.bound = bound
        """True once its asyncio task is known, which comes after the first step of a task that starts eagerly."""
        self.live = live
        """True once the branch is past its replay: it has made a call that was not recorded."""
        self.called = False
        """True once the branch has made a call in a replay."""
        self._counters: _Counters | None = None

    @property
    def _count(self) -> "_Counters":
        """The counters. They are made on first use, because most branches need none."""
        if self._counters is None:
            self._counters = _Counters()
        return self._counters

    def occurrence(self, identity: Hashable) -> int:
        """Return how often this branch was asked for `identity` before: 0, then 1, and so on."""
        occurrences = self._count.occurrences
        count = occurrences.get(identity, 0)
        occurrences[identity] = count + 1
        return count

    def begin_anew(self) -> None:
        """Count from 0 again, for a body that is called once more and makes the same calls."""
        self._counters = None

    def fork(self) -> "Branch":
        """Return the branch of the next task that this one creates."""
        return Branch(self.owner, (*self.path, next(self._count.children)), live=self.live)

    def fork_in_callback(self) -> "Branch":
        """Return the branch of the next task that a callback of this one creates.

        Callbacks are called in no fixed order, so they must not shift the numbers of other tasks.
        """
        return Branch(self.owner, (*self.path, f"{CALLBACK}{next(self._count.callbacks)}"), live=self.live)

    def fork_in_wait_for(self) -> "Branch":
        """Return this branch once more, for the task that `asyncio.wait_for` creates before Python 3.12.

        Both have the same path and counters, so a replay by a later Python, without that task, finds the same calls.
        """
        _ = self._count
        branch = copy.copy(self)
        branch.depth += 1
        branch.bound = False
        return branch

    def within_step(self, label: str) -> "Branch":
        """Return the branch of the body of a step that this one executes."""
        return Branch(self.owner, (*self.path, label), bound=True, live=True)

    def within_race(self, label: str) -> "Branch":
        """Return the branch of the asyncio tasks of a race, which are not created once the race is decided."""
        return Branch(self.owner, (*self.path, f"{RACE}{label}"), bound=True, live=self.live)

    def start(self, create: Callable[[], TaskT], context: contextvars.Context | None) -> TaskT:
        """Return the asyncio task of this branch, made by `create` in `context`; None is a copy of the current one."""
        if context is None:
            token = current.set(self)
            try:
                task = create()
            finally:
                current.reset(token)
        else:
            with suppress(RuntimeError):  # the running task is in this very context
                context.run(current.set, self)
            task = create()
        if not self.bound:
            self.owner.adopt(task, self)
        return task


def current_branch() -> Branch:
    """Return the branch of the running asyncio task; in a thread or a callback, of the task that started it.

    Raises:
        LookupError: outside of runs.
        InvalidState: in an asyncio task that its run does not know of.
    """
    task = _current_task()
    branch = _branch_at(task)
    if branch is None:
        raise LookupError("No run is going on here.")
    if _has_escaped(task, branch):
        raise InvalidState("This asyncio task", "not one of its run", f"The run has ended. Or: {SET_FACTORY_BEFORE}")
    return branch


def next_branch(loop: asyncio.AbstractEventLoop, context: contextvars.Context | None) -> Branch | None:
    """Return the branch of the asyncio task that is about to be created; None outside of runs.

    `context` is the one it is to run in, None being a copy of the current one.
    """
    # The creating task comes before its context, because contexts are shared, made anew and passed around.
    creator = asyncio.current_task(loop)
    parent = _branch_at(creator)
    root = context.get(current) if context is not None else None
    if root is not None and not root.bound and root.owner.accepts_tasks_on(loop):
        return root
    if parent is None or not parent.owner.accepts_tasks_on(loop) or _has_escaped(creator, parent):
        return None
    if creator is None:
        return parent.fork_in_callback()
    return parent.fork_in_wait_for() if blocking.is_called_by_wait_for() else parent.fork()


def detached() -> AbstractContextManager[None]:
    """Return a context manager inside which asyncio tasks are created outside of the run.

    They take no number, and go on when the run is suspended.
    """
    return entered(None)


class entered(Generic[BranchT]):  # noqa: N801 - used as a function in `with` statements
    """Make `branch` the one of the running task inside the block."""

    # A class, because every step enters two of these. As generators they would take as long as the rest of the step.
    __slots__ = ("_branch", "_outer", "_task", "_token")

    def __init__(self, branch: BranchT) -> None:
        self._branch = branch

    def __enter__(self) -> BranchT:
        self._task = task = _current_task()
        self._outer = _branch_at(task)
        self._token = current.set(self._branch)
        if task in branch_of:
            branch_of[task] = self._branch
        return self._branch

    def __exit__(self, *_: object) -> None:
        if self._task in branch_of:
            branch_of[self._task] = self._outer
        try:  # noqa: SIM105 - `suppress` takes longer, and each step comes here twice
            current.reset(self._token)
        except ValueError:
            pass  # the garbage collector closes abandoned coroutines in another context


def _branch_at(task: AnyTask | None) -> Branch | None:
    """Return the branch of `task`, the running one; without a task, the branch of the context."""
    if task in branch_of:
        return branch_of[task]
    branch = current.get()
    if branch is not None and not branch.bound and task is not None and branch.owner.is_in_thread():
        branch.owner.adopt(task, branch)  # the task starts eagerly
    return branch


def _has_escaped(task: AnyTask | None, branch: Branch) -> bool:
    return task is not None and task not in branch_of and branch.owner.is_in_thread()


def _current_task() -> AnyTask | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without an event loop
        return None
