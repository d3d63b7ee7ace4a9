"""Spans of calls that spawn and emit: their context is written with the task or event, and they end after that."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from opentelemetry.trace import Span, set_span_in_context

from .meters import Meters
from .propagation import OTEL_CONTEXT, carried, encoded
from .spans import harmless, mark_failed


class _Operation:
    """A span as a context manager; not current, as the code within is the engine's."""

    def __init__(self, span: Span, meters: Meters) -> None:
        self._span = span
        self._meters = meters
        self._ended = False

    @property
    def _carrier(self) -> dict[str, str]:
        return self._carried() or {}

    @harmless
    def _carried(self) -> dict[str, str]:
        return carried(set_span_in_context(self._span))

    @harmless
    def end(self, error: BaseException | None = None) -> None:
        """End the span, unless it has ended."""
        if not self._ended:
            self._ended = True
            if error is not None:
                mark_failed(self._span, error)
            self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(error)


class Spawning(_Operation):
    """A call that spawns."""

    @property
    def headers(self) -> dict[str, Any]:
        """The headers of its tasks that carry the span."""
        return {OTEL_CONTEXT: carrier} if (carrier := self._carrier) else {}

    @harmless
    def created(self, queue_name: str, task_name: str | None) -> None:
        """Count a task that was created; None is the name of one that is not registered."""
        self._meters.spawned.add(1, self._meters.labels(queue_name, task_name))


class Emission(_Operation):
    """A client's emit."""

    def __init__(self, span: Span, meters: Meters, queue_name: str) -> None:
        super().__init__(span, meters)
        self._queue_name = queue_name

    @property
    def metadata(self) -> str | None:
        """The metadata of the event, which carry the span."""
        return encoded(self._carrier)

    @harmless
    def emitted(self) -> None:
        """Count the event: it was the first of its name."""
        self._meters.emitted.add(1, self._meters.queue(self._queue_name))
