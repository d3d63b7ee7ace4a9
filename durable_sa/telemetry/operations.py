"""Spawns and emits: spans whose context goes along with what is written, and which end when that has been."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from opentelemetry.trace import Span, set_span_in_context

from .meters import Meters
from .propagation import OTEL_CONTEXT, carried, encoded
from .spans import harmless, mark_failed


class _Operation:
    def __init__(self, span: Span, meters: Meters) -> None:
        self._span = span
        self._meters = meters
        self._ended = False

    @property
    def carrier(self) -> dict[str, str]:
        """The trace context of the span, as the database keeps it."""
        return self._carried() or {}

    @harmless
    def _carried(self) -> dict[str, str]:
        return carried(set_span_in_context(self._span))

    def _end(self, error: BaseException | None) -> None:
        # A transaction that lost against another is repeated, and tells a second time.
        if not self._ended:
            self._ended = True
            if error is not None:
                mark_failed(self._span, error)
            self._span.end()


class Spawning(_Operation):
    """A call that spawns."""

    @property
    def headers(self) -> dict[str, Any]:
        """The tasks'."""
        return {OTEL_CONTEXT: carrier} if (carrier := self.carrier) else {}

    @harmless
    def over(self, created: Iterable[tuple[str, str | None]], error: BaseException | None) -> None:
        """These tasks, by queue and name, are there now; None is the name of one that is not registered."""
        for queue_name, task_name in created:
            self._meters.spawned.add(1, self._meters.labels(queue_name, task_name))
        self._end(error)


class Emission(_Operation):
    """A client's emit."""

    def __init__(self, span: Span, meters: Meters, queue_name: str) -> None:
        super().__init__(span, meters)
        self._queue_name = queue_name

    @property
    def metadata(self) -> str | None:
        """The event's."""
        return encoded(self.carrier)

    @harmless
    def over(self, first: bool, error: BaseException | None) -> None:
        """It was the first of its name, or not."""
        if first:
            self._meters.emitted.add(1, self._meters.queue(self._queue_name))
        self._end(error)
