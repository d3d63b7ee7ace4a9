"""The timeout of an attempt: how long a task may be in memory, over all runs of the attempt.

When the time is up, the code of the task gets a `TaskTimeout`: `async def` code where it awaits something, `def` code
in its next call of the context. Code that catches it goes on, and gets another one as long after that.

A run that is suspended records the time that its attempt has used, and the next run of the attempt counts on from
there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import TaskTimeout
from ..ids import step_key
from ..signals import ControlFlow
from .journal import Journal
from .writes import CheckpointValues, Kind, Write

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun
    from .writer import Writer

T = TypeVar("T")


class AttemptTimeout(TaskTimeout, asyncio.CancelledError):
    """The timeout within the code of the task.

    It is a cancellation as well, because asyncio, drivers and clients end what is awaited only for one.
    """


AttemptTimeout.__name__, AttemptTimeout.__qualname__ = TaskTimeout.__name__, TaskTimeout.__qualname__
AttemptTimeout.__module__ = TaskTimeout.__module__


class AttemptLimit:
    """The time that is left to the attempt of a run. `signal` returns the signal that has ended the run, if any."""

    def __init__(
        self,
        seconds: float,
        claimed: ClaimedRun,
        journal: Journal,
        writer: Writer,
        signal: Callable[[], ControlFlow | None],
    ) -> None:
        self._seconds = seconds
        self._claimed = claimed
        self._writer = writer
        self._signal = signal
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._used = 0.0
        """Seconds used by earlier runs of the attempt."""
        self._records = 0
        while (entry := journal.take(self._key(self._records))) is not None:
            self._used = float(entry.value or 0)
            self._records += 1
        self._root: asyncio.Task[Any] | None = None
        self._due: AttemptTimeout | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.hand_over: Callable[[TaskTimeout], bool] | None = None
        """Passes the timeout to the thread of a `def` task. Returns False if that waits for a call of the context."""

    def _key(self, number: int) -> uuid.UUID:
        return step_key("time", str(self._claimed.attempt), "", (), number, part=True)

    def within(self, body: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Return the body of the task as a coroutine that the timeout interrupts."""
        return _Limited(body, self)

    def start(self, root: asyncio.Task[Any]) -> None:
        """Start to count."""
        self._root = root
        self._timer = self._loop.call_later(max(0.0, self._seconds - self._used), self._interrupt)

    def stop(self) -> None:
        """Stop counting: the code of the task has ended, or is being ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def record(self) -> None:
        """Record the time that the attempt has used, for its next run."""
        used = self._used + self._loop.time() - self._began
        values = CheckpointValues("value", "$time", "completed", f"{used:.6f}")
        claimed, key = self._claimed, self._key(self._records)
        self._writer.submit(Write(Kind.CHECKPOINT, claimed.task_id, claimed.fence, _ignore, values, key))

    def _interrupt(self) -> None:
        if self._root is None or self._root.done():
            return
        self._timer = self._loop.call_later(self._seconds, self._interrupt)
        error = AttemptTimeout(f"task {self._claimed.task_name!r}", self._seconds)
        if self.hand_over is None or not self.hand_over(error):
            self._due = error
            self._root.cancel()

    def replaced(self, exception: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the timeout in place of the cancellation that is its own; any other exception as it is."""
        error, self._due = self._due, None
        kind = exception[0] if isinstance(exception[0], type) else type(exception[0])
        if error is None or self._signal() is not None or not issubclass(kind, asyncio.CancelledError):
            return exception
        if self._root is not None:
            self._root.uncancel()
        return (error,)


class _Limited(Coroutine[Any, Any, T]):
    """A coroutine into which a timeout is thrown as such, and that raises it as a plain `TaskTimeout`."""

    __slots__ = ("_body", "_limit")

    def __init__(self, body: Coroutine[Any, Any, T], limit: AttemptLimit) -> None:
        self._body = body
        self._limit = limit

    def send(self, value: Any, /) -> Any:
        try:
            return self._body.send(value)
        except AttemptTimeout as error:
            raise _plain(error) from None

    def throw(self, *exception: Any) -> Any:
        try:
            return self._body.throw(*self._limit.replaced(exception))
        except AttemptTimeout as error:
            raise _plain(error) from None
        finally:
            del exception  # or it refers to itself, through this frame in its traceback

    def close(self) -> None:
        self._body.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._body.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _plain(error: AttemptTimeout) -> TaskTimeout:
    plain = TaskTimeout(error.what, error.timeout).with_traceback(error.__traceback__)
    vars(plain).update(vars(error))
    return plain


def _ignore(_: Any, __: BaseException | None) -> None:
    """Take no note of the outcome: a run that has lost its task has no use for it."""
