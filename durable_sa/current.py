"""The task that the current code runs in."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import isawaitable
from typing import Any

from durable_sa.errors import InvalidState
from durable_sa.policies import Duration

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


async def heartbeat(duration: Duration | None = None) -> None:
    """Report progress of the running task, from anywhere below it. Does nothing outside a task.

    It raises, and so ends the run, if the task was cancelled or taken over. A lease never depends on it.
    """
    context = _current.get()
    if context is not None and isawaitable(reported := context.heartbeat(duration)):
        await reported
