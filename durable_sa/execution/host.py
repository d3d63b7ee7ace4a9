"""The services that a run uses of its worker."""

from __future__ import annotations

import threading
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..concurrency.blocking import AnyTask
from ..concurrency.threads import StepThreads
from ..database.clock import LocalClock
from ..tasks import Task
from .hooks import HookChain

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun
    from ..telemetry import Telemetry
    from .reader import Reader
    from .writer import Writer


class RunHost(Protocol):
    """The worker of a run, as the run sees it."""

    writer: Writer
    reader: Reader
    threads: StepThreads
    """For `def` steps of `async def` tasks."""
    clock: LocalClock
    hooks: HookChain
    telemetry: Telemetry | None
    max_payload_bytes: int
    keep_logs: int | None
    """The level from which on lines of `ctx.logger` are kept."""

    @property
    def leased(self) -> bool:
        """True while the worker's lease holds by the local clock."""
        ...

    @property
    def has_room(self) -> bool:
        """True while most slots are free."""
        ...

    def attempt_timeout(self, task: Task[Any, Any]) -> float | None:
        """Return the seconds in memory after which an attempt of a task fails, if there is a limit."""

    def run_ended(self, claimed: ClaimedRun) -> None:
        """Free the slot of a run whose user code has ended."""

    def outcome_stored(self, claimed: ClaimedRun, outcome: str, error: BaseException | None) -> None:
        """Take note that the outcome of a run is committed, or that the run has lost its task."""

    def lease_lost(self) -> None:
        """Give the runs up, because the lease has ended by the local clock."""

    def left_behind(self, claimed: ClaimedRun, tasks: Sequence[AnyTask], *, lost: bool) -> None:
        """Take note of code of a run that ignores its cancellation; if `lost`, another worker may run the task."""

    def thread_abandoned(self, claimed: ClaimedRun, thread: threading.Thread) -> None:
        """Take note of the thread of a `def` run that executes code after the end of the run."""

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start an asyncio task of the engine, outside of every run."""
