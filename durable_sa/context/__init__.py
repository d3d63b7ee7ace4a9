"""The context of a task: steps, transactions, children, sleeps and events, each recorded and replayed."""

from __future__ import annotations

from typing import ClassVar

from ..app import App
from ..execution.run import Run
from ..signals import ControlFlow, LeaseLost, TaskCancelled
from ..validation import Duration, seconds
from .children import Children
from .data import StateT, TaskData
from .events import Events
from .logger import TaskLogger
from .messages import Messages
from .publishing import Publishing
from .races import Races
from .sleeps import Sleeps
from .steps import Steps
from .streams import Streams
from .transactions import Transactions
from .values import Values

__all__ = ["TaskContext"]


class TaskContext(
    Steps, Transactions, Children, Sleeps, Events, Messages, Races, Publishing, Streams, Values, TaskData[StateT]
):
    """The running task, as passed to its function.

    Every method that waits may raise :class:`durable_sa.signals.ControlFlow`, which is no ``Exception``: the run is
    then suspended, cancelled or lost, and ``finally`` blocks run as usual.
    """

    __slots__ = ("_claimed", "_state")

    blocking: ClassVar = False
    """False: the methods are awaited. True for a `SyncTaskContext`."""

    def __init__(self, run: Run, app: App, state: StateT) -> None:
        super().__init__(run, app)
        self._claimed = run.claimed
        self._state = state

    @property
    def logger(self) -> TaskLogger:
        """A logger for the task's own code that does not repeat its lines.

        Each replay executes the code between recorded calls once more, and a usual logger logs its lines once more.
        This one leaves out the lines before a call that is recorded. Lines in steps are always logged. Lines behind the
        last recorded call are logged once more by the attempt after a failure or a crash, and so are those behind the
        last call of a branch while others suspend the task. The logger is `durable_sa.tasks`; its records have the
        attributes of :class:`durable_sa.logs.TaskFields`. With `Durable(keep_logs=...)` lines are also kept, as
        the task's stream ``$log``.
        """
        return TaskLogger(self._claimed, self.log_line, self._run.lines.lowest)

    @property
    def signal(self) -> ControlFlow | None:
        """The reason why the run is being ended; None while it continues."""
        return self._run.signal

    @property
    def in_another_loop(self) -> bool:
        """True if the caller is in another event loop than the run's, and so cannot await the methods of a context."""
        return self._run.in_another_loop()

    async def heartbeat(self, duration: Duration | None = None) -> None:
        """Raise if the task was cancelled or taken over.

        The worker keeps the lease, so no task needs this for that; `duration` is checked and has no other effect.

        Raises:
            ControlFlow: the task was cancelled, or another worker has it.
            InvalidConfiguration: `duration` is not a duration.
        """
        if duration is not None:
            seconds(duration, "duration")
        run = self._run
        if run.in_another_loop():
            # The database cannot be asked from another loop, but a signal that is known already can be raised.
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
