"""The asyncio task factory that gives every asyncio task of a run its branch.

Several workers may share an event loop, so it is installed and uninstalled by count.
"""

import asyncio
import functools
import weakref
from collections.abc import Coroutine, Generator
from types import CellType
from typing import Any, TypeVar

from . import branches

T = TypeVar("T")


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Install the factory on `loop`, on top of the present one, which must take a `context`. Call `uninstall` later."""
    factory = _factories.get(loop)
    if factory is None:
        factory = _factories[loop] = _TaskFactory(loop.get_task_factory())
        loop.set_task_factory(factory)
    factory.users += 1


def ensure(loop: asyncio.AbstractEventLoop) -> None:
    """Install the factory anew if another one was set since the `install`, which would hide tasks from their runs."""
    current, factory = loop.get_task_factory(), _factories[loop]
    if current is not factory:
        # The other factory may call ours, which without users passes every call on to the factory below it.
        outer = _factories[loop] = _TaskFactory(current)
        outer.users, factory.users = factory.users, 0
        loop.set_task_factory(outer)


def uninstall(loop: asyncio.AbstractEventLoop) -> None:
    """Undo one `install`. The last one restores the former task factory, unless another one was set since."""
    factory = _factories[loop]
    factory.users -= 1
    if not factory.users:
        del _factories[loop]
        if loop.get_task_factory() is factory:
            loop.set_task_factory(factory.previous)


class BranchExit(BaseException):
    """The end of a branch by its cause, a `SystemExit` or `KeyboardInterrupt`, which would end the event loop."""


class _TaskFactory:
    def __init__(self, previous: Any) -> None:
        self.previous = previous
        self.users = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
        create = self.previous or _create
        context = kwargs.get("context")
        branch = branches.next_branch(loop, context) if self.users else None
        if branch is None:
            return create(loop, coro, **kwargs)
        guarded = _Guarded(coro) if asyncio.iscoroutine(coro) else coro
        return branch.start(functools.partial(create, loop, guarded, **kwargs), context)

    def __getattr__(self, name: str) -> Any:
        """Return what a factory of `asyncio.create_eager_task_factory` has: its code, and the constructor in a cell.

        anyio knows such a factory by its code, and calls the constructor for tasks that must not start eagerly.
        """
        if name not in ("__code__", "__closure__") or self.previous is None:
            raise AttributeError(name)
        found = getattr(self.previous, name)
        if name == "__code__":
            return found
        return tuple(CellType(functools.partial(self._construct, cell.cell_contents)) for cell in found)

    def _construct(self, constructor: Any, coro: Any, *, loop: Any = None, **kwargs: Any) -> Any:
        """Make a task that does not start eagerly, which is a branch if it is one of a run."""
        loop = loop or asyncio.get_running_loop()
        context = kwargs.get("context")
        branch = branches.next_branch(loop, context) if self.users else None
        if branch is None:
            return constructor(coro, loop=loop, **kwargs)
        guarded = _Guarded(coro) if asyncio.iscoroutine(coro) else coro
        return branch.start(functools.partial(constructor, guarded, loop=loop, **kwargs), context)

    def create_root(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], **kwargs: Any) -> Any:
        """Create the first task of a run, whose branch is in its context already."""
        return (self.previous or _create)(loop, _Guarded(coro), **kwargs)


_factories: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _TaskFactory] = weakref.WeakKeyDictionary()


class _Guarded(Coroutine[Any, Any, T]):
    """A coroutine whose `SystemExit` and `KeyboardInterrupt` do not reach the event loop.

    An `async def` around the coroutine would not do: cancelled before its first step, it never awaits the coroutine.
    """

    __slots__ = ("_coro",)

    def __init__(self, coro: Coroutine[Any, Any, T]) -> None:
        self._coro = coro

    def send(self, value: Any, /) -> Any:
        try:
            return self._coro.send(value)
        except (SystemExit, KeyboardInterrupt) as cause:
            raise BranchExit(type(cause).__name__) from cause

    def throw(self, *exception: Any) -> Any:
        try:
            return self._coro.throw(*exception)
        except (SystemExit, KeyboardInterrupt) as cause:
            raise BranchExit(type(cause).__name__) from cause
        finally:
            del exception  # or it refers to itself, through this frame in its traceback

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._coro.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)


def _create(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coro, loop=loop, **kwargs)
