"""The logger of a task, which does not repeat what an earlier run has logged."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..execution.lines import LOGGER

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun

    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter


class TaskLogger(Adapter):
    """The logger `durable_sa.tasks`, whose records have the fields of the task as attributes."""

    def __init__(self, claimed: ClaimedRun, handle: Callable[[logging.LogRecord], None], lowest: int | None) -> None:
        super().__init__(LOGGER, {})
        self._claimed = claimed
        self._handle = handle
        self.lowest = lowest
        """The level from which on lines are kept; None if none are."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - a method of logging
        """Return whether lines of the level are logged or kept."""
        return (self.lowest is not None and level >= self.lowest) or super().isEnabledFor(level)

    def log(
        self,
        level: int,
        msg: object,
        *args: object,
        exc_info: Any = None,
        stack_info: bool = False,
        stacklevel: int = 1,
        extra: Any = None,
        **unknown: Any,
    ) -> None:
        """Log a line, unless an earlier run of the task has done so."""
        if unknown:
            raise TypeError(f"log() got an unexpected keyword argument {min(unknown)!r}")
        if not self.isEnabledFor(level):
            return
        path, number, function, stack = self.logger.findCaller(stack_info, stacklevel + 1)
        raised: Any = exc_info or None
        if isinstance(exc_info, BaseException):
            raised = (type(exc_info), exc_info, exc_info.__traceback__)
        elif exc_info and not isinstance(exc_info, tuple):
            raised = sys.exc_info()
        fields: dict[str, Any] = {**self._claimed.log_fields, **(extra or {})}
        record = self.logger.makeRecord(
            self.logger.name, level, path, number, msg, args, raised, function, fields, stack
        )
        self._handle(record)
