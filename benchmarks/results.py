"""The samples of a run by workload, variant, system and metric, with the facts about machine, server and systems."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

FORMAT: Final = 1


class Metric(NamedTuple):
    """The unit of a metric, and True if a larger value is better."""

    unit: str
    more_is_better: bool

    def gain(self, old: float, new: float) -> float:
        """Return how many times as good the new value is."""
        return new / old if self.more_is_better else old / new


METRICS: Final = {
    "throughput": Metric("/s", more_is_better=True),
    "wal": Metric("bytes WAL per task", more_is_better=False),
    "dead": Metric("dead tuples per task", more_is_better=False),
    "hot": Metric("% of updates heap-only", more_is_better=True),
    "start p50": Metric("ms", more_is_better=False),
    "start p99": Metric("ms", more_is_better=False),
    "result p50": Metric("ms", more_is_better=False),
    "result p99": Metric("ms", more_is_better=False),
    "round trip p50": Metric("ms", more_is_better=False),
    "round trip p99": Metric("ms", more_is_better=False),
    "delay p50": Metric("ms", more_is_better=False),
    "delay p99": Metric("ms", more_is_better=False),
    "megabytes": Metric("MB/s", more_is_better=True),
    "statements": Metric("statements/s", more_is_better=False),
    "memory": Metric("KB per task", more_is_better=False),
    "claim p50": Metric("ms", more_is_better=False),
    "claim p99": Metric("ms", more_is_better=False),
    "last tenth over first": Metric("", more_is_better=True),
    "over none": Metric("", more_is_better=True),
    "rate": Metric("spawns/s", more_is_better=True),
    "database growth": Metric("KB per task", more_is_better=False),
    "resident growth": Metric("MB", more_is_better=False),
    "connections": Metric("", more_is_better=False),
    "cpu": Metric("ms CPU per task", more_is_better=False),
}


@dataclass
class Measurement:
    """The samples of one metric of one system in one variant of a workload."""

    workload: str
    variant: str
    system: str
    metric: str
    samples: list[float] = field(default_factory=list)
    tasks: int = 0
    """Tasks in each run."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the range of the samples, relative to the median."""
        return (max(self.samples) - min(self.samples)) / 2 / self.median if self.median else 0.0


@dataclass
class Failure:
    """A run without figures."""

    workload: str
    variant: str
    system: str
    round: int
    error: str


@dataclass
class Results:
    """The content of a results.json."""

    profile: str
    machine: dict[str, Any]
    server: dict[str, Any]
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    series: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: float = 0.0
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Earlier runs on the same machine whose workloads are included: start, commit, seconds and workloads of each."""

    def add(self, workload: str, variant: str, system: str, figures: dict[str, float], tasks: int) -> None:
        """Add the figures of a run."""
        for metric, value in figures.items():
            found = self.find(workload, variant, system, metric)
            if found is None:
                found = Measurement(workload, variant, system, metric, tasks=tasks)
                self.measurements.append(found)
            found.samples.append(value)

    def find(self, workload: str, variant: str, system: str, metric: str = "throughput") -> Measurement | None:
        for each in self.measurements:
            if (each.workload, each.variant, each.system, each.metric) == (workload, variant, system, metric):
                return each
        return None

    def value(self, workload: str, variant: str, system: str, metric: str = "throughput") -> float | None:
        """Return a median, or None if it was not measured."""
        found = self.find(workload, variant, system, metric)
        return None if found is None else found.median

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the workload, variant and metric of each row, in the order they were measured."""
        return list(dict.fromkeys((each.workload, each.variant, each.metric) for each in self.measurements))

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(each.workload for each in self.measurements))

    def after(self, before: Results) -> Results:
        """Return these results, completed with the workloads that only an earlier run measured.

        Raises:
            ValueError: the earlier run had another profile or another machine.
        """
        for fact in ("processor", "cores", "memory_gib"):
            if before.machine[fact] != self.machine[fact]:
                raise ValueError(f"the earlier run had another machine: {fact} was {before.machine[fact]}")
        if before.profile != self.profile:
            raise ValueError(f"the earlier run had the profile {before.profile}")
        missing = set(before.workloads) - set(self.workloads)
        parts = [
            {**part, "workloads": [name for name in part["workloads"] if name in missing]} for part in before.parts
        ]
        return replace(
            self,
            systems={**before.systems, **self.systems},
            measurements=[each for each in before.measurements if each.workload in missing] + self.measurements,
            failures=[each for each in before.failures if each.workload in missing] + self.failures,
            series={**before.series, **self.series},
            earlier=[part for part in parts if part["workloads"]],
        )

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The runs that the results come from, the latest last."""
        others = {name for part in self.earlier for name in part["workloads"]}
        own = [name for name in self.workloads if name not in others]
        about = {"started": self.machine["started"], "commit": self.machine["commit"], "seconds": self.seconds}
        return [*self.earlier, {**about, "workloads": own}]

    def save(self, path: Path) -> None:
        data = {"format": FORMAT, **asdict(self)}
        for each, measurement in zip(data["measurements"], self.measurements, strict=True):
            each["median"], each["spread"] = measurement.median, measurement.spread
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results.json.

        Raises:
            ValueError: the file has another format.
        """
        data = json.loads(path.read_text())
        if data.pop("format") != FORMAT:
            raise ValueError(f"{path} is not of format {FORMAT}")
        measurements = [
            Measurement(**{key: value for key, value in each.items() if key not in ("median", "spread")})
            for each in data.pop("measurements")
        ]
        failures = [Failure(**each) for each in data.pop("failures")]
        return cls(**data, measurements=measurements, failures=failures)


def percentile(values: list[float], share: float) -> float:
    """Return the value that a `share` (0 to 1) of all values lies below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
