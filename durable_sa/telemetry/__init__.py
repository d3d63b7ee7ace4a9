"""Spans and metrics through OpenTelemetry's API, which the `telemetry` extra brings.

An application that sets up OpenTelemetry's global providers needs nothing else; one that keeps providers of its own
gives them:

```python
from opentelemetry.sdk.trace import TracerProvider

from durable_sa import Durable
from durable_sa.telemetry import Telemetry

durable = Durable(telemetry=Telemetry(tracer_provider=TracerProvider()))
```

What goes wrong in here is logged once and never reaches a task. Names and ids are all that spans and metrics show:
params, results, payloads, headers and the messages of errors stay in the database.
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
from .meters import Meters
from .operations import Emission, Spawning
from .propagation import OTEL_CONTEXT, carried, context_of, encoded, links_to
from .spans import Scope, Tracing, harmless

if TYPE_CHECKING:
    from ..execution.run import Run
    from ..statements.claiming import ClaimedRun
    from ..worker.worker import Worker

__all__ = ["OTEL_CONTEXT", "Telemetry", "shared"]

T = TypeVar("T")

NAME = "durable_sa"


class Telemetry:
    """Where spans and metrics go: the providers given, else OpenTelemetry's global ones. Clients may share it."""

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracing = Tracing(trace.get_tracer(NAME, tracer_provider=tracer_provider))
        self._meters = Meters(metrics.get_meter(NAME, meter_provider=meter_provider))

    def spawn(self, task_name: str | None = None, queue_name: str | None = None) -> Spawning:
        """A spawn begins, of one task or, without a name, of many."""
        attributes = _present({"durable.task.name": task_name, "durable.queue": queue_name})
        name = "spawn" if task_name is None else f"spawn {task_name}"
        return Spawning(self._tracing.begin(name, trace.SpanKind.PRODUCER, attributes), self._meters)

    def emit(self, name: str, queue_name: str) -> Emission:
        """An event is about to be emitted by a client."""
        attributes = {"durable.event": name, "durable.queue": queue_name}
        return Emission(self._tracing.begin("emit", trace.SpanKind.PRODUCER, attributes), self._meters, queue_name)

    def call(self, kind: str, name: str | None, claimed: ClaimedRun, **more: Any) -> Scope:
        """A durable call of a task, from its beginning to its end or to the suspension of its run.

        The name of the span is that of the kind and the call; where the latter is made up at run time it is left out.
        """
        attributes = {**_attributes(claimed), "durable.step.name": name}
        attributes |= {f"durable.{key}": None if value is None else str(value) for key, value in more.items()}
        return self._tracing.scope(
            kind if name is None else f"{kind} {name}", trace.SpanKind.INTERNAL, _present(attributes)
        )

    async def execute(self, run: Run, start: Callable[[], Awaitable[T]]) -> T:
        """Execute user code in the span of its run, below the span that spawned the task, linked to what woke it."""
        claimed = run.claimed
        scope = self._tracing.scope(
            f"execute {claimed.task_name}",
            trace.SpanKind.CONSUMER,
            _attributes(claimed),
            parent=lambda: context_of(claimed.headers),
            links=lambda: links_to(run.wakers),
        )
        began = time.perf_counter()
        outcome = "completed"
        try:
            with scope:
                try:
                    return await start()
                except BaseException as error:
                    outcome = _outcome(run.signal, error)
                    raise
                finally:
                    scope.set("durable.outcome", outcome)
        finally:
            self._executed(claimed, outcome, time.perf_counter() - began)

    @harmless
    def _executed(self, claimed: ClaimedRun, outcome: str, seconds: float) -> None:
        labels = self._meters.labels(claimed.queue_name, claimed.task_name)
        self._meters.executions.record(seconds, {**labels, "outcome": outcome})

    @harmless
    def claimed(self, queue_names: Sequence[str], claimed: Sequence[ClaimedRun], seconds: float) -> None:
        """A worker has asked for tasks. Only a claim that has brought some has a span."""
        self._meters.claims.record(seconds, self._meters.queue(queue_names[0] if len(queue_names) == 1 else None))
        for item in claimed:
            self._meters.claimed.add(1, self._meters.labels(item.queue_name, item.task_name))
        if claimed:
            attributes = {"durable.queue": ", ".join(queue_names), "durable.claimed": len(claimed)}
            self._tracing.past("claim", attributes, seconds)

    @harmless
    def checkpointed(self, claimed: ClaimedRun, seconds: float) -> None:
        """A checkpoint is committed."""
        self._meters.checkpoints.record(seconds, self._meters.labels(claimed.queue_name, claimed.task_name))

    @harmless
    def ended(self, queue_name: str, task_name: str, outcome: str) -> None:
        """A run's outcome is committed; `completed` and `failed` are the task's, for good."""
        counter = {"completed": self._meters.completed, "failed": self._meters.failed}.get(outcome)
        if counter is not None:
            counter.add(1, self._meters.labels(queue_name, task_name))

    @harmless
    def emitted(self, queue_name: str) -> None:
        """A task was the first to emit an event."""
        self._meters.emitted.add(1, self._meters.queue(queue_name))

    def watch(self, worker: Worker) -> None:
        """Show a worker in the gauges, until :meth:`forget`."""
        self._meters.workers.add(worker)

    def forget(self, worker: Worker) -> None:
        """The worker has ended."""
        self._meters.workers.discard(worker)

    @harmless
    def metadata(self) -> str | None:
        """The metadata of an event that is emitted by the calling code."""
        return encoded(carried())


@functools.cache
def shared() -> Telemetry:
    """The one on the global providers, for all clients of the process that are given none."""
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
    """What became of an execution that did not complete."""
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
