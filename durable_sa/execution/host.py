"""What a run needs of its worker."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from ..concurrency.threads import StepThreads
from ..database.clock import LocalClock
from ..hooks import HookChain
from ..statements.claiming import ClaimedRun
from .writer import Writer

if TYPE_CHECKING:
    from ..telemetry import Telemetry
    from .reader import Reader


class RunHost(Protocol):
    """What a run needs of its worker."""

    writer: Writer
    reader: Reader
    threads: StepThreads
    clock: LocalClock
    hooks: HookChain
    telemetry: Telemetry | None
    max_payload_bytes: int

    @property
    def leased(self) -> bool:
        """Whether the worker's lease still holds by the local clock."""
        ...

    def run_ended(self, claimed: ClaimedRun) -> None:
        """User code of the run has come to its end: its slot is free."""

    def outcome_stored(self, claimed: ClaimedRun, outcome: str, error: BaseException | None) -> None:
        """What became of the run is committed."""

    def lease_lost(self) -> None:
        """The local deadline has passed."""

    def left_running(self) -> None:
        """Code of a run that others may have taken over does not end."""

    def start_task(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Start a task of the engine, outside every run."""
