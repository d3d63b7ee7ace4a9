"""Spans and metrics through OpenTelemetry's API, which the `telemetry` extra installs.

OpenTelemetry's global providers are used as they are. An application with providers of its own passes them:

```python
from opentelemetry.sdk.trace import TracerProvider

from durable_sa import Durable
from durable_sa.telemetry import Telemetry

durable = Durable(telemetry=Telemetry(tracer_provider=TracerProvider()))
```

Errors in telemetry are logged once and never reach a task. Spans and metrics show names and ids only: params, results,
payloads, headers and the messages of errors stay in the database.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

try:
    from opentelemetry import metrics, trace
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "OpenTelemetry's API is not installed. Install it: pip install 'durable_sa[telemetry]'", name=error.name
    ) from error

from ..signals import ControlFlow, LeaseLost, TaskCancelled
from .meters import Meters, WatchedWorker
from .operations import Emission, Spawning
from .propagation import OTEL_CONTEXT, carried, context_of, encoded, extract, inject, links_to
from .spans import Scope, Tracing, harmless

if TYPE_CHECKING:
    from ..statements.claiming import ClaimedRun

__all__ = ["OTEL_CONTEXT", "Telemetry", "extract", "inject", "shared"]

T = TypeVar("T")

NAME = "durable_sa"


class Telemetry:
    """Spans and metrics by the providers given, else by OpenTelemetry's global ones. Clients may share it."""

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracing = Tracing(trace.get_tracer(NAME, tracer_provider=tracer_provider))
        self._meters = Meters(metrics.get_meter(NAME, meter_provider=meter_provider))

    def spawn(self, task_name: str | None = None, queue_name: str | None = None) -> Spawning:
        """Begin the span of a spawn, of one task or, without a name, of many."""
        attributes = _present({"durable.task.name": task_name, "durable.queue": queue_name})
        name = "spawn" if task_name is None else f"spawn {task_name}"
        return Spawning(self._tracing.begin(name, trace.SpanKind.PRODUCER, attributes), self._meters)

    def emit(self, name: str, queue_name: str) -> Emission:
        """Begin the span of a client's emit."""
        attributes = {"durable.event": name, "durable.queue": queue_name}
        return Emission(self._tracing.begin("emit", trace.SpanKind.PRODUCER, attributes), self._meters, queue_name)

    def call(self, kind: str, name: str | None, claimed: ClaimedRun, **more: Any) -> Scope:
        """Return the span of a durable call of a task, which ends with the call or with the suspension of its run.

        The span is named after the kind and the call. Pass no name if it may be composed at run time.
        """
        attributes = {**_attributes(claimed), "durable.step.name": name}
        attributes |= {f"durable.{key}": None if value is None else str(value) for key, value in more.items()}
        return self._tracing.scope(
            kind if name is None else f"{kind} {name}", trace.SpanKind.INTERNAL, _present(attributes)
        )

    async def execute(
        self,
        claimed: ClaimedRun,
        wakers: str | None,
        signal: Callable[[], ControlFlow | None],
        start: Callable[[], Awaitable[T]],
    ) -> T:
        """Execute user code in the span of its run.

        The span is below the one that spawned the task, and has links to `wakers`, the encoded trace contexts of what
        has woken the task. After an error, `signal` returns the signal that has ended the run, if one has.
        """
        scope = self._tracing.scope(
            f"execute {claimed.task_name}",
            trace.SpanKind.CONSUMER,
            _attributes(claimed),
            parent=lambda: context_of(claimed.headers),
            links=lambda: links_to(wakers),
        )
        began = time.perf_counter()
        outcome = "completed"
        try:
            with scope:
                try:
                    return await start()
                except BaseException as error:
                    outcome = _outcome(signal(), error)
                    raise
                finally:
                    scope.set("durable.outcome", outcome)
        finally:
            self._record_execution(claimed, outcome, time.perf_counter() - began)

    @harmless
    def _record_execution(self, claimed: ClaimedRun, outcome: str, seconds: float) -> None:
        labels = self._meters.labels(claimed.queue_name, claimed.task_name)
        self._meters.executions.record(seconds, {**labels, "outcome": outcome})

    @harmless
    def claimed(self, queue_names: Sequence[str], claimed: Sequence[ClaimedRun], seconds: float) -> None:
        """Record a claim. A claim that returned no tasks has no span."""
        self._meters.claims.record(seconds, self._meters.queue(queue_names[0] if len(queue_names) == 1 else None))
        for item in claimed:
            self._meters.claimed.add(1, self._meters.labels(item.queue_name, item.task_name))
        if claimed:
            attributes = {"durable.queue": ", ".join(queue_names), "durable.claimed": len(claimed)}
            self._tracing.past("claim", attributes, seconds)

    @harmless
    def checkpointed(self, claimed: ClaimedRun, seconds: float) -> None:
        """Record the commit of a checkpoint."""
        self._meters.checkpoints.record(seconds, self._meters.labels(claimed.queue_name, claimed.task_name))

    @harmless
    def ended(self, queue_name: str, task_name: str, outcome: str) -> None:
        """Record the commit of a run's outcome. `completed` and `failed` are final for the task, and are counted."""
        counter = {"completed": self._meters.completed, "failed": self._meters.failed}.get(outcome)
        if counter is not None:
            counter.add(1, self._meters.labels(queue_name, task_name))

    @harmless
    def emitted(self, queue_name: str) -> None:
        """Count an event that a task was the first to emit."""
        self._meters.emitted.add(1, self._meters.queue(queue_name))

    def watch(self, worker: WatchedWorker) -> None:
        """Show a worker in the gauges, until :meth:`forget`."""
        self._meters.workers.add(worker)

    def forget(self, worker: WatchedWorker) -> None:
        """Remove a worker that has ended from the gauges."""
        self._meters.workers.discard(worker)

    @harmless
    def metadata(self) -> str | None:
        """Return the metadata of an event that the calling code emits."""
        return encoded(carried())


@functools.cache
def shared() -> Telemetry:
    """Return the telemetry on the global providers, for all clients of the process without one of their own."""
    return Telemetry()


def _present(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if value is not None}


def _attributes(claimed: ClaimedRun) -> dict[str, Any]:
    return {
        "durable.task.id": str(claimed.task_id),
        "durable.task.name": claimed.task_name,
        "durable.run.id": str(claimed.run_id),
        "durable.attempt": claimed.attempt,
        "durable.queue": claimed.queue_name,
    }


def _outcome(signal: ControlFlow | None, error: BaseException) -> str:
    """Return the outcome of an execution that has raised `error`."""
    found = error if isinstance(error, ControlFlow) else signal
    match found:
        case None:
            return "failed"
        case TaskCancelled():
            return "cancelled"
        case LeaseLost():
            return "lost"
        case _:
            return "suspended"
