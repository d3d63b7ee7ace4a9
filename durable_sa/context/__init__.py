"""What a task can do: steps, transactions, children, sleeps, events, each remembered from the first time on."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, cast

from typing_extensions import TypeVar as DefaultTypeVar

from ..policies import Duration, seconds
from ..serialization.codec import UNTYPED
from ..signals import ControlFlow, LeaseLost, TaskCancelled
from ..statements.claiming import ClaimedRun
from .base import Call
from .children import Children
from .events import Events
from .sleeps import Sleeps
from .steps import Steps
from .transactions import Transactions
from .values import Values

if TYPE_CHECKING:
    from ..client import Durable
    from ..execution.run import Run

__all__ = ["TaskContext"]

StateT = DefaultTypeVar("StateT", default=Any)


class TaskContext(Steps, Transactions, Children, Sleeps, Events, Values, Generic[StateT]):
    """The running task, as its function gets it.

    Every method that waits may raise :class:`durable_sa.signals.ControlFlow`, which is no ``Exception``: the run is
    then suspended, cancelled or lost, and ``finally`` blocks run as usual.
    """

    __slots__ = ("_headers", "_state")

    def __init__(self, run: Run, durable: Durable[Any], state: StateT) -> None:
        super().__init__(run, durable)
        self._state = state
        self._headers: Mapping[str, Any] | None = None

    @property
    def task_id(self) -> uuid.UUID:
        """The task's id, the same in all attempts."""
        return self._run.claimed.task_id

    @property
    def run_id(self) -> uuid.UUID:
        """The id of this attempt; it outlives suspensions."""
        return self._run.claimed.run_id

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1. Suspensions do not raise it; failures and lost workers do."""
        return self._run.claimed.attempt

    @property
    def task_name(self) -> str:
        """The name under which the task was spawned."""
        return self._run.claimed.task_name

    @property
    def queue_name(self) -> str:
        """The queue the task was spawned into."""
        return self._run.claimed.queue_name

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers given at spawn; plain JSON."""
        headers: Mapping[str, Any] | None = self._headers
        if headers is None:
            text = self._run.claimed.headers
            headers = {} if text is None else cast("Mapping[str, Any]", UNTYPED.decode(text, "the task's headers"))
            self._headers = headers
        return headers

    @property
    def state(self) -> StateT:
        """What the worker's `lifespan` yielded, else the client's `state`."""
        return self._state

    @property
    def signal(self) -> ControlFlow | None:
        """Why the run is coming to its end; None while it goes on."""
        return self._run.signal

    @property
    def in_another_loop(self) -> bool:
        """Whether the calling code is in another event loop than the run's, and so cannot await what a context does."""
        return self._run.in_another_loop()

    @property
    def claimed(self) -> ClaimedRun:
        """What the claim of the run said."""
        return self._run.claimed

    def around_step(self, call: Call) -> AbstractContextManager[object]:
        """Return a context manager for one try of a step: its span, and inside it the client's hooks."""
        return self._around(call)

    async def heartbeat(self, duration: Duration | None = None) -> None:
        """Ask whether the run still goes on: raises where the task was cancelled or taken over.

        Never needed to keep a lease, which is the worker's; `duration` is checked and otherwise has no meaning.

        Raises:
            ControlFlow: the task was cancelled, or another worker has it.
            InvalidConfiguration: a duration that is none.
        """
        if duration is not None:
            seconds(duration, "duration")
        run = self._run
        if run.in_another_loop():
            # From there nothing can be asked; but what is known already can be told.
            if run.signal is not None:
                raise run.signal
            return
        await run.enter()
        with self._observed("heartbeat"), run.branches.busy():
            state = await run.host.reader.ownership((self.task_id, run.claimed.fence))
        if state is not None:
            signal: ControlFlow = TaskCancelled() if state == "cancelled" else LeaseLost()
            run.take_away(signal)
            raise signal
