"""The cause that an asyncio task is blocked on, read from the task itself.

asyncio has no API for this. So it is read from `Task._fut_waiter`, the frames of the suspended coroutines and the
callbacks of futures. An await that is not recognised, of a library's own primitive or in a later Python, counts as one
of something outside of the run: it gets a grace period and a warning, and never leads to a suspension at once.
"""

import asyncio
import asyncio.tasks
import functools
import gc
import os
import sys
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator
from contextlib import suppress
from enum import Enum, auto
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any, Final, cast

AnyTask = asyncio.Task[Any]
AnyFuture = asyncio.Future[Any]


class Blocked(Enum):
    """The cause that a task is blocked on."""

    NOT = auto()
    """None: the task runs, or is about to."""
    PARKED = auto()
    """A durable wait."""
    INSIDE = auto()
    """Other tasks of its run, or a lock, event or queue that they share."""
    OUTSIDE = auto()
    """Anything else: a timer, a socket, a thread, a task that is not of the run."""


def retrieve_exception(future: AnyFuture) -> None:
    """Keep asyncio from logging that the exception of `future`, which is done, was never retrieved."""
    if not future.cancelled():
        future.exception()


def _codes(*functions: object) -> frozenset[CodeType]:
    return frozenset(code for function in functions if (code := getattr(function, "__code__", None)) is not None)


_ASYNCIO: Final = os.path.dirname(asyncio.__file__) + os.sep  # noqa: PTH120 - compared with code objects' plain strings
_GATHERING: Final[type[Any]] = getattr(asyncio.tasks, "_GatheringFuture", type(None))
_RELEASE_WAITER: Final = getattr(asyncio.tasks, "_release_waiter", None)
_SUSPENDABLE: Final[dict[type[Any], tuple[str, str]]] = {
    CoroutineType: ("cr_frame", "cr_await"),
    GeneratorType: ("gi_frame", "gi_yieldfrom"),
    AsyncGeneratorType: ("ag_frame", "ag_await"),
}

_COROUTINES: Final[tuple[type[Any], ...]] = (*_SUSPENDABLE, Coroutine)
"""Also the classes that wrap a coroutine."""

_WAIT: Final = _codes(getattr(asyncio.tasks, "_wait", None))
_WAIT_FOR: Final = _codes(asyncio.wait_for)
_TIMED: Final = _WAIT | _WAIT_FOR
_TASK_GROUP: Final = _codes(asyncio.TaskGroup.__aexit__, getattr(asyncio.TaskGroup, "_aexit", None))
_SHARED: Final = _codes(
    asyncio.Lock.acquire,
    asyncio.Semaphore.acquire,
    asyncio.Condition.wait,
    asyncio.Event.wait,
    cast(Any, asyncio.Queue).get,
    cast(Any, asyncio.Queue).put,
)


def examine(task: AnyTask, tasks: Container[object], parked: Container[object]) -> Blocked:
    """Return what `task` is blocked on. `tasks` are those of its run, `parked` the futures of its durable waits."""
    waiter = getattr(task, "_fut_waiter", None)
    if waiter is None or waiter.done():
        return Blocked.NOT
    if waiter in parked:
        return Blocked.PARKED
    stack = list(_frames(task))
    if any(_has_timeout(frame, _TIMED) for frame in stack):
        return Blocked.OUTSIDE
    awaited: Iterable[AnyFuture] = (waiter,)
    if stack:
        code = stack[-1].f_code
        if code in _SHARED:
            return Blocked.INSIDE
        if code in _WAIT:
            awaited = stack[-1].f_locals.get("fs", awaited)
        elif code in _TASK_GROUP:
            awaited = getattr(stack[-1].f_locals.get("self"), "_tasks", awaited)
    return _blocked_on(awaited, tasks)


def location(task: AnyTask) -> str:
    """Return the innermost frame outside asyncio in which `task` is blocked, as `file:line in function`."""
    stack = list(_frames(task))
    if not stack:
        return f"an unknown place in {task.get_name()}"
    frame = next((frame for frame in reversed(stack) if not frame.f_code.co_filename.startswith(_ASYNCIO)), stack[-1])
    place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}()"
    return place if frame is stack[-1] else f"{place}, in asyncio's {stack[-1].f_code.co_qualname}()"


