"""What was exported."""

from collections.abc import Callable
from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_trace_id


class Spans:
    """Spans that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self, name: str) -> list[ReadableSpan]:
        """In the order of their beginning."""
        found = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time or 0)

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.all(name)
        return span

    @property
    def names(self) -> list[str]:
        return sorted(span.name for span in self._exporter.get_finished_spans())

    def everything(self) -> str:
        return " ".join(span.to_json() for span in self._exporter.get_finished_spans())


class Values:
    """Metrics as they stand."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader

    def points(self, name: str) -> list[Any]:
        data: Any = self._reader.get_metrics_data()
        if data is None:
            return []
        return [
            point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def of(self, name: str, what: Callable[[Any], Any] = lambda point: point.value) -> dict[tuple[str, ...], Any]:
        """Values, or numbers of measurements, by the values of the labels in the order of their names."""
        return {
            tuple(value for _, value in sorted(point.attributes.items())): what(point) for point in self.points(name)
        }

    def counts(self, name: str) -> dict[tuple[str, ...], int]:
        return self.of(name, lambda point: point.count)


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


def is_below(span: ReadableSpan, parent: ReadableSpan) -> bool:
    assert parent.context is not None
    return span.parent is not None and span.parent.span_id == parent.context.span_id


def is_linked(span: ReadableSpan, to: ReadableSpan) -> bool:
    assert to.context is not None
    return to.context.span_id in {link.context.span_id for link in span.links}
