"""Threads of `def` runs that have ended without them: they are counted, and there are at most as many as slots."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NamedTuple

from ..statements.claiming import ClaimedRun

logger = logging.getLogger("durable_sa")


class _Abandoned(NamedTuple):
    claimed: ClaimedRun
    thread: threading.Thread


class AbandonedThreads:
    """The threads that execute code of ended runs. `on_excess` is called when there are more than `limit`."""

    def __init__(self, limit: int, on_excess: Callable[[], None]) -> None:
        self._limit = limit
        self._on_excess = on_excess
        self._threads: list[_Abandoned] = []

    def alive(self) -> list[_Abandoned]:
        """Return those that have not ended."""
        self._threads = [entry for entry in self._threads if entry.thread.is_alive()]
        return self._threads

    def add(self, claimed: ClaimedRun, thread: threading.Thread) -> None:
        """Count a thread, and log the task and the stack."""
        self._threads.append(_Abandoned(claimed, thread))
        count = len(self.alive())
        logger.warning(
            "task %s (%s): its run has ended, and its code goes on in thread %r (%d such threads, at most %d):\n%s",
            claimed.task_id,
            claimed.task_name,
            thread.name,
            count,
            self._limit,
            stack(thread),
            extra=claimed.log_fields,
        )
        if count > self._limit:
            self._on_excess()


def stack(thread: threading.Thread) -> str:
    """Return the frames of a thread as text, without values."""
    frame = None if thread.ident is None else sys._current_frames().get(thread.ident)  # pyright: ignore[reportPrivateUsage]
    return "  it has ended" if frame is None else "".join(traceback.format_stack(frame)).rstrip()
