"""The slots of a worker: which runs hold them, and how many are free."""

from __future__ import annotations

import asyncio
import uuid

from ..execution.run import Run
from ..statements.claiming import ClaimedRun
from .settings import Settings

RunKey = tuple[uuid.UUID, int]
"""The id of a task, and the fence of its run."""


class Slots:
    """The runs that a worker holds. The executor fills and frees slots; claims and the dispatcher count them."""

    def __init__(self, settings: Settings) -> None:
        self.concurrency = settings.concurrency
        self._batch_size = settings.batch_size
        self.runs: dict[RunKey, Run] = {}
        """Runs in progress, and those whose journal is being loaded."""
        self.starting: list[ClaimedRun] = []
        """Claimed runs that start in the next turn of the event loop."""
        self.unwritten: set[RunKey] = set()
        """Runs that hold no slot any more, but whose outcome has not been committed."""
        self.alone = False
        """The run in progress is that of a suspect, and nothing may run beside it."""
        self.makes_room = False
        """Nothing is claimed until all runs have ended, because a suspect waits."""
        self.claim_when_empty = False
        """A suspect may be claimed once the outcomes of all runs are written."""
        self.idle = asyncio.Event()
        """Set while no run is in progress or about to start."""
        self.idle.set()

    @property
    def taken(self) -> int:
        """The number of slots in use."""
        return len(self.runs) + len(self.starting)

    @property
    def free(self) -> int:
        """The number of tasks that one claim may ask for; negative if adopted runs exceed the slots."""
        if (self.alone and self.taken) or (self.makes_room and not self.empty):
            return 0
        free = self.concurrency - self.taken
        return min(free, self._batch_size or free)

    @property
    def mostly_free(self) -> bool:
        """True while a claim may ask for more than half of the slots."""
        return self.free * 2 > self.concurrency

    @property
    def empty(self) -> bool:
        """True if no run is in progress, about to start, or to be written."""
        return not (self.taken or self.unwritten)

    def reserve(self, claimed: list[ClaimedRun]) -> None:
        """Take slots for runs that are about to start."""
        self.starting.extend(claimed)
        self.idle.clear()

    def take(self, run: Run) -> None:
        """Put a run in its slot, in place of one with the same key."""
        self.runs[run.claimed.key] = run
        self.idle.clear()

    def free_slot(self, claimed: ClaimedRun) -> None:
        """Free the slot of a run whose code has ended."""
        key = claimed.key
        self.unwritten.add(key)
        self.runs.pop(key, None)
        self._update_idle()

    def written(self, claimed: ClaimedRun) -> bool:
        """Forget a run whose outcome is written. Return whether a suspect may be claimed now."""
        self.unwritten.discard(claimed.key)
        if not self.claim_when_empty or not self.empty:
            return False
        self.claim_when_empty = False
        return True

    def drop_starting(self) -> None:
        """Free the slots of runs that are about to start."""
        self.starting.clear()
        self._update_idle()

    def _update_idle(self) -> None:
        if not self.runs and not self.starting:
            self.alone = False
            self.idle.set()

    def unsettled(self) -> list[RunKey]:
        """Return every claimed run that is not settled, with or without a slot."""
        return [*self.runs, *self.unwritten, *(item.key for item in self.starting)]

    def running_in(self, queue_name: str) -> int:
        """Count the slots that runs of a queue take."""
        runs = [*(run.claimed for run in self.runs.values()), *self.starting]
        return sum(run.queue_name == queue_name for run in runs)

    def queue_names(self) -> list[str]:
        """Return the queue of each run in progress. Safe to call from any thread."""
        return [run.claimed.queue_name for run in list(self.runs.values())]