def is_under_wait_for(tasks: Container[object]) -> bool:
    """Return whether the running task is inside an `asyncio.wait_for` with a timeout.

    It also is if one of `tasks`, those of the run, awaits it inside a `wait_for`.
    """
    task = asyncio.current_task()
    if task is None:
        return False
    outermost = getattr(task.get_coro(), "cr_frame", None)
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if _has_timeout(frame, _WAIT_FOR):
            return True
        frame = frame.f_back if frame is not outermost else None
    waiting = (waiting for callback in _callbacks(task) for waiting in _woken_by(callback) if waiting in tasks)
    return any(_has_timeout(frame, _WAIT_FOR) for other in waiting for frame in _frames(other))


def is_called_by_wait_for() -> bool:
    """Return whether the calling task factory creates a task for `asyncio.wait_for` itself."""
    frame: FrameType | None = sys._getframe(3)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename.startswith(_ASYNCIO):
        if frame.f_code in _WAIT_FOR:
            return True
        frame = frame.f_back
    return False


def outcomes(tasks: Iterable[AnyTask]) -> set[AnyFuture]:
    """Return the futures that `asyncio.gather` and `asyncio.shield` have made of `tasks`."""
    found: set[AnyFuture] = set()
    pending: list[AnyFuture] = list(tasks)
    while pending:
        for callback in _callbacks(pending.pop()):
            if getattr(callback, "__module__", None) != asyncio.tasks.__name__:
                continue
            outer = {value for name, value in _captured(callback) if name == "outer" and asyncio.isfuture(value)}
            pending.extend(outer - found)
            found |= outer
    return found


def _frames(task: AnyTask) -> Iterator[FrameType]:
    """Return the suspended frames of a task, from the outermost to the innermost."""
    awaitable: object = task.get_coro()
    while awaitable is not None:
        if (attributes := _SUSPENDABLE.get(type(awaitable))) is not None:
            if (frame := getattr(awaitable, attributes[0])) is not None:
                yield frame
            awaitable = getattr(awaitable, attributes[1])
        else:
            # The iterators of `async for` and `__await__` have no attribute for the coroutine that they run.
            referents: list[object] = gc.get_referents(awaitable)
            awaitable = next((referent for referent in referents if issubclass(type(referent), _COROUTINES)), None)


def _blocked_on(futures: Iterable[AnyFuture], tasks: Container[object]) -> Blocked:
    """Return what blocks a task that awaits `futures`, which may be those of gather and shield."""
    blocked = Blocked.NOT  # if all of them are done, and the task is about to get their results
    pending = list(futures)
    while pending:
        future = pending.pop()
        if future.done():
            continue
        if future in tasks:
            blocked = Blocked.INSIDE
        elif isinstance(future, _GATHERING):
            pending.extend(getattr(future, "_children", ()))
        elif shielded := [inner for callback in _callbacks(future) for inner in _shielded_by(callback)]:
            pending.extend(shielded)
        else:
            return Blocked.OUTSIDE
    return blocked


def _callbacks(future: AnyFuture) -> list[Callable[..., object]]:
    return [callback for callback, _ in getattr(future, "_callbacks", None) or ()]


def _shielded_by(callback: Callable[..., object]) -> Iterator[AnyFuture]:
    """Return the future that `asyncio.shield` shields, if `callback` is that of the future it returns."""
    if getattr(callback, "__qualname__", "") == "shield.<locals>._outer_done_callback":
        yield from (value for name, value in _captured(callback) if name == "inner")


def _captured(callback: Callable[..., object]) -> Iterator[tuple[str, Any]]:
    """Return the variables, by name and value, that a callback has from the function around it."""
    names = getattr(getattr(callback, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(callback, "__closure__", None) or (), strict=False):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _has_timeout(frame: FrameType, functions: Container[CodeType]) -> bool:
    """Return whether `frame` is of one of asyncio's `functions`, called with a timeout."""
    return frame.f_code in functions and frame.f_locals.get("timeout") is not None


def _woken_by(callback: Callable[..., object]) -> Iterator[AnyTask]:
    """Return the task that awaits the future which has `callback`."""
    waiting: AnyTask | None = getattr(callback, "__self__", None)
    if isinstance(waiting, asyncio.Task):
        yield waiting
    elif isinstance(callback, functools.partial) and callback.func is _RELEASE_WAITER:
        # In Python 3.11, wait_for awaits a future of its own, which the awaited one resolves.
        for inner in _callbacks(callback.args[0]):
            yield from _woken_by(inner)
