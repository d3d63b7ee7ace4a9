"""What is to be reached, as ratios within one run, and whether it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from .catalogue import REFERENCE, SYSTEMS
from .results import Results

PEERS: Final = ("absurd", "dbos", "procrastinate", "pgqueuer")


@dataclass(frozen=True)
class Target:
    """A ratio that must not be smaller."""

    name: str
    least: float
    ratio: Callable[[Results], float | None]
    """None where the run did not have what it takes."""


@dataclass(frozen=True)
class Verdict:
    """A target, and what was reached."""

    target: Target
    ratio: float | None

    @property
    def reached(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= self.target.least


def verdicts(results: Results) -> Iterator[Verdict]:
    for target in TARGETS:
        yield Verdict(target, target.ratio(results))


def _over(workload: str, variant: str, peer: str, metric: str = "throughput") -> Callable[[Results], float | None]:
    """durable_sa's figure over a peer's."""

    def ratio(results: Results) -> float | None:
        own, other = (results.value(workload, variant, name, metric) for name in (REFERENCE, peer))
        return None if own is None or not other else own / other

    return ratio


def _over_best(workload: str, variant: str) -> Callable[[Results], float | None]:
    """durable_sa's figure over the best peer's."""

    def ratio(results: Results) -> float | None:
        own = results.value(workload, variant, REFERENCE)
        others = [value for peer in PEERS if (value := results.value(workload, variant, peer)) is not None]
        return None if own is None or not others else own / max(others)

    return ratio


def _below_all(metric: str) -> Callable[[Results], float | None]:
    """The lowest latency of the peers over durable_sa's lowest, each at the better of its settings."""

    def ratio(results: Results) -> float | None:
        own, others = _lowest(results, REFERENCE, metric), [_lowest(results, peer, metric) for peer in PEERS]
        return None if own is None else min((other / own for other in others if other is not None), default=None)

    return ratio


def _lowest(results: Results, system: str, metric: str) -> float | None:
    values = [results.value("latency", variant, system, metric) for variant in ("default settings", "best settings")]
    return min((value for value in values if value is not None), default=None)


def _levels(results: Results) -> float | None:
    variants = list(dict.fromkeys(each.variant for each in results.measurements if each.workload == "growth"))
    values = [results.value("growth", variant, REFERENCE) for variant in variants]
    return None if len(values) < 2 or not values[0] or values[-1] is None else values[-1] / values[0]


def _snapshot(results: Results) -> float | None:
    return results.value("snapshot", "held while draining", REFERENCE, "last tenth over first")


def _idle(results: Results) -> float | None:
    value = results.value("idle", "1 worker", REFERENCE, "statements")
    return None if value is None else 1 / max(value, 1e-9)


def _wake_up(results: Results) -> float | None:
    value = results.value("latency", "default settings", REFERENCE, "start p99")
    return None if value is None else 10 / value


def _listening(spawners: int) -> Callable[[Results], float | None]:
    return lambda results: results.value("listener", f"in a transaction, {spawners} at once", REFERENCE, "over none")


def _steps(workflows: int, peer: str) -> Callable[[Results], float | None]:
    """In the largest variant that was run with so many workflows."""

    def ratio(results: Results) -> float | None:
        start = f"{workflows} workflow"
        variants = [
            each.variant
            for each in results.measurements
            if each.workload == "steps" and each.variant.startswith(start) and each.variant.endswith("best settings")
        ]
        return _over("steps", variants[-1], peer)(results) if variants else None

    return ratio


def _title(peer: str) -> str:
    return SYSTEMS[peer].title


TARGETS: Final = (
    *(
        Target(f"drain, one process, best settings, over {_title(peer)}", least, _over("drain", "best settings", peer))
        for peer, least in (("pgqueuer", 1.2), ("absurd", 12.0), ("dbos", 15.0), ("raw", 0.4))
    ),
    Target("drain, default settings, over absurd", 8.0, _over("drain", "default settings", "absurd")),
    Target("steps, 100 workflows, over absurd", 12.0, _steps(100, "absurd")),
    Target("steps, 100 workflows, over dbos", 35.0, _steps(100, "dbos")),
    Target("steps, one workflow, over absurd", 1.5, _steps(1, "absurd")),
    Target("steps, one workflow, over dbos", 5.0, _steps(1, "dbos")),
    Target("spawn to result, p50: lowest peer over ours", 1.0, _below_all("result p50")),
    Target("spawn to result, p99: lowest peer over ours", 1.0, _below_all("result p99")),
    *(
        Target(f"spawn {variant}, over the best peer", 1.0, _over_best("spawn", variant))
        for variant in ("one by one, 1 at once", "one by one, 8 at once", "one by one, 32 at once", "in bulk")
    ),
    Target("drain beside the most rows, over empty tables", 0.9, _levels),
    Target("last tenth over first tenth under a held snapshot", 0.8, _snapshot),
    Target("idle worker: one statement a second, over ours", 1.0, _idle),
    Target("wake-up: 10 ms over our p99 from spawn to start", 1.0, _wake_up),
    Target("spawn in transactions, 8 at once, worker listening over none", 0.9, _listening(8)),
    Target("spawn in transactions, 32 at once, worker listening over none", 0.9, _listening(32)),
)
