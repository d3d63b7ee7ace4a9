"""The task that the current code runs in."""

import asyncio
from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import iscoroutinefunction
from typing import Any, Final

from .errors import InvalidState
from .validation import Duration

_current: ContextVar[Any] = ContextVar("durable_sa_context", default=None)


@contextmanager
def running(context: object) -> Generator[None]:
    """Make `context` the current one for what is called inside the block, and for the tasks and threads it starts."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def enter(context: object) -> None:
    """Make `context` the current one from here on, for a run that has a `contextvars.Context` of its own."""
    _current.set(context)


def context_or_none() -> Any:
    """Return the `TaskContext` or `SyncTaskContext` of the running task, or None outside one."""
    return _current.get()


def current_context() -> Any:
    """Return the context of the running task, from anywhere below it.

    It is a `TaskContext`, or a `SyncTaskContext` in a `def` task.

    Raises:
        InvalidState: outside a task.
    """
    context = _current.get()
    if context is None:
        remedy = "Call it from a task or one of its steps; unit tests get one from `durable_sa.testing.task_context()`."
        raise InvalidState("`current_context()`", "called where no task runs", remedy)
    return context


def heartbeat(duration: Duration | None = None) -> Awaitable[None]:
    """Report progress of the running task, from anywhere below it. Does nothing outside a task.

    It raises, and so ends the run, if the task was cancelled or taken over. A lease never depends on it. Coroutines
    await it; in a `def` task or step the call does it, and what it gives need not be awaited.
    """
    context = _current.get()
    if context is None:
        return _NOTHING
    if iscoroutinefunction(context.heartbeat) and not in_event_loop():
        # The thread of a step, from which nothing can be awaited.
        if context.signal is not None:
            raise context.signal
        return _NOTHING
    return context.heartbeat(duration) or _NOTHING


def in_event_loop() -> bool:
    """Whether the calling thread is one in which an event loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Nothing:
    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()


_NOTHING: Final = _Nothing()
