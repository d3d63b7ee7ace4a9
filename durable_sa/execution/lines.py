"""The lines that tasks log by `ctx.logger`: those of a replay are held back until it is known if they are new."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..concurrency.branches import Branch

LOGGER = logging.getLogger("durable_sa.tasks")


class Lines:
    """The lines of one run.

    A line is new if the next call of its branch is not recorded: an earlier run that had logged it would have made that
    call. So while calls are recorded that the replay has not come to, lines are held back until their branch makes its
    next call. Lines before the first call of a branch share its fate with those of the branches that have created it.
    """

    __slots__ = ("_handle", "held", "lowest")

    def __init__(self, handle: Callable[[logging.LogRecord], None] = LOGGER.handle, lowest: int | None = None) -> None:
        self._handle = handle
        self.lowest = lowest
        """The level from which on lines are taken, whatever the logger's own level is."""
        self.held: dict[tuple[int | str, ...], list[logging.LogRecord]] = {}
        """Lines by the path of their branch."""

    def log(self, record: logging.LogRecord, branch: Branch | None, *, replaying: bool) -> None:
        """Log a line, or hold it back if it may be one of a replay. Outside of branches it is logged."""
        if not replaying:
            self.release()
        elif branch is not None and not branch.live:
            self.held.setdefault(branch.path, []).append(record)
            return
        self._handle(record)

    def called(self, branch: Branch, *, recorded: bool) -> None:
        """Drop or log the lines before a call that a branch makes."""
        first, branch.called = not branch.called, True
        branch.live = not recorded
        if not self.held:
            return
        lines = self.held.pop(branch.path, [])
        if not recorded:
            self._handle_all(lines)
        elif first:
            for length in range(len(branch.path)):
                self.held.pop(branch.path[:length], None)

    def release(self) -> None:
        """Log the lines that are still held back: the replay is over."""
        for lines in self.held.values():
            self._handle_all(lines)
        self.held.clear()

    def _handle_all(self, lines: list[logging.LogRecord]) -> None:
        for record in lines:
            self._handle(record)
