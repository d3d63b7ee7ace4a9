"""The task that the calling code runs in."""

from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import iscoroutinefunction
from typing import Any, Final

from .concurrency.threads import in_event_loop
from .errors import InvalidState
from .validation import Duration

_current: ContextVar[Any] = ContextVar("durable_sa_context", default=None)


@contextmanager
def running(context: object) -> Generator[None]:
    """Make `context` the current one inside the block, and in the asyncio tasks and threads that are started there."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def enter(context: object) -> None:
    """Make `context` the current one for the rest of the running `contextvars.Context`."""
    _current.set(context)


def context_or_none() -> Any:
    """Return the `TaskContext` or `SyncTaskContext` of the running task, or None outside one."""
    return _current.get()


def current_context() -> Any:
    """Return the context of the running task, in any code that the task calls.

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
    """Check that the running task goes on, in any code that the task calls. Does nothing outside a task.

    It raises, and so ends the run, if the task was cancelled or taken over. A lease never depends on it. Coroutines
    await it; in a `def` task or step the call is enough, and its result need not be awaited.
    """
    context = _current.get()
    if context is None:
        return _NOTHING
    if iscoroutinefunction(context.heartbeat) and not in_event_loop():
        # This is the thread of a `def` step, which cannot await.
        if context.signal is not None:
            raise context.signal
        return _NOTHING
    return context.heartbeat(duration) or _NOTHING


class _Nothing:
    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()


_NOTHING: Final = _Nothing()
