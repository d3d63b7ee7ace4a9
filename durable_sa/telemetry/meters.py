"""The metrics, with a limit on their series: one for each known queue and task, and one for all others."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from opentelemetry.metrics import CallbackOptions, Meter, Observation

MAX_QUEUES: Final = 100
"""The first so many queues have series of their own."""
OTHER: Final = "other"
"""The label of all further queues, and of tasks that are not registered."""

Labels = dict[str, str]


class WatchedWorker(Protocol):
    """A worker, as the gauges see it. They may be read in any thread."""

    @property
    def queue_names(self) -> Iterable[str]:
        """The queues that it serves."""
        ...

    @property
    def queue_samples(self) -> Mapping[str, tuple[float, float]]:
        """For each queue, the number of ready tasks at the last count, and the age of the oldest in seconds."""
        ...

    @property
    def limit_keys(self) -> Mapping[tuple[str, str], int]:
        """The number of limit keys of each queue and state at the last count."""
        ...

    def running_in(self) -> Iterable[str]:
        """Return the queue of each run in progress."""
        ...


class Meters:
    """The instruments of one meter."""

    def __init__(self, meter: Meter) -> None:
        self._queues: set[str] = set()
        self.workers: weakref.WeakSet[WatchedWorker] = weakref.WeakSet()
        """The workers that the gauges show."""
        self.spawned = meter.create_counter("durable_tasks_spawned_total", description="Tasks spawned")
        self.claimed = meter.create_counter("durable_tasks_claimed_total", description="Runs claimed by workers")
        self.completed = meter.create_counter("durable_tasks_completed_total", description="Tasks completed")
        self.failed = meter.create_counter("durable_tasks_failed_total", description="Tasks that failed for good")
        self.emitted = meter.create_counter("durable_events_emitted_total", description="Events emitted")
        self.executions = meter.create_histogram(
            "durable_task_execution_duration_seconds", "s", "From the start of a run to its end or suspension"
        )
        self.claims = meter.create_histogram("durable_task_claim_duration_seconds", "s", "One claim, of many tasks")
        self.checkpoints = meter.create_histogram(
            "durable_checkpoint_duration_seconds", "s", "From a step's result to its commit"
        )
        meter.create_observable_gauge(
            "durable_worker_concurrent_tasks",
            [self._gauge(lambda worker: worker.running_in())],
            description="Runs in progress here",
        )
        meter.create_observable_gauge(
            "durable_worker_active",
            [self._gauge(lambda worker: worker.queue_names)],
            description="Workers of this process",
        )
        meter.create_observable_gauge(
            "durable_queue_depth", [self._sample(0)], description="Tasks that could be claimed, as last counted"
        )
        meter.create_observable_gauge(
            "durable_queue_oldest_ready_age_seconds",
            [self._sample(1)],
            "s",
            "For how long the oldest of these could have been claimed",
        )
        meter.create_observable_gauge(
            "durable_limit_keys",
            [self._limit_keys],
            description="Limit keys that are open, full, throttled or closed, as last counted",
        )

    def labels(self, queue_name: str | None, task_name: str | None = None) -> Labels:
        """Return the labels of a queue and a task; None stands for one that is not known."""
        return {"queue": self._known(queue_name), "task_name": task_name or OTHER}

    def queue(self, queue_name: str | None) -> Labels:
        """Return the label of a queue."""
        return {"queue": self._known(queue_name)}

    def _known(self, name: str | None) -> str:
        if name is None:
            return OTHER
        if name not in self._queues:
            if len(self._queues) >= MAX_QUEUES:
                return OTHER
            self._queues.add(name)
        return name

    def _gauge(
        self, count: Callable[[WatchedWorker], Iterable[str]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Return a callback that counts, for each queue, how often `count` names it. Each queue served is shown."""

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            totals: Counter[str] = Counter()
            for worker in list(self.workers):
                for queue_name in worker.queue_names:
                    totals[self._known(queue_name)] += 0
                totals.update(map(self._known, count(worker)))
            return [Observation(total, {"queue": queue}) for queue, total in totals.items()]

        return observe

    def _sample(self, position: int) -> Callable[[CallbackOptions], Iterable[Observation]]:
        """Return a callback that shows, for each queue, the number at `position` of its last sample."""

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            latest = {name: sample for worker in list(self.workers) for name, sample in worker.queue_samples.items()}
            folded: dict[str, float] = {}
            for name, sample in latest.items():
                queue = self._known(name)
                value = sample[position]
                folded[queue] = value if queue not in folded else _fold(position, folded[queue], value)
            return [Observation(value, {"queue": queue}) for queue, value in folded.items()]

        return observe

    def _limit_keys(self, _: CallbackOptions) -> Iterable[Observation]:
        """Show the number of limit keys in each state. Workers of the same queue count the same keys."""
        latest = {item: number for worker in list(self.workers) for item, number in worker.limit_keys.items()}
        totals: Counter[tuple[str, str]] = Counter()
        for (queue_name, state), number in latest.items():
            totals[self._known(queue_name), state] += number
        return [Observation(number, {"queue": queue, "state": state}) for (queue, state), number in totals.items()]


def _fold(position: int, one: float, another: float) -> float:
    """Add numbers of tasks; of ages, take the greater."""
    return one + another if position == 0 else max(one, another)
